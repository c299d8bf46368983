"""sharpwatch in the Trainer of Hugging Face: a callback, and `train`, which can go back to a checkpoint.

    trainer = Trainer(..., callbacks=[SharpwatchCallback(training_job="gpt2-owt")])
    train(trainer)

A rollback leaves the loop of `Trainer.train` and calls it again with `resume_from_checkpoint`: Trainer itself restores
model, optimizer, scheduler, random states, scaler and the position in the data, from its own checkpoint.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from torch.utils.hooks import RemovableHandle

from sharpwatch.agent.attach import attach
from sharpwatch.agent.control.commands import RollbackRequest
from sharpwatch.agent.watch import Watch
from sharpwatch.checkpointing.data_position import DataPosition, Range, holds, nth_kept, union
from sharpwatch.checkpointing.rng_state import random_state, set_random_state
from sharpwatch.checkpointing.rollback_record import RollbackRecord
from sharpwatch.common.atomic_file import read_json, write_json
from sharpwatch.errors import AttachError

try:
    from accelerate import skip_first_batches
    from accelerate.utils import gather_object
    from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(f"{error}: pip install 'sharpwatch[huggingface]'") from error

_LOG = logging.getLogger("sharpwatch")
_STATE = "sharpwatch.json"  # beside Trainer's own files, and written after them
_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt", _STATE)  # to go back to a checkpoint


class SharpwatchCallback(TrainerCallback):
    """Watches the model and the optimizer that Trainer trains; the options are `attach`'s.

    The agent's own state goes into Trainer's checkpoints, and a resumed training is the same run. Rollbacks are taken
    in `train(trainer)` alone: `Trainer.train` by itself has no way to leave its loop and come back.
    """

    def __init__(self, training_job: str, **attach_options: Any) -> None:
        self.watch: Watch | None = None
        self.goes_back = False  # in `train`
        self.left_out: list[Range] = []  # of the micro-batches that this process takes in all epochs, from 0
        self._options = {"training_job": training_job, **attach_options}
        self._watched: tuple[Any, Any] = (None, None)
        self._resumed: dict[str, Any] | None = None
        self._trail = DataPosition()  # the watch's steps to Trainer's: a GradScaler makes some of the latter void
        self._hook: RemovableHandle | None = None
        self._losses: list[Tensor] = []
        self._shares = False  # whether a micro-batch's loss is its share of the step's mean, and not its own

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Attach, or go on watching after a rollback."""
        if self._resumed is None and state.global_step:  # not in `train`: Trainer's own folder has it, as a rule
            self.take_up(_folder(args, state))
        resumed, self._resumed = self._resumed or {}, None
        watch, known, run = self.watch, resumed.get("watch", {}), {}
        request = None if watch is None else watch.pending_rollback
        if watch is not None and request is not None:
            watch.restored(request.step)
            known, run = watch.state_dict(), {"run": watch.run}
        if watch is None or request is None or self._watched != (kwargs["model"], kwargs["optimizer"]):
            watch = self.watch = self._attached(kwargs["model"], kwargs["optimizer"], state.global_step, run)
            watch.load_state_dict(known)
        self._trail = DataPosition(resumed.get("trail", [(watch.step, state.global_step)]))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Observe the step's loss."""
        losses, self._losses = self._losses, []
        if self.watch is not None and losses:
            total = sum(losses[1:], losses[0])
            self.watch.observe(loss=total if self._shares else total / len(losses))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Leave the loop where a rollback is pending, before anything is evaluated or saved."""
        if self.watch is None:
            return
        self._trail.mark(self.watch.step, state.global_step)
        request = self.watch.pending_rollback
        if request is None:
            return
        loader = kwargs["train_dataloader"]
        if not self.goes_back:
            self.watch.rollback_failed("rollbacks are taken in `train(trainer)` alone")
            return
        # What one process can't do, none does: a folder need not be there, or be read alike, on all.
        reason = "; ".join({*filter(None, gather_object([_obstacle(request, args, loader)]))})
        if reason:
            _LOG.warning("a rollback was not done, training goes on: %s", reason)
            self.watch.rollback_failed(reason)
            return
        if request.skip[0] < request.skip[1]:
            self.left_out = union([*self.left_out, self._batches(request, args, len(loader))])
        if state.is_world_process_zero:
            home = _home(args)
            RollbackRecord.of(home).after(Path(request.uri).name, _ages(args), [self.left_out]).note(home)
        raise _GoBack(request)

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Put the agent's state into the checkpoint, and tell of it."""
        folder = _folder(args, state)
        if self.watch is None or not folder.is_dir():
            return
        values = {"watch": self.watch.state_dict(), "trail": self._trail.corners, "left_out": self.left_out}
        if state.is_world_process_zero:
            try:
                write_json(folder / _STATE, values)
            except OSError as error:
                _LOG.warning("the agent's state is not in the checkpoint, no rollback can go there: %s", error)
                return
            RollbackRecord.of(folder.parent).saved(folder.parent, folder.name)
        self.watch.saved_checkpoint(self.watch.step, str(folder))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Say goodbye."""
        self._close()

    def give_up(self, error: BaseException) -> None:
        """Training ended by `error`: say what became of a rollback, and no goodbye."""
        if self.watch is not None:
            self.watch.rollback_failed(f"{type(error).__name__}: {error}")
            self.watch.__exit__(type(error), error, error.__traceback__)
        self._close()

    # Inside.

    def _close(self) -> None:
        if self.watch is not None:
            self.watch.close()
        if self._hook is not None:
            self._hook.remove()
        self.watch = self._hook = None
        self._watched = (None, None)

    def _attached(self, model: nn.Module, optimizer: Any, step: int, run: dict[str, str]) -> Watch:
        self._close()
        control = {"control": "rollback"} if self.goes_back else {}
        watch = attach(model, optimizer, **{"initial_step": step, **control, **self._options, **run})
        self._watched = (model, optimizer)
        self._hook = model.register_forward_hook(self._after_forward, with_kwargs=True)
        return watch

    def _after_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        del args
        loss = output.get("loss") if isinstance(output, dict) else None
        if model.training and isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach())
            self._shares = kwargs.get("num_items_in_batch") is not None

    def take_up(self, checkpoint: Path) -> None:
        """Read what the agent put into `checkpoint`; what is left out already stays so."""
        self._resumed = {}
        try:
            self._resumed = read_json(checkpoint / _STATE)
        except FileNotFoundError:
            pass  # saved before the callback was there
        except (OSError, ValueError) as error:
            _LOG.warning("the agent's state could not be read, and begins anew: %s", error)
        beside = RollbackRecord.of(checkpoint.parent).of_checkpoint(checkpoint.name)
        self.left_out = union(chain(self.left_out, self._resumed.get("left_out", ()), *beside))

    def _batches(self, request: RollbackRequest, args: TrainingArguments, epoch: int) -> Range:
        """The micro-batches that the steps to be skipped took, of those after the checkpoint; `epoch` have as many."""
        first, last = (
            nth_kept(self.left_out, _taken(self._trail.batches(step - 1), args.gradient_accumulation_steps, epoch))
            for step in (max(request.skip[0], request.step + 1), request.skip[1])
        )
        return first, last


def train(trainer: Trainer, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
    """`trainer.train(...)`, that goes back to one of Trainer's own checkpoints when a rollback is asked for.

    The rollback's batches are left out and the next ones move up, also those of the next epoch: epochs and the
    schedule keep their number of steps. That needs a dataset with a length.
    """
    found = [one for one in trainer.callback_handler.callbacks if isinstance(one, SharpwatchCallback)]
    if len(found) != 1:
        raise AttachError(f"train: the trainer needs one SharpwatchCallback, and has {len(found)}")
    callback, checkpoint, begun = found[0], resume_from_checkpoint, random_state()
    callback.goes_back, callback.left_out = True, []
    loader = trainer.get_train_dataloader
    own = vars(trainer).get("get_train_dataloader")
    vars(trainer)["get_train_dataloader"] = lambda: _without(loader(), callback.left_out)
    if checkpoint is True:
        newest = RollbackRecord.of(_home(trainer.args)).newest(_ages(trainer.args))
        checkpoint = True if newest is None else str(_home(trainer.args) / newest)  # True: Trainer says there is none
    try:
        while True:
            if isinstance(checkpoint, (str, os.PathLike)):
                callback.take_up(Path(checkpoint))
            try:
                return trainer.train(resume_from_checkpoint=checkpoint, **kwargs)
            except _GoBack as leaving:
                checkpoint = leaving.request.uri
                _as_begun(trainer, begun)
    except BaseException as error:
        callback.give_up(error)
        raise
    finally:
        del vars(trainer)["get_train_dataloader"]
        if own is not None:
            vars(trainer)["get_train_dataloader"] = own
        callback.goes_back = False


class _GoBack(Exception):  # noqa: N818 - the way out of Trainer's loop
    """A rollback is pending."""

    def __init__(self, request: RollbackRequest) -> None:
        super().__init__(f"back to {request.uri}")
        self.request = request


class _KeptBatches:
    """A batch sampler's batches of all epochs as one stream, without those that are left out, cut into equal epochs."""

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
            for place in _samplers(self._batch_sampler):
                if hasattr(place, "set_epoch"):
                    place.set_epoch(epoch)
            for number, batch in enumerate(self._batch_sampler, epoch * length):
                if start <= number <= end and not holds(self._left_out, number):
                    yield batch


def _as_begun(trainer: Trainer, random: dict[str, Any]) -> None:
    """Where Trainer's loop was left: be as a Trainer is that has not begun."""
    set_random_state(random)  # Trainer draws the order of the data from its seed, before it restores the random states
    handle = getattr(trainer, "neftune_hook_handle", None)
    if handle is not None:
        handle.remove()  # it puts a second one beside it


def _without(loader: Any, left_out: list[Range]) -> Any:
    """`loader`, a DataLoader that Accelerate has prepared, without the batches that are left out."""
    if not left_out:
        return loader
    loader = skip_first_batches(loader, 0)  # the public way to a prepared loader whose batch sampler can be replaced
    kept = _KeptBatches(loader.batch_sampler.batch_sampler, left_out)
    loader.batch_sampler.batch_sampler = kept
    loader.batch_sampler.set_epoch = kept.set_epoch  # where Trainer and Accelerate look for it
    return loader


def _samplers(batch_sampler: Any) -> Iterator[Any]:
    """Whatever orders the batches: the sampler, or those inside Accelerate's shares of it."""
    while batch_sampler is not None:
        yield from (batch_sampler, getattr(batch_sampler, "sampler", None))
        batch_sampler = getattr(batch_sampler, "batch_sampler", None)


def _taken(steps: int, accumulation: int, epoch: int) -> int:
    """Micro-batches in Trainer's first `steps` steps; the last step of an epoch has what remains of it."""
    epochs, rest = divmod(steps, -(-epoch // accumulation))
    return epochs * epoch + min(rest * accumulation, epoch)


def _home(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".").resolve()


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return _home(args) / f"checkpoint-{state.global_step}"


def _ages(args: TrainingArguments) -> dict[str, float]:
    """Trainer's checkpoints by name, with their steps."""
    there = (folder.name for folder in _home(args).glob("checkpoint-*") if folder.is_dir())
    return {name: int(found[1]) for name in there if (found := re.fullmatch(r"checkpoint-(\d+)", name))}


def _obstacle(request: RollbackRequest, args: TrainingArguments, loader: Any) -> str:
    """Why the rollback can't be done; empty if it can."""
    folder = Path(request.uri)
    if folder.parent != _home(args):
        return f"{folder}: not a checkpoint in {_home(args)}"
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        return f"{folder}: {', '.join(missing)} missing"
    if folder.name in RollbackRecord.of(folder.parent).undone:
        return f"{folder}: undone by a rollback"
    return _unskippable(args, loader) if request.skip[0] < request.skip[1] else ""


def _unskippable(args: TrainingArguments, loader: Any) -> str:
    """Why none of `loader`'s batches can be skipped; empty if they can."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or batch_sampler is None:
        return "no data can be skipped without a DataLoader over a dataset that has a length"
    if args.ignore_data_skip:
        return "no data can be skipped with ignore_data_skip: where it stands is not kept"
    if not any(isinstance(one, SequentialSampler) or hasattr(one, "set_epoch") for one in _samplers(batch_sampler)):
        return "no data can be skipped where the sampler has no set_epoch: an epoch's order can't be had again"
    return ""
