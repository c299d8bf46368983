from __future__ import annotations

import itertools

import dense
import pytest
import torch
from transformers import LlamaForCausalLM

from sharpwatch.blocks import classify
from sharpwatch.curvature.estimators import lanczos
from sharpwatch.curvature.estimators.lanczos import Lanczos, lanczos_probe
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.errors import ProbeError

N = 120


def signs(n, seed=3, dtype=torch.float32):
    bits = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed))
    return 2.0 * bits.to(dtype) - 1.0


def rotated(values, seed=0):
    """A dense symmetric matrix with these eigenvalues, in float64."""
    values = values.double()
    noise = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis, _ = torch.linalg.qr(noise)
    matrix = basis @ torch.diag(values) @ basis.T
    return (matrix + matrix.T) / 2


def bulk(n, low, high):
    return torch.linspace(low, high, n, dtype=torch.float64)


SPECTRA = {
    "indefinite, the bottom larger in size": torch.cat([bulk(N - 4, -1, 1), torch.tensor([-15.0, -14.0, 9.0, 7.0])]),
    "clustered top": torch.cat([bulk(N - 4, 0, 1), torch.tensor([5.0, 5.001, 5.002, 5.003])]),
    "degenerate": torch.cat([torch.full((N // 2,), -1.0), torch.full((N // 4,), 2.0), torch.full((N // 4,), 3.0)]),
    "rank two": torch.cat([torch.zeros(N - 2), torch.tensor([3.0, -0.5])]),
    "positive": torch.arange(1, N + 1, dtype=torch.float64).pow(-1.5) * 100,
    "negative": -torch.arange(1, N + 1, dtype=torch.float64).pow(-1.5) * 100,
    "no gaps": bulk(N, -2, 1),
    "tiny": 1e-12 * torch.cat([bulk(N - 2, -1, 1), torch.tensor([7.0, -9.0])]),
    "huge": 1e12 * torch.cat([bulk(N - 2, -1, 1), torch.tensor([7.0, -9.0])]),
    "identity": torch.ones(N),
    "n=1": torch.tensor([-3.0]),
    "n=2": torch.tensor([-3.0, 1.0]),
    "n=3": torch.tensor([-3.0, 1.0, 1.5]),
    "n=7": torch.tensor([-3.0, 1.0, 1.5, 0.0, 0.0, 4.0, 1.0]),
}


def run(matrix, start, products):
    found = Lanczos(start)
    while found.products < products and not found.is_invariant:
        found.step(lambda vector: (matrix @ vector.double()).to(vector))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECTRA)
def test_finds_both_ends(name, dtype):
    matrix = rotated(SPECTRA[name])
    values = torch.linalg.eigvalsh(matrix)
    scale = float(values.abs().max())
    # What a product rounded to float32 leaves of an eigenvalue: a few units of 6e-8 for each of up to 80 products.
    rounding = (1e-5 if dtype == torch.float32 else 1e-12) * scale
    found = run(matrix, signs(len(values), dtype=dtype), products=80)
    top, bottom = found.top(), found.bottom()
    assert abs(top.value - float(values[-1])) <= max(1e-5 * scale, top.residual)
    assert abs(bottom.value - float(values[0])) <= max(1e-5 * scale, bottom.residual)
    assert top.value <= float(values[-1]) + rounding
    assert bottom.value >= float(values[0]) - rounding
    for ritz in (top, bottom):
        assert float(ritz.vector.norm()) == pytest.approx(1.0, abs=1e-5)
        image = matrix @ ritz.vector.double()
        residual = float((image - ritz.value * ritz.vector.double()).norm())
        assert residual == pytest.approx(ritz.residual, rel=1e-2, abs=10 * rounding)


@pytest.mark.parametrize("products", [1, 2, 3, 5, 9, 17, 33])
@pytest.mark.parametrize("name", SPECTRA)
def test_at_every_stage_some_eigenvalue_is_within_the_residual_and_none_is_passed(name, products):
    matrix = rotated(SPECTRA[name])
    values = torch.linalg.eigvalsh(matrix)
    rounding = 1e-5 * float(values.abs().max())
    found = run(matrix, signs(len(values)), products)
    for ritz in (found.top(), found.bottom()):
        assert float((values - ritz.value).abs().min()) <= ritz.residual + rounding
        assert float(values[0]) - rounding <= ritz.value <= float(values[-1]) + rounding


def test_the_top_is_the_largest_not_the_largest_in_size():
    matrix = rotated(SPECTRA["indefinite, the bottom larger in size"])
    found = run(matrix, signs(N), products=30)
    assert found.top().value == pytest.approx(9.0, rel=1e-5)
    assert found.bottom().value == pytest.approx(-15.0, rel=1e-5)


def test_a_zero_matrix_is_exhausted_at_once():
    found = run(torch.zeros(9, 9, dtype=torch.float64), signs(9), products=20)
    assert found.products == 1
    assert found.is_invariant
    assert found.converged(1e-9)
    assert found.top().value == found.bottom().value == 0.0
    assert found.top().residual == 0.0
    assert found.spectrum().eigenvalues == (0.0,)


@pytest.mark.parametrize(("name", "distinct"), [("degenerate", 3), ("rank two", 3), ("identity", 1), ("n=3", 3)])
def test_is_exhausted_after_as_many_products_as_there_are_eigenvalues(name, distinct):
    matrix = rotated(SPECTRA[name])
    found = run(matrix, signs(len(matrix)), products=30)
    assert found.products == distinct
    assert found.is_invariant
    assert found.top().residual == found.bottom().residual == 0.0
    values = torch.unique(SPECTRA[name].double())
    # Known to float32 products of a matrix of size 3.
    assert found.spectrum().eigenvalues == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 8, 9])
def test_n_products_exhaust_n_dimensions(n):
    found = run(rotated(bulk(n, -1, 2)), signs(n), products=100)
    assert found.products <= n
    assert found.is_invariant


def test_nothing_is_known_before_the_first_product():
    found = Lanczos(signs(5))
    assert not found.is_invariant
    assert found.spectrum() is None
    assert torch.allclose(found.next_vector, signs(5) / 5**0.5)


@pytest.mark.parametrize("length", [1e-20, 1.0, 1e15])
def test_the_length_of_the_start_does_not_matter(length):
    matrix = rotated(SPECTRA["no gaps"])
    ones = run(matrix, signs(N), products=10).top()
    other = run(matrix, signs(N) * length, products=10).top()
    assert other.value == pytest.approx(ones.value, rel=1e-5)


@pytest.mark.parametrize("longest", [6, 7, 12])
@pytest.mark.parametrize("name", ["indefinite, the bottom larger in size", "clustered top", "positive"])
def test_restarts_lead_to_the_same_ends(monkeypatch, name, longest):
    monkeypatch.setattr(lanczos, "_MAX_BASIS", longest)
    matrix = rotated(SPECTRA[name])
    values = torch.linalg.eigvalsh(matrix)
    found = run(matrix, signs(N), products=100)
    assert found._basis.shape[0] <= longest + 1
    scale = float(values.abs().max())
    for ritz, truth in ((found.top(), values[-1]), (found.bottom(), values[0])):
        assert abs(ritz.value - float(truth)) <= max(1e-5 * scale, ritz.residual)
        residual = float((matrix @ ritz.vector.double() - ritz.value * ritz.vector.double()).norm())
        assert residual == pytest.approx(ritz.residual, rel=1e-2, abs=1e-5 * scale)
    basis = found._basis[: found._used].double()
    # Full orthogonalization, kept across twenty restarts.
    torch.testing.assert_close(basis @ basis.T, torch.eye(found._used, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        found._projected[: found._used, : found._used], basis @ matrix @ basis.T, atol=1e-5 * scale, rtol=0
    )


def test_a_restart_loses_nothing_of_the_ends(monkeypatch):
    monkeypatch.setattr(lanczos, "_MAX_BASIS", 8)
    matrix = rotated(SPECTRA["no gaps"])
    found = Lanczos(signs(N))
    tops, bottoms = [], []
    for _ in range(60):
        found.step(lambda vector: (matrix @ vector.double()).to(vector))
        tops.append(found.top().value)
        bottoms.append(found.bottom().value)
    # Nested spaces that keep both Ritz vectors: only rounding can make an end worse.
    assert all(after >= before - 1e-5 for before, after in itertools.pairwise(tops))
    assert all(after <= before + 1e-5 for before, after in itertools.pairwise(bottoms))


def test_a_long_vector_takes_a_short_basis(monkeypatch):
    monkeypatch.setattr(lanczos, "_BASIS_BYTES", 4 * N * 9)
    found = run(rotated(SPECTRA["positive"]), signs(N), products=60)
    assert found._basis.shape[0] <= 10
    assert found.top().value == pytest.approx(100.0, rel=1e-5)
    monkeypatch.setattr(lanczos, "_BASIS_BYTES", 0)
    short = run(rotated(SPECTRA["positive"]), signs(N), products=60)
    assert short._basis.shape[0] == 7
    assert short.top().value == pytest.approx(100.0, rel=1e-5)


def products_to(matrix, start, tolerance):
    found = Lanczos(start)
    while not (found.products > 2 and found.converged(tolerance)):
        found.step(lambda vector: (matrix @ vector.double()).to(vector))
    return found.products


@pytest.mark.parametrize("name", ["indefinite, the bottom larger in size", "positive"])
def test_a_warm_start_takes_fewer_products(name):
    matrix = rotated(SPECTRA[name])
    values = torch.linalg.eigvalsh(matrix)
    found = run(matrix, signs(N), products=40)
    kept = torch.stack([found.top().vector, found.bottom().vector]).sum(0)
    noise = torch.randn(N, N, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    moved = matrix + 1e-3 * float(values.abs().max()) * (noise + noise.T) / (2 * N) ** 0.5
    cold, warm = (products_to(moved, start, 5e-3) for start in (signs(N), kept))
    assert warm < cold


@pytest.mark.parametrize("name", SPECTRA)
def test_convergence_means_what_it_says(name):
    matrix = rotated(SPECTRA[name])
    values = torch.linalg.eigvalsh(matrix)
    scale = float(values.abs().max())
    found = Lanczos(signs(len(values)))
    while not (found.is_invariant or (found.products > 2 and found.converged(1e-3))):
        found.step(lambda vector: (matrix @ vector.double()).to(vector))
    assert abs(found.top().value - float(values[-1])) <= 1e-3 * scale
    assert abs(found.bottom().value - float(values[0])) <= 1e-3 * scale


@pytest.mark.parametrize("name", SPECTRA)
def test_the_density_has_the_moments_of_the_start(name):
    # Gauss quadrature with m nodes is exact for polynomials up to degree 2m - 1 (Golub and Meurant 2010, theorem 6.3).
    matrix = rotated(SPECTRA[name])
    start = signs(len(matrix), dtype=torch.float64)
    start /= start.norm()
    for products in (1, 2, 3, 6):
        found = run(matrix, start, products)
        spectrum = found.spectrum()
        weights, nodes = (torch.tensor(x, dtype=torch.float64) for x in (spectrum.weights, spectrum.eigenvalues))
        assert float(weights.min()) >= 0
        scale = float(torch.linalg.eigvalsh(matrix).abs().max())
        for degree in range(2 * found.products):
            power = start
            for _ in range(degree):
                power = matrix @ power / scale
            moment = float(weights @ (nodes / scale) ** degree)
            # An invariant space is left at a remainder of 1e-6 of the norm.
            assert moment == pytest.approx(float(start @ power), abs=1e-9 if not found.is_invariant else 1e-5)


def test_the_density_is_the_first_runs_even_after_restarts(monkeypatch):
    monkeypatch.setattr(lanczos, "_MAX_BASIS", 8)
    matrix = rotated(SPECTRA["no gaps"])
    start = signs(N, dtype=torch.float64)
    before, after = run(matrix, start, 8).spectrum(), run(matrix, start, 50).spectrum()
    assert before == after
    assert sum(after.weights) == pytest.approx(1.0, abs=1e-9)


def test_a_long_diagonal_operator_in_float32():
    n = 20_000
    diagonal = torch.cat([bulk(n - 6, -1, 1).float(), torch.tensor([8.0, 7.9, 5.0, -12.0, -11.0, -3.0])])
    start = signs(n, dtype=torch.float64).float()
    found = Lanczos(start)
    for _ in range(40):
        found.step(lambda vector: diagonal * vector)
    assert found.top().value == pytest.approx(8.0, rel=1e-5)
    assert found.bottom().value == pytest.approx(-12.0, rel=1e-5)
    spectrum = found.spectrum()
    weights, nodes = (torch.tensor(x, dtype=torch.float64) for x in (spectrum.weights, spectrum.eigenvalues))
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-6)
    # Signs weigh every entry of a diagonal alike: vᵀHᵏv is the mean of its kth powers.
    assert float(weights @ nodes) == pytest.approx(float(diagonal.double().mean()), abs=1e-6)
    assert float(weights @ nodes**2) == pytest.approx(float(diagonal.double().square().mean()), rel=1e-5)


def test_a_start_that_misses_an_eigenvector_says_that_its_space_is_done():
    # No Krylov method can see what its start has no part in; the residual is honest: 5 is an eigenvalue, not the top.
    diagonal = torch.tensor([9.0, 5.0, -1.0, 2.0])
    found = Lanczos(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    found.step(lambda vector: diagonal * vector)
    assert found.is_invariant
    assert found.top().value == 5.0


@pytest.fixture(scope="module")
def case():
    config = dense.llama().config
    config.hidden_size = config.intermediate_size = 8
    config.num_attention_heads, config.num_key_value_heads = 2, 1
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    ids, labels = dense.tokens()
    exact = dense.Exact.of(model)
    _, hessian = dense.gradient_and_hessian(exact, ids, labels)
    return model, Batch((), {"input_ids": ids, "labels": labels}), exact, hessian


@pytest.mark.parametrize("block", ["qk", "vo", "norm", "emb"])
def test_the_probe_finds_the_ends_of_a_models_block(case, block):
    model, batch, exact, hessian = case
    block_map = classify(model)
    own = exact.entries(block_map, block)
    values = torch.linalg.eigvalsh(hessian[own][:, own])
    generator = torch.Generator().manual_seed(0)
    found = lanczos_probe(model, block_map, batch, block=block, products=30, generator=generator)
    scale = float(values.abs().max())
    assert abs(found.top - float(values[-1])) <= found.top_residual + 1e-5 * scale
    assert abs(found.bottom - float(values[0])) <= found.bottom_residual + 1e-5 * scale
    assert found.top_residual < 0.05 * scale
    again = lanczos_probe(
        model, block_map, batch, block=block, products=4, generator=generator, start=found.vectors, method="autograd"
    )
    assert again.products <= 4
    assert again.top == pytest.approx(float(values[-1]), abs=1e-3 * scale)
    assert again.bottom == pytest.approx(float(values[0]), abs=1e-3 * scale)


def test_the_probe_of_no_block_finds_the_ends_of_the_whole_model(case):
    model, batch, _, hessian = case
    values = torch.linalg.eigvalsh(hessian)
    found = lanczos_probe(
        model, classify(model), batch, block="", products=40, generator=torch.Generator().manual_seed(0)
    )
    scale = float(values.abs().max())
    assert found.vectors.shape == (2, len(hessian))
    assert found.top == pytest.approx(float(values[-1]), abs=found.top_residual + 1e-5 * scale)
    assert found.bottom == pytest.approx(float(values[0]), abs=found.bottom_residual + 1e-5 * scale)


def test_a_product_that_is_no_number_is_refused():
    found = Lanczos(signs(5))
    with pytest.raises(ProbeError, match="finite"):
        found.step(lambda vector: vector * torch.nan)


def test_a_frozen_block_is_refused_by_name():
    model = dense.gpt2()
    model.transformer.wte.weight.requires_grad_(False)
    model.transformer.wpe.weight.requires_grad_(False)
    ids, labels = dense.tokens()
    batch = Batch((), {"input_ids": ids, "labels": labels})
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ProbeError, match="emb"):
        lanczos_probe(model, classify(model), batch, block="emb", products=3, generator=generator)
