"""One measurement, from the request to the report: load, check, run piece by piece, keep the state."""

from __future__ import annotations

import math
import os
import signal
from contextlib import ExitStack, closing
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from sharpwatch._version import __version__
from sharpwatch.blocks import load_rules
from sharpwatch.cli import output
from sharpwatch.cli.measure.command import MeasureRequest
from sharpwatch.cli.measure.data import TextWindows, load_batches
from sharpwatch.cli.measure.display import ProgressDisplay, count_pieces
from sharpwatch.cli.measure.files import StateFile, read_state
from sharpwatch.cli.measure.model import load
from sharpwatch.curvature.measure.measure import Measurement, Progress, Settings
from sharpwatch.curvature.measure.report import SharpnessReport
from sharpwatch.curvature.measure.validation import check_values
from sharpwatch.errors import SharpwatchError

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class DeferredSignals:
    """Defers Ctrl-C and SIGTERM while entered, so that the piece of work in progress is not lost.

    Attributes:
        received: The number of the signal that came, 0 for none. A second signal raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.received = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._receive) for number in _STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a handler's signature
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        # Not print: the handler may interrupt another write to the same stream.
        os.write(2, b"\nsharpwatch measure: stopping after this piece; again to stop at once\n")


class MeasureSession:
    """One `sharpwatch measure`. The constructor loads and checks everything; `run` does the work.

    Args:
        request: The arguments on the command line.

    Raises:
        SharpwatchError: Model, data or options cannot be used, or do not fit together.
    """

    def __init__(self, request: MeasureRequest) -> None:
        self.request = request
        self._last: Progress | None = None
        # State and rules before the model, which can take minutes to load: their errors should show at once.
        kept = None if request.state is None else read_state(request.state)
        rules = None if request.rules is None else load_rules(request.rules)
        loaded = load(request.model, request.device, request.dtype, trust_remote_code=request.trust_remote_code)
        windows = TextWindows(request.rows, request.length, request.batches)
        batches = load_batches(request.data, windows, loaded, request.seed)
        self._device = str(loaded.device)
        settings = Settings(
            request.estimators,
            request.draws,
            request.seed,
            request.precision,
            request.max_draws,
            request.blocks,
            rules,
            method=request.method,
        )
        self._measurement = Measurement(loaded.model, batches, loaded.optimizer, settings)
        # Before the first piece: on a GPU, a token id out of range makes the device unusable for the process.
        check_values(loaded.model, self._measurement.whole_map, batches, f"DATA {request.data}")
        self._file: StateFile | None = None
        if request.state is not None:
            self._file = StateFile(request.state)
            if kept is not None:
                self._file.load(self._measurement, kept)

    @property
    def pieces_done(self) -> int:
        """The number of pieces of work done."""
        return 0 if self._last is None else self._last.done

    def progress(self) -> str:
        """The progress so far, such as `12 of 40 pieces`."""
        return "0 pieces" if self._last is None else count_pieces(self._last)

    def run(self) -> int:
        """Measure, and keep all draws in the state file however this ends.

        Returns:
            The number of the signal that stopped the measurement early, 0 if none did.

        Raises:
            SharpwatchError: The device has too little memory.
        """
        try:
            with (
                DeferredSignals() as signals,
                ProgressDisplay(quiet=self.request.quiet) as display,
                ExitStack() as stack,
            ):
                # Closed at once if left early: until then the model is not as the user's module made it.
                for piece in stack.enter_context(closing(self._measurement.run())):
                    self._last = piece
                    display.show(piece)
                    if self._file is not None:
                        self._file.save_if_due(self._measurement)
                    if signals.received:
                        return signals.received
        except torch.OutOfMemoryError as error:
            less = "use fewer --rows or a shorter --length"
            raise SharpwatchError(f"out of memory on {self._device} after {self.progress()}: {less}") from error
        finally:
            if self._file is not None:
                self._file.save(self._measurement)
        return 0

    def state_note(self) -> str:
        """Where the draws so far are kept, or why they are not."""
        if self._file is None:
            return "not kept: --state FILE was not given"
        if self._file.trouble:
            return f"not kept: {self._file.trouble}"
        return f"kept in {self._file.path}: the same command continues from there"

    def report(self) -> SharpnessReport:
        """The results so far."""
        return self._measurement.report()

    def title(self, report: SharpnessReport) -> str:
        """The title of the figure."""
        loss = f"loss {output.number(report.loss)} over " if math.isfinite(report.loss) else ""
        return f"{self.request.model} on {self.request.data}: {loss}{report.tokens:,} tokens"

    def provenance(self) -> dict[str, Any]:
        """What was measured and how: enough to repeat it."""
        request = self.request
        return {
            "sharpwatch": __version__,
            "model": request.model,
            "data": request.data,
            "estimators": list(request.estimators),
            "draws": request.draws,
            "precision": request.precision,
            "max_draws": request.max_draws,
            "method": request.method,
            "device": self._device,
            "dtype": request.dtype,
        }
