"""The simulated agents of `benchmarks.load` send what an agent sends, and the daemon takes all of it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.load.messages import DRAWS, LAYER_BLOCKS, body, hello, request
from benchmarks.load.servers import bare, daemon, latency, load
from sharpwatch.daemon.ingest.hello import read_hello
from sharpwatch.daemon.ingest.samples import read_sample
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
