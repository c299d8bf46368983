"""The scale of attention logits in the agent's samples: with each probe, of the weights after the step."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import sharpwatch
from sharpwatch.agent.probes import attention, runner
from sharpwatch.curvature.estimators.attention_logits import AttentionLogits
from sharpwatch.testing import InMemoryTransport
from sharpwatch.wire import decode

HEADS, KEY_HEADS, WIDTH = 4, 2, 32
USUAL = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def llama():
    return LlamaForCausalLM(LlamaConfig(**USUAL, attention_dropout=0.1))


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**USUAL, head_dim=8))


def train(make=llama, steps=9, *, watched=True, **options):
    """A short training: its model and optimizer, its samples, its losses, and what `status` says at its end."""
    torch.manual_seed(3)
    model = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    transport, losses, status, seen = InMemoryTransport(), [], None, []
    watch = None
    if watched:
        watch = sharpwatch.attach(
            model, optimizer, **{"training_job": "job", "transport": transport, "probe_every": 3} | options
        )
    for _ in range(steps):
        tokens = torch.randint(64, (8, 6))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seen.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
    if watch is not None:
        status = watch.status
        watch.close()
    return model, optimizer, transport, losses, status, seen


def dense(weights, layer):
    """The largest norm over heads, of each query head with its own key head."""
    of_layer = f"model.layers.{layer}.self_attn"
    queries = weights[f"{of_layer}.q_proj.weight"].double().chunk(HEADS)
    keys = weights[f"{of_layer}.k_proj.weight"].double().chunk(KEY_HEADS)
    norms = [
        torch.linalg.matrix_norm(query.T @ keys[head * KEY_HEADS // HEADS], ord=2) for head, query in enumerate(queries)
    ]
    return float(max(norms)) / math.sqrt(WIDTH // HEADS)


def scales(transport, sample):
    rows = len(transport.hello.layer_blocks)
    return decode(sample.attention.logit_scale, name="scale", dtype="float32", shape=(rows,))


def test_each_probe_brings_the_scale_of_the_weights_after_its_step():
    _, _, transport, _, status, weights = train(steps=30)
    sent = {sample.step: sample for sample in transport.samples if sample.HasField("attention")}
    assert list(sent) == [sample.step for sample in transport.samples if sample.HasField("gnb")]
    assert list(sent) == list(range(3, 31, 3))
    for step, sample in sent.items():
        found = scales(transport, sample)
        rows = {(row.block, row.layer): value for row, value in zip(transport.hello.layer_blocks, found, strict=True)}
        assert all(np.isnan(value) for (block, _), value in rows.items() if block != "qk")
        for layer in range(2):
            true = dense(weights[step - 1], layer)
            assert rows["qk", f"layers.{layer}"] <= true * (1 + 1e-6)
            assert rows["qk", f"layers.{layer}"] == pytest.approx(true, rel=0.05)
    assert status.attention == "2 layer blocks measured"
    assert "attention 2 layer blocks measured" in str(status)


def test_without_a_probe_nothing_is_measured():
    _, _, transport, _, status, _ = train(probes=())
    assert not any(sample.HasField("attention") for sample in transport.samples)
    assert not status.attention


def test_training_is_bit_identical_with_and_without(monkeypatch):
    def result(**options):
        model, optimizer, _, losses, _, _ = train(**options)
        states = optimizer.state_dict()["state"].values()
        tensors = [*model.state_dict().values(), *(torch.as_tensor(one) for state in states for one in state.values())]
        return losses, tensors, torch.get_rng_state()

    watched, plain = result(), result(watched=False)
    monkeypatch.setattr(attention.AttentionReader, "read", lambda _: None)
    unread = result()
    for one, other in pairwise((watched, plain, unread)):
        assert one[0] == other[0]
        assert all(map(torch.equal, one[1], other[1]))
        assert torch.equal(one[2], other[2])


def test_other_readings_are_the_same_with_and_without(monkeypatch):
    _, _, transport, _, _, _ = train()
    monkeypatch.setattr(attention.AttentionReader, "read", lambda _: None)
    _, _, without, _, _, _ = train()
    for one, other in zip(transport.samples, without.samples, strict=True):
        assert one.gnb.traces == other.gnb.traces
        assert one.direction.curvature == other.direction.curvature
        assert one.tap == other.tap


def test_normalised_queries_are_left_out_with_the_reason(caplog):
    caplog.set_level("INFO", "sharpwatch")
    _, _, transport, _, status, _ = train(qwen3)
    assert not any(sample.HasField("attention") for sample in transport.samples)
    reason = "layers.0.qk and 1 more left out: queries and keys are normalised (q_norm)"
    assert reason in status.attention
    assert sum(reason in record.getMessage() for record in caplog.records) == 1


def failing(monkeypatch, *errors):
    """Has each reading raise the next of `errors`, or succeed where it is None; returns the list of its calls."""
    calls, measure = [], AttentionLogits.measure

    def raising(self, weights):
        calls.append(weights)
        error = errors[min(len(calls), len(errors)) - 1]
        if error is not None:
            raise error
        return measure(self, weights)

    monkeypatch.setattr(AttentionLogits, "measure", raising)
    return calls


def warnings(caplog):
    return [text for record in caplog.records if "attention logits is not measured" in (text := record.getMessage())]


def test_an_error_is_logged_once_and_harms_no_probe(monkeypatch, caplog):
    calls = failing(monkeypatch, ZeroDivisionError("on purpose"))
    _, _, transport, _, status, _ = train()
    assert len(calls) == len(warnings(caplog)) == 1
    assert status.attention == "given up after a failure: ZeroDivisionError: on purpose"
    assert not any(sample.HasField("attention") for sample in transport.samples)
    assert sum(sample.HasField("gnb") for sample in transport.samples) == 3
    assert status.swallowed_errors == 0


def short(*left):
    return [torch.OutOfMemoryError(f"{number} MiB is free") for number in left]


def test_memory_that_stays_short_ends_the_readings(monkeypatch, caplog):
    """The device's message has other numbers each time."""
    calls = failing(monkeypatch, *short(*range(6)))
    _, _, transport, _, status, _ = train(steps=18)
    assert len(calls) == 3
    first, last = warnings(caplog)
    assert first.endswith("OutOfMemoryError: 0 MiB is free")
    assert status.attention == "given up after 3 failures in a row: OutOfMemoryError: 2 MiB is free"
    assert last.endswith(status.attention)
    assert sum(sample.HasField("gnb") for sample in transport.samples) == 6
    assert status.swallowed_errors == 0


def test_memory_that_is_there_again_brings_readings_again(monkeypatch, caplog):
    failing(monkeypatch, *short(0, 1), None, *short(3, 4), None)
    _, _, transport, _, status, _ = train(steps=18)
    assert [sample.step for sample in transport.samples if sample.HasField("attention")] == [9, 18]
    assert len(warnings(caplog)) == 1
    assert status.attention == "2 layer blocks measured"


def test_its_cost_counts_as_the_probes(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(runner, "_now", lambda _: next(clock))
    seconds = {}
    run = runner.ProbeRunner.run

    def kept(self, names, captured, step):
        found = run(self, names, captured, step)
        seconds[names] = {name: value - step.seconds.get(name, 0.0) for name, value in found.seconds.items()}
        return found

    monkeypatch.setattr(runner.ProbeRunner, "run", kept)
    train(steps=3)
    # Each is timed by two ticks of the clock, and the last one by two more.
    assert seconds == {("gnb", "direction"): pytest.approx({"gnb": 1, "direction": 2})}
