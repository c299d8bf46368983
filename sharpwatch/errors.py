"""Every error that sharpwatch raises on purpose.

SharpwatchError
├── ConfigError          a configuration file or a rules file has an invalid entry
├── TokenFileError       the file with the operator's token cannot be used
├── BlockError           a parameter belongs to no block, or a block rule cannot be applied
├── AttachError          attach() was called with arguments it cannot work with
├── CheckpointError      a checkpoint cannot be saved, is incomplete, or belongs to another run
├── ProbeError           a probe or measurement cannot run on this model, batch or optimizer
│   ├── EmptyBatchError  every label of the batch is ignored, so there is no loss
│   ├── TrainingChangedError  parameters were frozen or unfrozen since attach()
│   ├── ObjectiveError   the loss that is trained on is none that gnb knows
│   │   └── UndecidedError   this batch does not show what the loss is, or which its rows are
│   └── PrecisionError   measure() stopped before it reached the requested precision
├── DesyncError          a collective probe failed on some ranks only: the run must stop
├── WireError            a message violates the wire protocol
├── StoreError           the journal cannot be opened, read or written
│   ├── JournalInUseError      another process has the journal
│   │   └── ShardLostError     another daemon has had a shard of this one meanwhile
│   └── RevisionConflictError  a revision is in the journal already, with other content
├── NoRoomError          the daemon holds as many live runs as it can
├── NotHeldError         the run is of a shard that this daemon does not hold
├── LogError             a log or a recorded run cannot be read
└── OperatorError        the daemon refused an operator's call, or cannot be reached
    └── UnansweredError  the trainer has not answered an operator's command yet
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sharpwatch.curvature.measure.report import SharpnessReport


class SharpwatchError(Exception):
    """Base class of every error that sharpwatch raises on purpose."""


class ConfigError(SharpwatchError):
    """A configuration file or a rules file has an invalid entry.

    Args:
        message: The rule that is violated, and the offending value.
        file: Path of the file.
        line: Line of the entry, from 1; 0 if the error concerns the whole file.
        key: Dotted path of the entry; empty if the error concerns the whole file.
    """

    def __init__(self, message: str, *, file: str, line: int, key: str) -> None:
        self.file = file
        self.line = line
        self.key = key
        where = f"{file}:{line}" if line else file
        super().__init__(": ".join(part for part in (where, key, message) if part))


class TokenFileError(SharpwatchError):
    """The file with the operator's token is missing, readable by others, or empty."""


class BlockError(SharpwatchError):
    """A model's parameters cannot be divided into blocks as requested."""


class AttachError(SharpwatchError):
    """`attach` was called with arguments it cannot work with."""


class CheckpointError(SharpwatchError):
    """A checkpoint cannot be saved, is incomplete, or belongs to another run."""


class ProbeError(SharpwatchError):
    """A probe or a measurement cannot run on this model, batch or optimizer."""


class EmptyBatchError(ProbeError):
    """Every label of the batch is ignored, so there is no loss to probe; another batch may work."""


class TrainingChangedError(ProbeError):
    """Parameters were frozen or unfrozen since `attach`, so the blocks are no longer what is trained."""


class ObjectiveError(ProbeError):
    """The loss that is trained on is none whose Gauss-Newton matrix sharpwatch knows, or can't be verified."""


class UndecidedError(ObjectiveError):
    """What the loss is, or which rows the batch has, can't be told from this batch; another one may show it."""


class PrecisionError(ProbeError):
    """`measure` stopped before it reached the requested precision.

    Args:
        report: The complete report; its `unreached` gives the reason for each block.
    """

    def __init__(self, report: SharpnessReport) -> None:
        self.report = report
        super().__init__("; ".join(f"{block}: {reason}" for block, reason in report.unreached.items()))


class DesyncError(SharpwatchError):
    """A collective probe failed on some ranks only, so the ranks are out of step.

    This is the only error of the agent that reaches the training loop: continuing would silently train wrong weights.
    """


class WireError(SharpwatchError):
    """A message violates the wire protocol.

    Args:
        code: Short reason, used as a metric label.
        message: Description of the violation.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class StoreError(SharpwatchError):
    """The journal cannot be opened, read or written."""


class JournalInUseError(StoreError):
    """Another process has the journal."""


class ShardLostError(JournalInUseError):
    """Another daemon has held a shard of this one meanwhile, so that this one no longer knows its runs."""


class RevisionConflictError(StoreError):
    """A revision is in the journal already, with other content, and is not overwritten.

    Args:
        message: What the journal has.
        run: The run.
        revision: The number of the revision.
    """

    def __init__(self, message: str, *, run: str, revision: int) -> None:
        self.run = run
        self.revision = revision
        super().__init__(message)


class NoRoomError(SharpwatchError):
    """The daemon holds as many live runs as it can."""


class NotHeldError(SharpwatchError):
    """The run is of a shard that this daemon does not hold; the message says which, and who holds it."""


class LogError(SharpwatchError):
    """A log or a recorded run cannot be read.

    Args:
        message: What is wrong, and what is valid.
        file: The file.
        line: Line of the error, from 1; 0 if it concerns the whole file.
    """

    def __init__(self, message: str, file: str, line: int = 0) -> None:
        self.file = file
        self.line = line
        super().__init__(f"{file}:{line}: {message}" if line else f"{file}: {message}")


class OperatorError(SharpwatchError):
    """The daemon refused an operator's call, or cannot be reached."""


class UnansweredError(OperatorError):
    """The trainer has not answered an operator's command yet; it may still apply it."""
