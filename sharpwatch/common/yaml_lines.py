"""YAML with its line numbers: nodes to values, each error with file, line, key and what is allowed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from sharpwatch.errors import ConfigError


def compose(path: Path) -> yaml.Node | None:
    """The root node of the file; None if it is empty. Raises `ConfigError` if it can't be read or isn't YAML."""
    file = str(path)
    try:
        root: yaml.Node | None = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"can't be read: {error.strerror}", file=file, line=0, key="") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8: {error.reason}", file=file, line=0, key="") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError(f"is not YAML: {error.problem}", file=file, line=line, key="") from error
    except RecursionError as error:
        raise ConfigError("is nested too deep", file=file, line=0, key="") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML: {error}", file=file, line=0, key="") from error
    return root


def nearest(word: str, allowed: Collection[str]) -> str:
    """`; did you mean ...?` where one of `allowed` is close to `word`, else nothing."""
    close = difflib.get_close_matches(word, sorted(allowed), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True, slots=True)
class Field:
    """A node, and where it stands: `key` is its path from the root, dotted."""

    file: str
    key: str
    node: yaml.Node

    def error(self, message: str) -> ConfigError:
        """`message` about this place."""
        return ConfigError(message, file=self.file, line=self.node.start_mark.line + 1, key=self.key)

    def mapping(self, allowed: Collection[str], required: Collection[str] = ()) -> dict[str, Field]:
        """The fields by name; refuses names that are unknown, missing or given twice."""
        known = ", ".join(allowed)
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error(f"expected a mapping with keys {known}")
        fields: dict[str, Field] = {}
        for name, value in self.node.value:
            word = str(name.value)
            at = Field(self.file, self._below(word), name)
            if word not in allowed or not isinstance(name, yaml.ScalarNode):
                raise at.error(f"unknown key; allowed: {known}{nearest(word, allowed)}")
            if word in fields:
                raise at.error("given twice")
            fields[word] = Field(self.file, self._below(word), value)
        for name in required:
            if name not in fields:
                raise self.error(f"{name} is missing; allowed: {known}")
        return fields

    def items(self) -> list[Field]:
        """The items of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.error("expected a list")
        return [Field(self.file, f"{self.key}[{index}]", node) for index, node in enumerate(self.node.value)]

    def text(self) -> str:
        """A string that isn't empty."""
        value = self._scalar("str", "a string")
        if not value:
            raise self.error("expected a string that is not empty")
        return value

    def choice(self, allowed: Collection[str]) -> str:
        """One of `allowed`."""
        said = self.node.value if isinstance(self.node, yaml.ScalarNode) else ""
        if said not in allowed:
            raise self.error(
                f"{said or 'this'!r} is not allowed; allowed: {', '.join(allowed)}{nearest(said, allowed)}"
            )
        return str(said)

    def boolean(self) -> bool:
        """True or false."""
        return self._scalar("bool", "true or false").lower() in {"true", "yes", "on"}

    def integer(self, low: int, high: int) -> int:
        """An integer within [low, high]."""
        expected = f"an integer from {low} to {high}"
        said = self._scalar("int", expected)
        try:
            value = int(said.replace("_", ""), 0)
        except ValueError as error:
            raise self.error(f"{said}: expected {expected}") from error
        if not low <= value <= high:
            raise self.error(f"{said}: expected {expected}")
        return value

    def number(self, low: float, high: float) -> float:
        """A finite number within (low, high]."""
        expected = f"a number above {low:g}, at most {high:g}"
        said = self._scalar(("float", "int"), expected)
        try:
            value = float(said.replace("_", ""))
        except ValueError as error:
            raise self.error(f"{said}: expected {expected}") from error
        if not math.isfinite(value) or not low < value <= high:
            raise self.error(f"{said}: expected {expected}")
        return value

    def seconds(self, low: float, high: float) -> float:
        """A duration: a number of seconds, or a number with one of the units s, m, h, d."""
        units: Mapping[str, float] = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
        expected = f"a duration from {low:g}s to {high:g}s: seconds, or a number with s, m, h or d, as in 5m"
        said = self._scalar(("float", "int", "str"), expected)
        number, unit = (said[:-1], said[-1]) if said[-1:] in units else (said, "s")
        try:
            value = float(number) * units[unit]
        except ValueError as error:
            raise self.error(f"{said}: expected {expected}") from error
        if not low <= value <= high:
            raise self.error(f"{said}: expected {expected}")
        return value

    def _scalar(self, tags: str | tuple[str, ...], expected: str) -> str:
        allowed = {f"tag:yaml.org,2002:{tag}" for tag in ([tags] if isinstance(tags, str) else tags)}
        if not isinstance(self.node, yaml.ScalarNode) or self.node.tag not in allowed:
            raise self.error(f"expected {expected}")
        return str(self.node.value)

    def _below(self, name: str) -> str:
        return f"{self.key}.{name}" if self.key else name
