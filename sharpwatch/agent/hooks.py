"""What the agent sees of a training loop: forwards, each optimizer's `step()` and closure, and replaced parameters."""

from __future__ import annotations

import functools
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from sharpwatch.agent.control.lr_multipliers import InForce, LrMultipliers
from sharpwatch.agent.optimizers.support import is_flat
from sharpwatch.agent.statistics.clipping import AfterClip, ClipHookHandle
from sharpwatch.curvature.objective.nested import tensors
from sharpwatch.curvature.parameters.shards import is_sharded

# Going through all modules at every step would cost too much for what happens rarely.
CHECK_INTERVAL = 64  # steps between two checks of the parameters
_MAX_OUTPUTS = 64  # tensors of an output that a backward is looked for at; the caches of all layers are among them
_LOG = logging.getLogger("sharpwatch")

Closure = Callable[..., Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of `step()` as torch's hooks get them: the optimizer is the first


class Hook:
    """A hook for modules and optimizers. If it returns None, torch continues with the arguments it has."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        """Call the wrapped function, except while torch traces, records or transforms the caller.

        Under torch.compile the agent's operations, or a graph break for them, would change the user's graph. A CUDA
        graph would replay the agent's kernels, and waiting for the device breaks its capture. Under `torch.func`
        tensors have no values of their own.
        """
        return None if must_not_act() else self._call(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        """Copied or pickled with its model, it does nothing there, and loads without sharpwatch."""
        # It takes any arguments, returns None, and is of the standard library.
        return getattr, (nullcontext(), "__exit__")


def must_not_act() -> bool:
    """Whether torch traces, records or transforms the caller now, so that the agent may do nothing."""
    return torch.compiler.is_compiling() or _is_capturing() or _is_transformed()


def backward_is_compiled() -> bool:
    """Whether the program has used compiled autograd, whose graphs leave out the agent's hooks."""
    utils = sys.modules.get("torch._dynamo.utils")
    return utils is not None and "compiled_autograd" in utils.counters


class Steps(Protocol):
    """Receives the events of a training loop; `which` is the index of an optimizer."""

    rates: LrMultipliers

    def idle(self) -> bool:
        """Whether events are to be ignored."""

    def agent_work(self, doing: str, /) -> AbstractContextManager[None]:
        """Run the body as the agent's own work: its exceptions are swallowed and its time is counted."""

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], /) -> None:
        """The model is about to be called in training."""

    def output(self, output: Any, /) -> None:
        """The call returned `output`."""

    def undecided(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], /) -> Callable[[Any], Callable[[], None]]:
        """The model is about to be called in evaluation mode, in which models are trained too.

        Returns:
            A function to call with the output; it returns one to call when a backward comes through the output.
        """

    def clipping(self, parameters: Sequence[Tensor], max_norm: float, total_norm: Tensor, /) -> AfterClip | None:
        """The gradients of `parameters` are about to be clipped; what is returned is called once they are."""

    def begin(self, which: int, /) -> None:
        """A `step()` begins."""

    def read(self, which: int, /) -> None:
        """The gradients of this `step()` are ready."""

    def end(self, which: int, /) -> None:
        """The `step()` has returned."""

    def go_back(self) -> None:
        """No step is in progress, so a rollback can be done. What it raises reaches the loop."""


class Hooks:
    """Tells `steps` what a loop does with a model and its optimizers, until every handle in `handles` is removed.

    Attributes:
        handles: The handles of all hooks.
        repeating: Whether a closure runs that the same step has evaluated before.
        calls_model: Whether the loop has called the model itself in training mode, with gradients enabled.
    """

    def __init__(self, steps: Steps, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.repeating = False
        self.calls_model = False
        self._steps = steps
        self._model = model
        self._optimizers = optimizers
        self._number = {id(optimizer): i for i, optimizer in enumerate(optimizers)}
        self._undecided: Callable[[Any], Callable[[], None]] | None = None  # between the two hooks of a forward
        self._skipped: set[int] = set()  # optimizers in a step() that changes nothing, because of an overflow
        self._awaiting_closure: set[int] = set()  # optimizers whose closure has not computed the gradients yet
        self._pre = [optimizer.register_step_pre_hook(Hook(self._before_step)) for optimizer in optimizers]
        self._post = [optimizer.register_step_post_hook(Hook(self._after_step)) for optimizer in optimizers]
        self.handles: list[RemovableHandle | ClipHookHandle] = [
            model.register_forward_pre_hook(Hook(self._before_forward), with_kwargs=True),
            model.register_forward_hook(Hook(self._after_forward), with_kwargs=True),
            *self._pre,
            *self._post,
            ClipHookHandle(self._before_clip),
        ]

    def innermost(self, which: int) -> None:
        """Make the hooks of an optimizer the innermost ones, so that no other hook sees groups that are split."""
        optimizer = self._optimizers[which]
        _move(optimizer._optimizer_step_pre_hooks, self._pre[which].id, last=True)  # noqa: SLF001 - no public way
        _move(optimizer._optimizer_step_post_hooks, self._post[which].id, last=False)  # noqa: SLF001 - as above

    def _counts(self) -> bool:
        """Whether a forward of the model may belong to the training step."""
        return not (self.repeating or self._steps.idle()) and torch.is_grad_enabled()

    def before_other(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The loop calls what stands for the model's forward (`calls`), unless it has called the model since."""
        if not self.calls_model and self._counts():
            self._called(module, args, kwargs)

    def after_other(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """That call returned `output`."""
        if not self.calls_model:
            self._after_forward(module, args, kwargs, output)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._counts():
            self.calls_model |= module.training
            self._called(module, args, kwargs)

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self._steps.agent_work("watching a forward"):
            if module.training:
                self._steps.forward(args, kwargs)
            else:
                self._undecided = self._steps.undecided(args, kwargs)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        del args, kwargs
        if self._counts():
            with self._steps.agent_work("reading the model's loss"):
                if module.training:
                    self._steps.output(output)
                elif self._undecided is not None:
                    returned, self._undecided = self._undecided, None
                    _at_backward(output, functools.partial(self._trains, returned(output)))

    def _trains(self, trains: Callable[[], None]) -> bool:
        if self.repeating or self._steps.idle():
            return False
        with self._steps.agent_work("watching a forward"):
            if is_accumulating(self._model):
                trains()
                return True
        return False

    def _before_clip(self, parameters: Sequence[Tensor], max_norm: float, total_norm: Tensor) -> AfterClip | None:
        if must_not_act() or self._steps.idle():
            return None
        after: AfterClip | None = None
        with self._steps.agent_work("watching the clipping"):
            after = self._steps.clipping(parameters, max_norm, total_norm)
        return None if after is None else functools.partial(self._after_clip, after)

    def _after_clip(self, after: AfterClip) -> None:
        with self._steps.agent_work("watching the clipping"):
            after()

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        steps = self._steps
        if steps.idle():
            return None
        which, replaced = self._number[id(optimizer)], None
        self._skipped.discard(which)
        self._awaiting_closure.discard(which)
        with steps.agent_work("reading the tap"):
            # A step that changes nothing does not count, and its gradients are not finite.
            if skips_its_step(optimizer):
                self._skipped.add(which)
                return None
            steps.begin(which)
            replaced = replace_closure(functools.partial(self._evaluate, which), args, kwargs)
            if replaced is None:
                steps.read(which)
            else:
                self._awaiting_closure.add(which)
        with steps.agent_work("applying learning-rate multipliers"):
            steps.rates.apply(which, steps.rates.in_force())
        return replaced

    def _evaluate(self, which: int, closure: Closure, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the closure of a `step()`, with the optimizer's own groups restored while it runs.

        The first evaluation computes the gradients of the step; later ones are at other weights.
        """
        steps = self._steps
        applied = InForce()
        if steps.idle():
            return closure(*args, **kwargs)
        with steps.agent_work("restoring parameter groups"):
            applied = steps.rates.restore(which)
        repeating, self.repeating = self.repeating, which not in self._awaiting_closure
        try:
            result = closure(*args, **kwargs)
        finally:
            # Put back rather than set to False: a closure may step another optimizer, with its own closure.
            self.repeating = repeating
        # Asked again, because the closure may have closed the watch.
        if steps.idle():
            return result
        with steps.agent_work("reading the tap"):
            if which in self._awaiting_closure:
                self._awaiting_closure.discard(which)
                steps.read(which)
        with steps.agent_work("applying learning-rate multipliers"):
            steps.rates.apply(which, applied)
        return result

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        steps = self._steps
        if steps.idle():
            return
        which = self._number[id(optimizer)]
        with steps.agent_work("restoring parameter groups"):
            steps.rates.restore(which)
        with steps.agent_work("ending a step"):
            if which not in self._skipped:
                steps.end(which)
        # Outside of the barrier: what the user's callback raises must reach the loop.
        steps.go_back()


def _at_backward(output: Any, call: Callable[[], bool]) -> None:
    """Have `call` called when a backward comes through a tensor of `output`, until it returns True.

    It must not hold these tensors.
    """
    waiting = [call]

    def arrives(*_: object) -> None:
        if waiting and waiting[0]():
            waiting.clear()

    for tensor in itertools.islice(tensors(output), _MAX_OUTPUTS):
        if tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(Hook(arrives))


def is_accumulating(model: nn.Module, *, or_returning: bool = False) -> bool:
    """Whether the running backward adds to the gradients of `model`, or returns them, as `torch.autograd.grad` may."""
    nodes = (get_gradient_edge(parameter).node for parameter in model.parameters() if parameter.requires_grad)
    try:
        return any(torch._C._will_engine_execute_node(node) for node in nodes)  # noqa: SLF001 - as torch.autograd.graph asks
    except RuntimeError:  # of a parameter whose gradient `torch.autograd.grad` is to return
        return or_returning


def replace_closure(evaluate: Closure, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Make `evaluate(closure)` stand in for the closure of a `step()`.

    Args:
        evaluate: Called with the closure, and with the arguments that the optimizer passes to it.
        args: The positional arguments of the step's hook, the optimizer first.
        kwargs: Its keyword arguments.

    Returns:
        The new arguments; None if the step has no closure.
    """
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": _evaluated_by(evaluate, kwargs["closure"])}
    if len(args) > 1 and callable(args[1]):
        return (args[0], _evaluated_by(evaluate, args[1]), *args[2:]), kwargs
    return None


def skips_its_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the next `step()` will change nothing, because GradScaler found an overflow.

    GradScaler leaves it to a fused optimizer to skip the step. Reading its flag waits for the device, as GradScaler
    itself does with other optimizers.
    """
    overflow = getattr(optimizer, "found_inf", None)
    return isinstance(overflow, Tensor) and bool(overflow.item())


def _evaluated_by(evaluate: Closure, closure: Closure) -> Closure:
    @functools.wraps(closure)
    def call(*args: Any, **kwargs: Any) -> Any:
        return evaluate(closure, *args, **kwargs)

    return call


def _move(hooks: Any, number: int, *, last: bool) -> None:
    if number in hooks and number != next(reversed(hooks) if last else iter(hooks)):
        hooks.move_to_end(number, last=last)


def _is_capturing() -> bool:
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(started) and torch.cuda.is_current_stream_capturing()


def _is_transformed() -> bool:
    """Whether `torch.func` transforms the caller, or `torch.jit.trace` records it."""
    # No public function tells of the first.
    return torch._C._functorch.peek_interpreter_stack() is not None or torch._C._is_tracing()  # noqa: SLF001


class ParameterIdentity:
    """Remembers the parameters of `model`, and finds out when they are replaced by others, or by other shapes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known = _names(model)
        self._shapes = {id(parameter): parameter.shape for parameter in model.parameters()}
        # FSDP itself replaces parameters by others and restores them during each step.
        self._can_check = not (is_sharded(model) or any(map(is_flat, model.parameters())))

    def replaced(self) -> str:
        """Compare the model's parameters with the known ones.

        Parameters added since `attach` are not watched; each is logged once.

        Returns:
            What became of the first known parameter that the model no longer has as it was; empty if it has all.
        """
        if not self._can_check:
            return ""
        now = _names(self._model)
        gone = [name for key, name in self._known.items() if key not in now]
        if not gone and now.keys() != self._known.keys():
            new = [name for key, name in now.items() if key not in self._known]
            _LOG.warning("parameters added after attach are not watched: %s", ", ".join(new))
            self._known |= now
        if gone:
            return f"{gone[0]} was replaced by another parameter"
        return next(self._resized(), "")

    def _resized(self) -> Iterator[str]:
        """Transformers' `resize_token_embeddings` keeps the parameter, and gives it other data."""
        for name, parameter in self._model.named_parameters():
            then = self._shapes.setdefault(id(parameter), parameter.shape)
            if parameter.shape != then:
                yield f"{name} is of shape {tuple(parameter.shape)} now, and was of {tuple(then)}"


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}
