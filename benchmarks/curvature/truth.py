"""What the estimates are held against: traces and extreme eigenvalues of every block.

`tiny` models, all in float64: the trace from products with all unit vectors, the eigenvalues of the dense matrix.
`small` models: the trace by Hutchinson's estimator on what a random subspace of 96 dimensions leaves (within the
subspace it is exact), until its standard error is below 0.4 %, from products in float32, which are good to 1e-5; the
eigenvalues by Lanczos in float64 with full reorthogonalisation until the residual of the larger end is below 1e-6 of
it, and the lesser's below 1e-3 (λ is then good to 1e-6 or so), as for blocks of more than 5000 parameters everywhere.
Blocks of at most 2048 parameters are exact there too. Traces of the Gauss-Newton matrix by random signs on its square
root, to 0.4 %; on `tiny` exactly. All of it knows nothing of sharpwatch's own code.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.curvature.blocks import parameters_of
from benchmarks.curvature.models import CACHE, Batch, batch_of, key, load, split_fused

_EXACT = {"tiny": 20_000, "small": 2048}  # parameters of a block up to which its trace is exact
_DENSE = 5000
_CHUNK = 16  # products at a time
_SUBSPACE = 96
_PRECISION, _GN_PRECISION = 4e-3, 4e-3
_RESIDUAL, _LESSER_RESIDUAL = 1e-6, 1e-3  # of the larger end, both over it

Product = Callable[[Tensor], Tensor]  # rows [k, n] -> rows [k, n]


@dataclass(frozen=True, slots=True)
class BlockTruth:
    """One block; `trace_error` is a relative standard error, 0 where the trace is exact."""

    parameters: int
    trace: float
    trace_error: float
    top: float
    bottom: float


def truth_of(name: str, size: str) -> dict[str, BlockTruth]:
    """By block; computed once, block by block, then read from `.bench`."""
    path = CACHE / f"truth-{key(name, size)}.json"
    written = json.loads(path.read_text()) if path.exists() else {}
    model, batch = load(name, size), batch_of(size)
    twin = split_fused(model).double()
    for block, names in parameters_of(model).items():
        if block not in written:
            start = time.perf_counter()
            written[block] = asdict(_block(twin, batch, names, _EXACT[size]))
            path.write_text(json.dumps(written, indent=1))
            print(f"# {name} {size} {block}: {written[block]} in {time.perf_counter() - start:.0f} s", flush=True)
    return {block: BlockTruth(**values) for block, values in written.items()}


def gauss_newton_of(name: str, size: str) -> dict[str, tuple[float, float]]:
    """Tr G_bb and its relative standard error by block, as `truth_of`."""
    path = CACHE / f"gauss-newton-{key(name, size)}.json"
    if not path.exists():
        model = load(name, size)
        twin, blocks = split_fused(model).double(), parameters_of(model)
        path.write_text(json.dumps(_gauss_newton(twin, batch_of(size), blocks, exact=size == "tiny"), indent=1))
    return {block: (value, error) for block, (value, error) in json.loads(path.read_text()).items()}


def _block(model: nn.Module, batch: Batch, names: list[str], exact: int) -> BlockTruth:
    n, product = _hessian(model, batch, names)
    generator = torch.Generator().manual_seed(7)
    if n <= exact:
        trace, error = _exact_trace(product, n), 0.0
    else:
        single = copy.deepcopy(model).float()
        trace, error = _trace(_hessian(single, batch, names)[1], n, generator)
    if n <= min(exact, _DENSE):
        matrix = product(torch.eye(n, dtype=torch.float64))
        values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
        top, bottom = values[-1].item(), values[0].item()
    else:
        top, bottom = _lanczos(product, n, generator)
    return BlockTruth(n, trace, error, top, bottom)


def _hessian(model: nn.Module, batch: Batch, names: list[str]) -> tuple[int, Product]:
    """The block's size and products with its Hessian, through one kept graph."""
    parameters = [dict(model.named_parameters())[name] for name in names]
    with sdpa_kernel(SDPBackend.MATH):
        found = torch.autograd.grad(model(**batch).loss, parameters, create_graph=True)
    gradient = torch.cat([g.flatten() for g in found])

    def product(rows: Tensor) -> Tensor:
        done = [
            torch.autograd.grad(gradient, parameters, piece, retain_graph=True, is_grads_batched=True)
            for piece in rows.split(_CHUNK)
        ]
        return torch.cat([torch.cat([g.flatten(1) for g in piece], 1) for piece in done])

    return len(gradient), product


def _exact_trace(product: Product, n: int) -> float:
    total = 0.0
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        rows = torch.zeros(stop - start, n, dtype=torch.float64)
        rows[torch.arange(stop - start), torch.arange(start, stop)] = 1
        total += product(rows)[torch.arange(stop - start), torch.arange(start, stop)].sum().item()
    return total


def _trace(product: Product, n: int, generator: torch.Generator) -> tuple[float, float]:
    """The trace and its relative standard error (Meyer et al., "Hutch++", arXiv 2010.09649)."""
    basis = torch.linalg.qr(product(_signs(_SUBSPACE, n, generator).float()).T)[0].T
    within = (basis * product(basis)).sum(dtype=torch.float64).item()
    samples: list[float] = []
    while True:
        signs = _signs(_CHUNK, n, generator).float()
        rest = signs - (signs @ basis.T) @ basis
        samples += (rest * product(rest)).sum(1, dtype=torch.float64).tolist()
        values = torch.tensor(samples, dtype=torch.float64)
        value = within + values.mean().item()
        error = (values.std() / math.sqrt(len(values))).item() / abs(value)
        if len(samples) >= 64 and error < _PRECISION:
            return value, error


def _lanczos(product: Product, n: int, generator: torch.Generator) -> tuple[float, float]:
    """The largest and the smallest eigenvalue."""
    vector = torch.randn(n, dtype=torch.float64, generator=generator)
    basis = [vector / vector.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = product(basis[-1][None])[0]
        diagonal.append((image @ basis[-1]).item())
        span = torch.stack(basis)
        for _ in range(2):
            image = image - span.T @ (span @ image)
        beside.append(image.norm().item())
        tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside[:-1]:
            off = torch.tensor(beside[:-1], dtype=torch.float64)
            tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        residuals = beside[-1] * vectors[-1].abs()
        ends = sorted((0, -1), key=lambda end: values[end].abs().item())
        scale = values[ends[1]].abs()
        done = residuals[ends[1]] < _RESIDUAL * scale and residuals[ends[0]] < _LESSER_RESIDUAL * scale
        if done and len(diagonal) > 20:
            return values[-1].item(), values[0].item()
        basis.append(image / beside[-1])


def _gauss_newton(
    model: nn.Module, batch: Batch, blocks: dict[str, list[str]], *, exact: bool
) -> dict[str, tuple[float, float]]:
    """Tr G_bb by block with its relative error: ‖Aᵀz‖² of random signs z or the sum over all rows, AᵀA = G."""
    parameters = dict(model.named_parameters())
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    probabilities = logits.detach().softmax(-1)
    scale = 1 / math.sqrt(len(logits))
    order = [(block, parameters[name]) for block, names in blocks.items() for name in names]

    def norms(directions: Tensor) -> dict[str, Tensor]:
        leaves = [parameter for _, parameter in order]
        found = torch.autograd.grad(logits, leaves, directions, retain_graph=True, is_grads_batched=True)
        sums = {block: torch.zeros(len(directions), dtype=torch.float64) for block in blocks}
        for (block, _), gradient in zip(order, found, strict=True):
            sums[block] += gradient.flatten(1).square().sum(1)
        return sums

    def root(signs: Tensor) -> Tensor:  # diag(√p) − p√pᵀ of every position, on rows [k, N, V]
        scaled = signs * probabilities.sqrt()
        return (scaled - probabilities * scaled.sum(-1, keepdim=True)) * scale

    if exact:
        totals = dict.fromkeys(blocks, 0.0)
        for rows in _unit_rows(probabilities):
            for block, values in norms(root(rows)).items():
                totals[block] += values.sum().item()
        return {block: (total, 0.0) for block, total in totals.items()}
    generator = torch.Generator().manual_seed(8)
    samples: dict[str, list[float]] = {block: [] for block in blocks}
    while True:
        signs = _signs(_CHUNK, probabilities.numel(), generator).view(_CHUNK, *probabilities.shape)
        for block, values in norms(root(signs)).items():
            samples[block] += values.tolist()
        tensors = {block: torch.tensor(values, dtype=torch.float64) for block, values in samples.items()}
        found = {
            block: (values.mean().item(), (values.std() / values.mean() / math.sqrt(len(values))).item())
            for block, values in tensors.items()
        }
        if len(samples[block]) >= 64 and all(error < _GN_PRECISION for _, error in found.values()):
            return found


def _unit_rows(like: Tensor) -> Iterator[Tensor]:
    """All unit vectors of the shape of `like`, some at a time."""
    for start in range(0, like.numel(), 4 * _CHUNK):
        stop = min(start + 4 * _CHUNK, like.numel())
        rows = torch.zeros(stop - start, like.numel(), dtype=like.dtype)
        rows[torch.arange(stop - start), torch.arange(start, stop)] = 1
        yield rows.view(-1, *like.shape)


def _signs(rows: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (rows, n), generator=generator).double() * 2 - 1
