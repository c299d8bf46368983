"""sharpwatch's own recordings and its journal, and TensorBoard's event files as its own writer makes them."""

from __future__ import annotations

import gzip
import json
import lzma
import sqlite3
import struct
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from sharpwatch import wire
from sharpwatch.daemon.config.settings import ActionConfig, MatchConfig, PolicyConfig
from sharpwatch.errors import LogError
from sharpwatch.replay.files import ReadOptions, expand, read_run
from sharpwatch.replay.judge import judge
from sharpwatch.v1 import agent_pb2
from sharpwatch.v1.types_pb2 import LayerBlock

DATA = Path(__file__).parents[2] / "data"
BLOCKS = ("qk", "vo")
HELLO = agent_pb2.Hello(
    protocol=wire.PROTOCOL,
    training_job="job",
    run="run",
    attempt="first",
    layer_blocks=[LayerBlock(block=block, layer="layers.0", parameters=64) for block in BLOCKS],
    blocks=BLOCKS,
    optimizer="AdamW",
    control="none",
    min_multiplier=0.1,
    max_multiplier=10.0,
)


def sample(step, loss):
    tap = agent_pb2.Tap()
    for name in ("gradient_norm", "weight_norm", "update_rms", "learning_rate", "lr_multiplier"):
        getattr(tap, name).CopyFrom(wire.encode(np.ones(2), "float32"))
    tap.non_finite.CopyFrom(wire.encode(np.zeros(2), "int64"))
    return agent_pb2.Sample(step=step, loss=loss, tap=tap)


def recording(about, *messages):
    frames = (message.SerializeToString() for message in messages)
    line = json.dumps({"kind": "plain", "onset": 0, "trunk": "", **about}).encode() + b"\n"
    return line + b"".join(struct.pack("<I", len(frame)) + frame for frame in frames)


@pytest.fixture
def written(tmp_path):
    def write(name, data):
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


def read(path, **options):
    return read_run(path, ReadOptions(**options))


def steps(run):
    return [(seen.step, seen.loss) for seen in run.observations]


def test_a_recording_and_the_one_that_it_goes_on_from(written):
    trunk = recording({}, HELLO, sample(1, 4.0), sample(2, 3.0), agent_pb2.Sample(step=2, closing=True))
    run = read(written("trunk.run.xz", lzma.compress(trunk)))
    assert (run.format, run.layer_blocks) == ("recording", (("qk", "layers.0"), ("vo", "layers.0")))
    assert steps(run) == [(1, 4.0), (2, 3.0)]
    assert run.is_own
    branch = recording({"trunk": "trunk.run.xz", "first": 2}, HELLO, sample(2, 9.0), sample(3, 8.0))
    assert steps(read(written("branch.run.xz", lzma.compress(branch)))) == [(1, 4.0), (2, 9.0), (3, 8.0)]


def test_a_recording_that_is_cut_off_or_without_its_trunk(written):
    whole = recording({}, HELLO, sample(1, 4.0))
    with pytest.raises(LogError, match=r"a\.run: the recording is cut off at byte \d+"):
        read(written("a.run", whole[:-3]))
    alone = recording({"trunk": "gone.run.xz", "first": 2}, HELLO, sample(2, 4.0))
    with pytest.raises(LogError, match=r"gone\.run\.xz: the recording that another one goes on from can't be read"):
        read(written("b.run", alone))
    other = agent_pb2.Hello.FromString(HELLO.SerializeToString())
    other.protocol = 99
    with pytest.raises(LogError, match=r"first message can't be read: protocol must be"):
        read(written("c.run", recording({}, other)))


def test_policies_know_the_checkpoints_of_a_recording(written):
    """A rollback would go to the newest checkpoint from before the onset."""
    saved = {2: "file:2", 4: "file:4", 8: "file:8"}
    samples = [sample(step, 4.0 if step != 6 else float("nan")) for step in range(1, 10)]
    for each in samples:
        if each.step in saved:
            each.checkpoints.add(step=each.step, uri=saved[each.step])
    samples.insert(4, agent_pb2.Sample(step=4, deleted_checkpoints=["file:2"]))
    run = read(written("a.run", recording({}, HELLO, *samples)))
    assert len(run.observations) == 9
    back = PolicyConfig("back", MatchConfig("NonFinite"), "enforce", ActionConfig("rollback"))
    (found,) = judge(run, policies=[back]).decisions
    assert (found.outcome, found.made.step, found.made.rollback.checkpoint.uri) == ("sent", 6, "file:4")


def test_the_journal_of_a_daemon(written):
    path = written("old.db", gzip.decompress((DATA / "journal-0.1.db.gz").read_bytes()))
    before = Path(path).read_bytes()
    for source in (path, f"sqlite:///{path}"):
        run = read(source)
        assert (run.format, run.source) == ("journal", f"{path} old-run")
        assert len(run.observations) > 300
    assert steps(read(path, run="old-run")) == steps(run)
    with pytest.raises(LogError, match="no run 'new'; the journal has old-run"):
        read(path, run="new")
    assert Path(path).read_bytes() == before
    assert sorted(each.name for each in Path(path).parent.iterdir()) == ["old.db"]


def test_a_database_of_another_program(tmp_path):
    with closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE bookmarks (url TEXT)")
        other.commit()
    with pytest.raises(LogError, match="a database of another program, not a journal"):
        read(str(tmp_path / "other.db"))
    with pytest.raises(LogError, match="nowhere: "):
        read(f"sqlite:///{tmp_path}/nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.fixture
def events(tmp_path):
    writer_of = pytest.importorskip("tensorboard.summary.writer.event_file_writer").EventFileWriter
    protos = (
        pytest.importorskip("tensorboard.compat.proto.event_pb2"),
        pytest.importorskip("tensorboard.compat.proto.summary_pb2"),
    )
    tensors = pytest.importorskip("tensorboard.util.tensor_util")

    def write(folder, scalars, *, as_tensors=False):
        writer = writer_of(str(tmp_path / folder))
        for tag, step, value in scalars:
            given = {"tensor": tensors.make_tensor_proto(np.float32(value))} if as_tensors else {"simple_value": value}
            summary = protos[1].Summary(value=[protos[1].Summary.Value(tag=tag, **given)])
            writer.add_event(protos[0].Event(wall_time=1.0, step=step, summary=summary))
        writer.close()
        return str(tmp_path / folder)

    return write


@pytest.mark.parametrize("as_tensors", [False, True])
def test_event_files(events, as_tensors):
    scalars = [("train/loss", 10, 3.5), ("train/loss", 20, float("nan")), ("eval/loss", 20, 9.0)]
    scalars += [("train/grad_norm", 10, 1.5), ("train/learning_rate", 20, 0.5)]
    folder = events("run", scalars, as_tensors=as_tensors)
    assert expand(folder) == [folder]
    run = read(folder)
    assert (run.format, run.names["loss"]) == ("tensorboard", "train/loss")
    (ten, twenty) = run.observations
    assert (ten.step, ten.loss, ten.layers.gradient_norm[0]) == (10, 3.5, 1.5)
    assert (twenty.step, np.isnan(twenty.loss), twenty.layers.learning_rate[0]) == (20, True, 0.5)
    (file,) = Path(folder).iterdir()
    assert len(read(str(file)).observations) == 2


def test_an_event_file_that_is_cut_off(events, written):
    (file,) = Path(events("run", [("loss", step, 1.0) for step in range(10)])).iterdir()
    run = read(written("cut", file.read_bytes()[:-5]))
    assert len(run.observations) == 9
    assert run.notes[0].startswith("cut can't be read from byte ")
    with pytest.raises(LogError, match="no TensorBoard event can be read"):
        read(written("short", file.read_bytes()[:40]), format="tensorboard")


def test_without_tensorboard_the_error_says_what_to_install(events, monkeypatch):
    folder = events("run", [("loss", 1, 1.0)])
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_file_loader", None)
    with pytest.raises(LogError, match=r"needs the package .*; run: pip install tensorboard"):
        read(folder)
