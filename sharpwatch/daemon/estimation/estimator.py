"""Estimates the windows of all runs in batches, on a device and a thread of their own, off the event loop.

`PROBES` is the daemon's registry of probes. To add a kind of probe, write its decoder in
`sharpwatch.daemon.ingest.probes`, write how its windows are estimated beside those of the others, and list it here.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import itemgetter

import torch

from sharpwatch.daemon.estimation.gnb import GNB
from sharpwatch.daemon.estimation.hessian import DIRECTION, HUTCHINSON, LANCZOS, LINE_SEARCH, PRECONDITIONED
from sharpwatch.daemon.estimation.windows import BatchShape, EstimateRequest, Estimates, ReadingSpec
from sharpwatch.daemon.ingest.probes import GradientNoiseReading
from sharpwatch.errors import SharpwatchError

_BATCH = 256  # windows in one batch
BATCH_BYTES = 32 * 2**20  # of the tensors that the windows of a batch are put into; torch takes some times as much
HEAVY_BYTES = 4 * 2**20  # of the tensors of one run, whose estimates then take tenths of a second
_REMEMBERED = 10_000  # windows that failed


def _gradient_noise(reading: GradientNoiseReading) -> Mapping[str, tuple[float, ...] | None]:
    return {"gradient_noise": None if reading.noise is None else tuple(map(float, reading.noise))}


_NO_TENSOR = BatchShape(0, 0, 0, 0, 0)  # of a window that is estimated by itself

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
    failures = {probe: error for estimates in of_probes for probe, error in estimates.failures.items()}
    return Estimates(values, layers.layer_sharpness, layers.order_correlation, failures)


def one_turn(requests: Sequence[EstimateRequest]) -> tuple[list[EstimateRequest], list[EstimateRequest]]:
    """Divides requests into those that are estimated now and those that wait on.

    Of heavy ones only the first is estimated now, so that the others wait for one of them at most.
    """
    now: list[EstimateRequest] = []
    later: list[EstimateRequest] = []
    has_heavy = False
    for request in requests:
        is_heavy = _is_heavy(request)
        (later if is_heavy and has_heavy else now).append(request)
        has_heavy = has_heavy or is_heavy
    return now, later


def _is_heavy(request: EstimateRequest) -> bool:
    shapes = (of(request) for probe in request.windows if (of := PROBES[probe].shape) is not None)
    return any(shape.nbytes > HEAVY_BYTES for shape in shapes)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One window of a request, as a request of its own; `number` is that of the request."""

    number: int
    probe: str
    request: EstimateRequest

    @property
    def name(self) -> tuple[str, str]:
        return self.request.hello.run, self.probe


def batches(requests: Sequence[EstimateRequest], apart: Collection[tuple[str, str]] = ()) -> list[list[_Part]]:
    """Divides the windows of all requests into batches, the smallest first.

    A batch has windows of one kind of probe, of one size of sketches and of one number of draws, so that none is padded
    to the draws of another, and at most `BATCH_BYTES`.

    Args:
        requests: The requests.
        apart: Run and probe of windows that are not put into one batch with others.
    """
    groups: dict[Hashable, list[tuple[BatchShape, _Part]]] = {}
    for number, request in enumerate(requests):
        for probe, window in request.windows.items():
            part = _Part(number, probe, replace(request, windows={probe: window}))
            of = PROBES[probe].shape
            shape = _NO_TENSOR if of is None else of(part.request)
            alone = number if part.name in apart else None
            groups.setdefault((probe, shape.size, shape.draws, alone), []).append((shape, part))
    cut = chain.from_iterable(map(_cut, groups.values()))
    return [batch for _, batch in sorted(cut, key=itemgetter(0))]


def _cut(group: list[tuple[BatchShape, _Part]]) -> Iterator[tuple[int, list[_Part]]]:
    """Cuts a group into batches, each with its bytes; windows of as many probes come together."""
    batch: list[_Part] = []
    whole = _NO_TENSOR
    for shape, part in sorted(group, key=lambda each: each[0].probes):
        joined = whole.joined(shape) if batch else shape
        if batch and (joined.nbytes > BATCH_BYTES or len(batch) >= _BATCH):
            yield whole.nbytes, batch
            batch, joined = [], shape
        batch.append(part)
        whole = joined
    yield whole.nbytes, batch


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
        self._failing: set[tuple[str, str]] = set()  # run and probe of windows that failed when they last came

    async def estimate(self, requests: Sequence[EstimateRequest]) -> AsyncIterator[tuple[EstimateRequest, Estimates]]:
        """Estimates `requests`; yields each with its estimates once all its windows are done, cheap ones first.

        A window that can't be estimated is among the `failures` of its own estimates, and harms no other.
        """
        left = Counter({number: len(request.windows) for number, request in enumerate(requests)})
        found: dict[int, list[Estimates]] = {number: [] for number in left}
        for batch in batches(requests, self._failing):
            for part, estimates in await self._of_batch(batch):
                self._note(part, estimates)
                found[part.number].append(estimates)
                left[part.number] -= 1
                if not left[part.number]:
                    yield requests[part.number], _combined(found.pop(part.number))

    async def _of_batch(self, batch: list[_Part]) -> list[tuple[_Part, Estimates]]:
        """Estimates a batch; where that fails, its halves, until a window that fails is alone."""
        requests = [part.request for part in batch]
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._thread, estimate_all, requests, self.device)
        except Exception as error:  # noqa: BLE001 - the pipeline counts it, and goes on
            if len(batch) == 1:
                return [(batch[0], Estimates(failures={batch[0].probe: error}))]
            half = len(batch) // 2
            return [*await self._of_batch(batch[:half]), *await self._of_batch(batch[half:])]
        return list(zip(batch, found, strict=True))

    def _note(self, part: _Part, estimates: Estimates) -> None:
        """Remembers which windows fail, so that they are estimated alone from then on, and no batch twice for them."""
        if not estimates.failures:
            self._failing.discard(part.name)
        elif len(self._failing) < _REMEMBERED:
            self._failing.add(part.name)

    def close(self) -> None:
        """Finishes the batch that is running."""
        self._thread.shutdown()


@dataclass(slots=True, eq=False)
class Waiting:
    """What of a run waits to be estimated: its windows of these probes, and when their samples came in."""

    probes: set[str] = field(default_factory=set)
    received_at: list[float] = field(default_factory=list)  # monotonic seconds

    def add(self, probes: Iterable[str], received_at: Iterable[float]) -> None:
        """Adds windows, and the times of their samples."""
        self.probes.update(probes)
        self.received_at.extend(received_at)


class EstimationQueue:
    """Runs whose windows wait to be estimated. Each is in it once at most, so that no run can fill it.

    Its windows are taken when its turn comes. They have all readings that have come in until then, so that a run
    which sends more probes than can be estimated only gets fewer estimates, each of its newest window.

    Args:
        estimate: Awaited with all that wait, by run, those that have waited longest first. It returns the names of runs
            that wait on, and must not raise.
    """

    def __init__(self, estimate: Callable[[Mapping[str, Waiting]], Awaitable[Collection[str]]]) -> None:
        self._estimate = estimate
        self._waiting: dict[str, Waiting] = {}
        self._task: asyncio.Task[None] | None = None

    def put(self, run: str, probes: Iterable[str], received_at: float) -> None:
        """Has the windows of `probes` estimated in the next batch."""
        self._waiting.setdefault(run, Waiting()).add(probes, [received_at])
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work(), name="estimates")

    async def settled(self) -> None:
        """Waits until the queue is empty and its last batch is estimated."""
        if self._task is not None:
            # Shielded: who gives up waiting must not cancel the estimates of all others.
            await asyncio.shield(self._task)

    async def _work(self) -> None:
        while self._waiting:
            # All that wait, so that the slower the estimates are, the larger and cheaper their batches get.
            batch, self._waiting = self._waiting, {}
            left = await self._estimate(batch)
            came, self._waiting = self._waiting, {name: batch[name] for name in batch if name in left}
            for name, waiting in came.items():
                self._waiting.setdefault(name, Waiting()).add(waiting.probes, waiting.received_at)
