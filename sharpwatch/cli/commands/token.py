"""`sharpwatch token`: make, list and revoke the tokens of a daemon's file of credentials."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from sharpwatch.cli.options import CommandGroup, DaemonCommand, DaemonOptions, LocalCommand, whole_number
from sharpwatch.cli.output import Grid, print_answer
from sharpwatch.common.credentials import (
    ROLES,
    Credential,
    Role,
    default_credentials_file,
    make_credential,
    read_credentials,
    write_credentials,
)
from sharpwatch.errors import TokenFileError

token = CommandGroup(
    "token",
    help="Make, list and revoke the tokens by which a daemon knows agents, viewers and operators. Its file of "
    "credentials has their hashes alone, and a running daemon notices each change.",
    example="sharpwatch token create --role agent --name gpt2 --job gpt2-owt > gpt2.token\n"
    "sharpwatch token revoke gpt2",
)
_FILE = click.option(
    "--file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    default=None,
    help="The file of credentials, as in daemon.credentials. Default: ~/.config/sharpwatch/credentials.yaml.",
)


@token.command(
    cls=LocalCommand,
    example="sharpwatch token create --role viewer --name grafana --days 90\n"
    "sharpwatch token create --role agent --name gpt2 --job gpt2-owt --replace > gpt2.token",
)
@click.option("--role", type=click.Choice(ROLES), required=True, help="What its holder may do.")
@click.option("--name", metavar="NAME", required=True, help="Whose it is; runs belong to the name.")
@click.option("--job", "jobs", metavar="JOB", multiple=True, help="A training job that an agent may speak for.")
@click.option("--days", metavar="N", type=whole_number(1), help="How long it is valid. Default: until it is revoked.")
@click.option("--replace", is_flag=True, help="Replace the token of that name, which is valid no more at once.")
@_FILE
def create(  # noqa: PLR0913 - click passes every option by name
    role: Role, name: str, *, jobs: tuple[str, ...], days: int | None, replace: bool, file: Path | None
) -> None:
    """Make a token and print it, this once; the file gets its hash.

    An agent without --job may speak for any training job.
    """
    if jobs and role != "agent":
        raise click.UsageError("--job is for --role agent")
    path = file or default_credentials_file()
    known = _known(path)
    if any(each.name == name for each in known) and not replace:
        raise TokenFileError(f"{path} has a token of {name!r} already; --replace makes a new one in its place")
    expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
    made, credential = make_credential(name, role, jobs, expires)
    write_credentials(path, [*(each for each in known if each.name != name), credential])
    # The token alone on stdout, so that it can go into a file.
    click.echo(f"{role} {name}: hash written to {path}; the token is shown this once", err=True)
    click.echo(made)


@token.command("list", cls=DaemonCommand, example="sharpwatch token list")
@_FILE
@click.pass_obj
def list_tokens(options: DaemonOptions, file: Path | None) -> None:
    """List the tokens of the file: name, role, training jobs, and how long each is valid."""
    path = file or default_credentials_file()
    now = datetime.now(UTC)
    found = read_credentials(path)
    payload = {"file": str(path), "tokens": [_plain(each, now) for each in found]}
    rows = tuple((each.name, each.role, ", ".join(each.jobs) or "any", _validity(each, now)) for each in found)
    print_answer(
        payload, [Grid("llll", rows, ("name", "role", "jobs", "valid"), empty="no token")], as_json=options.json
    )


@token.command(cls=LocalCommand, example="sharpwatch token revoke gpt2")
@click.argument("name", metavar="NAME", help="As `sharpwatch token list` shows it.")
@_FILE
def revoke(name: str, file: Path | None) -> None:
    """Take a token out of the file: from then on it opens nothing, and its open sessions end."""
    path = file or default_credentials_file()
    known = read_credentials(path)
    if all(each.name != name for each in known):
        there = ", ".join(each.name for each in known) or "none"
        raise TokenFileError(f"{path} has no token of {name!r}; it has {there}")
    write_credentials(path, [each for each in known if each.name != name])
    click.echo(f"{name}: revoked")


def _known(path: Path) -> tuple[Credential, ...]:
    return read_credentials(path) if path.exists() else ()


def _plain(each: Credential, now: datetime) -> dict[str, object]:
    return {
        "name": each.name,
        "role": each.role,
        "jobs": list(each.jobs),
        "expires": None if each.expires is None else each.expires.isoformat(),
        "valid": each.expires is None or each.expires > now,
    }


def _validity(each: Credential, now: datetime) -> str:
    if each.expires is None:
        return "until it is revoked"
    return f"{'until' if each.expires > now else 'EXPIRED'} {each.expires:%Y-%m-%d %H:%M} UTC"
