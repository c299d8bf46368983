"""Backups of the journal, and its full check: by the command line, beside a daemon that goes on."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sqlite3
import stat
from contextlib import closing

import pytest

from sharpwatch.cli.main import main
from sharpwatch.daemon.storage.journal import Journal
from sharpwatch.daemon.storage.schema import SCHEMAS, AttemptRow, PendingWrites, SampleRow


def payload(sequence: int) -> bytes:
    return sequence.to_bytes(4, "little") * 1000


def write_samples(journal: Journal, first: int, last: int) -> None:
    rows = [SampleRow("run", "a1", n, n, payload(n), 0.0) for n in range(first, last + 1)]
    journal.write(PendingWrites(attempts={"a1": AttemptRow("run", "a1", b"hello", 0.0)}), rows)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/journal.db"


@pytest.fixture
def journal(url):
    with closing(Journal(url, retain_samples=100_000)) as opened:
        write_samples(opened, 1, 20)
        yield opened


def sequences(path) -> list[int]:
    with closing(Journal(f"sqlite:///{path}", retain_samples=100_000)) as journal:
        stored = journal.load("run", samples=1000).samples
    assert all(row.payload == payload(row.sequence) for row in stored)
    return [row.sequence for row in stored]


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_a_backup_of_a_daemon_that_goes_on_has_all_that_was_acknowledged(daemon, build, tmp_path):
    trainer = await daemon.train()
    sent = 0
    for number in range(3):
        for _ in range(20):
            sent += 1
            await trainer.send(build.sample(sent))
        await trainer.acknowledged(sent)
        backing = asyncio.create_task(
            asyncio.to_thread(
                main, ["backup", "--store", f"sqlite:///{tmp_path}/journal.db", "--to", f"{tmp_path}/b{number}"]
            )
        )
        await trainer.send(build.sample(sent := sent + 1))  # meanwhile
        assert await backing == 0
        with closing(Journal(f"sqlite:///{tmp_path}/b{number}", retain_samples=100_000)) as backup:
            found = [row.sequence for row in backup.load("run", samples=1000).samples]
        assert found in (list(range(1, sent)), list(range(1, sent + 1)))
    await trainer.acknowledged(sent)


def test_a_backup_is_one_private_file(journal, url, tmp_path, capsys):
    before = os.umask(0)
    try:
        assert main(["backup", "--store", url, "--to", str(tmp_path / "backup.db")]) == 0
    finally:
        os.umask(before)
    assert capsys.readouterr().out == f"{tmp_path}/backup.db: {(tmp_path / 'backup.db').stat().st_size / 1e6:.1f} MB\n"
    assert stat.S_IMODE((tmp_path / "backup.db").stat().st_mode) == 0o600
    assert {name for name in names(tmp_path) if name.startswith("backup")} == {"backup.db"}
    write_samples(journal, 21, 30)
    assert sequences(tmp_path / "backup.db") == list(range(1, 21))


@pytest.mark.usefixtures("journal")
def test_a_backup_replaces_nothing_and_leaves_nothing_where_it_fails(url, tmp_path, capsys):
    (tmp_path / "there.db").write_text("mine")
    assert main(["backup", "--store", url, "--to", str(tmp_path / "there.db")]) == 1
    assert "there.db: there is such a file already" in capsys.readouterr().err
    assert (tmp_path / "there.db").read_text() == "mine"
    before = names(tmp_path)
    assert main(["backup", "--store", f"sqlite:///{tmp_path}/there.db", "--to", str(tmp_path / "backup.db")]) == 1
    assert "file is not a database" in capsys.readouterr().err
    assert main(["backup", "--store", f"sqlite:///{tmp_path}/none.db", "--to", str(tmp_path / "backup.db")]) == 1
    assert "none.db: there is no such file" in capsys.readouterr().err
    assert main(["backup", "--store", url, "--to", str(tmp_path / "nowhere" / "backup.db")]) == 1
    assert names(tmp_path) == before


@pytest.mark.usefixtures("journal")
def test_the_journal_is_found_by_the_configuration(url, tmp_path, monkeypatch, capsys):
    (tmp_path / "sharpwatch.yaml").write_text(f'daemon: {{store: "{url}"}}')
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["backup", "--config", "../sharpwatch.yaml"]) == 0
    (made,) = names(tmp_path / "here")
    assert capsys.readouterr().out.startswith(made)
    assert sequences(tmp_path / "here" / made) == list(range(1, 21))


def test_one_in_postgresql_is_left_to_its_own_tools(capsys):
    for command in (["backup"], ["restore", "x.db"], ["check-journal"]):
        assert main([*command, "--store", "postgresql+psycopg://ann@host/db"]) == 1
        assert "pg_dump" in capsys.readouterr().err


def test_restoring_moves_the_journal_aside_and_only_if_told_to(journal, url, tmp_path, capsys):
    backup = str(tmp_path / "backup.db")
    main(["backup", "--store", url, "--to", backup])
    write_samples(journal, 21, 30)
    assert main(["restore", backup, "--store", url]) == 1
    assert "there is a journal already; --force moves it aside" in capsys.readouterr().err
    assert main(["restore", backup, "--store", url, "--force"]) == 1
    assert "another daemon is using it" in capsys.readouterr().err
    journal.close()
    assert main(["restore", backup, "--store", url, "--force"]) == 0
    aside = [line.removeprefix("moved aside: ") for line in capsys.readouterr().out.splitlines()[:-1]]
    assert sequences(tmp_path / "journal.db") == list(range(1, 21))
    assert stat.S_IMODE((tmp_path / "journal.db").stat().st_mode) == 0o600
    # What was moved is a journal still.
    assert sequences(min(aside, key=len)) == list(range(1, 31))


@pytest.mark.usefixtures("journal")
def test_restoring_where_nothing_is(url, tmp_path):
    main(["backup", "--store", url, "--to", str(tmp_path / "backup.db")])
    assert main(["restore", str(tmp_path / "backup.db"), "--store", f"sqlite:///{tmp_path}/new.db"]) == 0
    assert sequences(tmp_path / "new.db") == list(range(1, 21))
    assert not [name for name in names(tmp_path) if name.endswith(".part")]


@pytest.mark.usefixtures("journal")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("there", [True, False])
def test_what_root_restores_belongs_to_the_daemons_user(url, tmp_path, there):
    main(["backup", "--store", url, "--to", str(tmp_path / "backup.db")])
    (tmp_path / "place").mkdir()
    place = tmp_path / "place" / "journal.db"
    if there:
        Journal(f"sqlite:///{place}", retain_samples=1).close()
    os.chown(place if there else place.parent, 12345, 23456)
    assert main(["restore", str(tmp_path / "backup.db"), "--store", f"sqlite:///{place}", "--force"]) == 0
    assert (place.stat().st_uid, place.stat().st_gid) == (12345, 23456)


@pytest.mark.usefixtures("journal")
def test_what_is_no_whole_backup_is_not_restored(url, tmp_path, capsys):
    new = ["--store", f"sqlite:///{tmp_path}/new.db"]
    main(["backup", "--store", url, "--to", str(tmp_path / "backup.db")])
    damaged = bytearray((tmp_path / "backup.db").read_bytes())
    damaged[-4096 * 3 : -4096 * 2] = bytes(4096)
    (tmp_path / "backup.db").write_bytes(damaged)
    (tmp_path / "text.db").write_text("no database at all " * 100)
    (tmp_path / "empty.db").touch()
    for name, said in (
        ("backup.db", "is damaged, so that no backup of it is of use"),
        ("text.db", "file is not a database"),
        ("empty.db", "the file is empty"),
        ("none.db", "there is no such file"),
        ("journal.db", "it is no backup: .*-wal has commits"),
    ):
        assert main(["restore", str(tmp_path / name), *new]) == 1
        assert re.search(said, capsys.readouterr().err), name
    assert "new.db" not in names(tmp_path)


@pytest.mark.usefixtures("journal")
def test_a_whole_journal_is_found_whole_beside_its_daemon_and_after(url, tmp_path, capsys):
    assert main(["check-journal", "--store", url, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["problems"], report["counts"]) == (
        [],
        {"attempts": 1, "samples": 20, "decisions": 0, "commits": 1},
    )
    assert report["notes"] == ["a daemon is using it; its log and length were not checked"]
    main(["backup", "--store", url, "--to", str(tmp_path / "backup.db")])
    capsys.readouterr()
    before = names(tmp_path)
    assert main(["check-journal", "--store", f"sqlite:///{tmp_path}/backup.db"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/backup.db: whole; 1 attempts, 20 samples, 0 decisions, 1 commits\n"
    assert names(tmp_path) == before


LACKING = {
    "DELETE FROM samples WHERE sequence > 15": ["a newest acknowledged sample that is not there: a1"],
    "INSERT INTO samples VALUES (99, 'run', 'a9', 1, 1, x'')": ["samples of an attempt that is not there: a9"],
    "INSERT INTO samples VALUES (99, 'else', 'a1', 21, 1, x'')": ["samples of an attempt of another run: a1"],
    "INSERT INTO transitions VALUES (1, 'run', 'd1', 1, 'sent', '', '', '')": [
        "transitions of a decision or plan that is not there: d1"
    ],
    """INSERT INTO revisions VALUES ('run', 2, '{"decision_id": "d1"}')""": [
        "a revision of a decision that is not there: run 2",
        "revisions that are not numbered from 1 on without a gap: run",
    ],
    "INSERT INTO baselines VALUES ('run', 'a9', 1, x'')": ["baselines of an attempt that is not there: run"],
}


@pytest.mark.usefixtures("journal")
@pytest.mark.parametrize("damage", LACKING)
def test_records_that_lack_others_are_found(url, tmp_path, capsys, damage):
    with closing(sqlite3.connect(tmp_path / "journal.db")) as beside, beside:
        beside.execute(damage)
    assert main(["check-journal", "--store", url]) == 1
    head, *lines = capsys.readouterr().out.splitlines()
    assert "damaged" in head
    assert lines == [*LACKING[damage], "note: a daemon is using it; its log and length were not checked"]


def test_samples_that_were_dropped_are_no_damage(journal, url, capsys):
    write_samples(journal, 25, 26)
    assert main(["check-journal", "--store", url]) == 0
    assert "note: 4 samples between others were never taken in, of 1 attempts" in capsys.readouterr().out


def test_a_damaged_page_and_lost_commits_are_found(journal, url, tmp_path, capsys):
    journal.close()
    shutil.copy(tmp_path / "journal.db", tmp_path / "copy.db")
    damaged = bytearray((tmp_path / "journal.db").read_bytes())
    damaged[-4096 * 3 : -4096 * 2] = bytes(4096)
    (tmp_path / "journal.db").write_bytes(damaged)
    assert main(["check-journal", "--store", url]) == 1
    out, err = capsys.readouterr()
    assert "damaged" in out + err
    shutil.copy(tmp_path / "copy.db", tmp_path / "journal.db")
    marker = (tmp_path / "journal.db-commits").read_text().split()
    (tmp_path / "journal.db-commits").write_text(f"{marker[0]} {int(marker[1]) + 3}")
    assert main(["check-journal", "--store", url]) == 1
    assert "3 acknowledged commits are missing" in capsys.readouterr().err
    (tmp_path / "journal.db-commits").unlink()


def test_a_journal_of_an_earlier_version_is_checked(tmp_path, capsys):
    with closing(sqlite3.connect(tmp_path / "old.db")) as old:
        old.executescript(SCHEMAS[0] + "PRAGMA user_version=1;")
        old.execute("INSERT INTO samples VALUES (1, 'run', 'a1', 1, 1, x'')")
        old.commit()
    assert main(["check-journal", "--store", f"sqlite:///{tmp_path}/old.db"]) == 1
    assert "samples of an attempt that is not there: a1" in capsys.readouterr().out
