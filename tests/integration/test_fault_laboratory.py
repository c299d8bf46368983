"""The fault laboratory: each fault does what it says and no more; recorded runs replay; harm is told from noise."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.decoders import ByteLevel

import sharpwatch
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.testing import InMemoryTransport

sys.path.append(str(Path(__file__).parents[2]))  # pytest started by its own name does not look there
from benchmarks.faults.judge import is_harmful, spread_of
from benchmarks.faults.kinds import BLOCKS, FAULTS, HEALTHY, KINDS
from benchmarks.faults.recordings import About, read, write
from benchmarks.faults.replay import observations
from benchmarks.faults.training import MODELS, Disturbance, Training, byte_pairs, raw, text

BEFORE = 3


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=MODELS)
def trunk(request):
    """A training before the onset, and its weights after one more healthy step."""
    training = Training(request.param, seed=2)
    for _ in range(BEFORE):
        training.step(Disturbance(), 10)
    state = training.state()
    training.step(Disturbance(), 10)
    return request.param, state, training.state()


def disturbed(trunk, kind, steps):
    name, state, _ = trunk
    training = Training(name, seed=2)
    training.restore(state)
    if kind.schedule is not None:
        training.schedule = kind.schedule
    disturbance = kind.make(*kind.place(name, training.seed))
    for _ in range(steps):
        training.step(disturbance, BEFORE + 1)
    return training.state()


@pytest.mark.slow
@pytest.mark.parametrize("name", [kind.name for kind in FAULTS])
def test_a_fault_changes_the_weights_and_no_later_batch(trunk, name):
    _, before, healthy = trunk
    steps = {"stuck-loader": 2, "repeated-data": 21}.get(name, 1)
    faulty = disturbed(trunk, KINDS[name], steps)
    healthy = healthy if steps == 1 else disturbed(trunk, KINDS["plain"], steps)
    weights = faulty["model"]
    if name == "rate-0":
        assert all(torch.equal(weights[key], before["model"][key]) for key in weights)
    assert any(not torch.equal(weights[key], healthy["model"][key]) for key in weights)
    assert torch.equal(faulty["data"], healthy["data"])


def test_a_damaged_weight_lies_in_its_block(trunk):
    name, before, _ = trunk
    for block in BLOCKS:
        training = Training(name, seed=2)
        training.restore(before)
        layer = None if block in {"emb", "head"} else 2
        if (name, block) == ("gpt2", "head"):
            with pytest.raises(ValueError, match="no block head"):
                training.part(block, layer)
            continue
        part = training.part(block, layer)
        KINDS["weight-300"].make(block, layer).begin(training, None)
        changed = {
            key: (weight != before["model"][key]).nonzero()
            for key, weight in training.model.named_parameters()
            if not torch.equal(weight, before["model"][key])
        }
        assert list(changed) == [part.parameter]
        (place,) = changed[part.parameter].tolist()
        assert part.type == block
        assert part.dim is None or part.start <= place[part.dim] < part.stop


def test_the_list_has_what_was_asked_for():
    assert len(FAULTS) >= 25
    assert len(HEALTHY) >= 11
    assert len(KINDS) == len(FAULTS) + len(HEALTHY)
    assert {kind.cause for kind in FAULTS} == {
        *("data", "learning-rate", "damaged-weight", "optimizer-state", "instability", "silent", "non-finite")
    }


def test_a_recorded_run_replays_as_it_was(tmp_path):
    training, transport = Training("llama", seed=0), InMemoryTransport()
    watch = sharpwatch.attach(training.model, training.optimizer, transport=transport, training_job="faults")
    onset, losses = 61, []
    disturbance = KINDS["weight-300"].make("ffn", 2)
    files = []
    for kind, first, until in (("trunk", 1, 60), ("weight-300", 61, 64)):
        seen = len(transport.samples)
        losses = [training.step(disturbance, onset, watch) for _ in range(first, until + 1)]
        about = About(
            kind, "llama", "0.5M", 0, onset * (first > 1), trunk=files[0] if files else "", losses=losses, first=first
        )
        files.append(write(tmp_path, about, transport.hellos[0], transport.samples[seen:]).name)
    watch.close()
    run = read(tmp_path / files[1])
    assert [sample.step for sample in run.samples] == list(range(1, 65))
    assert [sample.sequence for sample in run.samples] == list(range(1, 65))
    assert run.about.losses == pytest.approx(losses, abs=1e-5)
    for sent, kept in zip(transport.samples, run.samples, strict=False):
        assert sent.tap.weight_norm == kept.tap.weight_norm
        norms = np.frombuffer(sent.tap.gradient_norm.data, "<f4"), np.frombuffer(kept.tap.gradient_norm.data, "<f4")
        assert np.allclose(*norms, rtol=2.0**-7)
    hello, before = observations(tmp_path / files[0])
    _, after = observations(tmp_path / files[1])
    detection = RunDetection("run", hello.layer_blocks, hello.parameters, lambda: "id")
    for step in (*before, *after):
        detection.see(step)
    (incident,) = detection.incidents.all
    assert (incident.cause, incident.layer_blocks[0], incident.onset) == ("damaged-weight", "layers.2.ffn", 61)


def test_harm_is_what_nudged_twins_do_not_do():
    source = np.random.default_rng(0)
    twin = 2.0 + 0.05 * source.standard_normal(300)
    nudged = [twin + 0.005 * source.standard_normal(300) for _ in range(4)]
    spread = spread_of(nudged, twin)
    assert not any(is_harmful(each, twin, spread) for each in nudged)
    step = np.arange(300)
    assert is_harmful(twin + 0.02 * (step > 200), twin, spread)  # small, for good
    assert is_harmful(twin + 0.3 * ((step > 100) & (step < 150)), twin, spread)  # large, for a while
    assert not is_harmful(twin + 0.3 * (step == 100), twin, spread)  # one odd step
    assert not is_harmful(twin - 0.3, twin, spread)
    assert is_harmful(np.where(step > 290, np.nan, twin), twin, spread)


@pytest.mark.slow
def test_byte_pairs_give_the_text_back():
    tokens = text("english", 2048)
    names = byte_pairs(2048).id_to_token
    assert ByteLevel().decode([names(int(token)) for token in tokens]) == raw("english").decode(errors="ignore")
    assert len(tokens) < 0.5 * len(raw("english"))
