"""`sharpwatch replay`: what it prints for logs that can be read and for those that can't."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from sharpwatch.cli.main import main

USAGE = 2
HEALTHY = "step,train/loss\n" + "".join(f"{step},{4 - step % 7 * 0.01}\n" for step in range(1, 151))
BAD = "step,loss,grad_norm\n1,3.5,1.5\n2,3.25,nan\n3,nan,1.5\n"


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        (tmp_path / name).write_text(text)
        return name

    return write


def test_a_run_with_an_incident(written, capsys):
    assert main(["replay", written("bad.csv", BAD)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out == (
        "bad.csv\n"
        "onset  opened  closed  severity  cause       name       culprit      evidence\n"
        "    2       2    open  critical  non-finite  NonFinite  whole model  gradient of the model not finite\n"
        "\n"
        "csv: 3 rows, steps 1 to 3; loss judged only for nan and inf, gradient norm (grad_norm) judged only for nan and"
        " inf; not in the file and not judged: learning rate; "
        "blocks, weights and optimizer state are known only to the agent\n"
    )


def test_a_run_without_an_incident(written, capsys):
    assert main(["replay", written("healthy.csv", HEALTHY)]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("healthy.csv: no incident\n\ncsv: 150 rows, steps 1 to 150; loss (train/loss) judged after ")
    assert "not in the file and not judged: gradient norm, learning rate;" in out


def test_json(written, capsys):
    assert main(["replay", "--json", written("bad.csv", BAD), written("healthy.csv", HEALTHY)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["errors"] == []
    bad, healthy = found["runs"]
    assert (bad["file"], bad["format"], bad["rows"], bad["first_step"], bad["last_step"]) == ("bad.csv", "csv", 3, 1, 3)
    assert bad["columns"] == {"step": "step", "loss": "loss", "grad-norm": "grad_norm"}
    assert bad["blind_rows"] == {"loss": None, "grad-norm": None, "lr": None}
    (incident,) = bad["incidents"]
    assert (incident["name"], incident["cause"], incident["onset"]) == ("NonFinite", "non-finite", 2)
    assert (incident["closed_step"], incident["active"]) == (None, True)
    assert healthy["incidents"] == []


def test_a_file_that_cannot_be_read_leaves_the_others(written, capsys):
    files = [written("bad.csv", BAD), "nowhere", written("diary.txt", "Dear diary\n"), written("empty.csv", "")]
    assert main(["replay", *files]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("bad.csv\n")
    lines = err.splitlines()
    assert lines[0] == "sharpwatch replay: nowhere: No such file or directory"
    assert lines[1].startswith("sharpwatch replay: diary.txt: the format is not known by its content")
    assert lines[2].startswith("sharpwatch replay: empty.csv: the file is empty; valid are CSV, ")
    assert len(lines) == 3
    assert main(["replay", "nowhere"]) == 1
    assert capsys.readouterr().out == ""
    assert main(["replay", "nowhere", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found == {"runs": [], "errors": ["nowhere: No such file or directory"]}


def test_notes_have_a_line_each(written, capsys):
    assert main(["replay", written("log.csv", "loss,train_loss\n1,2\n1,2\n1")]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "note: the last line is incomplete and left out",
        "note: there is no step: rows are counted from 1",
        "note: loss is 'loss'; --column loss=NAME takes another: train_loss",
    ]


def test_columns_of_other_names(written, capsys):
    name = written("log.csv", "when,nll\n10,2\n20,nan\n")
    assert main(["replay", name]) == 1
    assert "log.csv:1: no column is known: when, nll." in capsys.readouterr().err
    assert main(["replay", "--column", "loss=nll", "--column", "step=when", name]) == 0
    assert "   20      20    open  critical  non-finite  NonFinite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Missing argument 'FILE...'"),
        (["--format", "xml", "a"], "'xml' is not one of 'csv', 'jsonl'"),
        (["--column", "loss", "a"], "'loss' must be COLUMN=NAME, with a column of step, loss, grad-norm, lr"),
        (["--column", "nll=loss", "a"], "'nll=loss' must be COLUMN=NAME"),
    ],
)
def test_usage(argv, message, capsys):
    assert main(["replay", *argv]) == USAGE
    assert message in capsys.readouterr().err


def test_the_command_has_the_formats_and_columns_of_the_package():
    """They are written twice, since help must not import the package."""
    from sharpwatch.cli.commands import replay  # noqa: PLC0415
    from sharpwatch.replay import files, log  # noqa: PLC0415

    assert replay._FORMATS == files.FORMATS
    assert tuple(replay._COLUMNS) == log.COLUMNS
    assert replay._MEASURED == log.MEASURED


def test_another_configuration_has_another_budget(written, capsys):
    random = np.random.default_rng(0)
    losses = 3.0 + 0.05 * random.standard_normal(400)
    losses[300:] += 0.08  # a shift that is worth a warning
    log = written("log.csv", "step,loss\n" + "".join(f"{i},{loss}\n" for i, loss in enumerate(losses, 1)))
    strict = written("strict.yaml", "detection: {pages_per_10k_steps: 0.001, warnings_per_10k_steps: 0.0001}\n")
    found = []
    for more in ([], ["--config", strict]):
        assert main(["replay", "--json", *more, log]) == 0
        found.append(len(json.loads(capsys.readouterr().out)["runs"][0]["incidents"]))
    assert found[0] > found[1] == 0


def test_a_configuration_that_is_wrong_is_said(written, capsys):
    config = written("wrong.yaml", "detection: {pages_per_10k_steps: 0}\n")
    assert main(["replay", "--config", config, written("healthy.csv", HEALTHY)]) == 1
    assert "wrong.yaml:1" in capsys.readouterr().err


def made(seed, gap=0.0):
    noise = np.random.default_rng(seed).normal(0, 0.02, 400)
    return "step,loss\n" + "".join(f"{step},{3 + gap + noise[step - 1]:.4f}\n" for step in range(1, 401))


def test_a_run_that_is_wrong_from_its_first_step_is_found_by_a_reference(written, capsys):
    bad, good = written("bad.csv", made(1, gap=0.4)), written("good.csv", made(2))
    assert main(["replay", bad]) == 0
    assert capsys.readouterr().out.startswith("bad.csv: no incident")
    assert main(["replay", bad, "--reference", good, "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    (incident,) = run["incidents"]
    assert (incident["name"], incident["cause"], incident["severity"]) == ("SilentFailure", "silent", "critical")
    assert incident["onset"] == 1
    assert "above the reference good.csv from step 1 on: by " in incident["evidence"][0]
    assert main(["replay", good, "--reference", bad]) == 0
    assert capsys.readouterr().out.startswith("good.csv: no incident")


def test_a_reference_that_can_not_be_read(written, capsys):
    assert main(["replay", written("good.csv", made(2)), "--reference", "none.csv"]) == 1
    assert "none.csv" in capsys.readouterr().err
    assert main(["replay", "good.csv", "--reference", written("rates.csv", "step,lr\n1,0.1\n2,0.1\n")]) == 1
    assert "rates.csv: no step has a loss that is finite" in capsys.readouterr().err


# What policies would have done

POLICIES = """
policies:
  - name: cut
    match: {alert: NonFinite}
    mode: enforce
    action: {kind: scale_lr, blocks: all, factor: 0.5}
    escalate: {after_steps: 10, to: back}
  - {name: back, mode: advise, action: {kind: rollback}}
  - {name: tell, match: {alert: NonFinite}, mode: enforce, action: {kind: notify}}
"""
TWICE = "step,loss,grad_norm\n" + "".join(
    f"{step},3.5,{'nan' if step in (5, 6, 60) else 1.5}\n" for step in range(1, 91)
)


def test_policies_say_what_they_would_have_decided_and_what_a_replay_cannot_know(written, capsys):
    config = written("new.yaml", POLICIES)
    assert main(["replay", written("bad.csv", TWICE), "--config", config]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "what the policies would have decided" in out
    assert "5 NonFinite from step 5 cut scale_lr sent ok the model 0.5 gradient of the model not finite" in out
    assert "5* NonFinite from step 5 tell notify observed ok" in out
    assert "60* NonFinite from step 60 back rollback refused checkpoint: there is none from before the onset" in out
    assert "note: nothing was applied: the run goes on as it was recorded, so no outcome is known" in out
    assert "note: the action of step 5 would have changed what follows" in out
    assert main(["replay", "bad.csv", "--config", config, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert found["policies"] == ["cut", "back", "tell"]
    first = found["decisions"][0]
    assert (first["policy"], first["step"], first["outcome"], first["guard"]) == ("cut", 5, "sent", "ok")
    assert first["evidence"] == ["gradient of the model not finite"]
    assert [each["hypothetical"] for each in found["decisions"]] == [False] + [True] * (len(found["decisions"]) - 1)


def test_a_rollback_without_a_checkpoint_would_be_refused(written, capsys):
    config = written(
        "new.yaml", "policies:\n  - {name: back, match: {alert: NonFinite}, mode: enforce, action: {kind: rollback}}"
    )
    assert main(["replay", written("bad.csv", BAD), "--config", config]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "NonFinite from step 2 back rollback refused" in out
    assert "note: no checkpoint is known from the file, which a rollback needs" in out
    assert "would have changed" not in out


def test_a_wrong_configuration_is_refused_before_any_file_is_read(written, capsys):
    assert main(["replay", "nowhere", "--config", written("new.yaml", "policies: [{nam: x}]")]) == 1
    assert "new.yaml:1: policies[0]: name is missing" in capsys.readouterr().err


def test_overrides_are_by_label(written, capsys):
    """With a budget of a hundred times the warnings, the end of a step in the loss is an incident for longer."""
    noise = random.Random(1)  # noqa: S311  not for secrets
    losses = [3 + noise.gauss(0, 0.05) + 0.15 * (step in {400, 401, 402}) for step in range(1, 601)]
    log = written("run.csv", "step,loss\n" + "".join(f"{step},{loss}\n" for step, loss in enumerate(losses, 1)))
    override = "{match: {team: nlp}, warnings_per_10k_steps: 1000}"
    config = written("sharpwatch.yaml", f"detection:\n  overrides:\n  - {override}\n")
    found = []
    for labels in ([], ["--label", "team=nlp"], ["--label", "team=vision"]):
        assert main(["replay", "--json", log, "--config", config, *labels]) == 0
        (run,) = json.loads(capsys.readouterr().out)["runs"]
        (incident,) = run["incidents"]
        found.append(incident["closed_step"])
    assert found[0] == found[2] < found[1]
    assert main(["replay", log, "--label", "team"]) == USAGE
    assert "'team' must be KEY=VALUE" in capsys.readouterr().err
