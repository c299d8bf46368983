"""The module tree of a model: where each parameter occurs in it, and in which layer. Wrappers are left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from sharpwatch.blocks.adapters import Route, routes
from sharpwatch.blocks.module_kinds import Node, nodes_of
from sharpwatch.errors import BlockError


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One occurrence of a parameter in the module tree.

    Attributes:
        leaf: Name of the parameter in its owner.
        path: The modules from the model down to the owner.
        owner: The module whose parameter it is.
        name: The name that describes it: the owner's, or that of the list it is alone in, for a weight or bias, else
            its own.
        enclosing: The modules that enclose what `name` names, as in `path`.
        is_named_itself: Whether it has a name of its own, rather than being the weight or bias of its owner.
        layer_depth: Number of modules in `path` down to and including the layer; 0 outside of layers.
        shape: The parameter's shape.
        adapter: Whether the parameter belongs to an adapter. All else is then of the parameter that it adapts.
        index: Its place among all occurrences of parameters, in the order in which they are registered.
    """

    leaf: str
    path: tuple[Node, ...]
    owner: Node
    name: str
    enclosing: tuple[Node, ...]
    is_named_itself: bool
    layer_depth: int
    shape: tuple[int, ...]
    adapter: bool
    index: int


class Tree:
    """A model's parameters with their occurrences and layers; a shared parameter occurs several times.

    Args:
        model: The model.

    Raises:
        BlockError: It is no module.

    Attributes:
        parameters: The parameters by name.
        shapes: Their shapes.
        layers: Canonical names of their layers, such as "layers.3" or "encoder.layers.3"; None outside of layers.
        occurrences: All occurrences of each parameter, by its id.
        layers_span: The indices of the first and the last occurrence in a layer; (-1, -1) without layers.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise BlockError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        # One pass: PEFT's adapter of torch's attention makes new parameters in each.
        every = list(model.named_parameters(remove_duplicate=False))
        first = {id(parameter): name for name, parameter in reversed(every)}
        self.parameters = {name: parameter for name, parameter in every if first[id(parameter)] == name}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        found_at = routes(model, [name for name, _ in every])
        nodes = nodes_of(model, [at.path for at in found_at])
        self._labels = _labels(dict(_trunks(nodes["", model], "")))
        self.occurrences: dict[int, list[Occurrence]] = {}
        # With duplicates: a tied parameter's block follows from all places where it occurs.
        for index, ((_, parameter), at) in enumerate(zip(every, found_at, strict=True)):
            path = tuple(nodes[place] for place in at.path)
            self.occurrences.setdefault(id(parameter), []).append(self._occurrence(index, path, at, parameter))
        found = itertools.chain.from_iterable(self.occurrences.values())
        inside = [at.index for at in found if at.layer_depth] or [-1]
        self.layers_span = min(inside), max(inside)
        self.layers = {name: self._layer(self.occurrences[id(each)][0]) for name, each in self.parameters.items()}

    def _occurrence(self, index: int, path: tuple[Node, ...], found: Route, parameter: nn.Parameter) -> Occurrence:
        owner = path[-1]
        named_itself = found.leaf not in {"weight", "bias"}
        # The only part with parameters of a list is named by the list, as `to_out` of a matrix and its dropout.
        alone = not named_itself and _is_alone(path)
        return Occurrence(
            found.leaf,
            path,
            owner,
            name=found.leaf if named_itself else path[-2].name if alone else owner.name,
            enclosing=path if named_itself else path[: -2 if alone else -1],
            is_named_itself=named_itself,
            layer_depth=self._layer_depth(path),
            shape=found.shape or tuple(parameter.shape),
            adapter=found.adapter,
            index=index,
        )

    def _layer(self, at: Occurrence) -> str | None:
        return self._labels[_prefix(at.path[: at.layer_depth])] if at.layer_depth else None

    def _layer_depth(self, path: tuple[Node, ...]) -> int:
        prefix = ""
        for depth, node in enumerate(path[1:], start=2):
            prefix += f"{node.name}."
            if prefix in self._labels:
                return depth
        return 0


def _is_alone(path: tuple[Node, ...]) -> bool:
    """Whether the last module of `path` is the only one with parameters in a list of modules."""
    if len(path) < 3 or not isinstance(path[-2].module, nn.ModuleList | nn.Sequential):
        return False
    return sum(next(child.parameters(), None) is not None for child in path[-2].module.children()) == 1


def _prefix(path: tuple[Node, ...]) -> str:
    return "".join(f"{node.name}." for node in path[1:])


def _trunks(node: Node, path: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the outermost lists of layers: the path of the list, and the names of its layers."""
    layers = _layers_in(node)
    if layers:
        yield path, layers
        return
    for child in node.children:
        yield from _trunks(child, f"{path}{child.name}.")


def _layers_in(node: Node) -> list[str]:
    """Names of the children that are layers: the modules with several parts, in a ModuleList.

    A Sequential can hold anything, so its layers must also be of one class.
    """
    if not isinstance(node.module, nn.ModuleList | nn.Sequential):
        return []
    layers = [child for child in node.children if _is_compound(child)]
    if isinstance(node.module, nn.Sequential) and len({type(layer.module) for layer in layers}) > 1:
        return []
    return [layer.name for layer in layers]


def _is_compound(node: Node) -> bool:
    return any(next(child.module.parameters(), None) is not None for child in node.children)


def _labels(trunks: dict[str, list[str]]) -> dict[str, str]:
    """Canonical layer names by path prefix; several lists of layers are told apart by how their paths differ."""
    segments = {path: path.split(".")[:-1] for path in trunks}
    parents = {path: names[:-1] for path, names in segments.items()}
    alike = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parents.values(), strict=False))
    shared = len(list(alike))
    labels: dict[str, str] = {}
    for path, layers in trunks.items():
        own = parents[path][shared:]
        twins = sum(other == parents[path] for other in parents.values()) > 1
        # "h", "blocks" and "layers" are all called layers, so that models of different families can be compared.
        trunk = ".".join([*own, segments[path][-1] if twins else "layers"])
        labels |= {f"{path}{layer}.": f"{trunk}.{layer}" for layer in layers}
    return labels
