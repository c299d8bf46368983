"""A model's module tree as the block rules read it: owners of a parameter, enclosing modules, layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter hangs: its own name in its owner, and the modules from the model down to the owner."""

    leaf: str
    path: tuple[tuple[str, nn.Module], ...]  # (segment, module); the model itself comes first, with segment ""

    @property
    def owner(self) -> nn.Module:
        """The module whose parameter it is."""
        return self.path[-1][1]

    @property
    def segment(self) -> str:
        """The owner's name in its parent; empty for the model itself."""
        return self.path[-1][0]

    @property
    def alone(self) -> bool:
        """Whether it is no weight or bias of the owner as a whole, but named for itself."""
        return self.leaf not in {"weight", "bias"}

    @property
    def name(self) -> str:
        """What names it: a weight or a bias is of its owner, and named as that is."""
        return self.leaf if self.alone else self.segment

    @property
    def above(self) -> tuple[tuple[str, nn.Module], ...]:
        """The modules that `name` is inside of."""
        return self.path if self.alone else self.path[:-1]


class Tree:
    """The parameters of a model, where each hangs (a shared one in several places), and their layers."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._places: dict[int, list[Place]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._places.setdefault(id(parameter), []).append(self._place(name))
        self._labels = _labels(dict(_trunks(model, "")))
        self._answers: dict[tuple[Callable[[nn.Module], bool], nn.Module], bool] = {}

    def places(self, parameter: nn.Parameter) -> list[Place]:
        """Everywhere `parameter` hangs; more than one place where it is shared."""
        return self._places[id(parameter)]

    def layer(self, name: str) -> str | None:
        """The layer's canonical name, "layers.3" or "encoder.layers.3"; None outside layers."""
        return next((label for prefix, label in self._labels.items() if name.startswith(prefix)), None)

    def layer_depth(self, place: Place) -> int:
        """How many modules of the path lead down to the layer, itself included; 0 where `place` is in no layer."""
        for depth in range(len(place.path) - 1, 0, -1):
            if "".join(segment + "." for segment, _ in place.path[1 : depth + 1]) in self._labels:
                return depth + 1
        return 0

    def ask(self, question: Callable[[nn.Module], bool], module: nn.Module) -> bool:
        """`question(module)`, a function of `structure`, worked out once for each module."""
        if (question, module) not in self._answers:
            self._answers[question, module] = question(module)
        return self._answers[question, module]

    def _place(self, name: str) -> Place:
        *segments, leaf = name.split(".")
        names = itertools.accumulate(segments, "{}.{}".format)
        path = ((segment, self._modules[inside]) for segment, inside in zip(segments, names, strict=True))
        return Place(leaf, (("", self._modules[""]), *path))


def _trunks(module: nn.Module, path: str) -> Iterator[tuple[str, list[str]]]:
    """The outermost lists of layers: path of the list, names of the layers in it."""
    layers = _layers_in(module)
    if layers:
        yield path, layers
        return
    for name, child in module.named_children():
        yield from _trunks(child, f"{path}{name}.")


def _layers_in(module: nn.Module) -> list[str]:
    """Names of the children that are layers: modules of several parts with parameters, in a list.

    A Sequential strings together anything, so there they must also be of one kind.
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
    """Canonical names by path prefix; several trunks are told apart by what their paths do not share."""
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
