"""The file of credentials: who may do what, each known by the hash of a token.

A token is 256 random bits, so its plain SHA-256 can't be turned back: slow hashes are for what people think up.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from sharpwatch.common.atomic_file import write_bytes
from sharpwatch.common.yaml_schema import Location, YamlDocument, nearest, read_yaml
from sharpwatch.errors import TokenFileError

Role = Literal["agent", "viewer", "operator"]
ROLES: tuple[Role, ...] = get_args(Role)
_KEYS = ("name", "role", "sha256", "jobs", "expires")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
_HEAD = "# Written by `sharpwatch token`. The daemon notices changes by itself.\n"


@dataclass(frozen=True, slots=True)
class Credential:
    """One token's hash, and what its holder may do.

    Attributes:
        name: Whose it is.
        role: agent (open sessions), viewer (read), or operator (all).
        sha256: The hash of the token, in hexadecimal.
        jobs: The training jobs that an agent may speak for; empty for any.
        expires: When it ends to be valid; None for never.
    """

    name: str
    role: Role
    sha256: str
    jobs: tuple[str, ...] = ()
    expires: datetime | None = None


def default_credentials_file() -> Path:
    """Where `sharpwatch token` keeps the credentials where no file is named."""
    from sharpwatch.common.token_file import default_token_file  # noqa: PLC0415 - slow to import

    return default_token_file().with_name("credentials.yaml")


def hash_token(token: bytes) -> str:
    """The hash by which a token is known."""
    return hashlib.sha256(token).hexdigest()


def make_credential(
    name: str, role: Role, jobs: Sequence[str] = (), expires: datetime | None = None
) -> tuple[str, Credential]:
    """Make a new token; returns it, and the credential that knows its hash alone.

    Raises:
        TokenFileError: The name is not valid.
    """
    if not _NAME.fullmatch(name):
        raise TokenFileError(f"a credential's name must be of A-Z a-z 0-9 . _ @ -, at most 64 characters, got {name!r}")
    token = secrets.token_urlsafe(32)
    return token, Credential(name, role, hash_token(token.encode()), tuple(jobs), expires)


def read_credentials(path: Path) -> tuple[Credential, ...]:
    """Read the file.

    Raises:
        TokenFileError: Others than its owner may change the file.
        ConfigError: The file can't be read, or an entry in it is wrong.
    """
    try:
        status = path.stat()
    except OSError:
        status = None  # `read_yaml` says why
    # Hashes are no secret. But whoever may write the file may write themselves in.
    if status is not None and stat.S_IMODE(status.st_mode) & 0o022:
        mode = stat.S_IMODE(status.st_mode)
        raise TokenFileError(f"credentials {path} has mode {mode:04o}: others can change it; run: chmod go-w {path}")
    if status is not None and status.st_uid not in {0, os.geteuid()}:
        raise TokenFileError(f"credentials {path} belongs to uid {status.st_uid}, and not to this user or root")
    document = read_yaml(path)
    if document.data is None:
        return ()
    if not isinstance(document.data, dict) or set(document.data) != {"credentials"}:
        raise document.error((), "expected one key, credentials, with a list")
    entries = document.data["credentials"] or []
    if not isinstance(entries, list):
        raise document.error(("credentials",), "expected a list")
    found = tuple(_credential(document, ("credentials", index)) for index in range(len(entries)))
    for index, each in enumerate(found):
        if each.name in {other.name for other in found[:index]}:
            raise document.error(("credentials", index, "name"), f"{each.name!r} is taken by an earlier entry")
    return found


def write_credentials(path: Path, credentials: Sequence[Credential]) -> None:
    """Replace the file.

    Raises:
        TokenFileError: It can't be written.
    """
    rows = [
        {
            "name": each.name,
            "role": each.role,
            "sha256": each.sha256,
            **({"jobs": list(each.jobs)} if each.jobs else {}),
            **({"expires": f"{each.expires:%Y-%m-%dT%H:%M:%SZ}"} if each.expires is not None else {}),
        }
        for each in credentials
    ]
    before = os.umask(0o077)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, (_HEAD + yaml.safe_dump({"credentials": rows}, sort_keys=False)).encode())
    except OSError as error:
        raise TokenFileError(f"credentials {path}: {error.strerror}") from error
    finally:
        os.umask(before)


def _credential(document: YamlDocument, at: Location) -> Credential:
    entry: Any = document.at(at)
    if not isinstance(entry, dict):
        raise document.error(at, f"expected a mapping with keys {', '.join(_KEYS)}")
    for key in entry:
        if key not in _KEYS:
            raise document.error((*at, key), f"unknown key; allowed: {', '.join(_KEYS)}{nearest(key, _KEYS)}")
    for key, rule, expected in (
        ("name", _NAME, "A-Z a-z 0-9 . _ @ -, at most 64 characters"),
        ("role", re.compile("|".join(ROLES)), ", ".join(ROLES)),
        ("sha256", _HASH, "64 digits of 0-9 a-f: the hash of a token, as `sharpwatch token create` writes it"),
    ):
        value = entry.get(key)
        if not isinstance(value, str) or not rule.fullmatch(value):
            # Not the value: somebody may have written the token itself.
            raise document.error((*at, key), f"expected {expected}")
    jobs = entry.get("jobs", [])
    if not isinstance(jobs, list) or not all(isinstance(each, str) and each for each in jobs):
        raise document.error((*at, "jobs"), "expected a list of names of training jobs")
    if "jobs" in entry and (entry["role"] != "agent" or not jobs):
        raise document.error((*at, "jobs"), "is for role agent, and names at least one training job")
    return Credential(
        entry["name"], cast("Role", entry["role"]), entry["sha256"], tuple(jobs), _expiry(document, at, entry)
    )


def _expiry(document: YamlDocument, at: Location, entry: dict[str, Any]) -> datetime | None:
    given = entry.get("expires")
    if given is None:
        return None
    try:
        expires = datetime.fromisoformat(str(given))
    except ValueError:
        raise document.error((*at, "expires"), "expected a time such as 2027-01-31T00:00:00Z") from None
    return expires.replace(tzinfo=UTC) if expires.tzinfo is None else expires.astimezone(UTC)
