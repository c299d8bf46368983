"""Grids are aligned, safe to print, and no wider than the terminal."""

from __future__ import annotations

import io

from sharpwatch.cli.output.tables import Grid, clean, plain, write

GRID = Grid("lrl", (("qk", "12", "a"), ("emb", "3", "longer")), ("block", "n", "why"), title="blocks")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_text_is_aligned_and_without_trailing_blanks():
    assert plain([GRID, Grid("l", (), empty="nothing here"), Grid("l", ())]) == (
        "blocks\n"
        "block   n  why\n"
        "qk     12  a\n"
        "emb     3  longer\n"
        "\n"
        "nothing here"
    )  # fmt: skip


def test_what_is_no_terminal_gets_plain_text():
    out = io.StringIO()
    write([GRID], out)
    assert out.getvalue() == plain([GRID]) + "\n"


def test_what_a_terminal_would_obey_is_shown_instead():
    assert clean("\x1b[31mred\nnext\tcell\u202e") == "\\x1b[31mred next cell\\x202e"
    assert "\x1b" not in plain([Grid("l", (("\x1b]0;title\x07",),))])


def test_markup_in_a_name_is_not_obeyed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    write([Grid("l", (("[red]run[/red]",),))], out)
    assert "[red]run[/red]" in out.getvalue()


def test_a_grid_too_wide_for_the_terminal_is_split_and_its_names_are_repeated(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    wide = Grid("lrrrr", (("qk", *("3.4e-09 ± 2e-10",) * 4),), ("block", "one", "two", "three", "four"))
    write([wide], out)
    lines = [line.rstrip() for line in out.getvalue().replace("\x1b[2m", "").replace("\x1b[0m", "").splitlines()]
    assert max(map(len, lines)) <= 40
    assert [line.split() for line in lines[::2]] == [["block", "one", "two"], ["block", "three", "four"]]
    assert lines[1] == lines[3] == "qk     3.4e-09 ± 2e-10  3.4e-09 ± 2e-10"


def test_split_keeps_every_column_once():
    parts = GRID.split(1)
    assert [part.headings for part in parts] == [("block", "n"), ("block", "why")]
    assert GRID.split(1000) == [GRID]
