"""The simulated agents of `benchmarks.load` send what an agent sends, and the daemon takes all of it."""

from __future__ import annotations

import argparse
import random

import numpy as np
import pytest

from benchmarks.load.fuzz import fuzz
from benchmarks.load.messages import DRAWS, LAYER_BLOCKS, body, hello, request
from benchmarks.load.mutations import damaged, whole_hello, whole_sample
from benchmarks.load.servers import ROOT, bare, daemon, latency, load
from sharpwatch.daemon.ingest.hello import read_hello
from sharpwatch.daemon.ingest.samples import read_sample
from sharpwatch.daemon.logs import MAX_LINE
from sharpwatch.v1 import agent_pb2


@pytest.mark.parametrize("gnb", [False, True])
def test_a_message_put_together_is_a_sample_with_its_own_numbers(gnb):
    rest = body(np.random.default_rng(0), gnb=gnb)
    sent = agent_pb2.SessionRequest.FromString(request(300, 5, rest))
    whole = agent_pb2.Sample(sequence=300, step=300, taken_at_unix_ns=5)
    whole.MergeFromString(rest)
    assert sent == agent_pb2.SessionRequest(sample=whole)
    told = read_hello(agent_pb2.SessionRequest.FromString(hello("run", "host")).hello)
    reading = read_sample(told, sent.sample)
    assert (reading.sequence, len(reading.layers.gradient_norm)) == (300, len(LAYER_BLOCKS))
    assert (len(reading.probes["gnb"].traces) if gnb else 0) == (DRAWS if gnb else 0)


def test_what_is_damaged_is_a_sample_of_everything_and_the_damage_goes_by_its_seed():
    told = read_hello(whole_hello("run", "attempt"))
    sample = whole_sample(1, np.random.default_rng(0))
    reading = read_sample(told, sample)
    assert len(reading.probes) == 7
    assert not reading.dropped_probes
    samples = [[whole_sample(n, np.random.default_rng(n)) for n in range(20)] for _ in "ab"]
    twice = [[damaged(one, random.Random(n)) for n, one in enumerate(each)] for each in samples]  # noqa: S311
    assert twice[0] == twice[1]
    assert len(set(twice[0])) == 20


@pytest.mark.slow
async def test_damaged_messages_harm_nothing_beside_them():
    found = await fuzz(argparse.Namespace(checkout=ROOT, messages=1_000, seed=7))
    assert found["messages"] >= 1_000
    assert (found["internal_errors"], found["errors"], found["unauthorised"]) == ([], [], [])
    assert (found["honest_lost"], found["alerts_missing"]) == (0, 0)
    assert found["longest_line"] <= MAX_LINE + 1


@pytest.mark.slow
def test_the_bare_server_and_the_daemon_acknowledge_what_is_sent():
    arguments = ["--runs=3", "--window=4", "--every=2", "--warm=0.2", "--seconds=1"]
    events = []
    with bare() as server:
        seen = load(server, arguments, events.append)
    assert events == ["welcomed", "measuring", "measured"]
    assert seen["acknowledged"] > 0
    with daemon() as server:
        before = server.scrape()[1]
        seen = load(server, arguments)
        after = server.scrape()[1]
        assert server.processor > 0
        assert server.stored > 0
    assert seen["acknowledged"] > 0
    assert seen["refused"] == 0
    assert seen["p50"] <= seen["p99"]
    assert "sharpwatch_samples_refused_total{" not in after
    half, most = latency(before, after)
    assert 0 < half <= most
