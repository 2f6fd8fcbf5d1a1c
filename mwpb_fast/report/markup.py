"""HTML and SVG from calls, in which every text is escaped that was not made here."""

from __future__ import annotations

import html
import re
from typing import Any

VOID = ("meta", "link", "img", "br", "rect", "circle", "line", "path")
# Controls that HTML has no place for, and those that turn the order of what is read.
UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]"
)


class Markup(str):
    """Text that is HTML already."""


def text(value: Any) -> Markup:
    """A value as HTML: itself where it is Markup, else escaped, and what cannot be seen written out."""
    if isinstance(value, Markup):
        return value
    plain = str(value).encode("utf-8", "backslashreplace").decode()
    return Markup(html.escape(UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", plain)))


def join(*parts: Any) -> Markup:
    """Parts after one another; None is nothing, a list is its items."""
    flat = [join(*part) if isinstance(part, (list, tuple)) else text(part) for part in parts if part is not None]
    return Markup("".join(flat))


def element(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. attributes: class_ is class, aria_label is aria-label; None is left out."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID and not children:
        return Markup(f"<{name}{words}/>" if name in VOID[4:] else f"<{name}{words}>")
    return Markup(f"<{name}{words}>{join(*children)}</{name}>")


def table(
    header: list[Any], rows: list[list[Any]], caption: str, wide: bool = False, stack: bool = False
) -> Markup:
    """A table whose first column names its rows; where it is too wide it scrolls, by keyboard too. stack: on a
    phone each row is a block, a line a cell with its column's name."""
    head = element("tr", [element("th", cell, scope="col") for cell in header])
    names = [name if stack else None for name in header[1:]]
    body = [
        element("tr", element("th", row[0], scope="row"),
                [element("td", cell, data_column=name) for cell, name in zip(row[1:], names, strict=True)])
        for row in rows
    ]  # fmt: skip
    inner = element("table", element("thead", head), element("tbody", body))
    name = f"scroll{' wide' if wide else ''}{' stack' if stack else ''}"
    scroll = element("div", inner, class_=name, tabindex=0, role="region", aria_label=caption)
    return join(element("p", caption, class_="told"), scroll)


def details(summary: Any, *inside: Any) -> Markup:
    return element("details", element("summary", summary), *inside)
