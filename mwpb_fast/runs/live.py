"""The live view of progress on a terminal: a bar, and a line below it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mwpb_fast.system.optional import attempt


def live_bar(label: str, total: int, done: int) -> Any:
    """A bar on standard error, begun: show(n, text, status, left) moves it on and says something beside it, below
    it and at its end; stop() takes it away. None where rich cannot be used."""
    if attempt("rich.console", "rich.progress", "rich.text").module is None:
        return None
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.text import Text

    class Live(Progress):
        status = ""

        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            if self.status:
                yield Text(self.status, no_wrap=True, overflow="ellipsis")

        def show(self, n: int, text: str, status: str, left: str) -> None:
            self.status = status or self.status
            self.update(self.task_ids[0], advance=n, note=text.strip(), left=left)

    bar = Live(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TextColumn("{task.fields[note]}", markup=False),
        TextColumn("{task.fields[left]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    )
    bar.start()
    bar.add_task(label, total=total, completed=done, note="", left="")
    return bar
