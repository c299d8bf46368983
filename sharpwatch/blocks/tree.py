"""A model's module tree as the block rules need it: owners of parameters, enclosing modules, layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One occurrence of a parameter in the module tree.

    Attributes:
        leaf: Name of the parameter in its owner.
        path: (name, module) from the model, with name "", down to the owner.
    """

    leaf: str
    path: tuple[tuple[str, nn.Module], ...]

    @property
    def owner(self) -> nn.Module:
        """The module whose parameter it is."""
        return self.path[-1][1]

    @property
    def segment(self) -> str:
        """The owner's name in its parent; "" for the model itself."""
        return self.path[-1][0]

    @property
    def is_named_itself(self) -> bool:
        """Whether it has a name of its own, rather than being the weight or bias of its owner."""
        return self.leaf not in {"weight", "bias"}

    @property
    def name(self) -> str:
        """The name that describes it: the owner's for a weight or bias, else its own."""
        return self.leaf if self.is_named_itself else self.segment

    @property
    def enclosing(self) -> tuple[tuple[str, nn.Module], ...]:
        """The modules that enclose what `name` names."""
        return self.path if self.is_named_itself else self.path[:-1]


class Tree:
    """A model's parameters with their occurrences and layers; a shared parameter occurs several times."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._occurrences: dict[int, list[Occurrence]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._occurrences.setdefault(id(parameter), []).append(self._occurrence(name))
        self._labels = _labels(dict(_trunks(model, "")))
        self._cache: dict[tuple[Callable[[nn.Module], bool], nn.Module], bool] = {}

    def occurrences(self, parameter: nn.Parameter) -> list[Occurrence]:
        """All occurrences of `parameter`."""
        return self._occurrences[id(parameter)]

    def layer(self, name: str) -> str | None:
        """Canonical name of the parameter's layer, such as "layers.3" or "encoder.layers.3"; None outside of layers."""
        return next((label for prefix, label in self._labels.items() if name.startswith(prefix)), None)

    def layer_depth(self, place: Occurrence) -> int:
        """Number of modules in the path down to and including the layer; 0 outside of layers."""
        for depth in range(len(place.path) - 1, 0, -1):
            if "".join(segment + "." for segment, _ in place.path[1 : depth + 1]) in self._labels:
                return depth + 1
        return 0

    def cached(self, question: Callable[[nn.Module], bool], module: nn.Module) -> bool:
        """`question(module)` for a function of `structure`, computed once for each module."""
        if (question, module) not in self._cache:
            self._cache[question, module] = question(module)
        return self._cache[question, module]

    def _occurrence(self, name: str) -> Occurrence:
        *segments, leaf = name.split(".")
        names = itertools.accumulate(segments, "{}.{}".format)
        path = ((segment, self._modules[inside]) for segment, inside in zip(segments, names, strict=True))
        return Occurrence(leaf, (("", self._modules[""]), *path))


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
        trunk = ".".join([*own, segments[path][-1] if twins else "layers"])
        labels |= {f"{path}{layer}.": f"{trunk}.{layer}" for layer in layers}
    return labels
