"""A wrong command line is answered in one line that says what is valid; help and completion."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sharpwatch.cli.main import main

USAGE = 2


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "sharpwatch: missing command; choose from demo, measure, replay, compare, jobs, "),
        (["jbos"], "no command 'jbos'; choose from demo, measure, replay, compare, jobs, "),
        (["lr"], "sharpwatch lr: missing command; choose from show, set, history, undo, plan, promote, pause, abort;"),
        (["lr", "put"], "no command 'put'; choose from show, set, history, undo, plan, promote, pause, abort;"),
        (["lr", "set", "run"], "sharpwatch lr set: Missing argument 'BLOCK=FACTOR...', or --every"),
        (
            ["lr", "set", "run", "qk"],
            "'qk' is not a multiplier; it must be BLOCK=FACTOR with a factor above 0, such as",
        ),
        (["lr", "set", "run", "qk=0"], "'qk=0' is not a multiplier"),
        (["lr", "set", "run", "qk=-1"], "'qk=-1' is not a multiplier"),
        (["lr", "set", "run", "qk=nan"], "'qk=nan' is not a multiplier"),
        (["lr", "set", "run", "qk=inf"], "'qk=inf' is not a multiplier"),
        (["lr", "set", "run", "=2"], "'=2' is not a multiplier"),
        (["lr", "set", "run", "qk=1", "qk=2"], "qk is given twice"),
        (["lr", "set", "run", "qk=1", "--ramp", "-3"], "'--ramp': '-3' is not a whole number, 0 or more"),
        (["lr", "set", "run", "qk=1", "--ramp", "1.5"], "'--ramp': '1.5' is not a whole number, 0 or more"),
        (["lr", "set", "run", "qk=1", "--timeout", "0"], "'0' is not a positive number of seconds"),
        (["lr", "set", "run", "qk=1", "--tim", "3"], "No such option '--tim'"),
        (
            ["lr", "plan", "run"],
            "give PLAN or --set: paper, measured, curvature-share, a YAML file, or --set emb=4,head=4",
        ),
        (["lr", "plan", "run", "paper", "--set", "qk=2"], "give PLAN or --set"),
        (["lr", "plan", "run", "--set", "qk=2,vo=0"], "'vo=0' is not a multiplier"),
        (["lr", "plan", "run", "--set", "qk=2,vo=2", "--set", "qk=3"], "qk is given twice"),
        (["lr", "plan", "run", "paper", "--stages", "vo,,qk"], "'vo,,qk' does not name stages"),
        (
            ["lr", "set", "run", "--every", "qk=0"],
            "'qk=0' is not an update interval; it must be BLOCK=STEPS with 1 or more",
        ),
        (["lr", "set", "run", "--every", "qk=2.5"], "'qk=2.5' is not an update interval"),
        (["lr", "set", "run", "--every", "qk=2,qk=3"], "qk is given twice"),
        (["rollback", "run"], "Missing option '--reason'"),
        (
            ["rollback", "run", "--reason", "r", "--skip", "9:5"],
            "'9:5' is not a range of steps; it must be A:B with A < B",
        ),
        (["rollback", "run", "--reason", "r", "--skip", "5"], "'5' is not a range of steps"),
        (
            ["rollback", "run", "--reason", "--json"],
            "--reason has no value; if --json is its value, write --reason=--json",
        ),
        (["jobs", "--address", "--json"], "--address has no value"),
        (["rollback", "run", "--reason=--json", "--skip", "5"], "'5' is not a range of steps"),
        (["mode", "run", "act"], "'[MODE]': 'act' is not one of 'observe', 'advise', 'enforce'"),
        (["mode"], "Missing argument 'RUN'; --all MODE sets every run"),
        (["mode", "--all"], "--all takes a MODE and no RUN; MODE is one of observe, advise, enforce"),
        (["mode", "--all", "run"], "--all takes a MODE and no RUN; MODE is one of observe, advise, enforce"),
        (["mode", "run", "observe", "--all"], "--all takes a MODE and no RUN"),
        (
            ["jobs", "--address", "nowhere"],
            "expected HOST:PORT or unix:PATH, the port from 1 to 65535",
        ),
        (["--address", "host:0", "jobs"], "got 'host:0'"),
        (["--address", "host:65536", "jobs"], "got 'host:65536'"),
        (["--address", "unix:", "jobs"], "got 'unix:'"),
        (["decisions", "run", "more"], "Got unexpected extra argument (more)"),
        (["approve"], "Missing argument 'ID'"),
        (["silence", "add", "run", "--comment", "c"], "Missing option '--for'"),
        (["silence", "add", "run", "--for", "2h"], "Missing option '--comment'"),
        (
            ["silence", "add", "--for", "2h", "--comment", "c"],
            "name what to silence: RUN, --alert, --cause or --policy",
        ),
        (
            ["silence", "add", "run", "--for", "2", "--comment", "c"],
            "'2' is not a duration; it must be 1s to 30d, such",
        ),
        (["silence", "add", "run", "--for", "31d", "--comment", "c"], "'31d' is not a duration"),
        (["silence", "add", "run", "--for", "nanh", "--comment", "c"], "'nanh' is not a duration"),
        (["silence", "expire"], "Missing argument 'ID'"),
        (["serve", "--config", "f", "--http", "unix:x"], "got 'unix:x'"),
        (["serve", "--config", "f", "--grpc", "x"], "got 'x'"),
        (["--json", "serve", "--config", "f"], "sharpwatch serve: --json is for commands that ask the daemon"),
        (["check-config"], "Missing argument 'FILE'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(argv, expected, capsys):
    assert main(argv) == USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert err.count("\n") == 1
    assert err.startswith("sharpwatch")
    assert "--help" in err


def test_version(capsys):
    from sharpwatch import __version__  # noqa: PLC0415 - the name under test

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sharpwatch {__version__}\n"


def test_help_lists_every_command_without_loading_any(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in ("serve", "demo", "jobs", "show", "lr", "rollback", "mode", "decisions", "approve", "reject"):
        assert f"\n  {command} " in out


@pytest.mark.parametrize("argv", [["lr", "--help"], ["lr", "set", "--help"], ["rollback", "-h"], ["doctor", "--help"]])
def test_every_command_has_help(argv, capsys):
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith(f"Usage: sharpwatch {' '.join(argv[:-1])} ")


def complete(monkeypatch, *words):
    """What bash offers for the last of `words`."""
    monkeypatch.setenv("_SHARPWATCH_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(("sharpwatch", *words)))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    assert main([]) == 0


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("d",), ["demo", "decisions", "doctor"]),
        (("lr", "s"), ["show", "set"]),
        (("lr", "set", "--re"), ["--reason"]),
        (("serve", "--log-level", "w"), ["warning"]),
        (("demo", "--fault", "b"), ["bad-batches"]),
        (("mode", "run", ""), ["observe", "advise", "enforce"]),
    ],
)
def test_the_shell_completes_commands_options_and_values(words, offered, monkeypatch, capsys):
    complete(monkeypatch, *words)
    assert [line.partition(",")[2] for line in capsys.readouterr().out.splitlines()] == offered


def test_a_shell_gets_its_completion_script(monkeypatch, capsys):
    monkeypatch.setenv("_SHARPWATCH_COMPLETE", "bash_source")
    assert main([]) == 0
    assert "COMP_WORDS" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [("d",), ("serve", "--log-level", "w"), ("demo", "--fault", "b"), ("measure", "--dtype", "f")]
)
def test_completion_loads_neither_torch_nor_rich(words):
    code = (
        "import os, sys; from sharpwatch.cli.main import main\n"
        f"words = {('sharpwatch', *words)!r}\n"
        "os.environ |= {'_SHARPWATCH_COMPLETE': 'bash_complete', 'COMP_WORDS': ' '.join(words)}\n"
        "os.environ['COMP_CWORD'] = str(len(words) - 1)\n"
        "main([])\n"
        "print([name for name in ('torch', 'rich', 'pydantic', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_without_click_the_command_line_says_what_to_install():
    code = "import sys; sys.modules['click'] = None; from sharpwatch.cli.main import main; sys.exit(main(['jobs']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "sharpwatch: the command line needs the package click, which is not installed; "
        "run: pip install 'sharpwatch[cli]'\n"
    )


@pytest.mark.parametrize(
    "argv",
    [
        *(["demo"], ["measure"], ["jobs"], ["show"], ["decisions"], ["lr", "set"], ["lr", "undo"], ["mode"]),
        *(["rollback"], ["approve"], ["reject"], ["serve"], ["check-config"], ["doctor"]),
        *(["backup"], ["restore"], ["check-journal"]),
    ],
)
def test_help_has_an_example(argv, capsys):
    assert main([*argv, "--help"]) == 0
    assert f"Example:\n  sharpwatch {' '.join(argv)}" in capsys.readouterr().out
