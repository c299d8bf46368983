"""Files that are either the old or the new version at every moment, also after a crash."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds no JSON.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return found


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as JSON, durably. Raises `OSError`."""
    write_bytes(path, json.dumps(value).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` and wait until it is on the disk. Raises `OSError`."""
    # In the same folder: a rename is atomic only within one file system.
    draft = path.with_name(f".{path.name}")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        # Before the rename: a crash could otherwise leave an empty file under the final name.
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until what was made, renamed or deleted in `folder` is on the disk. Raises `OSError`."""
    # A rename is an entry of the folder, which has to reach the disk as well.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
