"""A run's blocks are those of what is trained at `attach`; what changes later is told."""

from __future__ import annotations

import logging

import pytest
import torch
from missing import missing
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import sharpwatch
from sharpwatch.errors import AttachError
from sharpwatch.testing import InMemoryTransport

LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 16}
IDS = torch.arange(20).view(2, 10) % 16


def llama(training=lambda _: True):
    """A model that trains the parameters whose names say so."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(training(name))
    return model


class Watched:
    """A watched loop of a model that takes token ids and labels."""

    def __init__(self, model, optimizer=None, **options):
        self.model = model
        self.optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)
        self.transport = InMemoryTransport()
        options = {"training_job": "job", "probe_every": 1, "probes": ("gnb", "direction")} | options
        self.watch = sharpwatch.attach(model, self.optimizer, transport=self.transport, **options)

    def steps(self, count):
        for _ in range(count):
            self.model(input_ids=IDS, labels=IDS).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def probed(self, name):
        return [sample.step for sample in self.transport.samples if sample.HasField(name)]

    @property
    def parameters(self):
        """Number of parameters by block, as the daemon is told."""
        hello = self.transport.hello
        found = dict.fromkeys(hello.blocks, 0)
        for row in hello.layer_blocks:
            found[row.block] += row.parameters
        return found


def test_frozen_parameters_are_no_part_of_a_runs_blocks():
    loop = Watched(llama(lambda name: "down_proj" in name or "norm" in name))
    assert loop.parameters == {"ffn": 2 * 16 * 16, "norm": 5 * 16}
    loop.steps(2)
    loop.watch.close()
    assert loop.probed("gnb") == loop.probed("direction") == [1, 2]
    status = loop.watch.status
    assert status.parameters == 7
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(status.frozen)
    assert status.training_change == ""


@pytest.mark.parametrize("half", [("q_proj", "v_proj"), ("k_proj", "o_proj")])
def test_a_block_counts_what_is_trained_of_it(half):
    loop = Watched(llama(lambda name: any(each in name for each in half)))
    assert loop.parameters == {"qk": 2 * 16 * 16, "vo": 2 * 16 * 16}
    loop.watch.close()


def adapted(model, **options):
    try:
        import peft  # noqa: PLC0415 - not every machine has it
    except ImportError:
        missing("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))


def test_a_model_with_adapters_is_watched():
    model = adapted(llama())
    loop = Watched(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    loop.steps(2)
    loop.watch.close()
    assert loop.parameters == {"qk": 2 * 2 * 2 * 16, "vo": 2 * 2 * 2 * 16}
    assert all(row.adapter_parameters == row.parameters for row in loop.transport.hello.layer_blocks)
    assert loop.probed("gnb") == [1, 2]
    assert "blocks    qk 128 of adapters, vo 128 of adapters" in str(loop.watch.status)


def test_adapters_are_told_apart_from_what_is_trained_beside_them():
    model = adapted(llama())
    model.base_model.model.lm_head.weight.requires_grad_(requires_grad=True)
    loop = Watched(model)
    rows = {row.block: row for row in loop.transport.hello.layer_blocks}
    assert (rows["head"].parameters, rows["head"].adapter_parameters) == (256, 0)
    assert [(each.block, each.adapter_entries) for each in loop.watch.status.blocks] == [
        ("qk", 128),
        ("vo", 128),
        ("head", 0),
    ]
    loop.watch.close()


def test_a_direction_probe_copies_no_frozen_weight(monkeypatch):
    copied = []
    monkeypatch.setattr(
        "sharpwatch.agent.probes.context.copy_weights",
        lambda weights, _: copied.append(set(weights)) or {name: weight.clone() for name, weight in weights.items()},
    )
    loop = Watched(llama(lambda name: "norm" in name))
    loop.steps(1)
    loop.watch.close()
    assert loop.probed("direction") == [1]
    assert copied == [{name for name, parameter in loop.model.named_parameters() if parameter.requires_grad}]


def test_what_is_frozen_later_is_told_and_no_curvature_is_measured(caplog):
    loop = Watched(llama())
    loop.steps(2)
    loop.model.model.embed_tokens.weight.requires_grad_(requires_grad=False)
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        loop.steps(126)
    status = loop.watch.status
    assert status.state == "watching"
    assert status.training_change == "frozen since attach: model.embed_tokens.weight"
    assert "changed   frozen since attach: model.embed_tokens.weight; attach again" in str(status)
    assert all("frozen since attach" in probe.reason and not probe.given_up for probe in status.probes)
    assert caplog.text.count("frozen since attach: model.embed_tokens.weight: attach again") == 1
    assert loop.probed("gnb") == loop.probed("direction") == [1, 2]
    loop.model.model.embed_tokens.weight.requires_grad_(requires_grad=True)  # as before: all goes on
    loop.steps(1)
    loop.watch.close()
    assert loop.probed("gnb") == loop.probed("direction") == [1, 2, 129]
    assert loop.watch.status.training_change == ""


def test_what_is_unfrozen_later_is_told_and_no_curvature_is_measured():
    loop = Watched(llama(lambda name: "embed" not in name))
    loop.steps(1)
    loop.model.model.embed_tokens.weight.requires_grad_(requires_grad=True)
    loop.steps(2)
    loop.watch.close()
    status = loop.watch.status
    assert status.training_change == "trained, but not at attach: model.embed_tokens.weight"
    assert loop.probed("gnb") == [1]
    assert "emb" not in loop.parameters


def gpt2():
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM"))


@pytest.mark.parametrize("probe_every", [2, 1000])
def test_embeddings_that_are_resized_end_the_watch(caplog, probe_every):
    model = gpt2()
    loop = Watched(model, torch.optim.AdamW(model.parameters(), 1e-3), probe_every=probe_every)
    weight = model.transformer.wte.weight
    model.resize_token_embeddings(48)
    assert model.transformer.wte.weight is weight  # the parameter stays, and its data is another
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        loop.steps(70)
    says = "transformer.wte.weight is of shape (48, 16) now, and was of (32, 16); attach again"
    assert caplog.text.count(says) == 1
    status = loop.watch.status
    assert (status.state, status.ended, status.step) == ("closed", says, min(probe_every, 64))
    assert f"(closed: {says})" in str(status)
    assert not loop.probed("gnb")
    assert not loop.watch.status.swallowed_errors
    loop.watch.close()
    assert loop.watch.status.ended == says


def test_parameters_that_are_replaced_end_the_watch_before_they_are_probed():
    loop = Watched(llama(), probe_every=3)
    loop.model.lm_head = nn.Linear(16, 16, bias=False)
    loop.optimizer.add_param_group({"params": [loop.model.lm_head.weight]})
    loop.steps(3)
    assert loop.watch.status.ended == "lm_head.weight was replaced by another parameter; attach again"
    assert not loop.probed("gnb")


class Strange(nn.Module):
    """A model with parameters that no rule knows."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(16, 8)
        self.gizmo = nn.Parameter(torch.eye(8))
        self.idle = nn.Parameter(torch.eye(8), requires_grad=False)
        self.head = nn.Linear(8, 16)

    def forward(self, input_ids, labels):
        logits = self.head(self.emb(input_ids) @ self.gizmo)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return type("Output", (dict,), {"loss": loss, "logits": logits})(loss=loss, logits=logits)


def test_a_name_stops_no_job(caplog):
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        loop = Watched(Strange())
    assert loop.parameters == {"emb": 128, "head": 144, "other": 64}
    (record,) = [record for record in caplog.records if "no known block" in record.message]
    assert 'gizmo (8, 8). To place them, pass rules={"gizmo": "other"} with their blocks' in record.message
    assert "idle" not in record.message  # not trained, so not watched
    status = loop.watch.status
    assert status.unplaced == ("gizmo",)
    assert "unplaced  gizmo; attach(rules=...) places them" in str(status)
    loop.watch.close()


@pytest.mark.parametrize("rules", [{"gizmo": "ffn"}, [{"match": "giz*", "block": "ffn"}]], ids=["dict", "list"])
def test_rules_are_given_to_attach(caplog, rules):
    with caplog.at_level(logging.WARNING, "sharpwatch"):
        loop = Watched(Strange(), rules=rules, strict=True)
    assert loop.parameters == {"emb": 128, "ffn": 64, "head": 144}
    assert not caplog.records
    loop.watch.close()


def test_rules_given_to_attach_take_the_place_of_the_environments(monkeypatch, tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text("- match: nothing\n  block: head\n")
    monkeypatch.setenv("SHARPWATCH_BLOCK_RULES", str(path))
    with pytest.raises(AttachError, match=r"^\$SHARPWATCH_BLOCK_RULES: rule 'nothing' places nothing"):
        Watched(Strange())
    loop = Watched(Strange(), rules={"gizmo": "ffn"})
    assert loop.parameters["ffn"] == 64
    loop.watch.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strict": True}, r"^model: these parameters belong to no known block: gizmo \(8, 8\)"),
        ({"rules": {"gizmo": "gadget"}}, r"^rules: rules\[0\]\.block: 'gadget' is not a block type; allowed: emb, qk"),
        ({"rules": {"gadget": "ffn"}}, "^rules: rule 'gadget' places nothing: no parameter matches"),
        ({"rules": 3}, "^rules: rules must be a dict by glob, a list of rules or the path of a file, got int"),
    ],
)
def test_what_attach_refuses(options, says):
    with pytest.raises(AttachError, match=says):
        Watched(Strange(), **options)
