"""Optimizers as real projects write their own: those whose groups can't be split, and those whose groups can.

Each is small, keeps what it keeps where the project keeps it, and takes groups or parameters.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

RATE = 1e-2
EVERYTHING = []  # parameters that a training script holds in a global list


class Own(torch.optim.Optimizer):
    """A project's optimizer; subclasses say in `update` what becomes of a group's gradients."""

    def __init__(self, params, lr=RATE, **defaults):
        super().__init__(params, {"lr": lr} | defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for number, group in enumerate(self.param_groups):
            held = [p for p in group["params"] if p.grad is not None]
            if held:
                for p, update in zip(held, self.updates(held, number=number, group=group), strict=True):
                    p.add_(update.view_as(p), alpha=-group["lr"])
        return loss


def by_shape(held):
    """The positions of parameters of each shape."""
    shapes = {}
    for number, p in enumerate(held):
        shapes.setdefault(p.shape, []).append(number)
    return shapes.values()


def orthogonalized(matrices):
    """Newton-Schulz iterations in bfloat16, as in Muon; of one matrix or of several stacked ones."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


def adam(grad, first, second, step):
    first.lerp_(grad, 0.1)
    second.lerp_(grad.square(), 0.05)
    return (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)


# Those whose groups can't be split.


class StackedMuon(Own):
    """Nanochat's: momentum of all matrices of one shape, stacked under the first of them."""

    def updates(self, held, **_):
        updates = [None] * len(held)
        for places in by_shape(held):
            grads = torch.stack([held[place].grad for place in places])
            state = self.state[held[places[0]]]
            if "momentum_buffer" not in state or state["momentum_buffer"].shape != grads.shape:
                state["momentum_buffer"] = torch.zeros_like(grads)
            state["momentum_buffer"].lerp_(grads, 0.05)
            for place, each in zip(places, orthogonalized(grads.lerp_(state["momentum_buffer"], 0.95)), strict=True):
                updates[place] = each
        return updates


class Banks(Own):
    """One momentum bank for each group, in a list of the optimizer's own (modded-nanogpt's parameter banks)."""

    def __init__(self, params, lr=RATE):
        super().__init__(params, lr)
        self.banks = [None for _ in self.param_groups]

    def updates(self, held, number, **_):
        flat = torch.cat([p.grad.flatten() for p in held])
        if self.banks[number] is None:
            self.banks[number] = torch.zeros_like(flat)
        self.banks[number].mul_(0.9).add_(flat)
        return self.banks[number].split([p.numel() for p in held])


class FlatAdam(Own):
    """Adam on one flat buffer a group, under a key of the state that is no parameter."""

    def updates(self, held, number, **_):
        flat = torch.cat([p.grad.flatten() for p in held])
        state = self.state[f"group {number}"]
        if state.get("size") != flat.numel():
            state |= {"size": flat.numel(), "step": 0, "m": torch.zeros_like(flat), "v": torch.zeros_like(flat)}
        state["step"] += 1
        return adam(flat, state["m"], state["v"], state["step"]).split([p.numel() for p in held])


class FlatViews(Own):
    """The parameters are views of one buffer, which it steps as a whole."""

    def __init__(self, params, lr=RATE):
        super().__init__(params, lr)
        held = self.param_groups[0]["params"]
        self.flat = torch.cat([p.detach().flatten() for p in held])
        for p, part in zip(held, self.flat.split([p.numel() for p in held]), strict=True):
            p.data = part.view_as(p)

    @torch.no_grad()
    def step(self, *_):
        grads = torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]])
        self.flat.add_(grads, alpha=-self.param_groups[0]["lr"])


class CountedByGroup(Own):
    """Adam whose bias correction counts a group's steps under the group's first parameter."""

    def updates(self, held, **_):
        first = self.state[held[0]]
        first["step"] = first.get("step", 0) + 1
        for p in held:
            state = self.state[p]
            state.setdefault("m", torch.zeros_like(p))
            state.setdefault("v", torch.zeros_like(p))
            yield adam(p.grad, state["m"], state["v"], first["step"])


class CountedByNumber(CountedByGroup):
    """The same with counts in a list, by the group's number."""

    def __init__(self, params, lr=RATE):
        super().__init__(params, lr)
        self.steps = [0] * 64

    def updates(self, held, number, **_):
        self.steps[number] += 1
        for p in held:
            state = self.state[p]
            state.setdefault("m", torch.zeros_like(p))
            state.setdefault("v", torch.zeros_like(p))
            yield adam(p.grad, state["m"], state["v"], self.steps[number])


class CountsGroups(Own):
    """Counts its calls once for each group, and will decay by that one day: no step differs until then."""

    calls = 0

    def updates(self, held, **_):
        self.calls += 1
        return [p.grad if self.calls < 100_000 else p.grad / 2 for p in held]


class GroupLamb(Own):
    """LAMB with one trust ratio for a group."""

    def updates(self, held, **_):
        weights = torch.stack([p.norm() for p in held]).norm()
        grads = torch.stack([p.grad.norm() for p in held]).norm()
        return [p.grad * (weights / (grads + 1e-6)) for p in held]


class ClippedLion(Own):
    """Lion that clips the gradients of a group together, by a norm that small gradients never reach."""

    def updates(self, held, **_):
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        scale = min(1.0, 1.0 / float(norm))
        for p in held:
            momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            yield momentum.mul(0.9).add(p.grad, alpha=0.1 * scale).sign()
            momentum.lerp_(p.grad * scale, 0.01)


class ByNumber(Own):
    """Finds options by a group's number, as layer-wise decay does."""

    def __init__(self, params, lr=RATE):
        super().__init__(params, lr)
        self.scales = [0.9**number for number in range(100)]

    def updates(self, held, number, **_):
        return [p.grad * self.scales[number] for p in held]


class ListAtInit(Own):
    """Keeps momentum in lists made in `__init__`, which `step()` zips with the groups."""

    def __init__(self, params, lr=RATE):
        super().__init__(params, lr)
        self.momenta = [[torch.zeros_like(p) for p in group["params"]] for group in self.param_groups]

    def updates(self, held, number, **_):
        momenta = self.momenta[number % len(self.momenta)]
        return [momentum.mul_(0.9).add_(p.grad.view_as(momentum)) for p, momentum in zip(held, momenta, strict=False)]


class ByIdentity(Own):
    """A cache by the id of a group: one that is split for a step is another one."""

    def __init__(self, params, lr=RATE):
        super().__init__(params, lr)
        self.cache = {}

    def updates(self, held, group, **_):
        scale = self.cache.setdefault(id(group), [0.0])
        scale[0] = 0.9 * scale[0] + 0.1 * max(float(p.grad.abs().max()) for p in held)
        return [p.grad / scale[0] for p in held]


class InGroup(Own):
    """A fused buffer of each group, in the group."""

    def updates(self, held, group, **_):
        flat = torch.cat([p.grad.flatten() for p in held])
        momentum = group.get("momentum_buffer")
        if momentum is None or momentum.shape != flat.shape:
            momentum = group["momentum_buffer"] = torch.zeros_like(flat)
        momentum.mul_(0.9).add_(flat)
        return momentum.split([p.numel() for p in held])


class BlockShampoo(Own):
    """Shampoo with one preconditioner of all vectors and matrices of a group that have as many columns."""

    def updates(self, held, **_):
        updates = [None] * len(held)
        widths = {}
        for place, p in enumerate(held):
            widths.setdefault(p.shape[-1], []).append(place)
        for width, places in widths.items():
            rows = torch.cat([held[place].grad.view(-1, width) for place in places])
            statistics = self.state[held[places[0]]].setdefault(width, torch.eye(width))
            statistics.mul_(0.9).add_(rows.mT @ rows, alpha=0.1)
            values, vectors = torch.linalg.eigh(statistics)
            root = vectors @ torch.diag(values.clamp(min=1e-12).rsqrt()) @ vectors.mT
            for place in places:
                updates[place] = held[place].grad.view(-1, width) @ root
        return updates


class KeepsRates(Own):
    """Takes its rates from what they were in `__init__`, by position, as AdaBound does."""

    def __init__(self, params, lr=RATE):
        super().__init__(params, lr)
        self.initial = [group["lr"] for group in self.param_groups]

    def updates(self, held, number, group):
        final = 0.1 * group["lr"] / self.initial[number]
        return [p.grad.clamp(-final, final) for p in held]


class OwnRate(Own):
    """Ignores the groups' rates."""

    def updates(self, held, group, **_):
        return [p.grad * (RATE / group["lr"]) for p in held]


class GlobalList(Own):
    """Steps what a global list of the training script holds."""

    @torch.no_grad()
    def step(self, *_):
        for p in EVERYTHING:
            if p.grad is not None:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


def closing_over(params):
    """An optimizer whose class closes over the parameters."""
    held = list(params)

    class Closing(Own):
        @torch.no_grad()
        def step(self, *_):
            for p in held:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"])

    return Closing(held)


def listed(params):
    """Of parameters that a global list holds too."""
    held = list(params)
    EVERYTHING[:] = held
    return GlobalList(held)


class Together(torch.optim.Optimizer):
    """Two optimizers behind one face, whose groups are theirs."""

    def __init__(self, params):
        held = list(params)
        super().__init__(held, {"lr": RATE})
        matrices = [p for p in held if p.ndim > 1]
        rest = [p for p in held if p.ndim <= 1]
        self.optimizers = [torch.optim.SGD(matrices, lr=RATE), torch.optim.AdamW(rest, lr=RATE)]
        self.param_groups = [group for each in self.optimizers for group in each.param_groups]

    def step(self, *_):
        for each in self.optimizers:
            each.step()


def instance_compiled(params):
    """AdamW whose `step` was compiled, as torch's tutorial does."""
    optimizer = torch.optim.AdamW(params, lr=RATE)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    return optimizer


class ClassCompiled(Own):
    """A project's own, with its whole step compiled."""

    def updates(self, held, **_):
        return [p.grad for p in held]

    step = torch.compile(Own.step, backend="eager")


GROUPED = "its steps depend on how parameters are grouped, as copies showed"
FAILED = "step() of a copy failed when its groups were split"
NOT_SHOWN = "it could not be shown that its groups can be split"
RATES = "a group's learning rate does not act on the group's own parameters, and on these alone, as copies showed"
NOT_SEPARABLE = {
    "stacked muon": (StackedMuon, GROUPED),
    "parameter banks": (Banks, FAILED),
    "flat adam": (FlatAdam, GROUPED),
    "flat views": (FlatViews, NOT_SHOWN),
    "counted by group": (CountedByGroup, GROUPED),
    "counted by number": (CountedByNumber, GROUPED),
    "counts groups": (CountsGroups, "what it keeps in 'calls' depends on how parameters are grouped"),
    "lamb by group": (GroupLamb, GROUPED),
    "clipped lion": (ClippedLion, GROUPED),
    "options by number": (ByNumber, GROUPED),
    "list at init": (ListAtInit, NOT_SHOWN),
    "by identity": (ByIdentity, GROUPED),
    "fused in group": (InGroup, GROUPED),
    "block shampoo": (BlockShampoo, GROUPED),
    "keeps rates": (KeepsRates, FAILED),
    "own rate": (OwnRate, RATES),
    "closes over parameters": (closing_over, "its step() closes over other objects of the program"),
    "global list": (listed, NOT_SHOWN),
    "several in one": (Together, "it passes its groups to another optimizer by their position"),
    "compiled": (instance_compiled, "its step() is compiled"),
    "compiled class": (ClassCompiled, "its step() is compiled"),
}


# Those whose groups can be split.


class PlainAdamW(Own):
    """Adam with decoupled decay, parameter by parameter."""

    def updates(self, held, **_):
        for p in held:
            state = self.state[p]
            if not state:
                state |= {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            state["step"] += 1
            yield adam(p.grad, state["m"], state["v"], state["step"]) + 0.1 * p


class CountedInGroup(Own):
    """Apex' way: the count of steps is an option of the group."""

    def updates(self, held, group, **_):
        group["step"] = group.get("step", 0) + 1
        for p in held:
            state = self.state[p]
            if not state:
                state |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            yield adam(p.grad, state["m"], state["v"], group["step"])


class Lion(Own):
    """The sign of an interpolation."""

    def updates(self, held, **_):
        for p in held:
            momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            yield momentum.lerp(p.grad, 0.1).sign()
            momentum.lerp_(p.grad, 0.01)


class Muon(Own):
    """Keller Jordan's, on one process: one matrix after the other."""

    def updates(self, held, **_):
        for p in held:
            momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            update = p.grad.lerp(momentum, 0.95)
            yield orthogonalized(update) if p.ndim == 2 else update


class StackedForSpeed(Muon):
    """Orthogonalizes matrices of one shape together, but keeps each one's momentum: rounding alone may differ."""

    def updates(self, held, **_):
        updates = [None] * len(held)
        for p in held:
            self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 0.05)
        for places in by_shape(held):
            momenta = torch.stack([self.state[held[place]]["momentum_buffer"] for place in places])
            for place, each in zip(places, orthogonalized(momenta) if momenta.ndim == 3 else momenta, strict=True):
                updates[place] = each
        return updates


class Quantized(Own):
    """Momentum in 8 bit with a scale for each block of 64 entries: state that is shaped like no parameter."""

    def updates(self, held, **_):
        for p in held:
            state = self.state[p]
            padded = torch.nn.functional.pad(p.grad.flatten(), (0, -p.numel() % 64)).view(-1, 64)
            if not state:
                state |= {"codes": torch.zeros_like(padded, dtype=torch.int8), "scales": torch.ones(len(padded), 1)}
            momentum = state["codes"] * state["scales"] * 0.9 + padded
            state["scales"] = momentum.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            state["codes"] = (momentum / state["scales"]).round().to(torch.int8)
            yield momentum.flatten()[: p.numel()]


class Factored(Own):
    """Rows and columns of the second moment, as Adafactor's."""

    def updates(self, held, **_):
        for p in held:
            square = p.grad.square() + 1e-30
            if p.ndim < 2:
                moment = self.state[p].setdefault("v", torch.zeros_like(p)).lerp_(square, 0.05)
                yield p.grad * moment.rsqrt()
                continue
            rows = self.state[p].setdefault("row", torch.zeros(p.shape[0])).lerp_(square.mean(1), 0.05)
            columns = self.state[p].setdefault("col", torch.zeros(p.shape[1])).lerp_(square.mean(0), 0.05)
            yield p.grad * (rows / rows.mean()).rsqrt()[:, None] * columns.rsqrt()


class Soap(Own):
    """Adam in the eigenbasis of each matrix' own statistics, which are refreshed every tenth step."""

    def updates(self, held, **_):
        for p in held:
            state = self.state[p]
            if not state:
                state |= {"step": 0, "gram": torch.zeros(p.shape[0], p.shape[0]), "basis": torch.eye(p.shape[0])}
                state |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            rows = p.grad.view(p.shape[0], -1)
            state["gram"].lerp_(rows @ rows.mT, 0.05)
            if state["step"] % 10 == 0:
                state["basis"] = torch.linalg.eigh(state["gram"])[1]
            state["step"] += 1
            turned = (state["basis"].mT @ rows).view_as(p)
            yield state["basis"] @ adam(turned, state["m"], state["v"], state["step"]).view_as(rows)


class MadeAtInit(Own):
    """Makes its state in `__init__`."""

    def __init__(self, params, lr=RATE):
        super().__init__(params, lr)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.zeros_like(p)

    def updates(self, held, **_):
        return [self.state[p]["momentum"].mul_(0.9).add_(p.grad) for p in held]


class ByParameterId(Own):
    """A cache by the id of a parameter, beside the state."""

    def __init__(self, params, lr=RATE):
        super().__init__(params, lr)
        self.momenta = {id(p): torch.zeros_like(p) for group in self.param_groups for p in group["params"]}

    def updates(self, held, **_):
        return [self.momenta[id(p)].mul_(0.9).add_(p.grad) for p in held]


def _kernel(momentum: Tensor, grad: Tensor, decay: float) -> Tensor:
    momentum.mul_(decay).add_(grad)
    return momentum / momentum.norm().clamp(min=1e-12)


class CompiledKernel(Own):
    """One compiled function for each parameter, as torchao's and nanochat's AdamW; the step itself is not compiled."""

    def __init__(self, params, lr=RATE):
        super().__init__(params, lr)
        self.kernel = functools.partial(torch.compile(_kernel, backend="eager", dynamic=False), decay=0.9)

    def updates(self, held, **_):
        for p in held:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            yield math.sqrt(p.numel()) * self.kernel(momentum, p.grad)


SEPARABLE = {
    "plain adamw": PlainAdamW,
    "counted in group": CountedInGroup,
    "lion": Lion,
    "muon": Muon,
    "quantized": Quantized,
    "factored": Factored,
    "soap": Soap,
    "made at init": MadeAtInit,
    "by parameter id": ByParameterId,
    "compiled kernel": CompiledKernel,
}
