"""Everything sharpwatch raises on purpose.

SharpwatchError
├── ConfigError      a configuration file or a rule says something that can't be
├── TokenFileError   the operator's token file can't be used
├── BlockError       a parameter that no block rule places, or a rule that matches nothing
├── AttachError      attach() was called with something it can't watch
├── CheckpointError  a checkpoint can't be saved, or is not whole
├── ProbeError       a probe can't run on this model or batch, with the reason
├── DesyncError      a probe failed where ranks wait for each other: the run can't go on
├── WireError        a message that breaks the wire contract
├── StoreError       the journal can't be opened, read or written
└── OperatorError    the daemon refused or could not be reached
"""

from __future__ import annotations


class SharpwatchError(Exception):
    """Root of every error sharpwatch raises on purpose."""


class ConfigError(SharpwatchError):
    """A configuration says something that can't be; names file, line, key and what is allowed.

    Line 0 and an empty key are left out: the file as a whole is meant.
    """

    def __init__(self, message: str, *, file: str, line: int, key: str) -> None:
        self.file = file
        self.line = line
        self.key = key
        where = f"{file}:{line}" if line else file
        super().__init__(": ".join(part for part in (where, key, message) if part))


class TokenFileError(SharpwatchError):
    """The file with the operator's token is missing, open to others, or holds no token."""


class BlockError(SharpwatchError):
    """A model's parameters can't be divided into blocks as asked."""


class AttachError(SharpwatchError):
    """`attach` was called with something it can't watch."""


class CheckpointError(SharpwatchError):
    """A checkpoint can't be saved, is not whole, or is another run's."""


class ProbeError(SharpwatchError):
    """A probe can't run on this model or batch."""


class DesyncError(SharpwatchError):
    """A probe of several ranks failed within the model's own collectives, on some of them: they are out of step.

    The one error of the agent's that reaches the training loop: to train on would give wrong weights without a word.
    """


class WireError(SharpwatchError):
    """A message breaks the wire contract; `code` is the short reason it is counted under."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class StoreError(SharpwatchError):
    """The journal can't be opened, read or written."""


class OperatorError(SharpwatchError):
    """The daemon refused an operator's call or could not be reached."""
