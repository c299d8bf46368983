"""sharpwatch for the Trainer of Hugging Face: a callback, and `train`, which does rollbacks.

    trainer = Trainer(..., callbacks=[SharpwatchCallback(training_job="gpt2-owt")])
    train(trainer)

A rollback leaves the loop of `Trainer.train` and calls it again with `resume_from_checkpoint`. Trainer itself then
restores model, optimizer, scheduler, random states, scaler and the position in the data from its own checkpoint.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from sharpwatch.agent.attach import attach
from sharpwatch.agent.control.commands import RollbackRequest
from sharpwatch.agent.watch import Watch
from sharpwatch.checkpointing.resumable_loader import DataPosition, Range, holds, nth_kept, union
from sharpwatch.checkpointing.rollback_record import RollbackRecord
from sharpwatch.common.atomic_file import read_json, write_json
from sharpwatch.common.rng_state import random_state, set_random_state
from sharpwatch.errors import AttachError

try:
    from accelerate import Accelerator, skip_first_batches
    from accelerate.utils import DistributedType, gather_object
    from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(f"{error}: pip install 'sharpwatch[huggingface]'") from error

_LOG = logging.getLogger("sharpwatch")
_STATE = "sharpwatch.json"  # beside Trainer's own files, and written after them
_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt", _STATE)  # for a rollback to a checkpoint


class SharpwatchCallback(TrainerCallback):
    """Watches the model and the optimizer of a Trainer.

    The agent's own state is saved in Trainer's checkpoints, so a resumed training is the same run. Rollbacks are done
    only in `train(trainer)`: `Trainer.train` can't leave its loop and enter it again.

    Args:
        training_job: The name of what is trained, as for `attach`.
        **attach_options: The other options of `attach`. In `train`, `control` is "rollback" unless given.

    Attributes:
        watch: The watch, while training.
    """

    def __init__(self, training_job: str, **attach_options: Any) -> None:
        self.watch: Watch | None = None
        self.can_roll_back = False  # in `train`
        self.left_out: list[Range] = []  # in the micro-batches that this process takes in all epochs, from 0
        self._options = {"training_job": training_job, **attach_options}
        self._watched: tuple[Any, Any] = (None, None)
        self._resumed: dict[str, Any] | None = None
        self._steps = DataPosition()  # Trainer's steps by the watch's, which has none that a GradScaler skipped
        self._backward_losses: _BackwardLosses | None = None
        self._folders: set[str] = set()  # Trainer's checkpoints when last looked at

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Attach, or continue watching after a rollback."""
        if self._resumed is None and state.global_step:  # outside `train`: the checkpoint is usually in output_dir
            self.resume_from(_folder(args, state))
        resumed, self._resumed = self._resumed or {}, None
        watch, known, run = self.watch, resumed.get("watch", {}), {}
        request = None if watch is None else watch.pending_rollback
        if watch is not None and request is not None:
            watch.restored(request.step)
            known, run = watch.state_dict(), {"run": watch.run}
        # A rollback goes on with the same watch, unless Trainer has made model or optimizer anew (model_init).
        if watch is None or request is None or self._watched != (kwargs["model"], kwargs["optimizer"]):
            watch = self.watch = self._attached(kwargs["model"], kwargs["optimizer"], state.global_step, run)
            watch.load_state_dict(known)
        self._steps = DataPosition(resumed.get("trail", [(watch.step, state.global_step)]))
        self._folders = set(_ages(args))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Observe the step's loss: the sum over its micro-batches, whose losses are their shares of its mean."""
        losses = self._backward_losses.take() if self._backward_losses is not None else []
        if self.watch is not None and losses:
            self.watch.observe(loss=sum(losses[1:], losses[0]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Leave the loop if a rollback is pending, before anything is evaluated or saved."""
        if self.watch is None:
            return
        self._steps.mark(self.watch.step, state.global_step)
        request = self.watch.pending_rollback
        if request is None:
            return
        loader = kwargs["train_dataloader"]
        if not self.can_roll_back:
            self.watch.rollback_refused("rollbacks need sharpwatch.integrations.huggingface.train(trainer)")
            return
        # All processes must do the rollback or none, and a checkpoint may be missing on some of them.
        found = gather_object([(_obstacle(request, args), _unskippable(request, args, loader))])
        failed, refused = ("; ".join({*filter(None, reasons)}) for reasons in zip(*found, strict=True))
        if failed or refused:
            _LOG.warning("no rollback, training continues: %s", failed or refused)
            self.watch.rollback_failed(failed) if failed else self.watch.rollback_refused(refused)
            return
        if request.skip[0] < request.skip[1]:
            self.left_out = union([*self.left_out, self._batches(request, args, len(loader))])
        if state.is_world_process_zero:
            folder, name = _output_dir(args), Path(request.uri).name
            RollbackRecord.read(folder).after_rollback(name, _ages(args), [self.left_out]).write(folder)
        # By an exception: told to stop by its own flag, Trainer would still evaluate, save and report an end.
        raise _StopTraining(request)

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Save the agent's state in the checkpoint, and tell the watch of the checkpoint."""
        folder = _folder(args, state)
        if self.watch is None or not folder.is_dir():
            return
        there = set(_ages(args))
        for name in self._folders - there:  # Trainer has deleted it: save_total_limit
            self.watch.deleted_checkpoint(str(folder.parent / name))
        self._folders = there
        values = {"watch": self.watch.state_dict(), "trail": self._steps.corners, "left_out": self.left_out}
        if state.is_world_process_zero:
            try:
                write_json(folder / _STATE, values)
            except OSError as error:
                _LOG.warning("cannot save the agent's state, no rollback to this checkpoint is possible: %s", error)
                return
            RollbackRecord.read(folder.parent).saved(folder.parent, folder.name)
        self.watch.saved_checkpoint(self.watch.step, str(folder))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the watch."""
        self._close()

    def fail(self, error: BaseException) -> None:
        """Training was ended by `error`: report a pending rollback as failed, and close the watch as interrupted."""
        if self.watch is not None:
            self.watch.rollback_failed(f"{type(error).__name__}: {error}")
            self.watch.__exit__(type(error), error, error.__traceback__)
        self._close()

    def _close(self) -> None:
        if self.watch is not None:
            self.watch.close()
        if self._backward_losses is not None:
            self._backward_losses.remove()
        self.watch = self._backward_losses = None
        self._watched = (None, None)

    def _attached(self, model: nn.Module, optimizer: Any, step: int, run: dict[str, str]) -> Watch:
        self._close()
        control = {"control": "rollback"} if self.can_roll_back else {}
        watch = attach(model, optimizer, **{"initial_step": step, **control, **self._options, **run})
        self._watched = (model, optimizer)
        trainer = _calling_trainer(self)
        if trainer is not None:
            self._backward_losses = _BackwardLosses(trainer.accelerator)
        return watch

    def resume_from(self, checkpoint: Path) -> None:
        """Read the agent's state in `checkpoint`, and add to `left_out` what it says."""
        self._resumed = {}
        try:
            self._resumed = read_json(checkpoint / _STATE)
        except FileNotFoundError:
            pass  # saved without the callback
        except (OSError, ValueError) as error:
            _LOG.warning("cannot read the agent's state, which starts anew: %s", error)
        beside = RollbackRecord.read(checkpoint.parent).left_out_beside(checkpoint.name)
        self.left_out = union(chain(self.left_out, self._resumed.get("left_out", ()), *beside))

    def _batches(self, request: RollbackRequest, args: TrainingArguments, epoch: int) -> Range:
        """The micro-batches of the steps to skip that come after the checkpoint; `epoch` is the length of an epoch."""
        first, last = (
            nth_kept(self.left_out, _taken(self._steps.batches(step - 1), args.gradient_accumulation_steps, epoch))
            # Batches before the checkpoint have been trained on and stay so.
            for step in (max(request.skip[0], request.step + 1), request.skip[1])
        )
        return first, last


def train(trainer: Trainer, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
    """Call `trainer.train(...)`, and do rollbacks to Trainer's own checkpoints.

    The next batches, also of the next epoch, take the place of those that a rollback skips, so epochs and the schedule
    keep their number of steps. Skipping needs a dataset with a length.

    Args:
        trainer: A Trainer with one `SharpwatchCallback`.
        resume_from_checkpoint: As for `Trainer.train`. True does not resume from a checkpoint that was undone by a
            rollback.
        **kwargs: Passed on to `Trainer.train`.

    Returns:
        What `Trainer.train` returns.

    Raises:
        AttachError: It is no Trainer, or has no `SharpwatchCallback`, or several.
    """
    if not isinstance(trainer, Trainer):
        raise AttachError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    found = [one for one in trainer.callback_handler.callbacks if isinstance(one, SharpwatchCallback)]
    if len(found) != 1:
        raise AttachError(f"trainer must have exactly one SharpwatchCallback, got {len(found)}")
    callback, checkpoint, start = found[0], resume_from_checkpoint, random_state()
    callback.can_roll_back, callback.left_out = True, []
    loader = trainer.get_train_dataloader
    # Only what the user set on the instance is put back; the class's method comes back by itself.
    own = vars(trainer).get("get_train_dataloader")
    vars(trainer)["get_train_dataloader"] = lambda: _without(loader(), callback.left_out)
    if checkpoint is True:
        folder = _output_dir(trainer.args)
        newest = RollbackRecord.read(folder).newest(_ages(trainer.args))
        checkpoint = True if newest is None else str(folder / newest)  # True: Trainer raises that there is none
    try:
        while True:
            if isinstance(checkpoint, (str, os.PathLike)):
                callback.resume_from(Path(checkpoint))
            try:
                return trainer.train(resume_from_checkpoint=checkpoint, **kwargs)
            except _StopTraining as pending:
                checkpoint = pending.request.uri
                _reset(trainer, start)
    except BaseException as error:
        callback.fail(error)
        raise
    finally:
        del vars(trainer)["get_train_dataloader"]
        if own is not None:
            vars(trainer)["get_train_dataloader"] = own
        callback.can_roll_back = False


class _BackwardLosses:
    """The losses that backward runs from, as Trainer gives them to its Accelerator.

    They are what `compute_loss` returned, or a subclass made of it, each divided by the number of micro-batches unless
    it is a share of the whole step's mean already.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._losses: list[Tensor] = []
        self._original = accelerator.backward
        self._replaced = vars(accelerator).get("backward")
        vars(accelerator)["backward"] = self._backward

    def take(self) -> list[Tensor]:
        """The losses since the last call."""
        losses, self._losses = self._losses, []
        return losses

    def remove(self) -> None:
        """Leave the Accelerator as it was."""
        if vars(self._accelerator).get("backward") == self._backward:
            del vars(self._accelerator)["backward"]
            if self._replaced is not None:
                vars(self._accelerator)["backward"] = self._replaced

    def _backward(self, loss: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(loss, Tensor) and loss.numel() == 1:
            own = loss.detach()
            # Accelerate divides by its own number of micro-batches, which is 1 under newer Trainers.
            deepspeed = self._accelerator.distributed_type == DistributedType.DEEPSPEED
            self._losses.append(own if deepspeed else own / self._accelerator.gradient_accumulation_steps)
        return self._original(loss, *args, **kwargs)


class _StopTraining(Exception):  # noqa: N818 - leaves Trainer's loop, and is no error
    """A rollback is pending."""

    def __init__(self, request: RollbackRequest) -> None:
        super().__init__(f"rollback to {request.uri}")
        self.request = request


class _KeptBatches:
    """A batch sampler without the batches in `left_out`.

    The batches of all epochs are one stream, from which some are removed; the rest is cut into epochs of equal length.
    """

    def __init__(self, batch_sampler: Any, left_out: list[Range]) -> None:
        self._batch_sampler = batch_sampler
        self._left_out = left_out
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._batch_sampler)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        length = len(self)
        start = nth_kept(self._left_out, self._epoch * length)
        end = nth_kept(self._left_out, (self._epoch + 1) * length - 1)
        for epoch in range(start // length, end // length + 1):
            for sampler in _samplers(self._batch_sampler):
                if hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(epoch)
            for number, batch in enumerate(self._batch_sampler, epoch * length):
                if start <= number <= end and not holds(self._left_out, number):
                    yield batch


def _reset(trainer: Trainer, random: dict[str, Any]) -> None:
    """Bring a Trainer whose loop was left into the state before it started."""
    set_random_state(random)  # Trainer draws the order of the data from its seed, before it restores the random states
    handle = getattr(trainer, "neftune_hook_handle", None)
    if handle is not None:
        handle.remove()  # Trainer.train would add a second hook


def _without(loader: Any, left_out: list[Range]) -> Any:
    """`loader`, a DataLoader prepared by Accelerate, without the batches in `left_out`."""
    if not left_out:
        return loader
    loader = skip_first_batches(loader, 0)  # the public way to get one whose batch sampler can be replaced
    kept = _KeptBatches(loader.batch_sampler.batch_sampler, left_out)
    loader.batch_sampler.batch_sampler = kept
    loader.batch_sampler.set_epoch = kept.set_epoch  # Trainer and Accelerate call it there
    return loader


def _samplers(batch_sampler: Any) -> Iterator[Any]:
    """The batch sampler and its sampler, also those inside Accelerate's wrappers."""
    while batch_sampler is not None:
        yield from (batch_sampler, getattr(batch_sampler, "sampler", None))
        batch_sampler = getattr(batch_sampler, "batch_sampler", None)


def _taken(steps: int, accumulation: int, epoch: int) -> int:
    """The number of micro-batches in Trainer's first `steps` steps; the last step of an epoch may have fewer."""
    epochs, rest = divmod(steps, -(-epoch // accumulation))
    return epochs * epoch + min(rest * accumulation, epoch)


def _calling_trainer(callback: SharpwatchCallback) -> Trainer | None:
    """The Trainer that is calling `callback`; it passes its callbacks all that it has, but not itself."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    return None


def _output_dir(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".").resolve()


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return _output_dir(args) / f"checkpoint-{state.global_step}"


def _ages(args: TrainingArguments) -> dict[str, float]:
    """The steps of Trainer's checkpoints, by name."""
    names = (folder.name for folder in _output_dir(args).glob("checkpoint-*") if folder.is_dir())
    return {name: int(found[1]) for name in names if (found := re.fullmatch(r"checkpoint-(\d+)", name))}


def _obstacle(request: RollbackRequest, args: TrainingArguments) -> str:
    """Say why the checkpoint can't be restored; empty if it can."""
    folder = Path(request.uri)
    if folder.parent != _output_dir(args):
        return f"{folder} is not in output_dir {_output_dir(args)}"
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        return f"{folder} lacks {', '.join(missing)}"
    if folder.name in RollbackRecord.read(folder.parent).undone:
        return f"{folder} was undone by a rollback"
    return ""


def _unskippable(request: RollbackRequest, args: TrainingArguments, loader: Any) -> str:
    """Say why the batches that are to be skipped can't be; empty if they can."""
    if request.skip[0] >= request.skip[1]:
        return ""
    batch_sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or batch_sampler is None:
        return "skipping data needs a DataLoader over a dataset that has a length"
    if args.ignore_data_skip:
        return "skipping data needs ignore_data_skip=False: otherwise Trainer does not restore the position in the data"
    if not any(isinstance(one, SequentialSampler) or hasattr(one, "set_epoch") for one in _samplers(batch_sampler)):
        return (
            "skipping data is impossible because the sampler has no set_epoch: the order of an epoch can't be repeated"
        )
    return ""
