"""sharpwatch in Lightning's Trainer: a callback, and `fit`, which can go back to a checkpoint.

    trainer = Trainer(..., callbacks=[SharpwatchCallback(training_job="gpt2-owt"), ModelCheckpoint(...)])
    fit(trainer, module, loader)

A rollback leaves `Trainer.fit` and calls it again with `ckpt_path`: Lightning itself restores model, optimizers,
schedulers, precision plugin and loops, from its own checkpoint. What it does not keep of a plain DataLoader, the random
states and the position in the data, `fit` puts into that checkpoint too.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sharpwatch.agent.attach import attach
from sharpwatch.agent.control.commands import RollbackRequest
from sharpwatch.agent.watch import Watch
from sharpwatch.checkpointing.data_position import Range
from sharpwatch.checkpointing.resumable_loader import Batches
from sharpwatch.checkpointing.rollback_record import RollbackRecord
from sharpwatch.errors import AttachError

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(f"{error}: pip install 'sharpwatch[lightning]'") from error

_LOG = logging.getLogger("sharpwatch")
_LAST = "last"  # Lightning's copy of the newest checkpoint, which it writes over: no place to go back to


class SharpwatchCallback(Callback):
    """Watches the model and the optimizers that Lightning trains; the other options are `attach`'s.

    `model` names the attribute of the LightningModule that is the transformer; by default it is the one child that has
    all parameters, else the whole. The agent's own state goes into Lightning's checkpoints, and a resumed training is
    the same run. Rollbacks are taken in `fit(trainer, ...)` alone.
    """

    def __init__(self, training_job: str, *, model: str | None = None, **attach_options: Any) -> None:
        self.watch: Watch | None = None
        self.goes_back = False  # in `fit`
        self.loaders: list[ResumableLoader] = []
        self._model = model
        self._options = {"training_job": training_job, **attach_options}
        self._resumed: Mapping[str, Any] = {}
        self._saved: dict[str, int] = {}  # checkpoints of this process, with the watch's steps
        self._left_out: list[list[tuple[int, int]]] = []  # of each loader, over a rollback
        self._stepped = 0  # Lightning's steps when a loss was last observed
        self._loss: Tensor | None = None  # the sum of the step's micro-batches, which Lightning has divided

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, also after a rollback: Lightning makes new optimizers each time."""
        resumed, options = self._resumed, dict(self._options)
        self._resumed = {}
        if self.watch is not None:
            request = self.watch.pending_rollback
            if request is not None:
                self.watch.restored(request.step)
            resumed, options["run"] = self.watch.state_dict(), self.watch.run
            self.watch.close()
        if self.goes_back:
            options.setdefault("control", "rollback")
            _keep_resumed(trainer)
        options.setdefault("initial_step", trainer.global_step)
        self.watch = attach(_transformer(pl_module, self._model), trainer.optimizers, **options)
        self.watch.load_state_dict(resumed)
        self._left_out = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Follow the loaders: Lightning fetches ahead where they have no length."""
        for loader in self.loaders:
            loader.trained()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Observe the loss; leave the loop where a rollback is pending, before anything is saved."""
        if self.watch is None:
            return
        for loader in self.loaders:
            loader.mark(self.watch.step)
        if pl_module.automatic_optimization:
            self._observe(outputs.get("loss") if isinstance(outputs, dict) else outputs, trainer)
        request = self.watch.pending_rollback
        if request is None:
            return
        reason = _obstacle(request, trainer, self._saved.get(request.uri, request.step))
        if not self.goes_back:
            reason = "rollbacks are taken in `fit(trainer, ...)` alone"
        # What one process can't do, none does: a folder need not be there, or be read alike, on all.
        if not trainer.strategy.reduce_boolean_decision(not reason):
            reason = reason or "another process can't"
            _LOG.warning("a rollback was not done, training goes on: %s", reason)
            self.watch.rollback_failed(reason)
            return
        self._left_out = [[*one.left_out, one.taken_by(*request.skip)] for one in self.loaders]
        raise _GoBack(request)

    def left_out(self, number: int, checkpoint: Any) -> list[Range]:
        """What loader `number` is to leave out when it goes on from `checkpoint`, beyond what that says."""
        known = (self._left_out, _beside(checkpoint))
        return [(first, last) for each in known if number < len(each) for first, last in each[number]]

    def note(self, checkpoint: Path) -> None:
        """Note what going back to `checkpoint` leaves behind."""
        home = checkpoint.parent
        RollbackRecord.of(home).after(checkpoint.name, _ages(home), self._left_out).note(home)

    def saved(self, path: Path, *, first: bool) -> None:
        """A checkpoint was saved at `path`; `first` on one rank."""
        if first:
            RollbackRecord.of(path.parent).saved(path.parent, path.name)
        if self.watch is not None and not path.name.startswith(_LAST):
            self._saved[str(path)] = self.watch.step
            self.watch.saved_checkpoint(self.watch.step, str(path))

    def give_up(self, error: BaseException) -> None:
        """Training ended by `error`: say what became of a rollback, and no goodbye."""
        if self.watch is not None:
            self.watch.rollback_failed(f"{type(error).__name__}: {error}")
            self.watch.__exit__(type(error), error, error.__traceback__)
        self.watch = None

    def state_dict(self) -> dict[str, Any]:
        """The agent's own state, for Lightning's checkpoint."""
        return {} if self.watch is None else self.watch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for when training starts."""
        self._resumed = state_dict

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say goodbye."""
        del trainer, pl_module
        if self.watch is not None:
            self.watch.close()
        self.watch = None

    def _observe(self, loss: Tensor | None, trainer: Trainer) -> None:
        if isinstance(loss, Tensor):
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        if trainer.global_step != self._stepped:
            self._stepped = trainer.global_step
            if self.watch is not None and self._loss is not None:
                self.watch.observe(loss=self._loss)
            self._loss = None


def fit(
    trainer: Trainer, model: LightningModule, train_dataloaders: Any = None, *, ckpt_path: Any = None, **kwargs: Any
) -> None:
    """`trainer.fit(...)`, that goes back to one of Lightning's own checkpoints when a rollback is asked for.

    The rollback's batches are left out and the next ones move up, also those of the next epoch: epochs keep their
    number of batches. The random states and the position in a loader without `state_dict` go into the checkpoints.
    """
    found = [one for one in trainer.callbacks if isinstance(one, SharpwatchCallback)]  # type: ignore[attr-defined]
    if len(found) != 1:
        raise AttachError(f"fit: the trainer needs one SharpwatchCallback, and has {len(found)}")
    callback, strategy = found[0], trainer.strategy
    process, save = strategy.process_dataloader, trainer.save_checkpoint

    def resumable(loader: Any) -> Any:
        if not trainer.training:
            return process(loader)
        left_out = callback.left_out(len(callback.loaders), trainer.ckpt_path)
        callback.loaders.append(ResumableLoader(process(loader), trainer, left_out))
        return callback.loaders[-1]

    def told(filepath: Any, *args: Any, **kwargs: Any) -> None:
        save(filepath, *args, **kwargs)
        callback.saved(Path(filepath).resolve(), first=trainer.is_global_zero)

    vars(strategy)["process_dataloader"], vars(trainer)["save_checkpoint"] = resumable, told
    callback.goes_back = True
    if ckpt_path == _LAST:
        ckpt_path = _last(trainer)
    try:
        while True:
            callback.loaders = []
            try:
                return trainer.fit(model, train_dataloaders, ckpt_path=ckpt_path, **kwargs)
            except _GoBack as leaving:
                ckpt_path = leaving.request.uri
                if trainer.is_global_zero:
                    callback.note(Path(ckpt_path))
    except BaseException as error:
        callback.give_up(error)
        raise
    finally:
        vars(strategy)["process_dataloader"], vars(trainer)["save_checkpoint"] = process, save
        callback.goes_back = False


class ResumableLoader(Batches):
    """A training loader whose position Lightning puts into its checkpoints; for everything else it is the loader."""

    def __init__(self, loader: Any, trainer: Trainer, left_out: Sequence[Range]) -> None:
        super().__init__(loader)
        self._over_a_rollback = left_out
        self._trainer = trainer
        self._ahead: deque[dict[str, Any]] = deque()  # the places of batches that were fetched and not begun
        self._begun: dict[str, Any] = {}  # the place of the newest that was begun

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    @property
    def worker_init_fn(self) -> Any:
        """The loader's own, which Lightning sets."""
        return self.loader.worker_init_fn

    @worker_init_fn.setter
    def worker_init_fn(self, value: Any) -> None:
        self.loader.worker_init_fn = value

    @property
    def _iterator(self) -> Any:
        """The loader's own, whose workers Lightning ends."""
        return self.loader._iterator  # noqa: SLF001 - where Lightning looks for it

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self.loader._iterator = value  # noqa: SLF001 - as above

    def length(self) -> int | None:
        """Lightning ends an epoch, maybe earlier than the loader would; it begins a shorter one of several again."""
        count, own = self._trainer.num_training_batches, super().length()
        return own if math.isinf(count) else int(count) if own is None else min(int(count), own)

    def __iter__(self) -> Iterator[Any]:
        """As the loader's, with a note of where each batch stood."""
        self._ahead.clear()
        batches = super().__iter__()
        if self.length() is not None:
            return batches
        self._begun = self.place()
        return self._noting(batches)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand there again, and leave out what the checkpoint does not know of before anything is fetched."""
        super().load_state_dict(state)
        self.leave_out(*self._over_a_rollback)

    def trained(self) -> None:
        """A batch is trained on."""
        if self._ahead:
            self._begun = self._ahead.popleft()

    def place(self) -> dict[str, Any]:
        """Where training stands, which may be before what was fetched."""
        return self._begun if self._ahead else super().place()

    def mark(self, step: int, taken: int | None = None) -> None:
        """Optimizer step `step` was done with the batches that were begun."""
        super().mark(step, self.place()["taken"] if taken is None else taken)

    def _noting(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._ahead.append(super().place())
            yield batch


class _GoBack(Exception):  # noqa: N818 - the way out of Lightning's loop
    """A rollback is pending."""

    def __init__(self, request: RollbackRequest) -> None:
        super().__init__(f"back to {request.uri}")
        self.request = request


def _transformer(module: LightningModule, name: str | None) -> nn.Module:
    if name is not None:
        return module.get_submodule(name)
    parameters = set(module.parameters())
    return next((child for child in module.children() if set(child.parameters()) == parameters), module)


def _keep_resumed(trainer: Trainer) -> None:
    """Keep Lightning from saving the checkpoint that it goes on from once more, in the midst of the step after it."""
    for one in trainer.checkpoint_callbacks if trainer.ckpt_path else ():
        if "_last_global_step_saved" in vars(one):
            vars(one)["_last_global_step_saved"] = trainer.global_step


def _ages(home: Path) -> dict[str, float]:
    """The checkpoints in `home` by name, with when they were saved."""
    return {path.name: path.stat().st_mtime for path in home.glob("*.ckpt") if path.exists()}


def _homes(trainer: Trainer) -> list[Path]:
    """The folders of the checkpoint callbacks, where they are named."""
    folders = (getattr(one, "dirpath", None) for one in trainer.checkpoint_callbacks)
    return [Path(folder).resolve() for folder in folders if folder]


def _last(trainer: Trainer) -> str:
    """For "last", the newest checkpoint, where Lightning's own last was undone by a rollback."""
    found = (getattr(one, "_find_last_checkpoints", lambda _: ())(trainer) for one in trainer.checkpoint_callbacks)
    for home in dict.fromkeys([*_homes(trainer), *(Path(path).resolve().parent for each in found for path in each)]):
        noted, ages = RollbackRecord.of(home), _ages(home)
        newest = noted.newest(ages)
        if newest is not None and any(name.startswith(_LAST) for name in noted.undone & ages.keys()):
            return str(home / newest)
    return _LAST


def _beside(checkpoint: Any) -> Sequence[Sequence[Range]]:
    """What rollbacks have left out of each loader and `checkpoint` does not know of."""
    path = Path(checkpoint or "")
    return RollbackRecord.of(path.parent).of_checkpoint(path.name)


def _obstacle(request: RollbackRequest, trainer: Trainer, step: int) -> str:
    """Why the rollback to a checkpoint that was last saved at `step` can't be done; empty if it can."""
    path = Path(request.uri)
    if path.parent not in _homes(trainer):
        return f"{path}: not in the folder of any checkpoint callback"
    if path.name in RollbackRecord.of(path.parent).undone:
        return f"{path}: undone by a rollback"
    if step != request.step:
        return f"{path}: was saved again at step {step}"
    if not path.exists():
        return f"{path}: not there any more"
    if request.skip[0] < request.skip[1] and trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        return "no data can be skipped with reload_dataloaders_every_n_epochs: it is another's each time"
    return ""
