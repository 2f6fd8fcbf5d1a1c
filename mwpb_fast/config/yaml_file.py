"""YAML as its writer means it: a key once, and no word or number that silently becomes something else.

The scalars are those of YAML 1.2: `yes`, `on`, `010`, `1:30`, `1_000` and dates, which YAML 1.1 turns into truth
values, octal and sexagesimal numbers and days, stay the text that they are, for the option to accept or refuse.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mwpb_fast.config.schema import ConfigError

_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", "~nN"),
)


def read(path: Path) -> Any:
    """What a YAML file holds, in plain types. Raises ConfigError, one line that names the file and the line."""
    import yaml

    try:
        # whatever the locale; some editors begin with a byte order mark
        return _loader()(path.read_bytes().decode("utf-8-sig")).get_single_data()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        reason = " ".join(str(error.problem).split())
        meaning = isinstance(error, yaml.constructor.ConstructorError)  # YAML, but nothing that can be meant
        raise ConfigError(f"{path}{place}: {reason if meaning else f'not YAML ({reason})'}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "not text in UTF-8" if isinstance(error, UnicodeDecodeError) else " ".join(str(error).split())
        raise ConfigError(f"{path}: not YAML ({reason})") from error


def write(content: Any) -> bytes:
    """`content`, of plain types, as YAML that `read` and readers of YAML 1.1 take for the same."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes the texts that are something else in either version."""

    for tag, pattern, first in _SCALARS:
        Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"), [*first])
    return yaml.dump(content, Dumper=Dumper, sort_keys=False).encode()


def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # yaml's own name for them

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            line_of: dict[str, int] = {}
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    line = key.start_mark.line + 1
                    if key.value in line_of:
                        problem = f"{key.value} stands in line {line_of[key.value]} already; leave one of them"
                        raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                    line_of[key.value] = line
            return super().construct_mapping(node, deep)

    for tag, pattern, first in _SCALARS:
        starts = [*first, ""] if tag == "null" else [*first]
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"), starts)
    Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<\Z"), ["<"])
    return Loader
