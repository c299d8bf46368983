"""What the courier passes on of a daemon's responses: a command beyond the limits only as its id and a refusal.

Ids and texts stay in the trainer's memory, log and checkpoints, whatever a daemon sends.
"""

from __future__ import annotations

from collections.abc import Iterator

from sharpwatch.v1 import agent_pb2, types_pb2

MAX_RESPONSE_BYTES = 2**20  # a longer one is not parsed
_MAX_COMMAND_BYTES = 2**16
# The daemon's own, as in `sharpwatch.wire`, which imports numpy.
_MAX_NAME = 253  # characters
_MAX_TEXT = 4_096  # characters
_MAX_ITEMS = 256  # blocks in a set
_UNNAMED = "unnamed"  # the daemon takes no result without an id


def too_long(size: int) -> bytes:
    """Returns, in place of a response of `size` bytes, a refused command for the trainer."""
    return _refused("", f"a response must have at most {MAX_RESPONSE_BYTES} bytes, got {size}")


def within_limits(payload: bytes, command: types_pb2.Command) -> bytes:
    """Returns the response `payload`, which holds `command`, or a refused command in its place."""
    refusal = next(_refusals(command, len(payload)), "")
    return _refused(command.id, refusal) if refusal else payload


def _refused(command_id: str, refusal: str) -> bytes:
    shown = command_id if command_id.isprintable() else ascii(command_id)
    if len(shown) > _MAX_NAME:
        shown = shown[: _MAX_NAME - 1] + "…"
    command = types_pb2.Command(id=shown or _UNNAMED, refusal=refusal)
    return agent_pb2.SessionResponse(command=command).SerializeToString()


def _refusals(command: types_pb2.Command, size: int) -> Iterator[str]:
    if size > _MAX_COMMAND_BYTES:
        yield f"a command must have at most {_MAX_COMMAND_BYTES} bytes, got {size}"
    for name in ("id", "cancel") if command.HasField("cancel") else ("id",):
        text = getattr(command, name)
        if not (0 < len(text) <= _MAX_NAME and text.isprintable()):
            yield f"{name} must have 1 to {_MAX_NAME} printable characters, got {len(text)}"
    uri = command.rollback.checkpoint.uri
    for name, text in (("author", command.author), ("reason", command.reason), ("rollback.checkpoint.uri", uri)):
        if len(text) > _MAX_TEXT:
            yield f"{name} must have at most {_MAX_TEXT} characters, got {len(text)}"
    blocks = {*command.set_multipliers.multipliers, *command.set_multipliers.update_every}
    if len(blocks) > _MAX_ITEMS:
        yield f"a set must name at most {_MAX_ITEMS} blocks, got {len(blocks)}"
    longest = max(map(len, blocks), default=0)
    if longest > _MAX_NAME:
        yield f"a block must have at most {_MAX_NAME} characters, got {longest}"
    if command.refusal:
        yield "refusal must be empty: only the courier sets it"
