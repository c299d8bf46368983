from __future__ import annotations

import copy
import weakref

import dense
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from sharpwatch.blocks import Rule, Rules, classify
from sharpwatch.curvature.objective import hessian as engine
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.hessian import open_hessian
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace
from sharpwatch.errors import ProbeError


def gpt2():
    """As dense.gpt2, narrower: its Hessian takes a second."""
    config = dense.gpt2().config
    config.n_embd = config.n_inner = 8
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).train()


def llama():
    """As dense.llama, narrower."""
    config = dense.llama().config
    config.hidden_size = config.intermediate_size = 8
    config.num_attention_heads, config.num_key_value_heads = 2, 1
    torch.manual_seed(0)
    return LlamaForCausalLM(config).train()


def trained(make, steps=30):
    """After a few steps of AdamW, where the Gauss-Newton part no longer rules."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids, labels = dense.tokens(rows=8, seed=5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.zero_grad()
    return model


MAKES = {
    "gpt2": gpt2,
    "llama": llama,
    "trained gpt2": lambda: trained(gpt2),
    "trained llama": lambda: trained(llama),
}
CASES = {}


@pytest.fixture(params=MAKES)
def case(request):
    """A model, its batch, and its Hessian at its weights in float64."""
    if request.param not in CASES:
        model = MAKES[request.param]()
        ids, labels = dense.tokens()
        exact = dense.Exact.of(model)
        gradient, hessian = dense.gradient_and_hessian(exact, ids, labels)
        CASES[request.param] = model, Batch((), {"input_ids": ids, "labels": labels}), exact, gradient, hessian
    return CASES[request.param]


def random(size, count=2, seed=4, dtype=torch.float32):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


def blocks_of(block_map):
    return (None, *block_map.blocks)


@pytest.mark.parametrize("method", ["autograd", "differences"])
def test_products_are_the_dense_hessians_in_every_block(case, method):
    model, batch, exact, _, hessian = case
    block_map = classify(model)
    worst = {}
    with open_hessian(model, block_map, [batch], method=method) as found:
        for block in blocks_of(block_map):
            space = ParameterSpace(block_map, block, found.objective.live.leaves)
            own = torch.arange(len(hessian)) if block is None else exact.entries(block_map, block)
            vectors = random(space.size)
            if block is None:  # a space's order is that of the parts, in which fused parameters lie slice by slice
                own = torch.cat(exact.by_part(block_map, own))
            truth = vectors.double() @ hessian[own][:, own]
            worst[block] = relative(found.products(space, vectors), truth)
    # Autograd: float32 sums through a few layers. Differences: what the rounding of gradients leaves (0.06 %).
    assert max(worst.values()) <= (2e-5 if method == "autograd" else 1e-3), worst


@pytest.mark.parametrize("method", ["auto", "autograd", "differences"])
def test_the_gradient_is_the_losss(case, method):
    model, batch, exact, gradient, _ = case
    block_map = classify(model)
    with open_hessian(model, block_map, [batch], method=method) as found:
        space = ParameterSpace(block_map, None, found.objective.live.leaves)
        own = torch.cat(exact.by_part(block_map, gradient))
        assert relative(space.flatten(found.gradient(0)), own) < 1e-5
        assert found.method == ("gradient differences" if method == "differences" else "autograd")
        assert found.smooth


def products(model, batches, block, method, vectors=None, *, loss_fn=None, rules=None):
    """Products with three vectors of signs, or `vectors`, and by what they were had."""
    block_map = classify(model, rules)
    with open_hessian(model, block_map, batches, method=method, loss_fn=loss_fn) as found:
        space = ParameterSpace(block_map, block, found.objective.live.leaves)
        if vectors is None:
            vectors = torch.sign(random(space.size, 3))
        return found.products(space, vectors), found.method


def whole_batch(rows=3):
    ids, labels = dense.tokens(rows=rows)
    return Batch((), {"input_ids": ids, "labels": labels})


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_model_held_in_bfloat16_has_the_products_of_its_weights_in_float32(make):
    model = make().bfloat16()
    batch = whole_batch()
    blocks = classify(model).blocks
    truth = {block: products(copy.deepcopy(model).float(), [batch], block, "autograd")[0] for block in blocks}
    for block in blocks:
        for method in ("autograd", "differences"):
            found, _ = products(model, [batch], block, method)
            assert relative(found, truth[block].double()) <= (1e-6 if method == "autograd" else 1e-3)
            with torch.autocast("cpu", torch.bfloat16):
                inside, _ = products(model, [batch], block, method)
                assert torch.is_autocast_enabled("cpu")
            assert torch.equal(inside, found)


@pytest.mark.parametrize("method", ["autograd", "differences"])
def test_autocast_is_off_inside_and_as_before_afterwards(method):
    model = gpt2()
    seen = []

    def loss_fn(called, batch):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()))
        return called(**batch.kwargs).loss

    with torch.autocast("cpu", torch.bfloat16):
        products(model, [whole_batch()], "vo", method, loss_fn=loss_fn)
        assert torch.is_autocast_enabled("cpu")
    assert set(seen) == {(False, "highest")}


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_model_in_float64_stays_in_float64(make):
    model = make().double()
    batch = whole_batch()
    exact = dense.Exact.of(model)
    _, hessian = dense.gradient_and_hessian(exact, batch.kwargs["input_ids"], batch.kwargs["labels"])
    block_map = classify(model)
    for block in ("qk", "norm"):
        own = exact.entries(block_map, block)
        vectors = random(len(own), dtype=torch.float64)
        truth = vectors @ hessian[own][:, own]
        # transformers takes the logits' float32 for the loss, also here.
        assert relative(products(model, [batch], block, "autograd", vectors)[0], truth) < 1e-6
        # The stencil's own error, of the fourth power of the step; largest in `norm`.
        assert relative(products(model, [batch], block, "differences", vectors)[0], truth) < 2e-3
        single = products(model, [batch], block, "autograd", vectors.float())[0]
        assert single.dtype == torch.float32
        assert relative(single, vectors.float().double() @ hessian[own][:, own]) < 2e-6


@pytest.mark.parametrize("method", ["autograd", "differences"])
def test_several_batches_are_as_one_that_holds_them_all(method):
    model = gpt2()
    ids, labels = dense.tokens(rows=6)
    cut = zip(torch.split(ids, [1, 3, 2]), torch.split(labels, [1, 3, 2]), strict=True)
    parts = [Batch((), {"input_ids": i, "labels": each}) for i, each in cut]
    truth, _ = products(model, [Batch((), {"input_ids": ids, "labels": labels})], "vo", "autograd")
    found, _ = products(model, parts, "vo", method)
    assert relative(found, truth.double()) <= (2e-5 if method == "autograd" else 1e-3)
    truths = [products(model, [parts[index]], "vo", "autograd")[0].double() for index in (2, 0)]
    block_map = classify(model)
    with open_hessian(model, block_map, parts, method=method) as hessian:
        space = ParameterSpace(block_map, "vo", hessian.objective.live.leaves)
        vectors = torch.sign(random(space.size, 3))
        alone = [hessian.products(space, vectors, index) for index in (2, 0)]  # in any order
    assert all(relative(one, own) <= 1e-3 for one, own in zip(alone, truths, strict=True))


@pytest.mark.parametrize("count", [2, 8, 11])
def test_several_vectors_at_once_are_as_one_by_one(count):
    model = llama()
    block_map = classify(model)
    with open_hessian(model, block_map, [whole_batch()], method="autograd") as found:
        for block in blocks_of(block_map):
            space = ParameterSpace(block_map, block, found.objective.live.leaves)
            vectors = random(space.size, count)
            before = found.objective.cost
            batched = found.products(space, vectors)
            assert (found.objective.cost - before).backwards in {count, count + 1}  # the first opens the graph
            alone = torch.cat([found.products(space, vector[None]) for vector in vectors])
            assert relative(batched, alone.double()) < 1e-5
        assert found._batched


def test_a_product_over_batches_begins_with_the_graph_that_is_held():
    """It isn't built again, and the sum is the same to the bit whichever batch it is of."""
    batches = [dense.tokens(rows=1, seed=seed) for seed in range(3)]
    parts = [Batch((), {"input_ids": ids, "labels": labels}) for ids, labels in batches]
    model = gpt2()
    block_map = classify(model)
    with open_hessian(model, block_map, parts, method="autograd", shares=[0.5, 0.25, 0.25]) as found:
        space = ParameterSpace(block_map, "ffn", found.objective.live.leaves)
        vector = random(space.size, count=1)
        made = []
        for held in range(3):
            found.gradient(held)
            before = found.objective.cost
            made.append(found.products(space, vector))
            cost = found.objective.cost - before
            assert cost.forwards == pytest.approx(1 - found.objective.shares[held])
            assert torch.equal(made[-1], made[0])


def test_products_do_not_depend_on_what_was_asked_before():
    model = gpt2()
    block_map = classify(model)
    with open_hessian(model, block_map, [whole_batch()], method="auto") as found:
        spaces = [ParameterSpace(block_map, block, found.objective.live.leaves) for block in block_map.blocks]
        first = [found.products(space, random(space.size)) for space in spaces]
        displacement = torch.ones(spaces[0].size)
        with found.objective.displaced(spaces[0], displacement):
            found.objective.value(0)
        again = [found.products(space, random(space.size)) for space in reversed(spaces)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))


class Toy(nn.Module):
    """An embedding, something in between, and a head: `inner` [batch, T, 8] -> the same."""

    def __init__(self, inner):
        super().__init__()
        self.wte = nn.Embedding(20, 8)
        self.mlp = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20)
        self.inner = inner

    def forward(self, idx, targets):
        return F.cross_entropy(self.head(self.inner(self, self.wte(idx))).flatten(0, 1), targets.flatten())


TOY_RULES = Rules((Rule("mlp.*", block="ffn"), Rule("head.*", block="head")))


def toy(inner, method="auto", block="ffn"):
    torch.manual_seed(0)
    model = Toy(inner)
    generator = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(0, 20, (2, 6), generator=generator) for _ in range(2))
    return products(model, [Batch((ids, targets))], block, method, rules=TOY_RULES)


def tanh(module, x):
    return module.mlp(x).tanh()


class OnceTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class KernelTanh(torch.autograd.Function):
    """As a flash kernel is: its backward fills memory that autograd does not see."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        found = torch.empty_like(y)
        found.detach().numpy()[...] = grad.detach().numpy() * (1 - y.detach().numpy() ** 2)
        return found


class LoopTanh(torch.autograd.Function):
    """AutogradHessian differentiable, with a backward that knows no batch of vectors."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return LoopScale.apply(grad, 1 - y * y)


class LoopScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, by):
        ctx.save_for_backward(x, by)
        return x * by

    @staticmethod
    def backward(ctx, grad):
        x, by = ctx.saved_tensors
        return LoopScale.apply(grad, by), LoopScale.apply(grad, x)


def test_falls_to_differences_where_a_function_can_be_differentiated_once():
    truth, how = toy(tanh)
    assert how == "autograd"
    found, how = toy(lambda module, x: OnceTanh.apply(module.mlp(x)))
    assert how == "gradient differences"
    assert relative(found, truth.double()) <= 1e-3
    with pytest.raises(ProbeError, match="OnceTanh"):
        toy(lambda module, x: OnceTanh.apply(module.mlp(x)), "autograd")


def test_falls_to_differences_for_a_known_packages_kernel(monkeypatch):
    monkeypatch.setattr(KernelTanh, "__module__", "liger_kernel.ops")
    found, how = toy(lambda module, x: KernelTanh.apply(module.mlp(x)))
    assert how == "gradient differences"
    assert relative(found, toy(tanh)[0].double()) <= 1e-3


def test_falls_to_differences_for_a_kernel_that_nobody_knows():
    found, how = toy(lambda module, x: KernelTanh.apply(module.mlp(x)))
    assert how == "gradient differences"
    assert relative(found, toy(tanh)[0].double()) <= 1e-3


def test_refuses_autograd_for_a_kernel_that_nobody_knows():
    with pytest.raises(ProbeError, match="KernelTanh"):
        toy(lambda module, x: KernelTanh.apply(module.mlp(x)), "autograd")


def test_a_function_without_a_batching_rule_is_taken_one_by_one():
    found, how = toy(lambda module, x: LoopTanh.apply(module.mlp(x)))
    assert how == "autograd"
    assert relative(found, toy(tanh)[0].double()) < 1e-5


@pytest.fixture(scope="module")
def alias():
    """A view operator of its own, for which torch has no batching rule and can't make one."""
    library = torch.library.Library("sharpwatch_test", "DEF")
    library.define("same(Tensor(a) x) -> Tensor(a)")

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            with torch._C._AutoDispatchBelowAutograd():
                return torch.ops.sharpwatch_test.same(x)

        @staticmethod
        def backward(_, grad):
            return torch.ops.sharpwatch_test.same(grad)

    library.impl("same", torch.ops.aten.alias, "CompositeExplicitAutograd")
    library.impl("same", Same.apply, "Autograd")
    yield torch.ops.sharpwatch_test.same
    library._destroy()


def test_an_operator_without_a_batching_rule_is_taken_one_by_one(alias):
    found, how = toy(lambda module, x: alias(module.mlp(x)).tanh())
    assert how == "autograd"
    assert relative(found, toy(tanh)[0].double()) < 1e-5


def attention(module, x):
    q = module.mlp(x).view(2, 6, 2, 4).transpose(1, 2)
    return x + F.scaled_dot_product_attention(q, q.tanh(), q, is_causal=True).transpose(1, 2).reshape(2, 6, 8)


def by_hand(module, x):
    q = module.mlp(x).view(2, 6, 2, 4).transpose(1, 2)
    scores = (q @ q.tanh().transpose(2, 3) / 2).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    return x + (scores.softmax(-1) @ q).transpose(1, 2).reshape(2, 6, 8)


@pytest.mark.parametrize("method", ["auto", "autograd", "differences"])
def test_attention_with_torchs_own_kernels_needs_nothing_of_the_user(method):
    truth, _ = toy(by_hand)
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    found, how = toy(attention, method)
    assert how == ("gradient differences" if method == "differences" else "autograd")
    assert relative(found, truth.double()) <= (1e-5 if how == "autograd" else 1e-3)
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == before


def test_the_users_choice_of_attention_kernels_stands_afterwards():
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        _, how = toy(attention)
        assert torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.math_sdp_enabled()
    assert how == "autograd"
    assert torch.backends.cuda.math_sdp_enabled()


def checkpointed(reentrant, inner):
    return lambda module, x: checkpoint(inner, module, x, use_reentrant=reentrant)


@pytest.mark.parametrize("block", ["ffn", "emb"])
@pytest.mark.parametrize("method", ["autograd", "differences"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_part_has_the_products_of_the_part_itself(reentrant, method, block):
    # The backward computes it again, and must do so at the weights of its forward. Differences at the model's own
    # weights, for one, would be those of the rest of the model: that is far from the truth, as asserted first.
    truth, _ = toy(tanh, "autograd", block)
    without, _ = toy(lambda module, x: module.mlp(x).tanh().detach() + 0 * x, "autograd", block)
    assert relative(without, truth.double()) > 0.1
    found, _ = toy(checkpointed(reentrant, tanh), method, block)
    assert relative(found, truth.double()) <= (1e-5 if method == "autograd" else 1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_part_is_computed_again_at_the_displaced_weights(reentrant):
    # Every computation of the part sees the weights of the difference that is being taken.
    seen = []

    def part(module, x):
        seen.append(module.mlp.weight.detach().clone())
        return tanh(module, x)

    toy(checkpointed(reentrant, part), "differences")
    del seen[0]  # one forward at the weights as they are: whether the model runs in float32 at all
    distinct = {tuple(weights.flatten().tolist()) for weights in seen}
    forwards = 4 * 3  # offsets, vectors
    assert len(distinct) == forwards
    assert len(seen) == (forwards if reentrant else 2 * forwards)
    if not reentrant:
        assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))


@pytest.mark.parametrize("method", ["auto", "autograd", "differences"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_attention_is_computed_again_by_the_same_kernel(reentrant, method):
    truth, _ = toy(by_hand)
    found, how = toy(checkpointed(reentrant, attention), method)
    assert how == ("gradient differences" if method == "differences" else "autograd")
    assert relative(found, truth.double()) <= (1e-5 if how == "autograd" else 1e-3)


SETTINGS = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "no convolutions": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "cuda": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "cpu": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "exact convolutions": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
}


def places():
    backends = torch.backends
    return [
        *(backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn),
        *(backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn),
    ]


@pytest.fixture
def precisions():
    """torch's settings, put back after the test."""
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("this torch has one setting only")
    saved = torch.backends.fp32_precision, [place.fp32_precision for place in places()]
    convolutions = torch.backends.cudnn.allow_tf32
    yield lambda: [torch.backends.fp32_precision, *(place.fp32_precision for place in places())]
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = saved[0]
    for place, value in zip(places(), saved[1], strict=True):
        place.fp32_precision = value
    torch.backends.cudnn.allow_tf32 = convolutions  # a flag beside them: where they differ, reading it raises
    assert torch.backends.cudnn.allow_tf32 == convolutions


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_precision_of_products_of_matrices_is_full_inside_and_as_before_afterwards(precisions, setting):
    SETTINGS[setting]()
    before = precisions()
    inside = []

    def seeing(module, x):
        inside.append((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return tanh(module, x)

    toy(seeing)
    assert set(inside) == {("ieee", "ieee")}
    assert precisions() == before


def test_a_sparse_embedding_has_the_products_of_a_dense_one():
    torch.manual_seed(0)
    ids, targets = (torch.randint(0, 20, (2, 6)) for _ in range(2))
    model = Toy(tanh)
    truth, _ = products(model, [Batch((ids, targets))], "emb", "autograd", rules=TOY_RULES)
    model.wte.sparse = True
    for method in ("differences", "auto"):
        found, _ = products(model, [Batch((ids, targets))], "emb", method, rules=TOY_RULES)
        assert relative(found, truth.double()) <= 1e-3


@pytest.mark.parametrize("method", ["autograd", "differences"])
def test_what_the_loss_does_not_reach_is_zero(method):
    model = gpt2()
    model.unused = nn.Linear(3, 3)
    model.transformer.wpe.weight.requires_grad_(False)
    block_map = classify(model, Rules((Rule("unused.*", block="other"),)))
    with open_hessian(model, block_map, [whole_batch()], method=method) as found:
        other = ParameterSpace(block_map, "other", found.objective.live.leaves)
        assert torch.equal(found.products(other, torch.ones(2, 12)), torch.zeros(2, 12))
        emb = ParameterSpace(block_map, "emb", found.objective.live.leaves)
        assert emb.size == model.transformer.wte.weight.numel()
        assert found.products(emb, torch.ones(1, emb.size)).norm() > 0
        whole = ParameterSpace(block_map, None, found.objective.live.leaves)
        image = found.products(whole, torch.ones(1, whole.size))[0]
        assert int((image[whole.mask("other") == 1] != 0).sum()) == 0


@pytest.mark.parametrize("method", ["autograd", "differences"])
def test_the_product_with_nothing_is_nothing(method):
    model = gpt2()
    space_of = classify(model)
    with open_hessian(model, space_of, [whole_batch()], method=method) as found:
        space = ParameterSpace(space_of, "vo", found.objective.live.leaves)
        # FiniteDifferenceHessian: rounding of the same gradient four times over, through a step of 0.01.
        assert float(found.products(space, torch.zeros(1, space.size)).abs().max()) < 1e-5


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_differences_do_not_depend_on_the_length_of_the_vector(size):
    model = llama()
    vectors = random(ParameterSpace(classify(model), "qk", dict(model.named_parameters())).size, 1)
    truth, _ = products(model, [whole_batch()], "qk", "autograd", vectors)
    found, _ = products(model, [whole_batch()], "qk", "differences", size * vectors)
    assert relative(found / size, truth.double()) <= 1e-3


class ZeroCentred(nn.Module):
    """A norm whose scale is 1 + weight, as Gemma's: its weights begin at zero and stay small."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.weight)


@pytest.mark.parametrize("size", [0.0, 1e-5, 1e-1])
def test_differences_are_right_for_a_block_whose_weights_are_near_zero(size):
    torch.manual_seed(0)
    model = Toy(lambda module, x: module.norm(module.mlp(x)).tanh())
    model.norm = ZeroCentred()
    nn.init.normal_(model.norm.weight, std=size) if size else None
    ids, targets = (torch.randint(0, 20, (2, 6)) for _ in range(2))
    rules = Rules((*TOY_RULES.rules, Rule("norm.*", block="norm")))
    truth, _ = products(model, [Batch((ids, targets))], "norm", "autograd", rules=rules)
    found, _ = products(model, [Batch((ids, targets))], "norm", "differences", rules=rules)
    assert relative(found, truth.double()) <= 1e-3


class BoomError(Exception):
    pass


def test_an_error_inside_leaves_the_model_as_it_was():
    model = gpt2()
    before = copy.deepcopy(model.state_dict())

    def fail():
        with open_hessian(model, classify(model), [whole_batch()]):
            raise BoomError

    with pytest.raises(BoomError):
        fail()
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(mode):
    model = gpt2()
    truth, _ = products(model, [whole_batch()], "vo", "auto")
    with mode():
        found, _ = products(model, [whole_batch()], "vo", "auto")
    assert torch.equal(found, truth)


def opened_toy(model, loss_fn=None):
    generator = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(0, 20, (2, 6), generator=generator) for _ in range(2))
    return open_hessian(model, classify(model, TOY_RULES), [Batch((ids, targets))], loss_fn=loss_fn)


def test_of_a_trial_that_was_refused_nothing_is_kept_while_differences_are_taken(monkeypatch):
    tried = []

    class Tried(engine.AutogradHessian):
        def __init__(self, objective):
            super().__init__(objective)
            tried.append(weakref.ref(self))

    monkeypatch.setattr(engine, "AutogradHessian", Tried)
    model = Toy(lambda module, x: OnceTanh.apply(module.mlp(x)))
    for _ in range(2):
        with opened_toy(model) as found:
            assert found.method == "gradient differences"
            assert [one() for one in tried] == [None]  # and it is tried once


def no_loss(*_):
    return None


def loss_of_other_shapes(*_):
    raise RuntimeError("The size of tensor a (3) must match the size of tensor b (2)")


@pytest.mark.parametrize("loss_fn", [no_loss, loss_of_other_shapes])
def test_a_batch_that_fails_either_way_says_nothing_of_the_model(loss_fn):
    model = Toy(tanh)

    def fail():
        with opened_toy(model, loss_fn) as found:
            found.gradient(0)

    with pytest.raises(ProbeError):
        fail()
    with opened_toy(model) as found:
        assert found.method == "autograd"
