"""Models of other libraries are placed without a rule: as they name and build their parts, and the libraries' own."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch
from torch import nn

from sharpwatch.blocks import classify

D, HEADS, V = 8, 2, 11


def types(model):
    """The block or blocks of each parameter, with numbers as `*`."""
    found = {}
    for row in classify(model, strict=True).rows:
        found.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", row.parameter), set()).add(row.type)
    return {name: "+".join(sorted(blocks)) for name, blocks in found.items()}


def weights(model):
    """As `types`, of weights alone, by their owners' names."""
    return {name.removesuffix(".weight"): kind for name, kind in types(model).items() if not name.endswith("bias")}


class FusedAttention(nn.Module):
    """As in timm."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.q_norm, self.k_norm = nn.LayerNorm(D // HEADS), nn.LayerNorm(D // HEADS)

    def forward(self, x):
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return q, k, v


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)


class PatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, D, 4, 4)


class VisionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(D), FusedAttention(), nn.LayerNorm(D), Mlp()


class VisionTransformer(nn.Module):
    """As timm's vision transformers are built."""

    def __init__(self):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, D)), nn.Parameter(torch.zeros(1, 5, D))
        self.patch_embed = PatchEmbed()
        self.blocks = nn.Sequential(VisionBlock(), VisionBlock())
        self.norm, self.fc_norm, self.head = nn.LayerNorm(D), nn.LayerNorm(D), nn.Linear(D, 10)


def test_a_vision_transformer_in_timms_manner():
    assert weights(VisionTransformer()) == {
        "cls_token": "other",
        "pos_embed": "other",
        "patch_embed.proj": "other",
        "blocks.*.norm1": "norm",
        "blocks.*.attn.qkv": "qk+vo",
        "blocks.*.attn.proj": "vo",
        "blocks.*.attn.q_norm": "norm",
        "blocks.*.attn.k_norm": "norm",
        "blocks.*.norm2": "norm",
        "blocks.*.mlp.fc1": "ffn",
        "blocks.*.mlp.fc2": "ffn",
        "norm": "norm",
        "fc_norm": "norm",
        "head": "head",
    }


def modulation(parts):
    return nn.Sequential(nn.SiLU(), nn.Linear(D, parts * D))


class TimestepEmbedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, D), nn.SiLU(), nn.Linear(D, D))


class LabelEmbedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding_table = nn.Embedding(10, D)


class DiTBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp, self.adaLN_modulation = FusedAttention(), Mlp(), modulation(6)


class FinalLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.adaLN_modulation = nn.Linear(D, 12), modulation(2)


class DiT(nn.Module):
    """As DiT is built."""

    def __init__(self):
        super().__init__()
        self.x_embedder, self.t_embedder, self.y_embedder = PatchEmbed(), TimestepEmbedder(), LabelEmbedder()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, D), requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock(), DiTBlock()])
        self.final_layer = FinalLayer()


def test_a_diffusion_transformer_in_dits_manner():
    assert weights(DiT()) == {
        "pos_embed": "other",
        "x_embedder.proj": "other",
        "t_embedder.mlp.*": "other",
        "y_embedder.embedding_table": "emb",
        "blocks.*.attn.qkv": "qk+vo",
        "blocks.*.attn.proj": "vo",
        "blocks.*.attn.q_norm": "norm",
        "blocks.*.attn.k_norm": "norm",
        "blocks.*.mlp.fc1": "ffn",
        "blocks.*.mlp.fc2": "ffn",
        "blocks.*.adaLN_modulation.*": "other",
        "final_layer.linear": "head",
        "final_layer.adaLN_modulation.*": "other",
    }


class NanochatAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_q, self.c_k, self.c_v = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.c_proj, self.ve_gate = nn.Linear(D, D, bias=False), nn.Linear(4, HEADS, bias=False)


class NanochatMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)


class NanochatBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = NanochatAttention(), NanochatMlp()


class Nanochat(nn.Module):
    """As nanochat's GPT is built."""

    def __init__(self):
        super().__init__()
        layers = nn.ModuleList([NanochatBlock(), NanochatBlock()])
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(V, D), "h": layers})
        self.lm_head = nn.Linear(D, V, bias=False)
        self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
        self.value_embeds = nn.ModuleDict({"0": nn.Embedding(V, D), "1": nn.Embedding(V, D)})
        self.smear_gate = nn.Linear(4, 1, bias=False)


def test_nanochat():
    assert weights(Nanochat()) == {
        "resid_lambdas": "other",
        "x0_lambdas": "other",
        "transformer.wte": "emb",
        "transformer.h.*.attn.c_q": "qk",
        "transformer.h.*.attn.c_k": "qk",
        "transformer.h.*.attn.c_v": "vo",
        "transformer.h.*.attn.c_proj": "vo",
        "transformer.h.*.attn.ve_gate": "other",
        "transformer.h.*.mlp.c_fc": "ffn",
        "transformer.h.*.mlp.c_proj": "ffn",
        "lm_head": "head",
        "value_embeds.*": "emb",
        "smear_gate": "other",
    }


def test_torchs_own_transformer():
    model = nn.Transformer(D, HEADS, 1, 1, 16, batch_first=True)
    found = weights(model)
    assert {name: kind for name, kind in found.items() if "norm" not in name} == {
        "encoder.layers.*.self_attn.in_proj_weight": "qk+vo",
        "encoder.layers.*.self_attn.out_proj": "vo",
        "encoder.layers.*.linear1": "ffn",
        "encoder.layers.*.linear2": "ffn",
        "decoder.layers.*.self_attn.in_proj_weight": "qk+vo",
        "decoder.layers.*.self_attn.out_proj": "vo",
        "decoder.layers.*.multihead_attn.in_proj_weight": "qk+vo",
        "decoder.layers.*.multihead_attn.out_proj": "vo",
        "decoder.layers.*.linear1": "ffn",
        "decoder.layers.*.linear2": "ffn",
    }
    assert {kind for name, kind in found.items() if "norm" in name} == {"norm"}


class Critic(nn.Module):
    """A head of a task after layers whose feed-forward part has no telling name."""

    def __init__(self):
        super().__init__()
        self.input_proj = nn.Linear(3, D)
        self.layers = nn.ModuleList([nn.ModuleDict({"attn": FusedAttention(), "part": self.part()}) for _ in range(2)])
        self.critic = nn.Linear(D, 1)

    def part(self):
        return nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))


def test_what_has_no_telling_name_is_placed_by_its_shape_and_place():
    found = weights(Critic())
    assert found["input_proj"] == "other"
    assert found["layers.*.part.*"] == "ffn"
    assert found["critic"] == "head"


def test_a_convolution_beside_matrices_is_no_feed_forward_part():
    model = Critic()
    model.layers[0]["part"] = nn.Sequential(*Critic().part(), nn.ModuleDict({"mixer": nn.Conv1d(D, D, 3)}))
    found = weights(model)
    assert found["layers.*.part.*"] == "ffn"
    assert found["layers.*.part.*.mixer"] == "other"


def test_a_part_with_a_word_of_attention_is_never_taken_for_feed_forward():
    model = Critic()
    model.layers[0]["part"] = nn.ModuleDict({"img_attn_first": nn.Linear(D, D), "img_attn_last": nn.Linear(D, D)})
    unplaced = classify(model).unplaced
    assert [name for name in unplaced if name.endswith("weight")] == [
        "layers.0.part.img_attn_first.weight",
        "layers.0.part.img_attn_last.weight",
    ]


@pytest.mark.parametrize("reparametrize", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_a_reparametrized_matrix_is_placed_as_the_matrix(reparametrize):
    model = VisionTransformer()
    for block in model.blocks:
        reparametrize(block.attn.qkv)
        reparametrize(block.mlp.fc1)
    found = types(model)
    originals = {name: kind for name, kind in found.items() if "parametrizations" in name}
    assert originals
    assert {kind for name, kind in originals.items() if "qkv" in name} == {"qk+vo"}
    assert {kind for name, kind in originals.items() if "fc1" in name} == {"ffn"}


def installed(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@installed("diffusers")
@pytest.mark.parametrize(
    "name", ["DiTTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel", "PixArtTransformer2DModel"]
)
def test_diffusers_transformers(name):
    import diffusers  # noqa: PLC0415 - where it is installed

    with torch.device("meta"):
        model = getattr(diffusers, name)()
    block_map = classify(model, strict=True)
    assert {"qk", "vo", "ffn", "head"} <= set(block_map.blocks)
    if name.startswith("Flux"):
        outputs = [p for p in block_map.parts if p.parameter == "single_transformer_blocks.0.proj_out.weight"]
        width = model.inner_dim
        assert [(p.type, p.dim, p.start, p.stop) for p in outputs] == [
            ("vo", 1, 0, width),
            ("ffn", 1, width, 5 * width),
        ]


@installed("x_transformers")
def test_x_transformers():
    from x_transformers import Decoder, TransformerWrapper  # noqa: PLC0415 - where it is installed

    layers = Decoder(dim=D, depth=2, heads=HEADS, attn_dim_head=4)
    found = weights(TransformerWrapper(num_tokens=V, max_seq_len=6, attn_layers=layers))
    matrices = {name: kind for name, kind in found.items() if "norm" not in name and not name.endswith(".gamma")}
    assert {kind for name, kind in matrices.items() if re.search(r"\.to_[qk]$", name)} == {"qk"}
    assert {kind for name, kind in matrices.items() if re.search(r"\.to_(v|out)$", name)} == {"vo"}
    assert {kind for name, kind in matrices.items() if ".ff." in name} == {"ffn"}
    assert (found["token_emb.emb"], found["pos_emb.emb"], found["to_logits"]) == ("emb", "other", "head")


@installed("litgpt")
@pytest.mark.parametrize("groups", [1, 2])
def test_litgpt(groups):
    from litgpt import GPT, Config  # noqa: PLC0415 - where it is installed

    config = Config(n_embd=D, n_layer=1, n_head=HEADS, n_query_groups=groups, padded_vocab_size=V, block_size=4)
    block_map = classify(GPT(config), strict=True)
    parts = [(p.type, p.start, p.stop) for p in block_map.parts if p.parameter.endswith("attn.qkv.weight")]
    values = groups * D // HEADS
    assert parts == [("qk", 0, D + values), ("vo", D + values, D + 2 * values)]
    assert {"emb", "ffn", "norm", "head"} <= set(block_map.blocks)


@installed("vit_pytorch")
def test_vit_pytorch():
    from vit_pytorch import ViT  # noqa: PLC0415 - where it is installed

    size = {"image_size": 8, "patch_size": 4, "num_classes": 3, "dim": D, "depth": 1, "heads": HEADS, "mlp_dim": 16}
    block_map = classify(ViT(**size, dim_head=4), strict=True)
    assert set(block_map.blocks) == {"qk", "vo", "ffn", "norm", "head", "other"}


@installed("torchvision")
@installed("timm")
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224"])
def test_timm(name):
    try:
        import timm  # noqa: PLC0415 - where it is installed
    except (ImportError, RuntimeError):
        pytest.skip("timm needs a torchvision that fits torch's build")
    with torch.device("meta"):
        block_map = classify(timm.create_model(name), strict=True)
    assert {"qk", "vo", "ffn", "norm", "head"} <= set(block_map.blocks)
    assert block_map.numel["qk"] == pytest.approx(block_map.numel["vo"], rel=0.01)
