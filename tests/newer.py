"""Messages as a later version would send them: with fields that this one does not know."""

from __future__ import annotations

from google.protobuf.message import Message

# Fields 1000 to 1002: a number, a text, eight bytes. Protobuf keeps what it does not know, and sends it on.
UNKNOWN = b"\xc0\x3e\x07\xca\x3e\x05newer\xd1\x3e" + 8 * b"\xff"


def newer(message: Message) -> Message:
    """The message, with unknown fields in itself and in each message within."""
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for each in value if field.is_repeated else (value,):
            newer(each)
    message.MergeFromString(UNKNOWN)
    assert message.SerializeToString().endswith(UNKNOWN)
    return message
