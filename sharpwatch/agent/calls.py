"""What a training loop calls in place of the model's forward: another method of it, or a module inside of it.

Nothing of this is done while forwards of the model are seen. Otherwise one step is searched: hooks on all modules look
at Python's stack for the methods of the model that they were called in. If the whole step is one method's, or one inner
module's, its calls are captured from then on as a forward's would be.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sharpwatch.agent.hooks import Hook, Hooks
from sharpwatch.curvature.state.isolation import unwrap

_MODULE_CALLS = ("_call_impl", "_wrapped_call_impl", "__call__")  # of torch, around a module's forward
_SEARCHES = 3  # steps that are searched before it is given up
_MAX_NAMED = 4
_LIGHTNING = ("lightning.", "pytorch_lightning.")


@dataclass(frozen=True, slots=True)
class OtherCall:
    """What the loop calls: `method` of the submodule `path`, which is empty for the model itself.

    An empty method stands for a call of the module, as `module(...)`.
    """

    path: str
    method: str

    def __str__(self) -> str:
        return f"model{'.' if self.path else ''}{self.path}{'.' if self.method else ''}{self.method}"


MODEL = OtherCall("", "")  # whose calls are seen anyway


class OtherCalls:
    """Finds and captures what the loop calls in place of the model's forward.

    Args:
        model: The model.
        hooks: Are told of each call as of a forward.

    Attributes:
        found: What the loop calls; None where nothing was found, or was looked for.
        reason: Why nothing can be captured; empty before the first search.
        active: Whether a step is searched, or a call captured; otherwise a step has nothing to do here.
    """

    def __init__(self, model: nn.Module, hooks: Hooks) -> None:
        self.found: OtherCall | None = None
        self.reason = ""
        self.active = False
        self._model = unwrap(model)
        self._hooks = hooks
        self._search: _Search | None = None
        self._searches = 0
        self._remove: list[Callable[[], None]] = []

    def step_begins(self) -> None:
        """An optimizer's `step()` begins."""
        if self._search is not None:
            self._search.step_begins()

    def step_ends(self, *, missed: bool) -> OtherCall | None:
        """A step has ended; `missed` says that probes were due and no forward was seen in it.

        Returns:
            What the loop calls, if that was found in this step, or has changed to the model itself.
        """
        if self.found is not None and self._hooks.calls_model:
            self.close()
            self.found = None
            self.active = False
            return MODEL
        search, self._search = self._search, None
        if search is not None:
            search.close()
            self._hooks.calls_model = False  # from here on it says that the loop has changed
            self.found, self.reason = search.result()
            self.active = self.found is not None
            if self.found is not None:
                self._capture(self.found)
                return self.found
        if missed and self.found is None and self._searches < _SEARCHES:
            self._searches += 1
            self._search = _Search(self._model)
            self.active = True
        return None

    def close(self) -> None:
        """Remove all hooks, and put the method back."""
        if self._search is not None:
            self._search.close()
            self._search = None
        while self._remove:
            self._remove.pop()()

    def _capture(self, call: OtherCall) -> None:
        module = self._model.get_submodule(call.path)
        if call.method:
            method = _Method(module, call.method, self._hooks)
            vars(module)[call.method] = method
            self._remove.append(functools.partial(_put_back, module, call.method, method))
            return
        before, after = Hook(self._hooks.before_other), Hook(self._hooks.after_other)
        self._remove += [
            module.register_forward_pre_hook(before, with_kwargs=True).remove,
            module.register_forward_hook(after, with_kwargs=True).remove,
        ]


class _Search:
    """The methods of a model that its modules are called in during one step."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        training = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        # Only of these a single call may be the whole loss.
        self._whole = {
            id(module): path
            for path, module in model.named_modules()
            if training <= {id(parameter) for parameter in module.parameters()}
        }
        self._chains: dict[tuple[OtherCall, ...], None] = {}  # outermost first; in order, each once
        self._outside: dict[str, None] = {}  # modules that were called outside of any of these
        self._stepping: tuple[OtherCall, ...] = ()
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(Hook(functools.partial(self._called, path)))
            for path, module in model.named_modules()
        ]

    def close(self) -> None:
        """Remove all hooks."""
        while self._handles:
            self._handles.pop().remove()

    def step_begins(self) -> None:
        """An optimizer's `step()` begins: a method on the stack now takes it itself."""
        self._stepping = self._chain(sys._getframe(1))  # noqa: SLF001 - as `inspect` does

    def result(self) -> tuple[OtherCall | None, str]:
        """What the step called, or why that can't be captured; neither where the model itself was called."""
        if any(MODEL in chain for chain in self._chains):
            return None, ""
        if self._outside or not self._chains:
            called = _named([f"model.{path}" for path in self._outside])
            return None, f"the loop calls {called or 'no module'}, and no method of the model that has its whole loss"
        outermost = dict.fromkeys(chain[0] for chain in self._chains)
        common = set.intersection(*map(set, self._chains))
        # A call of a module is captured by hooks, and computes something rather than log it.
        inner = [call for call in next(iter(self._chains)) if call in common and not call.method]
        if inner:
            return inner[0], ""
        if len(outermost) > 1:
            return None, f"the loop calls {_named(list(map(str, outermost)))}, of which none has its whole loss"
        (call,) = outermost
        refusal = self._refusal(call)
        return (None if refusal else call), refusal

    def _refusal(self, call: OtherCall) -> str:
        module = self._model.get_submodule(call.path)
        kind = type(module)
        if call in self._stepping:
            return f"{call} takes the optimizer's step itself, so no probe may call it"
        if any(each.__module__.startswith(_LIGHTNING) for each in kind.__mro__):
            return f"{call} may log to Lightning, so no probe calls it: have it call self(...)"
        replaced = call.method in vars(module) or not inspect.isfunction(getattr(kind, call.method))
        return f"{call} is no plain method of its class, and can't be captured" if replaced else ""

    def _called(self, path: str, *_: object) -> None:
        if torch.is_grad_enabled():
            chain = self._chain(sys._getframe(1))  # noqa: SLF001 - as `inspect` does
            if chain:
                self._chains[chain] = None
            else:
                self._outside[path] = None

    def _chain(self, frame: FrameType | None) -> tuple[OtherCall, ...]:
        """The calls on the stack of modules with all trainable parameters, outermost first, each once."""
        calls = dict.fromkeys(call for each in _frames(frame) if (call := self._call(each)) is not None)
        return tuple(reversed(calls))

    def _call(self, frame: FrameType) -> OtherCall | None:
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        path = self._whole.get(id(first)) if isinstance(first, nn.Module) else None
        if path is None:
            return None
        if code.co_name in _MODULE_CALLS:
            return OtherCall(path, "")
        # A function outside of the class may have the module as its first argument too.
        return OtherCall(path, code.co_name) if hasattr(type(first), code.co_name) else None


class _Method:
    """Stands in for a method of a module, and tells hooks of its calls as of forwards.

    Copied or pickled with the module, it is the method of the copy, and loads without sharpwatch.
    """

    __slots__ = ("__wrapped__", "_hooks", "_module", "_name")

    def __init__(self, module: nn.Module, name: str, hooks: Hooks) -> None:
        self.__wrapped__ = getattr(type(module), name)
        self._hooks = hooks
        self._module = weakref.ref(module)  # which holds this
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        module = self._module()
        if module is None or torch.compiler.is_compiling():
            return self.__wrapped__(module, *args, **kwargs)
        self._hooks.before_other(module, args, kwargs)
        output = self.__wrapped__(module, *args, **kwargs)
        self._hooks.after_other(module, args, kwargs, output)
        return output

    @property
    def __name__(self) -> str:
        return self._name

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.__wrapped__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        """The copy's own method."""
        return getattr, (self._module(), self._name)


def _put_back(module: nn.Module, name: str, method: _Method) -> None:
    if vars(module).get(name) is method:  # otherwise the user has set another one since
        del vars(module)[name]


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _named(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
