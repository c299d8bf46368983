"""What torch holds of a loop: hooks around the model's forward, each optimizer's `step()`, and its closure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from sharpwatch.agent.control.lr_multipliers import LrMultipliers
from sharpwatch.agent.instrumentation.closures import Arguments, Closure, through
from sharpwatch.agent.optimizers.support import skips_its_step


class Hook:
    """A hook for modules and optimizers; where it returns None, torch goes on with what it has."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        """Call on, unless torch.compile traces us: a graph of ours, or a break for it, would change the user's own.

        Nor into a CUDA graph: it would replay what we launch, and to wait for the device breaks its capture.
        """
        return None if torch.compiler.is_compiling() or _is_capturing() else self._call(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        """Copied or pickled with its model, it does nothing there, and needs no sharpwatch to be loaded."""
        return getattr, (nullcontext(), "__exit__")


class Steps(Protocol):
    """What is told of a loop's steps; `which` is an optimizer's number."""

    rates: LrMultipliers

    def idle(self) -> bool:
        """Whether nothing is to be told."""

    def ours(self, doing: str, /) -> AbstractContextManager[None]:
        """The body is the agent's own work: what it raises ends here, its seconds are counted."""

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], /) -> None:
        """The model is called in training."""

    def output(self, output: Any, /) -> None:
        """What it returned."""

    def begin(self, which: int, /) -> None:
        """A `step()` begins."""

    def read(self, which: int, /) -> None:
        """The gradients stand that it steps on."""

    def end(self, which: int, /) -> None:
        """It has ended."""

    def go_back(self) -> None:
        """No step is under way: the place for a rollback. What that raises is the loop's."""


class Hooks:
    """Tells `steps` what a loop does with a model and its optimizers, from now on until `remove`."""

    def __init__(self, steps: Steps, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.repeating = False  # in a closure that its step has evaluated before
        self._steps = steps
        self._optimizers = optimizers
        self._number = {id(optimizer): i for i, optimizer in enumerate(optimizers)}
        self._void: set[int] = set()  # optimizers in a step() that GradScaler makes void
        self._awaited: set[int] = set()  # optimizers whose closure has yet to bring their gradients
        self._pre = [optimizer.register_step_pre_hook(Hook(self._before_step)) for optimizer in optimizers]
        self._post = [optimizer.register_step_post_hook(Hook(self._after_step)) for optimizer in optimizers]
        self.handles = [
            model.register_forward_pre_hook(Hook(self._before_forward), with_kwargs=True),
            model.register_forward_hook(Hook(self._after_forward), with_kwargs=True),
            *self._pre,
            *self._post,
        ]

    def innermost(self, which: int) -> None:
        """Put our hooks around `step()` itself, inside all others: those then never see groups that are split."""
        optimizer = self._optimizers[which]
        _move(optimizer._optimizer_step_pre_hooks, self._pre[which].id, last=True)  # noqa: SLF001 - no public way
        _move(optimizer._optimizer_step_post_hooks, self._post[which].id, last=False)  # noqa: SLF001 - as above

    def _hears(self, module: nn.Module) -> bool:
        """Whether a forward of `module` is the step's own."""
        return not (self.repeating or self._steps.idle()) and module.training and torch.is_grad_enabled()

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._hears(module):
            with self._steps.ours("watching a forward"):
                self._steps.forward(args, kwargs)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        del args, kwargs
        if self._hears(module):
            with self._steps.ours("reading the model's loss"):
                self._steps.output(output)

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        steps = self._steps
        if steps.idle():
            return None
        which, given = self._number[id(optimizer)], None
        self._void.discard(which)
        self._awaited.discard(which)
        with steps.ours("reading the tap"):
            if skips_its_step(optimizer):
                self._void.add(which)
                return None
            steps.begin(which)
            given = through(partial(self._evaluate, which), args, kwargs)
            if given is None:
                steps.read(which)
            else:
                self._awaited.add(which)
        with steps.ours("laying learning rates"):
            steps.rates.lay(which, steps.rates.multipliers())
        return given

    def _evaluate(self, which: int, closure: Closure, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the closure of a `step()`, which sees the optimizer's own groups.

        The gradients that the first evaluation leaves are the step's; later ones look at other weights.
        """
        steps = self._steps
        laid: Mapping[int, float] = {}
        if steps.idle():
            return closure(*args, **kwargs)
        with steps.ours("taking learning rates away"):
            laid = steps.rates.remove(which)
        repeating, self.repeating = self.repeating, which not in self._awaited
        try:
            result = closure(*args, **kwargs)
        finally:
            self.repeating = repeating
        if steps.idle():
            return result
        with steps.ours("reading the tap"):
            if which in self._awaited:
                self._awaited.discard(which)
                steps.read(which)
        with steps.ours("laying learning rates"):
            steps.rates.lay(which, laid)
        return result

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        steps = self._steps
        if steps.idle():
            return
        which = self._number[id(optimizer)]
        with steps.ours("taking learning rates away"):
            steps.rates.remove(which)
        with steps.ours("ending a step"):
            if which not in self._void:
                steps.end(which)
        steps.go_back()


def _move(hooks: Any, number: int, *, last: bool) -> None:
    if number in hooks and number != next(reversed(hooks) if last else iter(hooks)):
        hooks.move_to_end(number, last=last)


def _is_capturing() -> bool:
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(started) and torch.cuda.is_current_stream_capturing()
