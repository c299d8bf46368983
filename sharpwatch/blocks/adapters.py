"""Adapters (LoRA and its kin) and other wrappers: the module tree as it would be without them.

PEFT replaces a module by one that holds it as `base_layer`, with the adapter's parameters beside it. An adapter's
parameter stands for the one that it adapts. Wrappers are recognized by what they hold, so PEFT need not be installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

Path = tuple[tuple[str, nn.Module], ...]  # (name, module) from the model, with name "", down to a module

_BASES = ("base_layer", "original_module")
_REPARAMETRIZED = re.compile(r"(weight|bias)_(g|v|orig)")  # torch's earlier weight norm, spectral norm and pruning
_LORA = re.compile(r"(^|_)lora_", re.IGNORECASE)
_BESIDE_MODEL = {"prompt_encoder", "internal_xlora_classifier"}  # PEFT's names of adapters that wrap no module


@dataclass(frozen=True, slots=True)
class Route:
    """Where a parameter is in the tree without wrappers.

    Attributes:
        path: The modules down to the one that owns it, or that owns the parameter it adapts.
        leaf: Its name there, or that of the parameter it adapts.
        adapter: Whether it belongs to an adapter.
        shape: The shape of the parameter that `leaf` names; of a quantized matrix that of the matrix it stands for.
    """

    path: Path
    leaf: str
    adapter: bool
    shape: tuple[int, ...]


def base_of(module: nn.Module) -> nn.Module | None:
    """The module that `module` wraps; None if it wraps none."""
    inside = module._modules  # noqa: SLF001 - without the attributes that wrappers pass through
    if not inside:
        return None  # as most modules are
    for name in _BASES:
        if inside.get(name) is not None:
            return inside[name]
    if inside.get("token_adapter") is not None:  # PEFT's trainable tokens, of which the base is a property
        return inside["token_adapter"]
    linear = inside.get("linear")
    if linear is not None and any(_LORA.search(name) for name in module._parameters):  # noqa: SLF001 - as above
        return linear  # as in litgpt
    return inside.get("model") if "adaption_prompt" in module._parameters else None  # noqa: SLF001 - as above


def unwrapped(module: nn.Module) -> nn.Module:
    """`module` without its wrappers."""
    while (base := base_of(module)) is not None:
        module = base
    return module


def bare_children(modules: Iterable[nn.Module]) -> dict[nn.Module, list[tuple[str, nn.Module]]]:
    """The children without their wrappers, with their names, of each of `modules` and of each module in them."""
    found: dict[nn.Module, list[tuple[str, nn.Module]]] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = [(name, unwrapped(child)) for name, child in module.named_children()]
            waiting += [child for _, child in found[module]]
    return found


def routes(model: nn.Module, names: Sequence[str]) -> list[Route]:
    """Follow the names of parameters through wrappers.

    Args:
        model: The model.
        names: Names in `model.named_parameters()`.

    Returns:
        Where each parameter is without wrappers; as far as the name leads, if a model names its parameters otherwise.
    """
    return [_route(model, name) for name in names]


def _route(model: nn.Module, name: str) -> Route:
    *segments, leaf = name.split(".")
    path, rest, adapts = _walk(model, segments)
    owner = path[-1][1]
    if adapts or base_of(owner) is not None:
        base = unwrapped(owner)
        whole = (*path[:-1], (path[-1][0], base))
        leaf = _adapted(owner, base)
        return Route(whole, leaf, adapter=True, shape=_shape(base, leaf))
    if rest[:1] == ["parametrizations"] and len(rest) > 1:
        return _parametrized(path, rest[1], adapter=not leaf.startswith("original"))
    own = _REPARAMETRIZED.fullmatch(leaf)
    if own is not None and ({f"{own[1]}_g", f"{own[1]}_v"} <= owner._parameters.keys() or own[2] == "orig"):  # noqa: SLF001 - as above
        return Route(path, own[1], adapter=False, shape=_shape(owner, f"{own[1]}_v", f"{own[1]}_orig"))
    if _LORA.search(leaf) and "weight" in owner._parameters:  # noqa: SLF001 - as above
        return Route(path, "weight", adapter=True, shape=_shape(owner, "weight"))
    return Route(path, leaf, adapter=not _BESIDE_MODEL.isdisjoint(name.split(".")), shape=_shape(owner, leaf))


def _walk(model: nn.Module, segments: Sequence[str]) -> tuple[Path, list[str], bool]:
    """Follow `segments` as far as they lead to modules of the model's own.

    Returns:
        The path, the segments that are left, and whether these lead into an adapter of the last module of the path.
    """
    path: list[tuple[str, nn.Module]] = [("", model)]
    rest = list(segments)
    while rest:
        name, module = path[-1]
        child = module._modules.get(rest[0])  # noqa: SLF001 - as above
        base = base_of(module)
        if child is None or rest[0] == "parametrizations":
            break
        if base is None:
            path.append((rest.pop(0), child))
        elif child is base:
            rest.pop(0)
            path[-1] = name, child
        elif rest[0] == "modules_to_save" and len(rest) > 1:  # trained copies of the module that is wrapped
            path[-1] = name, child.get_submodule(rest[1])
            del rest[:2]
        else:
            return tuple(path), rest, True
    return tuple(path), rest, False


def _adapted(wrapper: nn.Module, base: nn.Module) -> str:
    """The name of the parameter that is adapted: PEFT says which where it is not the weight."""
    own = [name for name, parameter in base._parameters.items() if parameter is not None]  # noqa: SLF001 - as above
    for name in (getattr(wrapper, "parameter_name", None), "weight", "in_proj_weight"):
        if name in own:
            return str(name)
    return own[0] if own else "weight"


def _parametrized(path: Path, leaf: str, *, adapter: bool) -> Route:
    """A parameter of torch.nn.utils.parametrize, from which `leaf` of the last module is computed."""
    originals = path[-1][1].get_submodule(f"parametrizations.{leaf}")
    return Route(path, leaf, adapter, _shape(originals, "original", "original1"))


def _shape(owner: nn.Module, *leaves: str) -> tuple[int, ...]:
    parameter = next((owner._parameters[leaf] for leaf in leaves if leaf in owner._parameters), None)  # noqa: SLF001
    size = getattr(owner, "out_features", None), getattr(owner, "in_features", None)
    packed = parameter is None or not (parameter.is_floating_point() or parameter.is_complex())
    if packed and leaves == ("weight",) and all(isinstance(each, int) for each in size):
        return size  # type: ignore[return-value]
    return () if parameter is None else tuple(parameter.shape)
