"""Renders `/metrics`: the daemon's own metrics by prometheus_client, those of the runs from texts that are kept.

`families` says what is exported of a run. `RunCollector` gives that to prometheus_client as any collector does;
`Exposition` writes the same lines itself, and only those of sections that have changed since the last scrape.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from sharpwatch.daemon.exporter.families import LAYER_SECTIONS, RUN_LABELS, SECTIONS, Family, Section
from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.daemon.runs.snapshot import RunSnapshot

_LARGEST_PLAIN = 1e6  # from there on Go writes a number otherwise than Python
_LABEL_SETS = 2**16  # whose text is kept; most are of all runs
# Between runs the interpreter is given up, once it was held for so many seconds, and for so long: a shorter pause is
# over before a thread that waits has woken. Not after every run: to get it back from a busy thread takes up to 5 ms.
_HELD, _PAUSE = 0.002, 50e-6


class RunCollector(Collector):
    """Exports each run that is live or was seen less than `stale_after` seconds ago (`RunSnapshot.exported`).

    Measurements that are too old (`RunSnapshot.without_stale`) are left out. `snapshots` may be called on any thread;
    `now` is unix seconds.
    """

    def __init__(
        self,
        snapshots: Callable[[], Iterable[RunSnapshot]],
        now: Callable[[], float],
        *,
        stale_after: float,
        layers: bool = True,
    ) -> None:
        self._snapshots = snapshots
        self._now = now
        self._stale_after = stale_after
        self.sections = (*SECTIONS, *(LAYER_SECTIONS if layers else ()))

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names depend on no run, and the registry need not collect to know them."""
        return ()

    def shown(self) -> list[RunSnapshot]:
        """The runs that are exported now, in their order; they still have what is too old."""
        oldest = self._now() - self._stale_after
        shown = [shown for each in self._snapshots() if (shown := each.exported(oldest)) is not None]
        return sorted(shown, key=lambda each: (each.hello.training_job, each.hello.run))

    def collect(self) -> Iterator[Metric]:
        """One family after another, each over all runs."""
        snapshots = [snapshot.without_stale() for snapshot in self.shown()]
        for section in self.sections:
            metrics = {family: family.metric() for family in section.families}
            for snapshot in snapshots:
                of_run = (snapshot.hello.training_job, snapshot.hello.run)
                for family, labels, value in section.rows(snapshot):
                    names = (*RUN_LABELS, *family.labels)
                    labelled = dict(zip(names, (*of_run, *labels), strict=True))
                    metrics[family].add_sample(family.sample, labelled, float(value))
            yield from metrics.values()


class Exposition:
    """Renders the body of `/metrics`. Safe on any thread; a scrape waits for another that is under way.

    Args:
        own: The daemon's own metrics.
        runs: The metrics of the runs.
    """

    def __init__(self, own: CollectorRegistry, runs: RunCollector) -> None:
        self._own = own
        self._runs = runs
        self._texts: dict[str, _RunText] = {}  # by run, of those that the last scrape has shown
        self._lock = threading.Lock()

    def render(self, accept: str) -> tuple[bytes, str]:
        """Renders the metrics.

        Args:
            accept: The request's Accept header, by which Prometheus asks for a format.

        Returns:
            The body and its content type.
        """
        try:
            encoder, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # prometheus_client raises these for a version that is no number
            encoder, content_type = choose_encoder("")
        end = encoder(_Families(()))
        if not _writes_as_here(encoder, end):
            return encoder(_Families((*self._own.collect(), *self._runs.collect()))), content_type
        parts = [encoder(self._own).removesuffix(end)]
        with self._lock:
            self._renew()
            for family in (family for section in self._runs.sections for family in section.families):
                parts.append(encoder(_Families((family.metric(),))).removesuffix(end))
                parts += [text.lines[family] for text in self._texts.values() if family in text.lines]
        return b"".join((*parts, end)), content_type

    def _renew(self) -> None:
        if _around_run.cache_info().currsize > _LABEL_SETS:
            _around_run.cache_clear()
        renewed, since = {}, time.perf_counter()
        for snapshot in self._runs.shown():
            hello = snapshot.hello
            text = self._texts.get(hello.run)
            if text is None or text.hello is not hello:
                text = _RunText(hello)
            text.renew(self._runs.sections, snapshot)
            if time.perf_counter() - since > _HELD:
                time.sleep(_PAUSE)
                since = time.perf_counter()
            renewed[hello.run] = text
        self._texts = renewed


class _Families:
    """What encoders need of a registry."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class _RunText:
    """The lines of one run by family, and the values that they were made from; it begins anew with another Hello."""

    def __init__(self, hello: RunHello) -> None:
        self.hello = hello
        self.lines: dict[Family, bytes] = {}
        self._run, self._job = _escaped(hello.run), _escaped(hello.training_job)
        self._snapshot: RunSnapshot | None = None
        self._seen: dict[Section, tuple[Any, ...]] = {}

    def renew(self, sections: Iterable[Section], snapshot: RunSnapshot) -> None:
        """Writes the lines of sections that have changed."""
        if snapshot is self._snapshot:
            return
        self._snapshot, shown = snapshot, snapshot.without_stale()
        for section in sections:
            fields = tuple(getattr(shown, name) for name in section.fields)
            before = self._seen.get(section)
            if before is None or not all(map(_is_same, before, fields)):
                self._seen[section] = fields
                self._write(section, shown)

    def _write(self, section: Section, snapshot: RunSnapshot) -> None:
        run, job = self._run, self._job
        lines: dict[Family, list[str]] = {family: [] for family in section.families}
        for family, labels, value in section.rows(snapshot):
            head, middle, tail = _around_run(family, labels)
            # Here and not by a function: this is run for every line.
            number = repr(float(value)) if -_LARGEST_PLAIN < value < _LARGEST_PLAIN else _as_go_writes(value)
            lines[family].append(f"{head}{run}{middle}{job}{tail}{number}\n")
        for family, own in lines.items():
            if own:
                self.lines[family] = "".join(own).encode()
            else:
                self.lines.pop(family, None)


def _is_same(before: Any, after: Any) -> bool:
    """Whether two values of a field are surely the same; of what is large, only whether it is one object."""
    return before is after or (isinstance(before, int | float | str | dict) and bool(before == after))


@cache
def _around_run(family: Family, labels: tuple[str, ...]) -> tuple[str, str, str]:
    """The line of a sample, without its value: what stands before, between and after run and training_job.

    These are of one run, while the rest is nearly always of many.
    """
    named = sorted(zip(family.labels, labels, strict=True))
    pairs = [(name, f'{name}="{_escaped(value)}"') for name, value in named]
    before = "".join(f"{pair}," for name, pair in pairs if name < "run")
    between = "".join(f"{pair}," for name, pair in pairs if "run" < name < "training_job")
    after = "".join(f",{pair}" for name, pair in pairs if name > "training_job")
    return f'{family.sample}{{{before}run="', f'",{between}training_job="', f'"{after}}} '


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _as_go_writes(value: float) -> str:
    written: str = floatToGoString(value)  # type: ignore[no-untyped-call]
    return written


_EXAMPLE = Family("counter", "sharpwatch_example", "", ("label",))


def _writes_as_here(encoder: Callable[[Any], bytes], end: bytes) -> bool:
    """Whether an encoder writes a sample as `_RunText` does: a client may ask for names that are escaped."""
    metric = _EXAMPLE.metric()
    metric.add_sample(_EXAMPLE.sample, {"training_job": "job", "run": "run", "label": "é\n"}, 1.5)
    head, middle, tail = _around_run(_EXAMPLE, ("é\n",))
    line = f"{head}run{middle}job{tail}1.5\n"
    return encoder(_Families((metric,))).removesuffix(end).endswith(b"\n" + line.encode())
