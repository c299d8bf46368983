"""Which parameters are trained: sharpness is over these alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sharpwatch.blocks import BlockMap

_NAMES = 3  # parameters that a message names


def trained_parameters(model: nn.Module) -> frozenset[str]:
    """The names of the parameters of `model` that require a gradient."""
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


@dataclass(frozen=True, slots=True)
class TrainingChange:
    """How what is trained differs from what a block map has; false if it does not.

    Attributes:
        frozen: Parameters of the block map that are not trained now.
        unfrozen: Parameters that are trained, and not in the block map.
        resized: Parameters of other shapes than in the block map.
    """

    frozen: tuple[str, ...] = ()
    unfrozen: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, block_map: BlockMap) -> TrainingChange:
        """Compare what is trained of `model` with `block_map`."""
        known = block_map.shapes
        # In this order, as a stage of a pipeline has only some of the block map's parameters.
        changed = [
            (name, p.requires_grad) for name, p in model.named_parameters() if p.requires_grad != (name in known)
        ]
        return cls(
            frozen=tuple(name for name, trained in changed if not trained),
            unfrozen=tuple(name for name, trained in changed if trained),
            resized=tuple(name for name, p in model.named_parameters() if tuple(p.shape) != known.get(name, p.shape)),
        )

    def __bool__(self) -> bool:
        return bool(self.frozen or self.unfrozen or self.resized)

    def __str__(self) -> str:
        named = [("frozen since attach", self.frozen), ("trained, but not at attach", self.unfrozen)]
        named += [("of another shape than at attach", self.resized)]
        return "; ".join(f"{what}: {_first(names)}" for what, names in named if names)


def _first(names: tuple[str, ...]) -> str:
    more = len(names) - _NAMES
    return ", ".join(names[:_NAMES]) + (f" and {more} more" if more > 0 else "")
