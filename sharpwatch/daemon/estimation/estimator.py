"""Estimates the windows of all runs in batches, on a device and a thread of their own, off the event loop.

`PROBES` is the daemon's registry of probes. To add a kind of probe, write its decoder in
`sharpwatch.daemon.ingest.probes`, write how its windows are estimated beside those of the others, and list it here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from sharpwatch.daemon.estimation.gnb import GNB
from sharpwatch.daemon.estimation.hessian import DIRECTION, HUTCHINSON, LANCZOS, LINE_SEARCH, PRECONDITIONED
from sharpwatch.daemon.estimation.windows import EstimateRequest, Estimates, ReadingSpec
from sharpwatch.daemon.ingest.probes import GradientNoiseReading
from sharpwatch.errors import SharpwatchError

CAPACITY = (
    1024  # windows that may wait; beyond it the pipeline waits, its queue fills, and the busiest run loses samples
)
_BATCH = 256  # requests in one batch, so that their padded sketches stay below some tens of megabytes


def _gradient_noise(reading: GradientNoiseReading) -> Mapping[str, tuple[float, ...] | None]:
    return {"gradient_noise": None if reading.noise is None else tuple(map(float, reading.noise))}


# In the order in which estimates are shown.
PROBES: dict[str, ReadingSpec] = {
    spec.name: spec
    for spec in (
        GNB,
        DIRECTION,
        HUTCHINSON,
        LANCZOS,
        LINE_SEARCH,
        PRECONDITIONED,
        ReadingSpec(name="gradient_noise", shown=_gradient_noise),
    )
}


def resolve_device(name: str) -> str:
    """Returns the torch device that `name` means here, where "auto" is a GPU if there is one.

    Raises:
        SharpwatchError: The device is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # By using it: a name can be valid where the device is not there. A torch built without CUDA raises
        # AssertionError.
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SharpwatchError(f"device {name!r}: {reason}") from error
    return name


def estimate_all(requests: Sequence[EstimateRequest], device: str) -> list[Estimates]:
    """Estimates all windows of all requests, the windows of one kind of probe in one batch on `device`."""
    found: list[list[Estimates]] = [[] for _ in requests]
    for name, spec in PROBES.items():
        members = [index for index, request in enumerate(requests) if request.windows.get(name)]
        if members and spec.estimate is not None:
            of_probe = spec.estimate([requests[index] for index in members], device)
            for index, estimates in zip(members, of_probe, strict=True):
                found[index].append(estimates)
    return [_combined(each) for each in found]


def _combined(of_probes: Sequence[Estimates]) -> Estimates:
    """The estimates of one run from all its probes; a single kind of probe estimates layers."""
    values = {key: one for estimates in of_probes for key, one in estimates.values.items()}
    layers = next((each for each in of_probes if each.layer_sharpness), Estimates())
    return Estimates(values, layers.layer_sharpness, layers.order_correlation)


class Estimator:
    """Runs the estimates on one thread, with one thread of torch's.

    The matrices have tens of rows. Measured on 2 cores, a second torch thread made the estimates of a run 5 times
    slower on an idle machine (18 ms instead of 3.4), and 10 times slower on a busy one.
    """

    def __init__(self, device: str) -> None:
        self.device = resolve_device(device)
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="estimator", initializer=torch.set_num_threads, initargs=(1,)
        )

    async def estimate(self, requests: Sequence[EstimateRequest]) -> list[Estimates]:
        """Estimates `requests` in their order, in as few batches as memory allows."""
        loop = asyncio.get_running_loop()
        found: list[Estimates] = []
        for first in range(0, len(requests), _BATCH):
            batch = requests[first : first + _BATCH]
            found += await loop.run_in_executor(self._thread, estimate_all, batch, self.device)
        return found

    def close(self) -> None:
        """Finishes the batch that is running."""
        self._thread.shutdown()


@dataclass(frozen=True, slots=True, eq=False)
class QueuedRequest:
    """A request to be estimated; `received_at` is when its newest sample came in, on a monotonic clock."""

    request: EstimateRequest
    received_at: float


class EstimationQueue:
    """Requests that wait to be estimated, so that no sample waits for the estimates of another.

    `estimate` is awaited with all requests that wait, one batch at a time; it must not raise.
    """

    def __init__(
        self, estimate: Callable[[Sequence[QueuedRequest]], Awaitable[None]], capacity: int = CAPACITY
    ) -> None:
        self._estimate = estimate
        self._capacity = capacity
        self._waiting: list[QueuedRequest] = []
        self._task: asyncio.Task[None] | None = None

    def put(self, window: QueuedRequest) -> None:
        """Has `window` estimated in the next batch."""
        self._waiting.append(window)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work(), name="estimates")

    async def room(self) -> None:
        """Waits while the queue is full."""
        if len(self._waiting) >= self._capacity:
            await self.settled()

    async def settled(self) -> None:
        """Waits until the queue is empty and its last batch is estimated."""
        if self._task is not None:
            # Shielded: who gives up waiting must not cancel the estimates of all others.
            await asyncio.shield(self._task)

    async def _work(self) -> None:
        while self._waiting:
            # All that wait, so that the slower the estimates are, the larger and cheaper their batches get.
            batch, self._waiting = self._waiting, []
            await self._estimate(batch)
