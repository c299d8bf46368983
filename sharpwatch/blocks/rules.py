"""A user's own block rules: ordered, from YAML or from code; the first rule that matches a parameter decides.

- match: "*.attn.sinks"            # glob on the name in model.named_parameters()
  block: other
- match: "*.attn.qkv.*"
  split:
    dim: 0                         # may count from the end: -1
    parts: [{block: qk, size: 128}, {block: vo, size: 64}]
    repeats: 4                     # that often in a row, once a head; 1 where it is left out
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sharpwatch.blocks.blockmap import BLOCKS
from sharpwatch.errors import BlockError, ConfigError


@dataclass(frozen=True, slots=True)
class Split:
    """Parts of a fused parameter, in order along `dim`: (block type, size); all of them `repeats` times in a row."""

    dim: int
    parts: tuple[tuple[str, int], ...]
    repeats: int = 1


@dataclass(frozen=True, slots=True)
class Rule:
    """Parameters whose name matches the glob `match` are `block`, or are divided as `split` says: one of the two."""

    match: str
    block: str | None = None
    split: Split | None = None

    def __post_init__(self) -> None:
        if (self.block is None) == (self.split is None):
            raise BlockError(f"rule {self.match!r}: give either block or split")
        named = [self.block] if self.split is None else [kind for kind, _ in self.split.parts]
        if not set(named) <= set(BLOCKS):
            raise BlockError(f"rule {self.match!r}: block {named} is not all of {', '.join(BLOCKS)}")


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules in order."""

    rules: tuple[Rule, ...] = ()


def load_rules(path: str | Path) -> Rules:
    """Read `path`; raises `ConfigError` with file, line, key and what is allowed."""
    file = str(path)
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"can't be read: {error.strerror}", file=file, line=0, key="rules") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8: {error.reason}", file=file, line=0, key="rules") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError(f"is not YAML: {error.problem}", file=file, line=line, key="rules") from error
    if root is None:
        raise ConfigError("is empty; expected a list of rules", file=file, line=1, key="rules")
    reader = _Reader(file)
    return Rules(tuple(reader.rule(node, key) for node, key in reader.items(root, "rules")))


@dataclass(frozen=True, slots=True)
class _Reader:
    """YAML nodes to values; keeps the nodes' lines for errors."""

    file: str

    def rule(self, node: yaml.Node, key: str) -> Rule:
        fields = self.fields(node, key, required={"match"}, optional={"block", "split"})
        if ("block" in fields) == ("split" in fields):
            raise self.error(node, key, "give either block or split")
        match = self.text(fields["match"], f"{key}.match")
        if "block" in fields:
            return Rule(match, block=self.block(fields["block"], f"{key}.block"))
        return Rule(match, split=self.split(fields["split"], f"{key}.split"))

    def split(self, node: yaml.Node, key: str) -> Split:
        fields = self.fields(node, key, required={"dim", "parts"}, optional={"repeats"})
        parts = self.items(fields["parts"], f"{key}.parts")
        if len(parts) < 2:
            raise self.error(fields["parts"], f"{key}.parts", "expected two parts or more")
        repeats = self.count(fields["repeats"], f"{key}.repeats") if "repeats" in fields else 1
        return Split(self.integer(fields["dim"], f"{key}.dim"), tuple(self.part(*part) for part in parts), repeats)

    def part(self, node: yaml.Node, key: str) -> tuple[str, int]:
        fields = self.fields(node, key, required={"block", "size"})
        return self.block(fields["block"], f"{key}.block"), self.count(fields["size"], f"{key}.size")

    def block(self, node: yaml.Node, key: str) -> str:
        name = self.text(node, key)
        if name not in BLOCKS:
            raise self.error(node, key, f"{name!r} is not a block type; allowed: {', '.join(BLOCKS)}")
        return name

    def text(self, node: yaml.Node, key: str) -> str:
        return str(self.scalar(node, key, "str", "a string", str))

    def count(self, node: yaml.Node, key: str) -> int:
        value = self.integer(node, key)
        if value < 1:
            raise self.error(node, key, f"{value}: expected an integer of 1 or more")
        return value

    def integer(self, node: yaml.Node, key: str) -> int:
        return int(self.scalar(node, key, "int", "an integer", lambda text: int(text, 0)))

    def scalar(self, node: yaml.Node, key: str, tag: str, expected: str, convert: Callable[[str], Any]) -> Any:
        if not isinstance(node, yaml.ScalarNode) or node.tag != f"tag:yaml.org,2002:{tag}" or not node.value:
            raise self.error(node, key, f"expected {expected}")
        try:
            return convert(node.value)
        except ValueError as error:
            raise self.error(node, key, f"expected {expected}") from error

    def items(self, node: yaml.Node, key: str) -> list[tuple[yaml.Node, str]]:
        if not isinstance(node, yaml.SequenceNode):
            raise self.error(node, key, "expected a list")
        return [(item, f"{key}[{index}]") for index, item in enumerate(node.value)]

    def fields(
        self, node: yaml.Node, key: str, *, required: set[str], optional: frozenset[str] | set[str] = frozenset()
    ) -> dict[str, yaml.Node]:
        allowed = ", ".join(sorted(required | optional))
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, key, f"expected a mapping with keys {allowed}")
        fields: dict[str, yaml.Node] = {}
        for name, value in node.value:
            if name.value not in required | optional:
                raise self.error(name, f"{key}.{name.value}", f"unknown key; allowed: {allowed}")
            if name.value in fields:
                raise self.error(name, f"{key}.{name.value}", "given twice")
            fields[name.value] = value
        for name in sorted(required - fields.keys()):
            raise self.error(node, f"{key}.{name}", f"is missing; allowed: {allowed}")
        return fields

    def error(self, node: yaml.Node, key: str, message: str) -> ConfigError:
        return ConfigError(message, file=self.file, line=node.start_mark.line + 1, key=key)
