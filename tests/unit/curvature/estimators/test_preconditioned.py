from __future__ import annotations

import dense
import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

from sharpwatch.blocks import classify
from sharpwatch.curvature.estimators.preconditioned import preconditioned_probe, preconditioner
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.errors import ProbeError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gpt2():
    """As dense.gpt2, narrower: its Hessian takes a second."""
    config = dense.gpt2(dropout=0.0).config
    config.n_embd = config.n_inner = 8
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).train()


def batch(seed=1):
    ids, labels = dense.tokens(seed=seed)
    return Batch((), {"input_ids": ids, "labels": labels})


def two_groups(model):
    parameters = list(model.parameters())
    return [{"params": parameters[:5], "lr": 1e-2}, {"params": parameters[5:], "lr": 2e-3, "betas": (0.8, 0.95)}]


@pytest.fixture(scope="module", params=["AdamW", "Adam, two groups, amsgrad"])
def case(request):
    """A model, its optimizer after a few steps, and D H D in float64."""
    model = gpt2()
    if request.param == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    else:
        optimizer = torch.optim.Adam(two_groups(model), amsgrad=True)
    for seed in range(4):
        optimizer.zero_grad()
        model(**batch(seed).kwargs).loss.backward()
        optimizer.step()
    exact = dense.Exact.of(model)
    _, hessian = dense.gradient_and_hessian(exact, *batch().kwargs.values())
    scales = []
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert name == exact.names[len(scales)]
        state, group = optimizer.state[parameter], group_of[id(parameter)]
        moment = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        root = (moment.double() / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]
        edge = (2 + 2 * group["betas"][0]) / ((1 - group["betas"][0]) * group["lr"])
        scales.append((1 / (edge * root)).sqrt().flatten())
    diagonal = torch.cat(scales)
    return model, optimizer, diagonal[:, None] * hessian * diagonal


@pytest.mark.parametrize("method", ["autograd", "differences"])
def test_is_the_top_eigenvalue_of_the_dense_preconditioned_hessian(case, method):
    model, optimizer, matrix = case
    values = torch.linalg.eigvalsh(matrix)
    found = preconditioned_probe(
        model, classify(model), batch(), [optimizer], products=40, generator=generator(), method=method
    )
    scale = float(values.abs().max())
    # float32, or differences of gradients, and the residual.
    assert abs(found.ratio - float(values[-1])) <= found.residual + (1e-5 if method == "autograd" else 1e-3) * scale
    assert found.residual < 0.05 * scale
    assert found.ratio == pytest.approx(float(values[-1]), rel=1e-2)
    assert found.products == 40
    assert found.method == ("autograd" if method == "autograd" else "gradient differences")


def test_a_warm_start_is_there_at_once(case):
    model, optimizer, matrix = case
    truth = float(torch.linalg.eigvalsh(matrix)[-1])
    block_map = classify(model)
    cold = preconditioned_probe(model, block_map, batch(), [optimizer], products=40, generator=generator())
    warm, again = (
        preconditioned_probe(
            model, block_map, batch(), [optimizer], products=2, generator=generator(), start=start, method="autograd"
        )
        for start in (cold.vector, None)
    )
    assert warm.ratio == pytest.approx(truth, rel=1e-2)
    assert again.ratio < 0.9 * truth


def test_leaves_model_and_optimizer_as_they_were(case):
    model, optimizer, _ = case
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    moments = [optimizer.state[parameter]["exp_avg_sq"].clone() for parameter in model.parameters()]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    preconditioned_probe(model, classify(model), batch(), [optimizer], products=3, generator=generator())
    assert all(torch.equal(w, p) for w, p in zip(weights, model.parameters(), strict=True))
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))
    assert all(
        torch.equal(m, optimizer.state[p]["exp_avg_sq"]) for m, p in zip(moments, model.parameters(), strict=True)
    )


def test_another_optimizer_is_refused_by_name():
    model = gpt2()
    with pytest.raises(ProbeError, match="SGD"):
        preconditioned_probe(
            model,
            classify(model),
            batch(),
            [torch.optim.SGD(model.parameters(), lr=0.1)],
            products=3,
            generator=generator(),
        )


def test_before_the_first_step_is_refused():
    model = gpt2()
    with pytest.raises(ProbeError, match="take an optimizer step first"):
        preconditioned_probe(
            model, classify(model), batch(), [torch.optim.AdamW(model.parameters())], products=3, generator=generator()
        )


class Bowl(nn.Module):
    """½ θᵀAθ, A of condition 10."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(3, 4)
        basis = torch.linalg.qr(torch.randn(12, 12, generator=generator(1), dtype=torch.float64))[0]
        curvature = basis @ torch.diag(torch.linspace(1, 10, 12, dtype=torch.float64)) @ basis.T
        self.register_buffer("curvature", curvature.float())
        nn.init.normal_(self.wte.weight, generator=generator(2))

    def forward(self, idx, targets):
        del idx, targets
        theta = self.wte.weight.flatten()
        return None, theta @ self.curvature @ theta / 2


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)])
@pytest.mark.parametrize(("ratio", "converges"), [(0.98, True), (1.02, False)])
def test_one_is_the_edge_of_stability(betas, ratio, converges):
    # Adam with its second moment held is momentum on a quadratic: it settles below the edge and grows above.
    torch.manual_seed(0)
    model = Bowl()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=betas)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    model(zero, zero)[1].backward()
    optimizer.step()
    block_map = classify(model)

    def measured():
        return preconditioned_probe(
            model, block_map, Batch((zero, zero)), [optimizer], products=12, generator=generator()
        ).ratio

    optimizer.param_groups[0]["lr"] *= ratio / measured()  # it is proportional to the rate
    assert measured() == pytest.approx(ratio, rel=1e-4)
    rate, state = optimizer.param_groups[0]["lr"], optimizer.state[model.wte.weight]
    corrected = state["exp_avg_sq"].double() / (1 - betas[1] ** float(state["step"]))
    root = (corrected.sqrt() + optimizer.param_groups[0]["eps"]).flatten()
    theta = model.wte.weight.detach().double().flatten()
    curvature, momentum = model.curvature.double(), torch.zeros(12, dtype=torch.float64)
    start = float(theta @ curvature @ theta)
    # Two per cent from the edge a step at the top shrinks or grows by 4 % without momentum, and by more with it.
    for _ in range(400):
        momentum = betas[0] * momentum + (1 - betas[0]) * (curvature @ theta)
        theta -= rate * momentum / root
    end = float(theta @ curvature @ theta)
    assert end < 1e-6 * start if converges else end > 1e3 * start


def test_the_scale_of_what_is_not_trained_is_zero():
    model = gpt2()
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if "ln" not in name], lr=1e-2)
    model(**batch().kwargs).loss.backward()
    optimizer.step()
    block_map = classify(model)
    found = preconditioned_probe(model, block_map, batch(), [optimizer], products=8, generator=generator())
    moved = set(preconditioner(model, [optimizer]))
    position = 0
    for part in block_map.parts:
        entries = found.vector[position : position + part.numel]
        position += part.numel
        if part.parameter not in moved:
            # The start has random signs there; each product takes their share of the Ritz vector away.
            assert float(entries.norm()) < 0.2
