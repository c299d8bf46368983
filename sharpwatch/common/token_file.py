"""The file that holds the operator's token, which only its owner may read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from sharpwatch.errors import TokenFileError


def default_token_file() -> Path:
    """Where daemon and command line look for the token: `$XDG_CONFIG_HOME/sharpwatch`, by default `~/.config`."""
    from platformdirs import user_config_path  # noqa: PLC0415 - slow to import, and not needed with a named file

    try:
        return user_config_path("sharpwatch") / "operator.token"
    except RuntimeError:  # no home directory: a container's uid without $HOME; `token_path` says so where it is needed
        return Path("~/.config/sharpwatch/operator.token")


def token_path(named: str | Path) -> Path:
    """The path of a token file, whose name may begin with `~`.

    Raises:
        TokenFileError: The user has no home directory.
    """
    try:
        return Path(named).expanduser()
    except RuntimeError:
        raise TokenFileError(
            f"token file {named}: this user has no home directory; set $HOME, or name another file"
        ) from None


def read_token(path: Path) -> str:
    """Read the operator's token.

    Args:
        path: A file of mode 0600 with one line of ASCII.

    Raises:
        TokenFileError: The file cannot be read, others may read it, it belongs to another user, or holds no token.
    """
    try:
        status = path.stat()
        mode = stat.S_IMODE(status.st_mode)
        # Before it is read: a token that others could read or replace proves nothing about who sends it.
        if mode & 0o077:
            raise TokenFileError(f"token file {path} has mode {mode:04o}: others can read it; run: chmod 600 {path}")
        token = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise TokenFileError(f"token file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TokenFileError(f"token file {path} is not ASCII text; it must hold one line with the token") from error
    if not token or len(token.split()) > 1:
        raise TokenFileError(f"token file {path} holds no token; it must hold one line with the token")
    return token


def make_token(path: Path) -> None:
    """Write a new random token to `path`, mode 0600, with the folders that lead to it.

    Raises:
        TokenFileError: The file exists or cannot be written.
    """
    import secrets  # noqa: PLC0415 - slow to import, and commands only read tokens

    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Exclusive, so that no token in use is replaced, and with its mode from the start: nobody can read it in
        # between.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise TokenFileError(f"token file {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
