"""`sharpwatch compare`: what it prints, draws and refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sharpwatch.cli.main import main
from tests.journals import JournalledAttempt, write_journal

USAGE = 2
RNG = np.random.default_rng(0)
DATA = 3 + 0.2 * RNG.standard_normal(400)
NOISE = 0.01 * RNG.standard_normal(400)
REFERENCE = [(step, float(loss)) for step, loss in enumerate(DATA.round(6), 1)]
RUN = [
    (step, loss + float(noise) * (step > 50) + 0.1 * (step > 200))
    for (step, loss), noise in zip(REFERENCE, NOISE, strict=True)
]
SHARPNESS = [(300, block, value, 0.1, "gnb") for block, value in (("emb", 1.0), ("qk", 3.0), ("ffn", 2.0), ("vo", 4.0))]
HIGHER = [(290, block, value + 1, 0.1, "gnb") for _, block, value, _, _ in SHARPNESS]


def as_csv(losses):
    return "step,loss\n" + "".join(f"{step},{loss!r}\n" for step, loss in losses)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.csv").write_text(as_csv(RUN))
    (tmp_path / "reference.csv").write_text(as_csv(REFERENCE))
    return tmp_path


@pytest.fixture
def store(folder):
    runs = {
        "gpt2-a1": [JournalledAttempt(REFERENCE, SHARPNESS, {100: 1.0, 200: 3.0})],
        "gpt2-b7": [JournalledAttempt(RUN, HIGHER, {100: 2.0, 200: 4.0})],
    }
    return write_journal(folder / "journal.db", runs)


def printed(capsys, *argv):
    assert main(["compare", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.usefixtures("folder")
def test_two_files(capsys):
    out = printed(capsys, "run.csv", "reference.csv")
    lines = out.splitlines()
    assert lines[:3] == [
        "run        run.csv        csv: 400 rows, steps 1 to 400",
        "reference  reference.csv  csv: 400 rows, steps 1 to 400",
        "in common                 400 steps, 1 to 400",
    ]
    assert "equal losses to step 50, the first other one at step 51: the same data in the same order" in out
    assert "loss: above the reference from step 201 on\nthey part for good at step 201: by 0." in out
    assert "% of the reference's loss" in out
    assert lines[-1] == (
        "no sharpness to compare: there is none of the run and of the reference; a daemon's journal has them"
    )
    assert len([line for line in lines if " to " in line and line[0].isdigit()]) == 8


@pytest.mark.usefixtures("folder")
def test_json(capsys):
    found = json.loads(printed(capsys, "run.csv", "reference.csv", "--json"))
    assert found["steps"] == {"count": 400, "first": 1, "last": 400}
    assert (found["data"]["same"], found["data"]["equal_until"], found["data"]["first_other"]) == (True, 50, 51)
    assert found["loss"]["parted_step"] == 201
    assert found["loss"]["difference_at_end"]["value"] == pytest.approx(0.1, abs=0.02)
    (stretch,) = found["loss"]["stretches"]
    assert (stretch["side"], stretch["first_step"], stretch["last_step"]) == ("above", 201, 400)
    assert (found["log_gradient_norm"]["pairs"], found["sections"][0]["gradient_norm"]) == (0, None)


@pytest.mark.usefixtures("folder")
def test_tolerance(capsys):
    assert "loss: no difference can be told" in printed(capsys, "run.csv", "reference.csv", "--tolerance", "0.2")


def test_runs_of_a_journal_by_prefix(store, capsys):
    out = printed(capsys, "--store", store, "gpt2-b", "gpt2-a")
    assert "loss: above the reference from step 201 on" in out
    assert "qk     gnb         290               300  4.0 ± 0.1  3.0 ± 0.1       +7.1\n" in out
    assert "block order of the run (gnb): rank correlation 0.8; qk above ffn by 7.1 standard errors" in out
    assert "block  gradient noise  reference  in errors\nemb             3 ± 1      2 ± 1       +0.7\n" in out
    found = json.loads(printed(capsys, "--store", store, "gpt2-b", "gpt2-a", "--json"))
    assert [pair["block"] for pair in found["sharpness"]["pairs"]] == ["emb", "qk", "ffn", "vo"]
    assert found["block_order"][0]["run"]["inversions"][0]["sharper"] == "qk"
    assert printed(capsys, f"{store}#gpt2-b7", f"{store}#gpt2-a") == out
    assert "none within 5 steps" in printed(capsys, "--store", store, "gpt2-b", "gpt2-a", "--within", "5")


def test_a_file_against_a_journal(store, capsys):
    out = printed(capsys, "--store", store, "run.csv", "gpt2-a")
    assert "loss: above the reference from step 201 on" in out
    assert out.endswith("no sharpness to compare: there is none of the run; a daemon's journal has them\n")


def test_the_picture(store, folder, capsys):
    printed(capsys, f"{store}#gpt2-b", f"{store}#gpt2-a", "--picture", "difference.svg")
    svg = (folder / "difference.svg").read_text()
    assert svg.startswith("<svg ")
    assert "step 201<" in svg
    assert "sharpness by block" in svg


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run.csv", "nowhere.csv"], "nowhere.csv: No such file or directory"),
        (
            ["late.csv", "reference.csv"],
            "late.csv: no step in common with reference.csv: steps 900 to 901 here, steps 1",
        ),
        (
            ["--store", "sqlite:///journal.db", "gpt2", "gpt2-a"],
            "2 runs begin with 'gpt2'; the journal has gpt2-a1, gpt2",
        ),
        (["sqlite:///journal.db", "run.csv"], "one of its runs must be named, with --run NAME or for `compare` as"),
        (["sqlite:///journal.db#bert", "run.csv"], "no run 'bert'; the journal has gpt2-a1, gpt2-b7"),
        (["run.csv", "reference.csv", "--picture", "no/where.svg"], "--picture no/where.svg: there is no folder no"),
    ],
)
@pytest.mark.usefixtures("store")
def test_what_cannot_be_read_or_written(argv, message, folder, capsys):
    (folder / "late.csv").write_text(as_csv([(900, 1.0), (901, 1.0)]))
    assert main(["compare", *argv]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a"], "Missing argument 'REFERENCE'"),
        (["-", "-"], "only one of RUN and REFERENCE can be -"),
        (["a", "b", "--store", "journal.db"], "'journal.db' must be sqlite:///PATH"),
        (["a", "b", "--picture", "a.png"], "'a.png' must end in .svg"),
        (["a", "b", "--tolerance", "-1"], "'-1' must be a number, 0 or more"),
        (["a", "b", "--within", "1.5"], "'1.5' is not a whole number, 0 or more"),
    ],
)
def test_usage(argv, message, capsys):
    assert main(["compare", *argv]) == USAGE
    assert message in capsys.readouterr().err


def test_the_default_distance_is_the_packages():
    from sharpwatch.cli.commands.compare import compare  # noqa: PLC0415
    from sharpwatch.replay.paired_estimates import WITHIN  # noqa: PLC0415

    (option,) = (each for each in compare.params if each.name == "within")
    assert option.default == WITHIN
