"""Reads from a module's own code how the output of a fused matrix is divided.

The layout of a fused matrix in a user's own attention is in no table, and its shape does not say whether queries, keys
and values lie one after the other or head by head. What is done first with its output does.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Literal

from torch import nn

# One part after the other, all of one size or of sizes of their own; "" where the code does not say so.
Division = Literal["equal", "sizes", ""]

_KEEPS_SHAPE = {"contiguous", "float", "to", "type_as", "clone"}


def division_of(module: nn.Module, name: str, count: int) -> Division:
    """How the output of a matrix is divided along its features into `count` parts, of which the values are the last.

    Args:
        module: The module that holds the matrix.
        name: Its name there, that of a linear layer or of a parameter.
        count: 3 for queries, keys and values; 2 for keys and values.

    Returns:
        The division; empty also where the code cannot be read, or does it in a way that is not known.
    """
    mro = type(module).__mro__
    for cls in mro[: mro.index(nn.Module)]:
        code = _code_of(cls)
        found = set() if code is None else set(code.divisions(name, count))
        if found:
            return found.pop() if len(found) == 1 else ""
    return ""


class _Code:
    """The code of a class, with the parent of each node."""

    def __init__(self, tree: ast.AST) -> None:
        self._nodes = list(ast.walk(tree))
        self._parents = {child: node for node in self._nodes for child in ast.iter_child_nodes(node)}

    def divisions(self, name: str, count: int) -> Iterator[Division]:
        """How each output of `self.name` is divided."""
        for node in self._nodes:
            if isinstance(node, ast.Call) and _multiplies(node, name):
                first = next(self._uses(node), None)
                yield "" if first is None else self._division(first, count)

    def _uses(self, output: ast.expr) -> Iterator[ast.Call]:
        """The calls that are made on `output`, or on the variable that it is assigned to, in their order."""
        parent = self._parents.get(output)
        call = self._parents.get(parent) if isinstance(parent, ast.Attribute) else parent
        if isinstance(call, ast.Call) and call is not output:
            yield from self._uses(call) if _method(call)[0] in _KEEPS_SHAPE else [call]
        elif isinstance(parent, ast.Assign) and isinstance(parent.targets[0], ast.Name):
            variable = parent.targets[0].id
            names = (node for node in self._nodes if isinstance(node, ast.Name) and node.id == variable)
            later = [use for use in names if isinstance(use.ctx, ast.Load) and use.lineno > parent.lineno]
            for use in sorted(later, key=lambda use: (use.lineno, use.col_offset)):
                yield from self._uses(use)

    def _division(self, call: ast.Call, count: int) -> Division:
        parent = self._parents.get(call)
        target = parent.targets[0] if isinstance(parent, ast.Assign) else None
        names = [each.id for each in target.elts if isinstance(each, ast.Name)] if isinstance(target, ast.Tuple) else []
        if names and not (len(names) == count and names[-1].lower().startswith("v")):
            return ""
        method, args = _method(call)
        if method == "split" and names and args:
            return "sizes" if isinstance(args[0], ast.Tuple | ast.List) else "equal"
        return "equal" if _divides_equally(call, count) else ""


@cache
def _code_of(kind: type) -> _Code | None:
    """The code of `kind`; None where it can't be read, as of a class made at run time."""
    try:
        return _Code(ast.parse(textwrap.dedent(inspect.getsource(kind))))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None


def _multiplies(call: ast.Call, name: str) -> bool:
    """Whether it is `self.name(x)`, or `linear` with `self.name.weight` or the parameter `self.name`."""
    if _is_own(call.func, name):
        return True
    if _method(call)[0] != "linear":
        return False
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    weights = [each.value if isinstance(each, ast.Attribute) and each.attr == "weight" else each for each in given]
    return any(_is_own(each, name) for each in weights)


def _is_own(node: ast.expr, name: str) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == name
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _divides_equally(call: ast.Call, count: int) -> bool:
    """Whether the call divides the last dimension into `count` equal parts, before it divides it any further."""
    method, args = _method(call)
    if method == "chunk":
        return bool(args) and _is(args[0], count)
    if method in {"reshape", "view"}:
        sizes = args[0].elts if len(args) == 1 and isinstance(args[0], ast.Tuple | ast.List) else args
        # [batch, tokens, 3, heads, width], with windows between, or [tokens, 3, heads, width]: before the heads.
        return len(sizes) in {4, 5, 6} and _is(sizes[len(sizes) - 3], count)
    if method == "unflatten":
        return len(args) == 2 and isinstance(args[1], ast.Tuple | ast.List) and _is(args[1].elts[0], count)
    return method == "rearrange" and _rearranges(call, count)


def _method(call: ast.Call) -> tuple[str, list[ast.expr]]:
    """The name and the arguments of a method, also where it is called as a function of torch or einops."""
    if not isinstance(call.func, ast.Attribute):
        return getattr(call.func, "id", ""), call.args[1:]
    is_function = isinstance(call.func.value, ast.Name) and call.func.value.id in {"torch", "einops"}
    return call.func.attr, call.args[1:] if is_function else call.args


def _rearranges(call: ast.Call, count: int) -> bool:
    """Whether an einops pattern takes the features apart with the parts outermost: "b n (three h d) -> ..."."""
    pattern = call.args[1].value if len(call.args) > 1 and isinstance(call.args[1], ast.Constant) else ""
    before = str(pattern).partition("->")[0].strip()
    group = before.rpartition("(")[2].removesuffix(")").split() if before.endswith(")") else []
    sizes = {keyword.arg: keyword.value for keyword in call.keywords}
    return bool(group) and (group[0] == str(count) or (group[0] in sizes and _is(sizes[group[0]], count)))


def _is(node: ast.expr, value: int) -> bool:
    return isinstance(node, ast.Constant) and node.value == value
