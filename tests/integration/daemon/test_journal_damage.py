"""A journal that has lost something is noticed when it is opened, said, and left as it is."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from sharpwatch.daemon.storage import catalog
from sharpwatch.daemon.storage.journal import Journal
from sharpwatch.daemon.storage.wal import read_wal
from sharpwatch.errors import StoreError

WRITES = 150
# Writes, says each time that it is done, and is killed with the log as it is; a copy of that is made on the way. The
# samples are so large that the first log is in the database by then, and a second one begun over it.
WRITER = """
import os, shutil, sys
from sharpwatch.daemon.storage.journal import Journal
from sharpwatch.daemon.storage.schema import AttemptRow, PendingWrites, SampleRow
folder, writes = sys.argv[1], int(sys.argv[2])
journal = Journal(f"sqlite:///{folder}/journal.db", retain_samples=100_000)
journal.write(PendingWrites(attempts={"a1": AttemptRow("run", "a1", b"", 0.0)}))
for sequence in range(1, writes + 1):
    journal.write(PendingWrites(), [SampleRow("run", "a1", sequence, sequence, os.urandom(50_000), 0.0)])
    if sequence == writes - 10:
        shutil.copy(f"{folder}/journal.db-wal", f"{folder}/earlier-wal")
os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders with journals whose daemons were killed, one of them of a few writes."""
    folders = []
    for writes in (WRITES, 20):
        folders.append(tmp_path_factory.mktemp("killed"))
        command = [sys.executable, "-c", WRITER, str(folders[-1]), str(writes)]
        assert subprocess.run(command, check=False, timeout=120).returncode == -9
    return folders


@pytest.fixture
def folder(killed, tmp_path):
    """A copy of the journal of many writes."""
    shutil.copytree(killed[0], tmp_path / "journal")
    return tmp_path / "journal"


def opened(folder: Path) -> Journal:
    return Journal(f"sqlite:///{folder}/journal.db", retain_samples=100_000)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith("-shm")}


def flip(name: str, at: int):
    """Change one bit of a file; a negative place counts from its end."""

    def damage(folder: Path, _: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[at] ^= 1
        (folder / name).write_bytes(data)

    return damage


def cut(name: str, share: float):
    def damage(folder: Path, _: Path) -> None:
        os.truncate(folder / name, int(share * (folder / name).stat().st_size) // 4096 * 4096)

    return damage


def zero(name: str):
    def damage(folder: Path, _: Path) -> None:
        (folder / name).write_bytes(bytes((folder / name).stat().st_size))

    return damage


def remove(name: str):
    return lambda folder, _: (folder / name).unlink()


def take(source: str, name: str, *, other: bool = True):
    """Put another file in the place of one."""
    return lambda folder, second: shutil.copy((second if other else folder) / source, folder / name)


def text(folder: Path, _: Path) -> None:
    (folder / "journal.db").write_text("not a database, and long enough to be looked at as one " * 20)


FRAME = 24 + 4096
DAMAGE = {
    "a bit of the log's header": (flip("journal.db-wal", 9), r"journal\.db-wal is damaged: its header"),
    "a bit of the log's salt": (flip("journal.db-wal", 17), r"journal\.db-wal is damaged: its header"),
    "a bit of a page in the log": (flip("journal.db-wal", 32 + 3 * FRAME + 999), "is damaged: frame 4 of "),
    "a bit of a frame's salt": (flip("journal.db-wal", 32 + 3 * FRAME + 9), "is damaged: frame 4 of "),
    "a zeroed log": (zero("journal.db-wal"), r"journal\.db-wal is damaged: its header"),
    "no log": (remove("journal.db-wal"), "acknowledged commits are missing, and there is no -wal file: nothing was"),
    "an empty log": (cut("journal.db-wal", 0.0), "acknowledged commits are missing: nothing was changed; put"),
    "half a log": (cut("journal.db-wal", 0.5), "acknowledged commits are missing: nothing was changed; put"),
    "an earlier log": (take("earlier-wal", "journal.db-wal", other=False), "10 acknowledged commits are missing"),
    "another's log": (take("journal.db-wal", "journal.db-wal"), "not the journal that was here|truncated|malformed"),
    "a zeroed database": (zero("journal.db"), "the file is zeroed; nothing was changed; restore a backup"),
    "a truncated database": (cut("journal.db", 0.9), r"the file is truncated: \d+ of \d+ bytes"),
    "half a page": (cut("journal.db", 0.0005), "file is empty, but there is .*-wal"),
    "an empty database": (cut("journal.db", 0.0), "the file is empty, but there is .*journal.db-wal"),
    "no database": (remove("journal.db"), "the file is gone, but there is .*journal.db-wal"),
    "another journal": (take("journal.db", "journal.db"), "not the journal that was here|truncated|malformed"),
    "a text": (text, "file is not a database"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_said_and_left_as_it_is(killed, folder, what):
    damage, said = DAMAGE[what]
    damage(folder, killed[1])
    before = content(folder)
    for _ in range(2):
        with pytest.raises(StoreError, match=rf"journal .*journal\.db: .*({said})"):
            opened(folder)
    assert content(folder) == before


@pytest.mark.parametrize("what", ["empty", "gone"])
def test_a_closed_journal_that_is_lost_is_not_begun_anew(folder, what):
    opened(folder).close()
    (folder / "journal.db").unlink()
    if what == "empty":
        (folder / "journal.db").touch()
    with pytest.raises(StoreError, match=f"the file is {what}, but it had acknowledged commits.*remove .*db-commits"):
        opened(folder)
    (folder / "journal.db-commits").unlink()
    with closing(opened(folder)) as journal:
        assert not journal.ask(catalog.outlines)


def test_an_earlier_copy_is_taken_once_it_is_said_that_it_may_be(folder, tmp_path):
    opened(folder).close()
    shutil.copy(folder / "journal.db", tmp_path / "copy.db")
    with closing(opened(folder)) as journal:
        journal.keep_notifications({})
    shutil.copy(tmp_path / "copy.db", folder / "journal.db")
    with pytest.raises(StoreError, match=r"1 acknowledged commits are missing.*To go on with what is there, remove"):
        opened(folder)
    (folder / "journal.db-commits").unlink()
    with closing(opened(folder)) as journal:
        assert journal.load("run", samples=1).attempts[0].acknowledged == WRITES


@pytest.mark.parametrize("tail", [b"", b"x" * 1000, b"x" * FRAME, "a frame of the transaction under way"])
def test_what_a_kill_leaves_is_no_damage(folder, tail):
    log = folder / "journal.db-wal"
    with log.open("r+b") as file:
        header = file.read(32)
        # Frames of the log that this one was begun over follow its own.
        frames = iter(lambda: file.read(FRAME), b"")
        own = next(index for index, frame in enumerate(frames) if frame[8:16] != header[16:24])
        if isinstance(tail, str):
            file.seek(32)
            tail = file.read(FRAME)
        file.seek(32 + own * FRAME)
        file.write(tail)
    with closing(opened(folder)) as journal:
        stored = journal.load("run", samples=1000)
    assert [row.sequence for row in stored.samples] == list(range(1, WRITES + 1))
    assert not log.exists()


def test_the_log_is_read_as_sqlite_reads_it(folder):
    found = read_wal(folder / "journal.db-wal", 4096)
    with closing(sqlite3.connect(f"file:{folder}/journal.db?mode=ro", uri=True)) as beside:
        assert beside.execute("PRAGMA page_count").fetchone() == (found.size,)
        # Truncated after each frame: what SQLite still finds are the commits up to there.
    data = (folder / "journal.db-wal").read_bytes()
    for frames in (1, 2, 14, 15, 16, 17, 18, 30):
        (folder / "journal.db-wal").write_bytes(data[: 32 + frames * FRAME])
        (folder / "journal.db-shm").unlink(missing_ok=True)
        found = read_wal(folder / "journal.db-wal", 4096)
        assert found.damage == ""
        with closing(sqlite3.connect(f"file:{folder}/journal.db?mode=ro", uri=True)) as beside:
            (pages,) = beside.execute("PRAGMA page_count").fetchone()
        assert found.size in {0, pages}
        assert len(found.pages) <= frames


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_no_second_daemon_opens_it_by_another_path(tmp_path, link):
    (tmp_path / "here").mkdir()
    with closing(Journal(f"sqlite:///{tmp_path}/here/journal.db", retain_samples=100)):
        path = tmp_path / "there.db"
        (path.symlink_to if link == "symbolic" else path.hardlink_to)(tmp_path / "here" / "journal.db")
        with pytest.raises(StoreError, match=r"there\.db: another daemon is using it"):
            Journal(f"sqlite:///{path}", retain_samples=100)


def test_a_link_leads_to_the_same_journal_and_its_log(folder, tmp_path):
    (tmp_path / "link.db").symlink_to(folder / "journal.db")
    with closing(Journal(f"sqlite:///{tmp_path}/link.db", retain_samples=100_000)) as journal:
        assert journal.load("run", samples=1).attempts[0].acknowledged == WRITES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal", "link.db"]


def test_a_refused_second_daemon_leaves_the_first_ones_locks(tmp_path):
    """Closing a descriptor drops the locks that its process has on the file, so it is tried by another process."""
    url = f"sqlite:///{tmp_path}/journal.db"
    with closing(Journal(url, retain_samples=100)):
        script = (
            "import sys; from sharpwatch.daemon.storage.journal import Journal; Journal(sys.argv[1], retain_samples=1)"
        )
        second = subprocess.run([sys.executable, "-c", script, url], capture_output=True, text=True, check=False)
        assert "another daemon is using it" in second.stderr
    Journal(url, retain_samples=100).close()


def test_only_its_user_may_read_it(tmp_path):
    before = os.umask(0)
    try:
        with closing(Journal(f"sqlite:///{tmp_path}/journal.db", retain_samples=100)) as journal:
            journal.keep_notifications({})
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("journal.db", "journal.db-wal", "journal.db-shm", "journal.db-commits"), 0o600)


def test_one_that_others_may_read_is_closed_to_them(folder):
    for path in folder.iterdir():
        path.chmod(0o644)
    with closing(opened(folder)):
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.glob("journal.db*")}
    assert {modes[name] for name in ("journal.db", "journal.db-wal", "journal.db-shm")} == {0o600}
