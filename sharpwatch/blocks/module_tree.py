"""The module tree of a model: where each parameter occurs in it, and in which layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from sharpwatch.errors import BlockError


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One occurrence of a parameter in the module tree.

    Attributes:
        leaf: Name of the parameter in its owner.
        path: (name, module) from the model, with name "", down to the owner.
        owner: The module whose parameter it is.
        name: The name that describes it: the owner's for a weight or bias, else its own.
        enclosing: The modules that enclose what `name` names, as in `path`.
        segment: The owner's name in its parent; "" for the model itself.
        is_named_itself: Whether it has a name of its own, rather than being the weight or bias of its owner.
        layer_depth: Number of modules in `path` down to and including the layer; 0 outside of layers.
    """

    leaf: str
    path: tuple[tuple[str, nn.Module], ...]
    owner: nn.Module
    name: str
    enclosing: tuple[tuple[str, nn.Module], ...]
    segment: str
    is_named_itself: bool
    layer_depth: int


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
        answers: What has been found out about its modules, by question and module.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise BlockError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        # With duplicates: a tied parameter's block follows from all places where it occurs.
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._labels = _labels(dict(_trunks(model, "")))
        self.layers = {name: self._layer(name) for name in self.parameters}
        self.occurrences: dict[int, list[Occurrence]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.occurrences.setdefault(id(parameter), []).append(self._occurrence(name))
        self.answers: dict[tuple[Callable[[nn.Module], bool], nn.Module], bool] = {}

    def _occurrence(self, name: str) -> Occurrence:
        *segments, leaf = name.split(".")
        names = itertools.accumulate(segments, "{}.{}".format)
        path = ((segment, self._modules[inside]) for segment, inside in zip(segments, names, strict=True))
        whole = (("", self._modules[""]), *path)
        segment, owner = whole[-1]
        named_itself = leaf not in {"weight", "bias"}
        return Occurrence(
            leaf,
            whole,
            owner,
            name=leaf if named_itself else segment,
            enclosing=whole if named_itself else whole[:-1],
            segment=segment,
            is_named_itself=named_itself,
            layer_depth=self._layer_depth(segments),
        )

    def _layer(self, name: str) -> str | None:
        return next((label for prefix, label in self._labels.items() if name.startswith(prefix)), None)

    def _layer_depth(self, segments: list[str]) -> int:
        depths = range(len(segments), 0, -1)
        return next((depth + 1 for depth in depths if ".".join(segments[:depth]) + "." in self._labels), 0)


def _trunks(module: nn.Module, path: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the outermost lists of layers: the path of the list, and the names of its layers."""
    layers = _layers_in(module)
    if layers:
        yield path, layers
        return
    for name, child in module.named_children():
        yield from _trunks(child, f"{path}{name}.")


def _layers_in(module: nn.Module) -> list[str]:
    """Names of the children that are layers: the modules with several parts, in a ModuleList.

    A Sequential can hold anything, so its layers must also be of one class.
    """
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return []
    layers = {name: child for name, child in module.named_children() if _is_compound(child)}
    if isinstance(module, nn.Sequential) and len({type(child) for child in layers.values()}) > 1:
        return []
    return list(layers)


def _is_compound(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())


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
