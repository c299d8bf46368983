"""Checkpoints of a plain loop, through `torch.distributed.checkpoint`: a place for rollbacks to go back to."""

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
from sharpwatch.agent.optimizers.support import skips_its_step
from sharpwatch.agent.watch import Watch
from sharpwatch.checkpointing.data_position import paced
from sharpwatch.checkpointing.resumable_loader import Batches
from sharpwatch.checkpointing.rng_state import random_state, seeded, set_random_state
from sharpwatch.common.atomic_file import read_json, sync_folder, write_json
from sharpwatch.curvature.state.isolation import hooks_disabled
from sharpwatch.errors import CheckpointError

_T = TypeVar("_T")
_LOG = logging.getLogger("sharpwatch")
_CONTENTS = "checkpoint.json"  # step, ranks and a digest of every file
_HEAD = "head.json"  # the checkpoint that the run goes on from, and the batches it leaves out
_OTHER_RANKS = (
    "%s was saved by %d ranks and is taken up by %d: its epoch goes on where it stood, to within a batch; a rank that "
    "is new draws random numbers of its own; a step has as many rows as the batches of these ranks"
)
_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class Stateful(Protocol):
    """A scheduler, a GradScaler."""

    def state_dict(self) -> dict[str, Any]:
        """What it is."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Be that again."""


class Checkpoints:
    """Checkpoints of a run in `folder`, and the way back to them.

    Each holds the model, the optimizers, schedulers, GradScaler, random states, the position in `data` and the watch's
    own state, and is complete or not there. `data` is the training loader; go through it by `batches`. Under DDP or
    FSDP2 every method is called on all ranks, with `folder` on a file system that they share.

    With `watch = attach(..., control="rollback")` a rollback is done where `batches` (or `roll_back`) is next asked.
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
            raise CheckpointError(f"keep={keep}: allowed is a whole number from 1")
        self.folder = Path(folder).resolve()
        self.data = None if data is None else Batches(data)
        self._model = model
        self._optimizers = (optimizer,) if isinstance(optimizer, torch.optim.Optimizer) else tuple(optimizer)
        schedulers = tuple(scheduler) if isinstance(scheduler, Sequence) else (scheduler,)
        self._others = {f"scheduler-{i}": one for i, one in enumerate(schedulers)}
        if scaler is not None:
            self._others["scaler"] = scaler
        self._watch = watch
        self._keep = keep
        self._steps = watch.step
        if self.data is not None:
            self.data.mark(self._steps)  # no batch was taken before
        self._optimizers[0].register_step_post_hook(self._count)
        self._rank, self._ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def step(self) -> int:
        """Optimizer steps that took effect: `watch.step`, but counted where sharpwatch is disabled too."""
        return self._steps

    def batches(self, epochs: int | None = None) -> Iterator[Any]:
        """The batches of `data` from where the run stands, for `epochs` in all; without end where that is None.

        Between two of them a pending rollback is done, and the next is then the one that follows the checkpoint, with
        those left out that the rollback names.
        """
        if self.data is None:
            raise CheckpointError("batches: Checkpoints was made without data")
        while epochs is None or self.data.epoch < epochs:
            for batch in self.data:
                yield batch
                self.data.mark(self.step)
                if self.roll_back() is not None:
                    break

    def save(self) -> Path:
        """Save everything, as the last thing of a step, and tell the watch; returns the checkpoint's folder.

        Raises `CheckpointError` on every rank where one can't write; what stood before still stands.
        """
        if self.data is not None:
            self.data.mark(self.step)
        path = self.folder / self._together(self._new_name)[0]
        draft = self.folder / f".{path.name}"
        with self._sharding():
            save(self._sharded(), storage_writer=FileSystemWriter(draft))
        self._together(lambda: self._write_rank(draft))
        digests = self._digests(draft)
        self._together(lambda: self._publish(draft, path, digests))
        self._watch.saved_checkpoint(self.step, str(path))
        return path

    def resume(self) -> int:
        """Go on from the newest checkpoint, also of another number of ranks; returns its step, 0 where there is none.

        Raises `CheckpointError`, with nothing changed, where it is not whole or can't be taken up by these ranks.
        """
        head = self._together(self._head)[0]
        if not head:
            return 0
        path = self.folder / head["checkpoint"]
        state = self._read(path)
        self._load(path, state)
        if self.data is not None:
            pace = self.data.pace(head["length"], head["ranks"], self._ranks)
            self.data.leave_out(*paced(head["left_out"], pace))
        self._watch.load_state_dict(state["watch"])
        if self._watch.step != self.step:  # sharpwatch was disabled when this was saved
            self._watch.restored(self.step)
        self._watch.saved_checkpoint(self.step, str(path))
        return self.step

    def roll_back(self) -> RollbackRequest | None:
        """Do the rollback that is pending, if one is; call it where nothing of a step is under way.

        One that can't be done because its checkpoint is not whole, or gone, is reported as failed, and training goes
        on. What is wrong only once the restore has begun is raised.
        """
        request = self._watch.pending_rollback
        if request is None:
            return None
        path = self.folder / Path(request.uri).name  # never what lies elsewhere, whoever names it
        try:
            state = self._read(path)
        except CheckpointError as error:
            _LOG.warning("a rollback was not done, training goes on: %s", error)
            self._watch.rollback_failed(str(error))
            return None
        if self.data is not None:
            left_out = (*self.data.left_out, self.data.taken_by(*request.skip))
            self._load(path, state)
            self.data.leave_out(*left_out)
        else:
            self._load(path, state)
        self._together(lambda: self._go_on_from(path))
        self._watch.restored(self.step)
        return request

    # Inside.

    def _count(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        self._steps += not skips_its_step(optimizer)

    @contextmanager
    def _sharding(self) -> Iterator[None]:
        """Around what DCP does. It makes an optimizer's missing state with a step() that no hook is to see."""
        with ExitStack() as stack:
            for optimizer in self._optimizers:
                stack.enter_context(hooks_disabled(optimizer, _STEP_HOOKS))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is no fault
            try:
                yield
            except CheckpointException as error:
                raise CheckpointError(f"{self.folder}: {error}") from error

    def _sharded(self) -> dict[str, Any]:
        """Model and optimizers as DCP takes them: the tensors are the live ones."""
        model, optimizers = get_state_dict(self._model, self._optimizers)
        return {"model": model, "optimizers": optimizers}

    def _write_rank(self, folder: Path) -> None:
        state = {
            "step": self._steps,
            "others": {name: one.state_dict() for name, one in self._others.items()},
            "random": random_state(),
            "data": None if self.data is None else self.data.state_dict(),
            "watch": self._watch.state_dict(),
        }
        path = folder / _rank_file(self._rank)
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        torch.load(path, weights_only=True)  # what can't be read is found now, not when it is needed

    def _read(self, path: Path) -> dict[str, Any]:
        """This rank's own state, after every file was found whole; nothing has been changed yet."""
        contents = self._together(lambda: read_json(path / _CONTENTS))[0]
        found = self._digests(path)
        damaged = sorted(name for name, digest in contents["files"].items() if found.get(name) != digest)
        if damaged:
            raise CheckpointError(f"{path}: missing or damaged: {', '.join(damaged)}")
        ranks = contents["ranks"]
        seeds = self._together(torch.initial_seed)
        state: dict[str, Any] = {}
        self._together(lambda: state.update(_rank_state(path, self._rank, ranks, seeds)))
        if state["others"].keys() != self._others.keys() or (state["data"] is None) != (self.data is None):
            raise CheckpointError(f"{path}: saved with other schedulers, scaler or data than this run has")
        if ranks != self._ranks:
            self._together(lambda: self._take_over(state, ranks))
            if self._rank == 0:
                _LOG.warning(_OTHER_RANKS, path, ranks, self._ranks)
        return state

    def _take_over(self, state: dict[str, Any], ranks: int) -> None:
        if self.data is not None:
            state["data"] = self.data.taken_over(state["data"], ranks, self._ranks)

    def _load(self, path: Path, state: dict[str, Any]) -> None:
        """Put everything back."""
        with self._sharding():
            sharded = self._sharded()
            load(sharded, storage_reader=FileSystemReader(path))
            set_state_dict(
                self._model,
                self._optimizers,
                model_state_dict=sharded["model"],
                optim_state_dict=sharded["optimizers"],
            )
        for name, one in self._others.items():
            one.load_state_dict(state["others"][name])
        self._steps = state["step"]
        set_random_state(state["random"])
        if self.data is not None:
            self.data.load_state_dict(state["data"])

    # On disk.

    def _new_name(self) -> str:
        """A name not taken yet: after a rollback a step comes again."""
        if self._rank == 0:
            for draft in self.folder.glob(".step-*"):  # of a save or a deletion that was cut off
                shutil.rmtree(draft, ignore_errors=True)
        name, again = f"step-{self.step}", 1
        while any((self.folder / taken).exists() for taken in (name, f".{name}")):
            again += 1
            name = f"step-{self.step}-{again}"
        return name

    def _digests(self, folder: Path) -> dict[str, str]:
        """A digest of every file, each read by one rank."""
        names = self._together(lambda: sorted(file.name for file in folder.iterdir() if file.name != _CONTENTS))[0]
        shares = self._together(lambda: {name: _digest(folder / name) for name in names[self._rank :: self._ranks]})
        return {name: digest for share in shares for name, digest in share.items()}

    def _publish(self, draft: Path, path: Path, digests: dict[str, str]) -> None:
        if self._rank == 0:
            write_json(draft / _CONTENTS, {"step": self.step, "ranks": self._ranks, "files": digests})
            draft.rename(path)
            sync_folder(self.folder)
            self._set_head(path)
            self._prune(path)

    def _set_head(self, path: Path) -> None:
        left_out, length = ([], None) if self.data is None else (self.data.left_out, self.data.length())
        head = {"checkpoint": path.name, "left_out": left_out, "length": length, "ranks": self._ranks}
        write_json(self.folder / _HEAD, head)

    def _go_on_from(self, path: Path) -> None:
        if self._rank == 0:
            self._set_head(path)
            (path / _CONTENTS).touch()  # the newest: those of the steps that are undone go before it

    def _head(self) -> dict[str, Any]:
        return read_json(self.folder / _HEAD) if (self.folder / _HEAD).exists() else {}

    def _prune(self, newest: Path) -> None:
        """Delete all but the newest, and the one that a pending rollback names."""
        pending = self._watch.pending_rollback
        named = {newest, *([Path(pending.uri)] if pending else [])}
        there = sorted(self.folder.glob(f"step-*/{_CONTENTS}"), key=lambda file: file.stat().st_mtime_ns)
        for old in [file.parent for file in there][: -self._keep]:
            if old not in named:
                with suppress(OSError):  # as a draft, so that what a kill leaves of it goes with the next
                    shutil.rmtree(old.rename(old.with_name(f".{old.name}")))

    # Between ranks.

    def _together(self, work: Callable[[], _T]) -> list[_T]:
        """What `work` gives on every rank; where it raises on one, `CheckpointError` is raised on all."""
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
    """What `rank` goes on from, of a checkpoint by `ranks`; `seeds` are those that all ranks have begun with now.

    A rank that was not there draws what another draws that was seeded alike, else numbers of its own.
    """
    twins = [rank] if rank < ranks else [one for one in range(ranks) if seeds[one] == seeds[rank]]
    state: dict[str, Any] = torch.load(path / _rank_file((twins or [0])[0]), weights_only=True)
    if not twins:
        digest = hashlib.sha256(state["random"]["cpu"].numpy().tobytes() + str(rank).encode()).digest()
        own = seeded(int.from_bytes(digest[:8]))
        state["random"] = own
        if state["data"] is not None:
            state["data"] |= {"random": own, "start": state["data"]["start"] | {"random": own, "first": own}}
    return state


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
