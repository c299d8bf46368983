"""What the daemon's own webhooks have in common: the headers with a token, and how their address is shown."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from sharpwatch.errors import SharpwatchError

_VALID = "it must hold one line with the token"


def webhook_headers(section: str, token_file: str) -> dict[str, str]:
    """The headers of a webhook of the configuration.

    Args:
        section: Where in the configuration it stands.
        token_file: A file with a bearer token; empty for none.

    Raises:
        SharpwatchError: The file can't be read, or is not one line with a token.
    """
    headers = {"Content-Type": "application/json"}
    if token_file:
        try:
            token = Path(token_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SharpwatchError(f"{section}.token_file {token_file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise SharpwatchError(f"{section}.token_file {token_file} is not UTF-8 text; {_VALID}") from error
        if not token or not token.isprintable():  # a header takes nothing else
            raise SharpwatchError(f"{section}.token_file {token_file} holds no token; {_VALID}")
        headers["Authorization"] = f"Bearer {token}"
    return headers


def shown_webhook(url: str) -> str:
    """The address as logs may have it: a path or a user may hold a secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}"
