"""Reads YAML files so that each error can name file, line, key and what is valid."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sharpwatch.errors import ConfigError

Location = tuple[str | int, ...]  # the keys and indices that lead from the root to a value


@dataclass(frozen=True, slots=True)
class YamlDocument:
    """A file's content as plain values, with the line of each.

    Attributes:
        file: The path, as error messages show it.
        data: Mappings, lists and scalars; None for an empty file. Dates are left as text.
        lines: Line numbers, from 1. A mapping's key and its value may stand on different lines: the value's counts.
        root: What the root is called in keys, as in `rules[0].match`; usually nothing.
    """

    file: str
    data: Any
    lines: Mapping[Location, int]
    root: str = ""

    def error(self, location: Location, message: str) -> ConfigError:
        """A `ConfigError` about the value at `location`.

        Args:
            location: Where the value is; a key that does not exist takes the line of what should hold it.
            message: What is wrong, and what is valid.
        """
        line = next(self.lines[location[:end]] for end in range(len(location), -1, -1) if location[:end] in self.lines)
        return ConfigError(message, file=self.file, line=line, key=key_of(location, self.root))

    def at(self, location: Location) -> Any:
        """The value at `location`; None where there is none."""
        value = self.data
        for step in location:
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                return None
        return value


def read_yaml(path: Path, root: str = "") -> YamlDocument:
    """Read a YAML file.

    Args:
        path: The file, UTF-8.
        root: What the root is called in the keys of errors.

    Raises:
        ConfigError: The file cannot be read, is not YAML, is nested too deeply or gives a key twice.
    """
    file = str(path)
    try:
        # Nodes, not `safe_load`: that forgets the lines, and keeps the last of two equal keys without a word.
        node: yaml.Node | None = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        lines: dict[Location, int] = {(): 1}
        document = YamlDocument(file, None, lines, root)
        data = None if node is None else _plain(node, (), document, lines)
    except OSError as error:
        raise ConfigError(f"can't be read: {error.strerror}", file=file, line=0, key=root) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8: {error.reason}", file=file, line=0, key=root) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError(f"is not YAML: {error.problem}", file=file, line=line, key=root) from error
    except RecursionError as error:
        # PyYAML recurses with the nesting of the file, and so does `_plain`.
        raise ConfigError("is nested too deep", file=file, line=0, key=root) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML: {error}", file=file, line=0, key=root) from error
    return YamlDocument(file, data, lines, root)


def key_of(location: Location, root: str = "") -> str:
    """`("policies", 0, "name")` as people write it: `policies[0].name`."""
    key = root
    for step in location:
        dot = "." if key else ""
        key += f"[{step}]" if isinstance(step, int) else f"{dot}{step}"
    return key


def nearest(word: str, allowed: Collection[str]) -> str:
    """`; did you mean ...?` where one of `allowed` is close to `word`, else nothing."""
    close = difflib.get_close_matches(word, sorted(allowed), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _plain(node: yaml.Node, location: Location, document: YamlDocument, lines: dict[Location, int]) -> Any:
    lines[location] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, location, document, lines)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*location, index), document, lines) for index, item in enumerate(node.value)]
    return _scalar(node)


def _mapping(
    node: yaml.MappingNode, location: Location, document: YamlDocument, lines: dict[Location, int]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in node.value:
        here = (*location, str(name.value))
        if name.value in values:
            # The line of the second one, which is the one to delete.
            lines[here] = name.start_mark.line + 1
            raise document.error(here, "given twice")
        values[str(name.value)] = _plain(value, here, document, lines)
    return values


def _scalar(node: yaml.Node) -> Any:
    """The value of a scalar. YAML's sexagesimal numbers (`1:30`) and dates stay text."""
    convert = _CONVERSIONS.get(node.tag)
    try:
        return str(node.value) if convert is None else convert(str(node.value))
    except ValueError:
        return str(node.value)


def _float(text: str) -> float:
    return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))


_CONVERSIONS: dict[str, Callable[[str], Any]] = {
    "tag:yaml.org,2002:int": lambda text: int(text.replace("_", ""), 0),
    "tag:yaml.org,2002:float": _float,
    "tag:yaml.org,2002:bool": lambda text: text.lower() in {"true", "yes", "on"},
    "tag:yaml.org,2002:null": lambda _: None,
}
