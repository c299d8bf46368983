"""What the daemon takes: python -m benchmarks.load [growth|tilt|place|hostile|fuzz] ...

    python -m benchmarks.load growth --runs 10 100 1000 --out growth.jsonl --plot growth.svg
    python -m benchmarks.load tilt --rounds 5 --out tilt.jsonl
    python -m benchmarks.load place --runs 100000 --shards 256
    python -m benchmarks.load hostile --rounds 2 --out hostile.jsonl
    python -m benchmarks.load fuzz --messages 100000 --seed 0

`growth`: agents that send a sample a second, with a `gnb` probe at every tenth, while `/metrics` is scraped every 15 s;
beside each size the same agents on a bare gRPC server, whose latencies are those of agents, network and gRPC alone.
`tilt`: as fast as acknowledgements allow, taps alone and `gnb` probes alone, the daemon and the bare server in turn;
the ratio is that of bytes a second of processor time. `hostile`: 20 honest runs beside a client that floods the daemon
in each way of `benchmarks.load.floods`, without and with a token. `fuzz`: the same beside one that sends damaged
messages, calls and requests, and what became of the daemon. All but `fuzz` print a table; lines of JSON go to `--out`.
`place`: how runs fall on the shards of several daemons, and what each carries by what `growth` measured of one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.load.floods import FLOODS
from benchmarks.load.fuzz import fuzz
from benchmarks.load.hostile import hostile
from benchmarks.load.place import place
from benchmarks.load.servers import ROOT, Server, bare, daemon, latency, load

_SCRAPE_EVERY = 15.0
_WINDOW = 64  # samples without an acknowledgement that an agent at full tilt may have
_COLUMNS = (
    ("runs", "runs", "{:.0f}"),
    ("samples/s", "rate", "{:.0f}"),
    ("ack p50 ms", "p50_ms", "{:.1f}"),
    ("p99", "p99_ms", "{:.1f}"),
    ("bare p50", "bare_p50_ms", "{:.1f}"),
    ("bare p99", "bare_p99_ms", "{:.1f}"),
    ("metric p50 ms", "metric_p50_ms", "{:.1f}"),
    ("p99", "metric_p99_ms", "{:.1f}"),
    ("CPU ms/sample", "cpu_ms", "{:.3f}"),
    ("bare", "bare_cpu_ms", "{:.3f}"),
    ("KiB/run", "memory_kib", "{:.0f}"),
    ("more while measured", "grown_kib", "{:.0f}"),
    ("scrape s", "scrape_s", "{:.2f}"),
    ("disk B/sample", "disk_bytes", "{:.0f}"),
    ("written B/sample", "written_bytes", "{:.0f}"),
    ("refused", "refused", "{:.0f}"),
)

_FLOODED = (
    ("flood", "flood", "{}"),
    ("token", "shows", "{}"),
    ("quiet p50 ms", "quiet_p50_ms", "{:.1f}"),
    ("p99", "quiet_p99_ms", "{:.0f}"),
    ("flooded p50 ms", "flood_p50_ms", "{:.1f}"),
    ("p99", "flood_p99_ms", "{:.0f}"),
    ("worst", "worst_ms", "{:.0f}"),
    ("cost at p99 ms", "cost_ms", "{:.0f}"),
    ("samples", "samples", "{}"),
    ("lost", "lost", "{}"),
    ("alerts missing", "missing", "{}"),
    ("a new agent's Welcome ms", "hello_ms", "{:.0f}"),
    ("CPU quiet", "quiet_cpu", "{:.2f}"),
    ("flooded", "flood_cpu", "{:.2f}"),
    ("memory MB", "memory_mb", "{:+.0f}"),
    ("log kB", "log_kb", "{:.0f}"),
)


class Watched:
    """A server while it is loaded: its figures when measuring begins and ends, and scrapes in between.

    Args:
        server: The server.
        scrapes: Whether it is scraped.
    """

    def __init__(self, server: Server, *, scrapes: bool) -> None:
        self._server = server
        self._scrapes = scrapes
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._scrape, daemon=True)
        self.began: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.seconds: list[float] = []  # of each scrape
        self.metrics = ["", ""]  # the first and the last text

    def at(self, event: str) -> None:
        """Takes the figures."""
        if event == "measuring":
            self.began = self._figures()
            if self._scrapes:
                self.metrics[0] = self._server.scrape()[1]
                self._thread.start()
        elif event == "measured":
            self.ended = self._figures()
            self._over.set()
            if self._scrapes:
                self._thread.join()
                self.metrics[1] = self._server.scrape()[1]

    def passed(self, name: str) -> float:
        """How much a figure has risen while measuring."""
        return self.ended[name] - self.began[name]

    def _figures(self) -> dict[str, float]:
        of = self._server
        return {"processor": of.processor, "written": of.written, "stored": of.stored, "memory": of.memory}

    def _scrape(self) -> None:
        while not self._over.wait(_SCRAPE_EVERY):
            self.seconds.append(self._server.scrape()[0])


def growth(given: argparse.Namespace, runs: int) -> dict[str, Any]:
    """The figures at a number of runs that send a sample every `--interval` seconds."""
    arguments = [f"--runs={runs}", f"--interval={given.interval}", f"--every={given.every}"]
    arguments += [f"--warm={given.warm}", f"--seconds={given.seconds}"]
    with daemon(given.checkout) as server:
        server.scrape()
        idle = server.memory
        watched = Watched(server, scrapes=True)
        seen = load(server, arguments, watched.at)
    with bare() as server:
        watched_bare = Watched(server, scrapes=False)
        seen_bare = load(server, [*arguments, f"--seconds={given.bare_seconds or given.seconds}"], watched_bare.at)
    metric = latency(*watched.metrics)
    samples = max(1, seen["acknowledged"])
    return {
        "runs": runs,
        "interval": given.interval,
        "seconds": seen["seconds"],
        "rate": samples / seen["seconds"],
        "p50_ms": 1e3 * seen["p50"],
        "p99_ms": 1e3 * seen["p99"],
        "bare_p50_ms": 1e3 * seen_bare["p50"],
        "bare_p99_ms": 1e3 * seen_bare["p99"],
        "metric_p50_ms": 1e3 * metric[0],
        "metric_p99_ms": 1e3 * metric[1],
        "cpu_ms": 1e3 * watched.passed("processor") / samples,
        "bare_cpu_ms": 1e3 * watched_bare.passed("processor") / max(1, seen_bare["acknowledged"]),
        "agents_cpu_ms": 1e3 * seen["processor"] / samples,
        "memory_kib": (watched.ended["memory"] - idle) / runs / 1024,
        "grown_kib": watched.passed("memory") / runs / 1024,
        "scrape_s": statistics.median(watched.seconds) if watched.seconds else float("nan"),
        "scrape_worst_s": max(watched.seconds, default=float("nan")),
        "scrape_bytes": len(watched.metrics[1]),
        "sample_bytes": seen["bytes"] / samples,
        "disk_bytes": watched.passed("stored") / samples,
        "written_bytes": watched.passed("written") / samples,
        "refused": seen["refused"],
    }


def tilt(given: argparse.Namespace, kind: str, number: int, servers: Mapping[str, Server]) -> dict[str, Any]:
    """One round at full tilt of both servers, one after the other."""
    figures: dict[str, Any] = {"kind": kind, "round": number}
    for name, server in servers.items():
        watched = Watched(server, scrapes=False)
        arguments = [f"--name={kind}{number}", f"--runs={given.runs}", f"--window={_WINDOW}", f"--warm={given.warm}"]
        arguments += [f"--every={1 if kind == 'gnb' else 0}", f"--seconds={given.seconds}"]
        seen = load(server, arguments, watched.at)
        processor, samples = watched.passed("processor"), max(1, seen["acknowledged"])
        figures |= {
            f"{name}_samples_s": samples / seen["seconds"],
            f"{name}_cpu_ms": 1e3 * processor / samples,
            f"{name}_bytes_cpu_s": seen["bytes"] / processor,
            f"{name}_busy": processor / seen["seconds"],
            f"{name}_refused": seen["refused"],
        }
    return figures | {"ratio": figures["daemon_bytes_cpu_s"] / figures["bare_bytes_cpu_s"]}


def _print_table(columns: Sequence[tuple[str, str, str]], found: Sequence[Mapping[str, Any]]) -> None:
    print("| " + " | ".join(title for title, _, _ in columns) + " |")
    print("|" + "---|" * len(columns))
    for each in found:
        print("| " + " | ".join(form.format(each[name]) for _, name, form in columns) + " |")


def _print_tilt(found: Sequence[Mapping[str, Any]]) -> None:
    print("| sample | rounds | daemon: samples/s | CPU ms | bare: samples/s | CPU ms | bytes a CPU second, ratio |")
    print("|---|---|---|---|---|---|---|")
    for kind in dict.fromkeys(each["kind"] for each in found):
        rounds = [each for each in found if each["kind"] == kind]
        middle = {name: statistics.median(each[name] for each in rounds) for name in rounds[0] if name != "kind"}
        ratios = [each["ratio"] for each in rounds]
        print(
            f"| {kind} | {len(rounds)} | {middle['daemon_samples_s']:.0f} | {middle['daemon_cpu_ms']:.3f} "
            f"| {middle['bare_samples_s']:.0f} | {middle['bare_cpu_ms']:.3f} "
            f"| {middle['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |"
        )


def _plot(found: Sequence[Mapping[str, Any]], picture: Path) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415  only where a picture is asked for

    figure = Figure(figsize=(9, 5), layout="constrained")
    drawn = (
        ("latency, ms", ("p50_ms", "p99_ms", "bare_p50_ms", "bare_p99_ms", "metric_p50_ms", "metric_p99_ms")),
        ("processor ms a sample", ("cpu_ms", "bare_cpu_ms")),
        ("memory a run, KiB", ("memory_kib",)),
        ("scrape, s", ("scrape_s", "scrape_worst_s")),
    )
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, drawn, strict=True):
        for name in names:
            axes.plot([each["runs"] for each in found], [each[name] for each in found], marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="runs", title=title)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize="small")
    figure.savefig(picture)


def _keep(out: Path | None, figures: Mapping[str, Any]) -> None:
    line = json.dumps({name: round(value, 6) if isinstance(value, float) else value for name, value in figures.items()})
    print(line, flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    made = {name: what.add_parser(name) for name in _MEASURED}
    for one in made.values():
        one.add_argument("--checkout", type=Path, default=ROOT, help="the checkout whose daemon is measured")
        one.add_argument("--out", type=Path, help="a file that lines of JSON are appended to")
    one = made["growth"]
    one.add_argument("--runs", type=int, nargs="+", default=[10, 100, 1000])
    one.add_argument("--interval", type=float, default=1.0, help="seconds between two samples of a run")
    one.add_argument("--every", type=int, default=10, help="samples between two gnb probes")
    one.add_argument("--plot", type=Path, help="a picture of the growth")
    one.add_argument("--warm", type=float, default=100.0, help="seconds before; windows have eight probes")
    one.add_argument("--seconds", type=float, default=120.0)
    one.add_argument("--bare-seconds", type=float, help="of the bare server; as many by default")
    one = made["tilt"]
    one.add_argument("--runs", type=int, default=10)
    one.add_argument("--kinds", nargs="+", choices=("tap", "gnb"), default=["tap", "gnb"])
    one.add_argument("--rounds", type=int, default=5)
    one.add_argument("--warm", type=float, default=3.0)
    one.add_argument("--seconds", type=float, default=10.0)
    one = made["hostile"]
    one.add_argument("--kinds", nargs="+", choices=FLOODS, default=list(FLOODS))
    one.add_argument("--shows", nargs="+", choices=("none", "token"), default=["none", "token"])
    one.add_argument("--rounds", type=int, default=1, help="quiet and flooded times of each kind")
    one.add_argument("--quiet", type=float, default=15.0, help="seconds before each flood")
    one.add_argument("--seconds", type=float, default=15.0, help="of each flood")
    one = made["place"]
    one.add_argument("--runs", type=int, default=100_000)
    one.add_argument("--shards", type=int, nargs="+", default=[16, 128, 256])
    one.add_argument("--interval", type=float, default=1.0, help="seconds between two samples of a run")
    one = made["fuzz"]
    one.add_argument("--messages", type=int, default=100_000)
    one.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def _all_growth(given: argparse.Namespace) -> None:
    found = []
    for runs in given.runs:
        found.append(growth(given, runs))
        _keep(given.out, found[-1])
    _print_table(_COLUMNS, found)
    if given.plot is not None:
        _plot(found, given.plot)


def _all_tilt(given: argparse.Namespace) -> None:
    found = []
    with daemon(given.checkout) as real, bare() as beside:
        for number in range(given.rounds):
            for kind in given.kinds:
                found.append(tilt(given, kind, number, {"bare": beside, "daemon": real}))
                _keep(given.out, found[-1])
    _print_tilt(found)


def _all_hostile(given: argparse.Namespace) -> None:
    _print_table(_FLOODED, asyncio.run(hostile(given, lambda figures: _keep(given.out, figures))))


def _place(given: argparse.Namespace) -> None:
    for shards in given.shards:
        _keep(given.out, place(given.runs, shards, given.interval))


def _fuzz(given: argparse.Namespace) -> None:
    _keep(given.out, asyncio.run(fuzz(given)))


_MEASURED = {"growth": _all_growth, "tilt": _all_tilt, "place": _place, "hostile": _all_hostile, "fuzz": _fuzz}


def main(arguments: Sequence[str]) -> int:
    """Measure, and print."""
    given = _arguments(arguments)
    began = time.monotonic()
    _MEASURED[given.what](given)
    print(f"{time.monotonic() - began:.0f} s in all", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
