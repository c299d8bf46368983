"""sharpwatch for Lightning's Trainer: a callback, and `fit`, which does rollbacks.

    trainer = Trainer(..., callbacks=[SharpwatchCallback(training_job="gpt2-owt"), ModelCheckpoint(...)])
    fit(trainer, module, loader)

A rollback leaves `Trainer.fit` and calls it again with `ckpt_path`. Lightning itself then restores model, optimizers,
schedulers, precision plugin and loops from its own checkpoint. It does not save the random states and the position in a
plain DataLoader; `fit` adds them to the checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharpwatch.agent.attach import attach
from sharpwatch.agent.control.commands import RollbackRequest
from sharpwatch.agent.watch import Watch
from sharpwatch.checkpointing.resumable_loader import Range
from sharpwatch.checkpointing.rollback_record import RollbackRecord
from sharpwatch.errors import AttachError
from sharpwatch.integrations.lightning_loader import LightningLoader

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(f"{error}: pip install 'sharpwatch[lightning]'") from error

_LOG = logging.getLogger("sharpwatch")
_LAST = "last"  # Lightning's copy of the newest checkpoint, which it overwrites: no target for a rollback


class SharpwatchCallback(Callback):
    """Watches the model and the optimizers of a Lightning Trainer.

    The agent's own state is saved in Lightning's checkpoints, so a resumed training is the same run. Rollbacks are done
    only in `fit(trainer, ...)`.

    Args:
        training_job: The name of what is trained, as for `attach`.
        model: The attribute of the LightningModule that is the transformer. By default the child that has all
            parameters, or the LightningModule itself if there is none.
        **attach_options: The other options of `attach`. In `fit`, `control` is "rollback" unless given.

    Attributes:
        watch: The watch, while training.
    """

    def __init__(self, training_job: str, *, model: str | None = None, **attach_options: Any) -> None:
        self.watch: Watch | None = None
        self.can_roll_back = False  # in `fit`
        self.loaders: list[LightningLoader] = []
        self._model = model
        self._options = {"training_job": training_job, **attach_options}
        self._resumed: Mapping[str, Any] = {}
        self._saved: dict[str, int] = {}  # by checkpoint that this process saved, the watch's step
        self._left_out: list[list[tuple[int, int]]] = []  # for each loader, from a rollback until the next start
        self._observed_step = 0  # Lightning's
        self._losses: list[Tensor] = []  # that backward ran from since the last step; Lightning has divided them

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, also after a rollback, because Lightning makes new optimizers each time."""
        resumed, options = self._resumed, dict(self._options)
        self._resumed = {}
        if self.watch is not None:
            request = self.watch.pending_rollback
            if request is not None:
                self.watch.restored(request.step)
            # The new watch goes on as the same run, with the multipliers now in force.
            resumed, options["run"] = self.watch.state_dict(), self.watch.run
            self.watch.close()
        if self.can_roll_back:
            options.setdefault("control", "rollback")
            _prevent_second_save(trainer)
        options.setdefault("initial_step", trainer.global_step)
        self.watch = attach(_transformer(pl_module, self._model), trainer.optimizers, **options)
        self.watch.load_state_dict(resumed)
        self._left_out = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Count the batch as started. Lightning prefetches from loaders without a length."""
        for loader in self.loaders:
            loader.batch_started()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss that backward runs from: what `training_step` returned, or gave to `manual_backward`."""
        del pl_module
        if isinstance(loss, Tensor) and loss.numel() == 1:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            # By the scaler's own product: asking for its scale would wait for the device.
            scale = 1.0 if scaler is None else scaler.scale(torch.ones_like(loss.detach()))
            self._losses.append(loss.detach() / scale)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Observe the loss of the step."""
        del pl_module, optimizer
        self._observe(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Leave the loop if a rollback is pending, before anything is saved."""
        del pl_module, outputs
        if self.watch is None:
            return
        if trainer.global_step != self._observed_step:  # a module's own `optimizer_step` may go past Lightning's hook
            self._observed_step = trainer.global_step
            self._observe(trainer)
        for loader in self.loaders:
            loader.mark(self.watch.step)
        request = self.watch.pending_rollback
        if request is None:
            return
        if self._is_impossible(request, trainer, self.watch):
            return
        self._left_out = [[*one.left_out, one.batches_of(*request.skip)] for one in self.loaders]
        raise _StopFitting(request)

    def _is_impossible(self, request: RollbackRequest, trainer: Trainer, watch: Watch) -> bool:
        """Tell the watch if the rollback can't be done, and say so."""
        failed = _obstacle(request, trainer, self._saved.get(request.uri, request.step))
        refused = _unskippable(request, trainer)
        if not self.can_roll_back:
            failed, refused = "", "rollbacks need sharpwatch.integrations.lightning.fit(trainer, ...)"
        # All processes must do the rollback or none, and a checkpoint may be missing on some of them.
        possible = trainer.strategy.reduce_boolean_decision(not failed)
        if possible and not refused:  # the same on all
            return False
        if not possible:
            watch.rollback_failed(failed or "the checkpoint can't be restored on another process")
        else:
            watch.rollback_refused(refused)
        _LOG.warning("no rollback, training continues: %s", failed or refused or "impossible on another process")
        return True

    def left_out(self, number: int, checkpoint: Any) -> list[Range]:
        """The ranges that loader `number` must leave out after `checkpoint`, beyond those in the checkpoint."""
        known = (self._left_out, _left_out_beside(checkpoint))
        return [(first, last) for each in known if number < len(each) for first, last in each[number]]

    def record_rollback(self, checkpoint: Path) -> None:
        """Write the rollback to `checkpoint` into the record beside it."""
        folder = checkpoint.parent
        RollbackRecord.read(folder).after_rollback(checkpoint.name, _ages(folder), self._left_out).write(folder)

    def saved(self, path: Path, *, first: bool) -> None:
        """A checkpoint was saved at `path`; `first` is True on one rank only, which updates the record."""
        if first:
            RollbackRecord.read(path.parent).saved(path.parent, path.name)
        if self.watch is not None and not path.name.startswith(_LAST):
            self._saved[str(path)] = self.watch.step
            self.watch.saved_checkpoint(self.watch.step, str(path))

    def deleted(self, path: Path) -> None:
        """Lightning has deleted the checkpoint at `path`: save_top_k."""
        self._saved.pop(str(path), None)
        if self.watch is not None:
            self.watch.deleted_checkpoint(str(path))

    def fail(self, error: BaseException) -> None:
        """Training was ended by `error`: report a pending rollback as failed, and close the watch as interrupted."""
        if self.watch is not None:
            self.watch.rollback_failed(f"{type(error).__name__}: {error}")
            self.watch.__exit__(type(error), error, error.__traceback__)
        self.watch = None

    def state_dict(self) -> dict[str, Any]:
        """The agent's own state, for Lightning's checkpoint."""
        return {} if self.watch is None else self.watch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._resumed = state_dict

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the watch."""
        del trainer, pl_module
        if self.watch is not None:
            self.watch.close()
        self.watch = None

    def _observe(self, trainer: Trainer) -> None:
        """Observe the sum over the step's micro-batches."""
        losses, self._losses = self._losses, []
        # Which of several optimizers a loss is for is not known; the model's own loss is shown, if it is trained on.
        if self.watch is not None and losses and len(trainer.optimizers) == 1:
            self.watch.observe(loss=sum(losses[1:], losses[0]))


def fit(
    trainer: Trainer, model: LightningModule, train_dataloaders: Any = None, *, ckpt_path: Any = None, **kwargs: Any
) -> None:
    """Call `trainer.fit(...)`, and do rollbacks to Lightning's own checkpoints.

    The next batches, also of the next epoch, take the place of those that a rollback skips, so epochs keep their number
    of batches. Checkpoints also get the random states and the position in a loader without `state_dict`.

    Args:
        trainer: A Trainer with one `SharpwatchCallback`.
        model: The LightningModule.
        train_dataloaders: As for `Trainer.fit`.
        ckpt_path: As for `Trainer.fit`. "last" does not resume from a checkpoint that was undone by a rollback.
        **kwargs: Passed on to `Trainer.fit`.

    Raises:
        AttachError: It is no Trainer of `lightning.pytorch`, or has no `SharpwatchCallback`, or several.
    """
    given: object = trainer
    if not isinstance(given, Trainer):
        kind = type(given)
        raise AttachError(f"trainer must be a lightning.pytorch.Trainer, got {kind.__module__}.{kind.__name__}")
    found = [one for one in trainer.callbacks if isinstance(one, SharpwatchCallback)]  # type: ignore[attr-defined]
    if len(found) != 1:
        raise AttachError(f"trainer must have exactly one SharpwatchCallback, got {len(found)}")
    callback = found[0]
    if ckpt_path == _LAST:
        ckpt_path = _last(trainer)
    callback.can_roll_back = True
    try:
        with _reporting(trainer, callback):
            while True:
                callback.loaders = []
                try:
                    return trainer.fit(model, train_dataloaders, ckpt_path=ckpt_path, **kwargs)
                except _StopFitting as pending:
                    ckpt_path = pending.request.uri
                    if trainer.is_global_zero:
                        callback.record_rollback(Path(ckpt_path))
    except BaseException as error:
        callback.fail(error)
        raise
    finally:
        callback.can_roll_back = False


@contextmanager
def _reporting(trainer: Trainer, callback: SharpwatchCallback) -> Iterator[None]:
    """Have the callback told of the training loaders, and of checkpoints saved and deleted, during the body."""
    strategy = trainer.strategy
    process, save, remove = strategy.process_dataloader, trainer.save_checkpoint, strategy.remove_checkpoint

    def resumable(loader: Any) -> Any:
        # Validation loaders have no position to keep.
        if not trainer.training:
            return process(loader)
        left_out = callback.left_out(len(callback.loaders), trainer.ckpt_path)
        callback.loaders.append(LightningLoader(process(loader), trainer, left_out))
        return callback.loaders[-1]

    def save_and_report(filepath: Any, *args: Any, **kwargs: Any) -> None:
        save(filepath, *args, **kwargs)
        callback.saved(Path(filepath).resolve(), first=trainer.is_global_zero)

    def remove_and_report(filepath: Any) -> None:
        remove(filepath)
        callback.deleted(Path(filepath).resolve())

    vars(strategy)["process_dataloader"], vars(trainer)["save_checkpoint"] = resumable, save_and_report
    vars(strategy)["remove_checkpoint"] = remove_and_report
    try:
        yield
    finally:
        vars(strategy)["process_dataloader"], vars(trainer)["save_checkpoint"] = process, save
        vars(strategy)["remove_checkpoint"] = remove


class _StopFitting(Exception):  # noqa: N818 - leaves Lightning's loop, and is no error
    """A rollback is pending."""

    def __init__(self, request: RollbackRequest) -> None:
        super().__init__(f"rollback to {request.uri}")
        self.request = request


def _transformer(module: LightningModule, name: str | None) -> nn.Module:
    if name is not None:
        modules: dict[str, nn.Module] = dict(module.named_modules())
        if name not in modules:
            children = ", ".join(child for child, _ in module.named_children())
            raise AttachError(f"model must name a module of the LightningModule ({children}), got {name!r}")
        return modules[name]
    parameters = set(module.parameters())
    return next((child for child in module.children() if set(child.parameters()) == parameters), module)


def _prevent_second_save(trainer: Trainer) -> None:
    """Prevent Lightning from saving the checkpoint that it resumes from again, in the middle of the next step."""
    for one in trainer.checkpoint_callbacks if trainer.ckpt_path else ():
        if "_last_global_step_saved" in vars(one):
            vars(one)["_last_global_step_saved"] = trainer.global_step


def _ages(folder: Path) -> dict[str, float]:
    """By the name of each checkpoint in `folder`, the time when it was saved."""
    return {path.name: path.stat().st_mtime for path in folder.glob("*.ckpt") if path.exists()}


def _folders(trainer: Trainer) -> list[Path]:
    """The folders of the checkpoint callbacks that have one."""
    folders = (getattr(one, "dirpath", None) for one in trainer.checkpoint_callbacks)
    return [Path(folder).resolve() for folder in folders if folder]


def _last(trainer: Trainer) -> str:
    """What `ckpt_path="last"` means: the newest checkpoint, if Lightning's own last was undone by a rollback."""
    found = (getattr(one, "_find_last_checkpoints", lambda _: ())(trainer) for one in trainer.checkpoint_callbacks)
    parents = (Path(path).resolve().parent for each in found for path in each)
    for folder in dict.fromkeys([*_folders(trainer), *parents]):
        record, ages = RollbackRecord.read(folder), _ages(folder)
        newest = record.newest(ages)
        if newest is not None and any(name.startswith(_LAST) for name in record.undone & ages.keys()):
            return str(folder / newest)
    return _LAST


def _left_out_beside(checkpoint: Any) -> Sequence[Sequence[Range]]:
    """For each loader, the ranges that rollbacks have left out since `checkpoint` was saved."""
    path = Path(checkpoint or "")
    return RollbackRecord.read(path.parent).left_out_beside(path.name)


def _obstacle(request: RollbackRequest, trainer: Trainer, step: int) -> str:
    """Say why a checkpoint that was last saved at `step` can't be restored; empty if it can."""
    path = Path(request.uri)
    if path.parent not in _folders(trainer):
        return f"{path} is not in the folder of a checkpoint callback"
    if path.name in RollbackRecord.read(path.parent).undone:
        return f"{path} was undone by a rollback"
    if step != request.step:
        return f"{path} was saved again at step {step}"
    if not path.exists():
        return f"{path} does not exist any more"
    return ""


def _unskippable(request: RollbackRequest, trainer: Trainer) -> str:
    """Say why the batches that are to be skipped can't be; empty if they can."""
    if request.skip[0] < request.skip[1] and trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        return "skipping data needs reload_dataloaders_every_n_epochs=0: a new loader may have other data"
    return ""
