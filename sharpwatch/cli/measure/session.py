"""One measurement from what was asked for to its report: loaded, checked, run in pieces, kept."""

from __future__ import annotations

import math
from contextlib import ExitStack, closing
from typing import Any

import torch

from sharpwatch._version import __version__
from sharpwatch.blocks import load_rules
from sharpwatch.cli.measure.arguments import Request
from sharpwatch.cli.measure.data import Cut, load_batches
from sharpwatch.cli.measure.model import load
from sharpwatch.cli.measure.progress import Progress, ProgressStep, told
from sharpwatch.cli.measure.signals import Stop
from sharpwatch.cli.measure.state import StateFile, read_state
from sharpwatch.cli.measure.validation import check_batches
from sharpwatch.cli.output import formatting
from sharpwatch.curvature.measure.measure import Measurement
from sharpwatch.curvature.measure.report import SharpnessReport
from sharpwatch.errors import SharpwatchError


class Session:
    """Everything a user can get wrong raises here, in the constructor; `run` does the work."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._last: ProgressStep | None = None
        kept = None if request.state is None else read_state(request.state)
        rules = None if request.rules is None else load_rules(request.rules)
        loaded = load(request.model, request.device, request.dtype)
        cut = Cut(request.rows, request.length, request.batches)
        batches = load_batches(request.data, cut, loaded, request.seed)
        self._device = str(loaded.device)
        self._measurement = Measurement(
            loaded.model,
            batches,
            loaded.optimizer,
            request.estimators,
            request.draws,
            request.seed,
            precision=request.precision,
            max_draws=request.max_draws,
            blocks=request.blocks,
            rules=rules,
            method=request.method,
        )
        check_batches(loaded.model, self._measurement.block_map, batches, request.data)
        self._file: StateFile | None = None
        if request.state is not None:
            self._file = StateFile(request.state)
            if kept is not None:
                self._file.load(self._measurement, kept)

    @property
    def pieces(self) -> int:
        """Pieces of work done."""
        return 0 if self._last is None else self._last.done

    def told(self) -> str:
        """How far it is."""
        return "0 pieces" if self._last is None else told(self._last)

    def run(self) -> int:
        """Measure; returns the signal that asked for an end before it was reached, else 0.

        What is done is in the state file, however this ends.
        """
        try:
            with Stop() as stop, Progress(quiet=self.request.quiet) as progress, ExitStack() as stack:
                # Closed at once where it is left early: until then the engine has the model on loan.
                for piece in stack.enter_context(closing(self._measurement.run())):
                    self._last = piece
                    progress.show(piece)
                    if self._file is not None:
                        self._file.save_if_due(self._measurement)
                    if stop.asked:
                        return stop.asked
        except torch.OutOfMemoryError as error:
            less = "give fewer --rows or a shorter --length"
            raise SharpwatchError(f"out of memory on {self._device} after {self.told()}: {less}") from error
        finally:
            if self._file is not None:
                self._file.save(self._measurement)
        return 0

    def kept(self) -> str:
        """What became of the draws so far."""
        if self._file is None:
            return "not kept: --state FILE was not given"
        if self._file.trouble:
            return f"not kept: {self._file.trouble}"
        return f"kept in {self._file.path}: the same command goes on from there"

    def report(self) -> SharpnessReport:
        """What was measured so far."""
        return self._measurement.report()

    def title(self, report: SharpnessReport) -> str:
        """The figure's heading."""
        loss = f"loss {formatting.number(report.loss)} over " if math.isfinite(report.loss) else ""
        return f"{self.request.model} on {self.request.data}: {loss}{report.tokens:,} tokens"

    def provenance(self) -> dict[str, Any]:
        """What was measured how: enough to do it again."""
        asked = self.request
        return {
            "sharpwatch": __version__,
            "model": asked.model,
            "data": asked.data,
            "estimators": list(asked.estimators),
            "draws": asked.draws,
            "precision": asked.precision,
            "max_draws": asked.max_draws,
            "method": asked.method,
            "device": self._device,
            "dtype": asked.dtype,
        }
