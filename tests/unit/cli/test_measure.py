"""`sharpwatch measure` in its parts: what it refuses, how it cuts and checks, what it keeps, writes and draws."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from sharpwatch.blocks import classify
from sharpwatch.cli.extras import need
from sharpwatch.cli.main import main
from sharpwatch.cli.measure.data import TextWindows, load_batches
from sharpwatch.cli.measure.display import ProgressDisplay, tables
from sharpwatch.cli.measure.files import StateFile, check_writable, read_state, write_whole
from sharpwatch.cli.measure.model import LoadedModel, call, find_device, is_factory, load
from sharpwatch.cli.measure.plot import (
    density,
    draw,
    figure,
    layer_points,
    layer_positions,
    outside_points,
    type_points,
)
from sharpwatch.cli.measure.session import DeferredSignals
from sharpwatch.cli.output import plain
from sharpwatch.curvature.measure.embedding_rows import EmbeddingRows, TokenGroup
from sharpwatch.curvature.measure.report import BlockReport, SharpnessReport
from sharpwatch.curvature.measure.validation import check_values
from sharpwatch.curvature.statistics.estimate import Cost, Estimate, Spectrum
from sharpwatch.errors import ProbeError, SharpwatchError

VOCABULARY = 12


class Plain(nn.Module):
    """A language model of one embedding, one norm and a head; nanoGPT's calling convention."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, 4)
        self.ln_f = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, vocabulary, bias=False)

    def forward(self, idx, labels=None):
        logits = self.lm_head(self.ln_f(self.wte(idx)))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def estimate(value, stderr=0.1, estimator="hutchinson", residual=math.nan):
    return Estimate(value, stderr, 8, estimator, residual=residual)


def block(trace, parameters=10, **more):
    return BlockReport(parameters, {"hutchinson": estimate(trace), "gnb": estimate(trace / 2, estimator="gnb")}, **more)


def report(**more):
    ends = {"top_eigenvalue": estimate(3.0, math.nan, "lanczos", 0.01), "bottom_eigenvalue": estimate(-2.0, 0.5)}
    spectrum = Spectrum((-2.0, 0.0, 1e-3, 3.0), (0.1, 0.5, 0.3, 0.1), 2)
    blocks = {"emb": block(1.0), "qk": block(-4.0, **ends, spectrum=spectrum), "norm": block(9.0)}
    layers = {"emb": block(1.0), "norm": block(3.0)}
    layers |= {
        f"layers.{index}.{kind}": block(-2.0 if kind == "qk" else 3.0) for index in (0, 1) for kind in ("qk", "norm")
    }
    return SharpnessReport(blocks, layers, block(6.0), 4.25, 64, 2, 7, Cost(3.0, 40.5), **more)


# What can't be on the command line


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--estimators", "gnb,foo"], "'foo' is not one of the estimators, which are gnb,hutchinson,lanczos,spectrum,"),
        (["--estimators", ""], "'' is not one of the estimators"),
        (["--blocks", "qk,kq"], "'kq' is not one of the blocks, which are emb,qk,vo,ffn,norm,head,other;"),
        (["--draws", "1"], "'1' is not a whole number, 2 or more: one draw has no standard error;"),
        (["--rows", "0"], "'0' is not a whole number, 1 or more;"),
        (["--precision", "5"], "'5' is not a relative error; it must be above 0 and below 1, such as 0.05;"),
        (["--precision", "nan"], "'nan' is not a relative error"),
        (["--plot", "x.gif"], "'x.gif' ends in .gif; it must end in .svg, .png, .pdf;"),
        (["--plot", "x"], "'x' ends in nothing;"),
        (["--dtype", "int8"], "'--dtype': 'int8' is not one of 'float64', 'float32', 'bfloat16', 'float16'"),
        (["--json", "a.x", "--state", "a.x"], "--json, --plot and --state must be different files;"),
    ],
)
def test_what_cannot_be_on_the_command_line_is_answered_in_one_line(options, expected, capsys):
    assert main(["measure", "model", "data", *options]) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert printed.count("\n") == 1


# Files


def test_an_output_that_cannot_be_written_is_refused_before_anything_starts(tmp_path, capsys):
    assert main(["measure", "model", "data", "--json", str(tmp_path / "none" / "a.json")]) == 1
    assert f"--json {tmp_path}/none/a.json: there is no folder {tmp_path}/none" in capsys.readouterr().err
    with pytest.raises(SharpwatchError, match="is a folder; name a file"):
        check_writable(tmp_path, "--plot")


def test_checking_an_output_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "a.json", "--json")
    check_writable(Path(os.devnull), "--json")
    assert not list(tmp_path.iterdir())


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_package_says_what_to_install():
    with pytest.raises(
        SharpwatchError, match=r"--plot needs the package nosuch, .*pip install 'sharpwatch\[measure\]'"
    ):
        need("nosuch", "--plot")


# A user's functions


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of the user's, in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = []

    def write(source: str, name: str = "users_own") -> str:
        (tmp_path / f"{name}.py").write_text(source)
        names.append(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("text", "is_one"), [("a.b:c", True), ("a:b", True), ("a", False), ("./a:b", False), ("a:", False)]
)
def test_a_function_is_written_with_its_module(text, is_one):
    assert is_factory(text) is is_one


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def make():\n    raise KeyError('x')", r"users_own:make raised KeyError: 'x' \(.*users_own.py:2\)"),
        ("make = 3", r"make is not a function, in .*users_own.py"),
        ("", r"make does not exist, in .*users_own.py"),
        ("import nosuch", r"importing users_own raised ModuleNotFoundError: No module named 'nosuch'"),
        ("1 / 0", r"importing users_own raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_users_function_that_fails_is_named_with_its_line(module, source, expected):
    module(source)
    with pytest.raises(SharpwatchError, match=expected):
        call("users_own:make")


@pytest.mark.usefixtures("module")
def test_a_module_that_is_not_there_is_named():
    with pytest.raises(SharpwatchError, match="no module nosuch_module in"):
        call("nosuch_module:make")


def test_a_function_may_return_an_optimizer_too(module):
    module(
        "import torch\ndef make():\n    model = torch.nn.Linear(2, 2)\n"
        "    return model, torch.optim.SGD(model.parameters(), lr=1)\ndef wrong():\n    return 3, 4"
    )
    loaded = load("users_own:make", None, "float64")
    assert loaded.model.weight.dtype == torch.float64
    assert loaded.optimizer.param_groups[0]["params"][0] is loaded.model.weight
    with pytest.raises(
        SharpwatchError, match=r"returned \(int, int\); expected a torch.nn.Module, or \(model, optimizer\)"
    ):
        load("users_own:wrong", None, None)


# Models


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "has no config.json, so it is not a Hugging Face checkpoint"),
        ({"config.json": "{"}, "config.json: can't be read"),
        ({"config.json": "[]"}, "config.json: is not a JSON object"),
        ({"config.json": '{"architectures": ["ResNetModel"]}'}, "architectures: ResNetModel: not a language model"),
        ({"config.json": '{"architectures": ["GPT2LMHeadModel"]}'}, "has config.json but no weights"),
        (
            {"config.json": '{"architectures": ["GPT2LMHeadModel"]}', "model.safetensors": "x"},
            "can't be loaded: ",
        ),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused_with_what_it_lacks(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SharpwatchError) as refused:
        load(str(tmp_path), "cpu", None)
    assert expected in str(refused.value)
    assert str(tmp_path) in str(refused.value)


CODE = """
from pathlib import Path
from transformers import GPT2LMHeadModel
Path({marker!r}).touch()
class OwnModel(GPT2LMHeadModel):
    pass
"""


@pytest.mark.parametrize("architecture", ["OwnModel", "GPT2LMHeadModel"])
def test_code_in_the_folder_of_a_model_runs_only_where_that_is_asked_for(tmp_path, monkeypatch, architecture):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker, folder = tmp_path / "ran", tmp_path / "model"
    tiny = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=8, n_positions=8)
    transformers.GPT2LMHeadModel(tiny).save_pretrained(folder)
    (folder / "modeling_own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    own = {"architectures": [architecture], "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    if architecture == "OwnModel":
        with pytest.raises(
            SharpwatchError, match="is Python code in the folder, which is run with --trust-remote-code"
        ):
            load(str(folder), "cpu", None)
    else:
        assert type(load(str(folder), "cpu", None).model) is transformers.GPT2LMHeadModel
    assert not marker.exists()
    assert type(load(str(folder), "cpu", None, trust_remote_code=True).model).__name__ == "OwnModel"
    assert marker.exists()


class Pickled:
    """Runs what it holds when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_code_in_a_batch_file_does_not_run(tmp_path):
    batch, marker = tmp_path / "batch.pt", tmp_path / "ran"
    torch.save({"input_ids": Pickled(marker)}, batch)
    with pytest.raises(SharpwatchError):
        load_batches(str(batch), TextWindows(None, None, None), loaded(), 0)
    assert not marker.exists()
    torch.load(batch, weights_only=False)
    assert marker.exists()  # it would have


def test_a_model_that_is_nowhere_says_what_is_allowed():
    with pytest.raises(SharpwatchError, match=r"MODEL gpt2-xl: is not there; expected a folder with config\.json"):
        load("gpt2-xl", None, None)


@pytest.mark.parametrize("name", ["cuda:99", "cpuu"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(SharpwatchError, match=f"--device {name}: is not there; this machine has cpu"):
        find_device(name)


# Batches


def loaded(**more):
    return LoadedModel(Plain(), torch.device("cpu"), **more)


def batch(**more):
    return {"idx": torch.ones(2, 3, dtype=torch.int64), **more}


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ([], "is empty: no batch to measure on"),
        ({}, "batch 0: is empty: no tensor among no arguments"),
        ([batch(), {"idx": torch.ones(0, 3)}], r"batch 1: is empty: idx has the shape \(0, 3\)"),
        ([torch.ones(2)], "batch 0: is a Tensor; expected a dict of the model's arguments"),
        (torch.ones(2), "holds a Tensor; expected a dict of the model's arguments, or a list of them"),
    ],
)
def test_a_batch_file_that_holds_no_batches_is_refused(tmp_path, saved, expected):
    path = tmp_path / "batch.pt"
    torch.save(saved, path)
    with pytest.raises(SharpwatchError, match=expected):
        load_batches(str(path), TextWindows(), loaded(), seed=0)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_holds_no_tensors_is_refused(tmp_path, suffix):
    path = tmp_path / f"batch{suffix}"
    path.write_text("no tensors")
    with pytest.raises(SharpwatchError, match=f"batch{suffix}: is not a file of tensors: "):
        load_batches(str(path), TextWindows(), loaded(), seed=0)


def test_batches_are_taken_as_they_are_up_to_the_number_asked_for(tmp_path):
    path = tmp_path / "batch.pt"
    torch.save([batch(), batch()], path)
    assert len(load_batches(str(path), TextWindows(), loaded(), seed=0)) == 2
    assert len(load_batches(str(path), TextWindows(batches=1), loaded(), seed=0)) == 1
    with pytest.raises(SharpwatchError, match="has 2 batches, --batches asks for 3"):
        load_batches(str(path), TextWindows(batches=3), loaded(), seed=0)
    with pytest.raises(SharpwatchError, match="--rows and --length cut a text"):
        load_batches(str(path), TextWindows(rows=1), loaded(), seed=0)


def test_an_endless_function_needs_a_number(module):
    module("import torch\ndef make():\n    while True:\n        yield {'idx': torch.ones(2, 3)}")
    assert len(load_batches("users_own:make", TextWindows(batches=3), loaded(), seed=0)) == 3
    with pytest.raises(SharpwatchError, match="set the number with --batches"):
        load_batches("users_own:make", TextWindows(), loaded(), seed=0)


def test_a_text_needs_a_tokenizer(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some text")
    with pytest.raises(SharpwatchError, match="a text needs a tokenizer, and a model made by a function has none"):
        load_batches(str(path), TextWindows(), loaded(), seed=0)
    with pytest.raises(SharpwatchError, match="has no tokenizer"):
        load_batches(str(path), TextWindows(), loaded(folder=tmp_path, task="causal"), seed=0)
    with pytest.raises(SharpwatchError, match="an encoder-decoder is trained on pairs of texts"):
        load_batches(str(path), TextWindows(), loaded(folder=tmp_path, task="seq2seq"), seed=0)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"idx": torch.full((2, 3), 12)}, "idx: token 12 is outside the model's vocabulary of 12"),
        ({"idx": torch.full((2, 3), -1)}, "idx: token -1 is outside"),
        ({"labels": torch.full((2, 3), 12)}, "label 12 is outside the 12 that the model has logits for"),
        ({"labels": torch.full((2, 3), -1)}, "label -1: a label below 0 must be -100, which is ignored"),
    ],
)
def test_a_batch_that_does_not_fit_the_model_is_named(changed, expected):
    model = Plain()
    good = batch(labels=torch.ones(2, 3, dtype=torch.int64))
    check_values(model, classify(model), [good], "DATA file.pt")
    with pytest.raises(SharpwatchError, match=f"DATA file.pt: batch 1: {expected}"):
        check_values(model, classify(model), [good, {**good, **changed}], "DATA file.pt")


def test_a_batch_that_the_model_does_not_take_is_named():
    model = Plain()
    wrong = {"ids": torch.ones(2, 3, dtype=torch.int64)}
    with pytest.raises(SharpwatchError, match=r"batch 0: the model can't be called with it: TypeError: .*'ids'"):
        check_values(model, classify(model), [wrong], "DATA file.pt")


# State


class Draws:
    """A measurement as far as a state file sees it."""

    def __init__(self, seed: int) -> None:
        self.state = {"seed": seed, "draws": [0.1, math.nan]}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        if state["seed"] != self.state["seed"]:
            raise ProbeError(f"seed {state['seed']}, now {self.state['seed']}")
        self.state = state


def test_a_state_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "state.json"
    assert read_state(path) is None
    kept = Draws(3)
    StateFile(path).save(kept)
    fresh = Draws(3)
    fresh.state["draws"] = []
    StateFile(path).load(fresh, read_state(path))
    assert fresh.state["draws"][0] == 0.1
    assert math.isnan(fresh.state["draws"][1])


def test_a_state_of_another_measurement_is_refused_and_says_what_differs(tmp_path):
    path = tmp_path / "state.json"
    StateFile(path).save(Draws(3))
    with pytest.raises(
        SharpwatchError,
        match=r"--state .*state.json: seed 3, now 4; move the file away, or repeat that measurement's options",
    ):
        StateFile(path).load(Draws(4), read_state(path))


def test_a_state_that_another_version_wrote_is_refused(tmp_path):
    path = tmp_path / "state.json"
    StateFile(path).save(Draws(3))
    kept = read_state(path)
    del kept["measurement"]["seed"]
    with pytest.raises(
        SharpwatchError, match=r"state\.json: was written by another version of sharpwatch; move the file away"
    ):
        StateFile(path).load(Draws(3), kept)


@pytest.mark.parametrize("text", ["", "{}", '{"format": "other"}', "[1]", "\x00"])
def test_a_file_that_is_no_state_is_left_alone(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(SharpwatchError, match="exists and is not the state of a measurement; name another file"):
        read_state(path)
    assert path.read_text() == text


def test_a_state_is_written_at_once_and_then_once_a_second(tmp_path):
    now = [100.0]
    file = StateFile(tmp_path / "state.json", clock=lambda: now[0])
    draws = Draws(0)
    written = []
    for passed in (0.0, 0.5, 0.5, 0.9, 0.2):
        now[0] += passed
        (tmp_path / "state.json").unlink(missing_ok=True)
        file.save_if_due(draws)
        written.append((tmp_path / "state.json").exists())
    assert written == [True, False, True, False, True]


def test_a_disk_that_is_full_is_noted_and_then_forgotten(tmp_path):
    folder = tmp_path / "gone"
    file = StateFile(folder / "state.json")
    file.save(Draws(0))
    assert "state.json: can't be written: No such file or directory" in file.trouble
    folder.mkdir()
    file.save(Draws(0))
    assert not file.trouble


# Signals and progress


def test_the_first_signal_waits_and_the_second_does_not():
    before = signal.getsignal(signal.SIGTERM)
    with DeferredSignals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@dataclass
class Piece:
    done: int
    total: int | None
    what: str


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    with ProgressDisplay(quiet=False, stream=out) as progress:
        progress.show(Piece(3, 12, "hutchinson qk"))
    assert "hutchinson qk" in out.getvalue()
    assert "3/12" in out.getvalue()


def test_a_log_gets_a_line_now_and_then():
    now = [0.0]
    out = io.StringIO()
    with ProgressDisplay(quiet=False, stream=out, clock=lambda: now[0]) as progress:
        for done in range(1, 31):
            now[0] += 1.0
            progress.show(Piece(done, None if done > 15 else 15, "gnb"))
    assert out.getvalue().splitlines() == [
        "sharpwatch measure: 10 of 15 pieces, gnb",
        "sharpwatch measure: 20 pieces, gnb",
        "sharpwatch measure: 30 pieces, gnb",
    ]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_is_quiet(stream):
    out = stream()
    with ProgressDisplay(quiet=True, stream=out, clock=lambda: 1e9) as progress:
        progress.show(Piece(1, 2, "gnb"))
    assert not out.getvalue()


# The table


def test_the_table_has_every_number_with_its_error():
    shown = plain(tables(report(unreached={"qk": "0.3 after 256 draws"})))
    lines = shown.splitlines()
    assert lines[0].split("  ")[0] == "block"
    assert "Hessian trace" in lines[0]
    assert "Gauss-Newton trace" in lines[0]
    qk = next(line for line in lines if line.startswith("qk"))
    assert "-4.0 ± 0.1" in qk
    assert "-0.40 ± 0.01" in qk
    assert "3 [0.01]" in qk
    assert "-2.0 ± 0.5" in qk
    assert "4.25 over 64 tokens in 2 batches" in shown
    assert "3 forwards, 40.5 backwards" in shown
    assert "not reached: qk" in shown


def test_what_was_not_measured_has_no_column_and_layers_come_on_request():
    bare = SharpnessReport({"emb": BlockReport(4)}, {}, BlockReport(4), 1.0, 1, 1, 0, Cost())
    assert plain(tables(bare)).splitlines()[0].split() == ["block", "parameters"]
    assert "layers.1.qk" in plain(tables(report(), layers=True))
    assert "layers.1.qk" not in plain(tables(report()))


def test_the_rows_of_the_embedding_are_a_table_below_the_blocks():
    groups = {
        "1": TokenGroup(5, 20, 7, 90, 0.75, estimate(8.0, 0.4, "gnb")),
        "unseen": TokenGroup(2, 8, 0, 0, 0.0, estimate(0.0, 0.0, "gnb")),
    }
    shown = plain(tables(report(embedding_rows=EmbeddingRows("wte.weight", groups, tied=("lm_head.weight",)))))
    blocks, rows, note, facts = shown.split("\n\n")
    assert blocks.startswith("block")
    assert [" ".join(line.split()) for line in rows.splitlines()] == [
        "wte.weight by token frequency, most frequent first",
        "group tokens occurrences of each share Gauss-Newton trace per parameter",
        "1 5 90 to 7 75 % 8.0 ± 0.4 0.40 ± 0.02",
        "unseen 2 0 0 % 0 ± 0 0 ± 0",
    ]
    assert note == "embedding rows  wte.weight is also lm_head.weight: a row's trace is of both uses together"
    assert facts.startswith("loss")


def test_the_reason_why_there_are_no_rows_takes_the_place_of_their_table():
    shown = plain(tables(report(embedding_rows=EmbeddingRows(reason="a batch has no input_ids"))))
    assert shown.split("\n\n")[1] == "embedding rows  not measured: a batch has no input_ids"


# The figure


def test_a_density_integrates_to_one_on_its_axis():
    found = density(Spectrum((-3.0, 0.0, 1e-4, 2e-2, 5.0), (0.05, 0.6, 0.2, 0.1, 0.05), 1))
    axis = np.arcsinh(found.eigenvalues / found.width)
    assert np.trapezoid(found.share, axis) == pytest.approx(1, abs=1e-3)
    assert found.eigenvalues[0] < -3.0
    assert found.eigenvalues[-1] > 5.0


def test_a_density_of_nothing_but_zeros_can_be_drawn():
    assert np.isfinite(density(Spectrum((0.0, 0.0), (0.5, 0.5), 1)).share).all()


def test_layers_stand_in_order_and_stacks_apart():
    names = ["emb", "decoder.layers.0.qk", "decoder.layers.1.qk", "encoder.layers.0.qk"]
    found = SharpnessReport({}, {name: block(1.0) for name in names}, block(1.0), 1.0, 1, 1, 0, Cost())
    assert layer_positions(found) == {"decoder.layers.0": 0.0, "decoder.layers.1": 1.0, "encoder.layers.0": 3.0}


def test_every_block_has_its_point():
    found = report()
    assert [(point.block, round(point.x)) for point in layer_points(found)] == [
        ("qk", 0),
        ("norm", 0),
        ("qk", 1),
        ("norm", 1),
    ]
    assert [point.block for point in outside_points(found)] == ["emb", "norm"]
    assert len(type_points(found)) == 6
    assert type_points(found)[3].sharpness.value == pytest.approx(-0.2)


def test_a_negative_sharpness_is_hollow_and_not_lost_on_the_logarithmic_axis():
    drawn = figure(report(), "title")
    types = drawn.subfigs[0].axes[2]
    marks = {
        (line.get_marker(), round(float(line.get_ydata()[0]), 6)): line.get_markerfacecolor()
        for line in types.lines
        if line.get_marker() in "os"
    }
    assert marks["o", 0.4] == marks["s", 0.2] == "white"
    assert marks["o", 0.9] != "white"
    labels = [text.get_text() for text in drawn.subfigs[0].legends[0].get_texts()]
    assert "negative: its size is shown" in labels


@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_the_suffix_names_the_format_and_the_same_report_gives_the_same_bytes(suffix, start):
    content = draw(report(), "title", suffix)
    assert content.startswith(start)
    assert content == draw(report(), "title", suffix)


def test_a_report_of_traces_only_is_drawn_without_spectra():
    found = report()
    blocks = {name: BlockReport(10, found.blocks[name].estimates) for name in found.blocks}
    only = SharpnessReport(blocks, found.layers, found.whole, 1.0, 1, 1, 0, Cost())
    assert len(figure(only, "title").subfigs) == 1
    assert draw(SharpnessReport({}, {}, BlockReport(1), 1.0, 1, 1, 0, Cost()), "nothing", ".png")


def test_provenance_is_json():
    json.dumps(report().to_dict())
