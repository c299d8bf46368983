"""The other libraries, each used as it documents, a block at a time: PyHessian, hessian-eigenthings, curvlinops.

A block is prepared once and then serves its trace and its eigenvalue; a library that keeps a graph keeps it as long.
Settings are a grid from coarse to fine, with the library's own defaults among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import curvlinops
import hessian_eigenthings as eigenthings
import torch
from pyhessian import hessian as PyHessian  # noqa: N812 - a class with a function's name
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from benchmarks.curvature.models import Batch

DRAWS = (8, 16, 32, 64, 80, 128)


class Value(NamedTuple):
    """A number and the standard error that the library states, if it does."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class Setting:
    """A way to call a library."""

    label: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


Family = tuple[Setting, ...]  # of one method, from coarse to fine


class Peer(Protocol):
    """One library."""

    name: str
    traces: tuple[Family, ...]
    tops: tuple[Family, ...]

    def prepare(self, model: nn.Module, batch: Batch, names: list[str]) -> Any:
        """What the library keeps of the block of the parameters `names`."""

    def trace(self, kept: Any, setting: Setting, seed: int) -> Value:
        """The block's trace."""

    def top(self, kept: Any, setting: Setting, seed: int) -> Value:
        """The block's largest eigenvalue, or what the library takes for it."""

    def release(self, model: nn.Module) -> None:
        """Leave the model as it was; most never change it."""


class PyHessianPeer(Peer):
    """Hutchinson and power iteration through one kept graph; a block by freezing all else."""

    name = "pyhessian"
    traces = (
        tuple(Setting(f"{draws} draws", {"maxIter": draws, "tol": 0.0}) for draws in DRAWS),
        (Setting("default (100 draws, tol 0.001)"),),
    )
    tops = (
        (
            *(Setting(f"tol {tol:g}", {"tol": tol}) for tol in (3e-2, 1e-2)),
            Setting("default (tol 0.001)"),
            Setting("tol 0.0001", {"tol": 1e-4}),
        ),
    )

    def prepare(self, model: nn.Module, batch: Batch, names: list[str]) -> PyHessian:
        """As `Peer.prepare`."""
        wanted = set(names)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        return PyHessian(model, _shifted_loss, data=(batch["input_ids"], batch["labels"]), cuda=False)

    def trace(self, kept: PyHessian, setting: Setting, seed: int) -> Value:
        """As `Peer.trace`."""
        torch.manual_seed(seed)
        samples = kept.trace(**setting.arguments)
        return Value(sum(samples) / len(samples))

    def top(self, kept: PyHessian, setting: Setting, seed: int) -> Value:
        """As `Peer.top`."""
        torch.manual_seed(seed)
        return Value(kept.eigenvalues(**setting.arguments)[0][0])

    def release(self, model: nn.Module) -> None:
        """As `Peer.release`."""
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(True)


class EigenthingsPeer(Peer):
    """Hutchinson, Hutch++, Lanczos and power iteration; a forward for every product."""

    traces = (
        tuple(Setting(f"hutchinson, {draws} draws", {"method": "hutchinson", "num_matvecs": draws}) for draws in DRAWS),
        (
            *(Setting(f"hutch++, {draws} products", {"num_matvecs": draws}) for draws in (18, 33, 66)),
            Setting("default (hutch++, 100 products)"),
        ),
    )
    tops = (
        tuple(
            Setting(f"lanczos LA, {steps} steps", {"k": 1, "which": "LA", "max_iter": steps})
            for steps in (4, 5, 6, 7, 10, 14, 20)
        ),
        (Setting("lanczos default (10 pairs, 20 steps)"),),
        (
            Setting("power iteration, tol 0.1", {"power": True, "tol": 1e-1}),
            Setting("power iteration, default (tol 0.0001)", {"power": True}),
        ),
    )

    def __init__(self, method: str = "autograd") -> None:
        self._method: Any = method
        self.name = "hessian-eigenthings" if method == "autograd" else f"hessian-eigenthings, {method}"

    def prepare(self, model: nn.Module, batch: Batch, names: list[str]) -> eigenthings.HessianOperator:
        """As `Peer.prepare`."""
        chosen = eigenthings.match_names(*names)
        return eigenthings.HessianOperator(
            model, [batch], eigenthings.hf_lm_loss(), param_filter=chosen, method=self._method
        )

    def trace(self, kept: eigenthings.HessianOperator, setting: Setting, seed: int) -> Value:
        """As `Peer.trace`."""
        result = eigenthings.trace(kept, seed=seed, **setting.arguments)
        return Value(result.estimate, result.stderr)

    def top(self, kept: eigenthings.HessianOperator, setting: Setting, seed: int) -> Value:
        """As `Peer.top`."""
        arguments = dict(setting.arguments)
        if arguments.pop("power", False):
            return Value(eigenthings.power_iteration_one(kept, seed=seed, **arguments)[0])
        result = eigenthings.lanczos(kept, seed=seed, **arguments)
        return Value(result.eigenvalues[0].item())


class CurvlinopsPeer(Peer):
    """Hutchinson, Hutch++ and XTrace on vectorised forward-over-reverse products; SciPy's Lanczos."""

    name = "curvlinops"
    traces = (
        tuple(
            Setting(f"hutchinson, {draws} draws", {"of": "hutchinson_trace", "num_matvecs": draws}) for draws in DRAWS
        ),
        tuple(
            Setting(f"hutch++, {draws} products", {"of": "hutchpp_trace", "num_matvecs": draws}) for draws in (33, 66)
        ),
        tuple(Setting(f"xtrace, {draws} products", {"of": "xtrace", "num_matvecs": draws}) for draws in (16, 32, 64)),
    )
    tops = (
        (
            *(Setting(f"eigsh LA, tol {tol:g}", {"which": "LA", "tol": tol}) for tol in (1e-1, 1e-2)),
            Setting("eigsh LA, default (tol 0)", {"which": "LA"}),
        ),
    )

    def prepare(self, model: nn.Module, batch: Batch, names: list[str]) -> curvlinops.HessianLinearOperator:
        """As `Peer.prepare`."""
        wrapped = _Logits(model)
        parameters = [dict(model.named_parameters())[name] for name in names]
        data = [(batch["input_ids"], batch["labels"][:, 1:].flatten())]
        return curvlinops.HessianLinearOperator(
            wrapped, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False, num_data=len(data[0][0])
        )

    def trace(self, kept: curvlinops.HessianLinearOperator, setting: Setting, seed: int) -> Value:
        """As `Peer.trace`."""
        torch.manual_seed(seed)
        arguments = dict(setting.arguments)
        return Value(getattr(curvlinops, arguments.pop("of"))(kept, **arguments).item())

    def top(self, kept: curvlinops.HessianLinearOperator, setting: Setting, seed: int) -> Value:
        """As `Peer.top`."""
        start = torch.randn(kept.shape[0], generator=torch.Generator().manual_seed(seed)).numpy()
        found = eigsh(kept.to_scipy(), k=1, return_eigenvectors=False, v0=start, **setting.arguments)
        return Value(float(found[0]))


PEERS: tuple[Peer, ...] = (
    PyHessianPeer(),
    EigenthingsPeer(),
    EigenthingsPeer("finite_difference"),
    CurvlinopsPeer(),
)


class _Logits(nn.Module):
    """Token ids in, logits of the positions that predict out, as curvlinops' losses want them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits[:, :-1].flatten(0, 1)


def _shifted_loss(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
