"""Checkpoints of a plain training loop, saved with `torch.distributed.checkpoint` (DCP), and rollbacks to them."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from sharpwatch.agent.control.commands import RollbackRequest
from sharpwatch.agent.hooks import skips_its_step
from sharpwatch.agent.watch import Watch
from sharpwatch.checkpointing.resumable_loader import ResumableLoader, rescaled
from sharpwatch.common.atomic_file import read_json, sync_folder, write_json
from sharpwatch.common.rng_state import random_state, seeded_state, set_random_state
from sharpwatch.curvature.state.hooks import hooks_disabled
from sharpwatch.errors import CheckpointError

_T = TypeVar("_T")
_LOG = logging.getLogger("sharpwatch")
_CONTENTS = "checkpoint.json"  # step, ranks and a digest of every file
_HEAD = "head.json"  # the checkpoint that the run continues from, and the batches it leaves out
_OTHER_RANKS = (
    "%s was saved by %d ranks and is resumed by %d: the epoch continues where it was, to within a batch; new ranks "
    "draw other random numbers; a step has as many rows as the batches of the present ranks together"
)
_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class Stateful(Protocol):
    """An object with a state to save, such as a scheduler or a GradScaler."""

    def state_dict(self) -> dict[str, Any]:
        """Its state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Set its state."""


class Checkpoints:
    """Saves checkpoints of a run in a folder, resumes from the newest, and does rollbacks.

    A checkpoint has the model, the optimizers, schedulers and GradScaler, all random states, the position in the data
    and the watch's own state. It is either complete or not there. Under DDP or FSDP2 call every method on all ranks.

    Call `resume` once, iterate over `batches`, and call `save` at the end of a step. If the watch was attached with
    `control="rollback"`, a pending rollback is done between two batches.

    Args:
        folder: Where checkpoints are saved; on several ranks a file system that they share.
        model: The model in training.
        optimizer: The optimizer that trains it, or several.
        watch: What `attach` returned.
        data: The training loader, if its position is to be saved. Iterate over `batches`, not over the loader.
        scheduler: A learning-rate scheduler, or several.
        scaler: The GradScaler.
        keep: How many checkpoints to keep; older ones are deleted.

    Raises:
        CheckpointError: `keep` is less than 1.
    """

    def __init__(  # noqa: PLR0913 - the parts of a training loop
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        watch: Watch,
        data: Iterable[Any] | None = None,
        scheduler: Stateful | Sequence[Stateful] = (),
        scaler: Stateful | None = None,
        keep: int = 3,
    ) -> None:
        if keep < 1:
            raise CheckpointError(f"keep must be >= 1, got {keep}")
        self.folder = Path(folder).resolve()
        self.data = None if data is None else ResumableLoader(data)
        self._model = model
        self._optimizers = (optimizer,) if isinstance(optimizer, torch.optim.Optimizer) else tuple(optimizer)
        schedulers = tuple(scheduler) if isinstance(scheduler, Sequence) else (scheduler,)
        self._extras = {f"scheduler-{i}": one for i, one in enumerate(schedulers)}
        if scaler is not None:
            self._extras["scaler"] = scaler
        self._watch = watch
        self._keep = keep
        self._steps = watch.step
        if self.data is not None:
            self.data.mark(self._steps)  # no batch was taken before
        self._optimizers[0].register_step_post_hook(self._count_step)
        self._rank, self._ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def step(self) -> int:
        """The number of optimizer steps that took effect: `watch.step`, also counted if sharpwatch is disabled."""
        return self._steps

    def batches(self, epochs: int | None = None) -> Iterator[Any]:
        """Iterate over the batches of `data`, from the position where the run is.

        A pending rollback is done before the next batch, which is then the first one after the checkpoint; the batches
        that the rollback skips are left out.

        Args:
            epochs: Stop after this many epochs, counted from the start of the run; None never stops.

        Yields:
            The batches, as the loader yields them.

        Raises:
            CheckpointError: `Checkpoints` was made without `data`, or a rollback failed after it had begun.
        """
        if self.data is None:
            raise CheckpointError("batches() needs Checkpoints(..., data=loader), got data=None")
        while epochs is None or self.data.epoch < epochs:
            for batch in self.data:
                yield batch
                self.data.mark(self.step)
                if self.roll_back() is not None:
                    break

    def save(self) -> Path:
        """Save a checkpoint, and tell the watch that rollbacks can go to it. Call it at the end of a step.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: A rank could not write; raised on all ranks. Earlier checkpoints are unchanged.
        """
        if self.data is not None:
            self.data.mark(self.step)
        # Rank 0's name for all: it deletes drafts meanwhile, so the others may find other names in use.
        path = self.folder / self._on_all_ranks(self._new_name)[0]
        draft = self.folder / f".{path.name}"
        with self._dcp():
            save(self._dcp_state(), storage_writer=FileSystemWriter(draft))
        self._on_all_ranks(lambda: self._write_rank(draft))
        digests = self._digests(draft)
        self._on_all_ranks(lambda: self._publish(draft, path, digests))
        self._watch.saved_checkpoint(self.step, str(path))
        return path

    def resume(self) -> int:
        """Restore the newest checkpoint, which may have been saved by another number of ranks.

        Returns:
            Its step; 0 if there is no checkpoint.

        Raises:
            CheckpointError: The checkpoint is damaged, or can't be restored by these ranks. Nothing is changed then.
        """
        head = self._on_all_ranks(self._head)[0]
        if not head:
            return 0
        path = self.folder / head["checkpoint"]
        state = self._read(path)
        self._load(path, state)
        if self.data is not None:
            ratio = self.data.batch_ratio(head["length"], head["ranks"], self._ranks)
            # From the head and not the checkpoint: rollbacks since it was saved have left out more.
            self.data.leave_out(*rescaled(head["left_out"], ratio))
        self._watch.load_state_dict(state["watch"])
        if self._watch.step != self.step:  # sharpwatch was disabled when this was saved
            self._watch.restored(self.step)
        self._watch.saved_checkpoint(self.step, str(path))
        return self.step

    def roll_back(self) -> RollbackRequest | None:
        """Do the pending rollback, if there is one. Call it between two steps; `batches` does.

        If the checkpoint is gone or damaged, the rollback is reported as failed and training continues.

        Returns:
            The rollback that was done; None if none was.

        Raises:
            CheckpointError: The restore failed after it had begun.
        """
        request = self._watch.pending_rollback
        if request is None:
            return None
        path = self.folder / Path(request.uri).name  # whoever asks for it, only checkpoints of this run are loaded
        try:
            state = self._read(path)
        except CheckpointError as error:
            _LOG.warning("rollback failed, training continues: %s", error)
            self._watch.rollback_failed(str(error))
            return None
        if self.data is not None:
            # Asked before the load, which replaces the record of what each step took.
            left_out = (*self.data.left_out, self.data.batches_of(*request.skip))
            self._load(path, state)
            self.data.leave_out(*left_out)
        else:
            self._load(path, state)
        self._on_all_ranks(lambda: self._continue_from(path))
        self._watch.restored(self.step)
        return request

    # What a checkpoint contains.

    def _count_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        self._steps += not skips_its_step(optimizer)

    @contextmanager
    def _dcp(self) -> Iterator[None]:
        """The context for calls of DCP, which creates missing optimizer state by a `step()` that no hook must see."""
        with ExitStack() as stack:
            for optimizer in self._optimizers:
                stack.enter_context(hooks_disabled(optimizer, _STEP_HOOKS))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is enough
            try:
                yield
            except CheckpointException as error:
                raise CheckpointError(f"{self.folder}: {error}") from error

    def _dcp_state(self) -> dict[str, Any]:
        """The state of model and optimizers for DCP, with the tensors in use and not copies of them."""
        model, optimizers = get_state_dict(self._model, self._optimizers)
        return {"model": model, "optimizers": optimizers}

    def _write_rank(self, folder: Path) -> None:
        state = {
            "step": self._steps,
            "others": {name: one.state_dict() for name, one in self._extras.items()},
            "random": random_state(),
            "data": None if self.data is None else self.data.state_dict(),
            "watch": self._watch.state_dict(),
        }
        path = folder / _rank_file(self._rank)
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        torch.load(path, weights_only=True)  # a state that can't be read must fail now, not at a restore

    def _read(self, path: Path) -> dict[str, Any]:
        """Verify every file of a checkpoint, and read this rank's state; changes nothing."""
        contents = self._on_all_ranks(lambda: read_json(path / _CONTENTS))[0]
        found = self._digests(path)
        damaged = sorted(name for name, digest in contents["files"].items() if found.get(name) != digest)
        if damaged:
            raise CheckpointError(f"{path}: missing or damaged: {', '.join(damaged)}")
        ranks = contents["ranks"]
        seeds = self._on_all_ranks(torch.initial_seed)
        state: dict[str, Any] = {}
        self._on_all_ranks(lambda: state.update(_rank_state(path, self._rank, ranks, seeds)))
        if state["others"].keys() != self._extras.keys() or (state["data"] is None) != (self.data is None):
            raise CheckpointError(f"{path} was saved with another set of schedulers, scaler and data than this run has")
        if ranks != self._ranks:
            self._on_all_ranks(lambda: self._adapt_state(state, ranks))
            if self._rank == 0:
                _LOG.warning(_OTHER_RANKS, path, ranks, self._ranks)
        return state

    def _adapt_state(self, state: dict[str, Any], ranks: int) -> None:
        if self.data is not None:
            state["data"] = self.data.adapted_state(state["data"], ranks, self._ranks)

    def _load(self, path: Path, state: dict[str, Any]) -> None:
        """Restore everything of a checkpoint; `state` is this rank's."""
        with self._dcp():
            dcp_state = self._dcp_state()
            load(dcp_state, storage_reader=FileSystemReader(path))
            set_state_dict(
                self._model,
                self._optimizers,
                model_state_dict=dcp_state["model"],
                optim_state_dict=dcp_state["optimizers"],
            )
        for name, one in self._extras.items():
            one.load_state_dict(state["others"][name])
        self._steps = state["step"]
        # After model and optimizers: DCP makes missing optimizer state by a step, which may draw.
        set_random_state(state["random"])
        if self.data is not None:
            self.data.load_state_dict(state["data"])

    # Files.

    def _new_name(self) -> str:
        """A name that is not in use: after a rollback a step is done, and maybe saved, a second time."""
        if self._rank == 0:
            for draft in self.folder.glob(".step-*"):  # of a save or a deletion that was interrupted
                shutil.rmtree(draft, ignore_errors=True)
        name, again = f"step-{self.step}", 1
        while any((self.folder / taken).exists() for taken in (name, f".{name}")):
            again += 1
            name = f"step-{self.step}-{again}"
        return name

    def _digests(self, folder: Path) -> dict[str, str]:
        """The digest of every file; each file is read by one rank."""
        names = self._on_all_ranks(lambda: sorted(file.name for file in folder.iterdir() if file.name != _CONTENTS))[0]
        shares = self._on_all_ranks(lambda: {name: _digest(folder / name) for name in names[self._rank :: self._ranks]})
        return {name: digest for share in shares for name, digest in share.items()}

    def _publish(self, draft: Path, path: Path, digests: dict[str, str]) -> None:
        if self._rank == 0:
            write_json(draft / _CONTENTS, {"step": self.step, "ranks": self._ranks, "files": digests})
            # Atomic, and after its contents are written: a kill leaves a draft or a complete checkpoint.
            draft.rename(path)
            sync_folder(self.folder)
            self._set_head(path)
            self._prune(path)

    def _set_head(self, path: Path) -> None:
        left_out, length = ([], None) if self.data is None else (self.data.left_out, self.data.length())
        head = {"checkpoint": path.name, "left_out": left_out, "length": length, "ranks": self._ranks}
        write_json(self.folder / _HEAD, head)

    def _continue_from(self, path: Path) -> None:
        if self._rank == 0:
            self._set_head(path)
            (path / _CONTENTS).touch()  # counts as the newest, so that checkpoints of undone steps are deleted first

    def _head(self) -> dict[str, Any]:
        return read_json(self.folder / _HEAD) if (self.folder / _HEAD).exists() else {}

    def _prune(self, newest: Path) -> None:
        """Delete old checkpoints, but not the newest nor that of a pending rollback."""
        pending = self._watch.pending_rollback
        named = {newest, *([Path(pending.uri)] if pending else [])}
        saved = sorted(self.folder.glob(f"step-*/{_CONTENTS}"), key=lambda file: file.stat().st_mtime_ns)
        for old in [file.parent for file in saved][: -self._keep]:
            if old not in named:
                with suppress(OSError):  # as a draft, so that after a kill the next save deletes the rest
                    shutil.rmtree(old.rename(old.with_name(f".{old.name}")))

    # Ranks.

    def _on_all_ranks(self, work: Callable[[], _T]) -> list[_T]:
        """Call `work` on every rank and gather its results; raises `CheckpointError` on all if it raises on one."""
        value: _T | None = None
        failure = ""
        try:
            value = work()
        except Exception as error:  # noqa: BLE001 - the other ranks must not wait for this one
            failure = f"rank {self._rank}: {type(error).__name__}: {error}"
        outcomes: list[Any] = [(value, failure)]
        if self._ranks > 1:
            outcomes *= self._ranks
            dist.all_gather_object(outcomes, (value, failure))
        failures = [failure for _, failure in outcomes if failure]
        if failures:
            raise CheckpointError(f"{self.folder}: {'; '.join(failures)}")
        return [value for value, _ in outcomes]


def _rank_file(rank: int) -> str:
    return f"rank-{rank}.pt"


def _rank_state(path: Path, rank: int, ranks: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Read the state for `rank` of a checkpoint that `ranks` ranks have saved.

    A rank that did not exist then draws the same random numbers as another rank with the same seed; if there is none,
    it gets a random state of its own. `seeds` are those of all present ranks.
    """
    twins = [rank] if rank < ranks else [one for one in range(ranks) if seeds[one] == seeds[rank]]
    state: dict[str, Any] = torch.load(path / _rank_file((twins or [0])[0]), weights_only=True)
    if not twins:
        digest = hashlib.sha256(state["random"]["cpu"].numpy().tobytes() + str(rank).encode()).digest()
        own = seeded_state(int.from_bytes(digest[:8]))
        state["random"] = own
        if state["data"] is not None:
            state["data"] |= {"random": own, "start": state["data"]["start"] | {"random": own, "first": own}}
    return state


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
