"""What survives: python -m benchmarks.chaos [SCENARIO ...] [--store sqlite|postgresql] [--seed N].

A real daemon, in a process of its own, is disturbed while simulated agents send samples and answer commands, and an
operator changes learning rates and modes. In the end the journal is compared with what they know to be acknowledged:
nothing of it may be lost, or there twice. One row of a table each; the exit status is 1 where something was.

`full-disk` and `read-only` mount a file system of their own, for which they must be root. PostgreSQL's programs
must be installed. No scenario touches the machine's own clock or disks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from benchmarks.chaos.clients import PATIENCE, Agent, Asked, Operator, bodies
from benchmarks.chaos.machine import Daemon, Disk, Tls, make_disk, make_store, rows
from benchmarks.chaos.scenarios import SCENARIOS, Links, Place, Scenario

_RUNS = 6
_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))  # a connection for each channel


@dataclass
class Verdict:
    """What was lost, and what was doubled, in words; and how much was acknowledged."""

    samples: int = 0
    changes: int = 0
    lost_samples: list[str] = field(default_factory=list)
    doubled_samples: list[str] = field(default_factory=list)
    lost_changes: list[str] = field(default_factory=list)
    doubled_changes: list[str] = field(default_factory=list)

    @property
    def complaints(self) -> Iterator[str]:
        """All of it."""
        for name in ("lost_samples", "doubled_samples", "lost_changes", "doubled_changes"):
            yield from (f"{name.replace('_', ' ')}: {each}" for each in getattr(self, name))


def judge_samples(verdict: Verdict, agents: Sequence[Agent], url: str) -> None:
    """Compares the journal's samples with those that agents have sent, byte by byte."""
    found: dict[str, list[tuple[int, int]]] = {agent.attempt: [] for agent in agents}
    for attempt, sequence, payload in rows(url, "SELECT attempt, sequence, payload FROM samples"):
        found[attempt].append((sequence, zlib.crc32(payload)))
    for agent in agents:
        log, there = agent.log, dict(found[agent.attempt])
        acknowledged = set(range(1, log.acknowledged + 1)) - log.refused
        verdict.samples += len(acknowledged)
        verdict.lost_samples += [
            f"{agent.attempt} {each}" for each in acknowledged if there.get(each) != log.sums[each]
        ] + [f"{agent.attempt}: {log.forgotten} at a Welcome"] * bool(log.forgotten)
        if len(log.sums) > log.acknowledged + sum(each > log.acknowledged for each in log.refused):
            verdict.lost_samples.append(f"{agent.attempt}: no acknowledgement of the last ones in {PATIENCE} s")
        counts = Counter(sequence for sequence, _ in found[agent.attempt])
        verdict.doubled_samples += [f"{agent.attempt} {each}" for each, count in counts.items() if count > 1]


def judge_changes(verdict: Verdict, operator: Operator, agents: Sequence[Agent], url: str) -> None:
    """Compares the journal's modes, decisions and revisions with what operator and agents know."""
    decisions = [json.loads(record) for (record,) in rows(url, "SELECT record FROM decisions")]
    revisions = [json.loads(record) for (record,) in rows(url, "SELECT record FROM revisions")]
    by_reason = {each["reason"]: each for each in decisions}
    by_decision = {each["decision_id"]: each for each in revisions}
    modes = [reason for (reason,) in rows(url, "SELECT reason FROM modes")]
    written = Counter([*modes, *(each["reason"] for each in decisions if each["author"] == "operator")])
    verdict.doubled_changes += [f"{reason} is there {count} times" for reason, count in written.items() if count > 1]
    entered = Counter(rows(url, "SELECT decision, outcome FROM transitions"))
    verdict.doubled_changes += [f"transition {each}, {count} times" for each, count in entered.items() if count > 1]
    for reason, asked in operator.asked.items():
        if not asked.acknowledged:
            continue
        verdict.changes += 1
        if reason not in written:
            verdict.lost_changes.append(f"{reason} is not in the journal")
        elif asked.decision is not None:
            verdict.lost_changes += _missing(asked, by_reason[reason], by_decision)
    answered = {name: (agent, answer) for agent in agents for name, answer in agent.log.answers.items()}
    unknown = answered.keys() - {made["id"] for made in decisions}
    verdict.lost_changes += [f"{each}, whose command an agent has had, is not in the journal" for each in unknown]
    for made in decisions:
        agent, answer = answered.get(made["id"], (None, None))
        if agent is None or answer is None:
            verdict.lost_changes.append(f"no agent has had the command of {made['id']}, {made['reason']}")
            continue
        verdict.changes += agent.log.answered(answer)
        if (made["outcome"], made["applied_step"]) != ("applied", answer.step):
            found = f"{made['outcome']} at step {made['applied_step']}: {made['detail']}"
            verdict.lost_changes.append(f"{made['id']} was applied at step {answer.step}, the journal has {found}")
        elif by_decision.get(made["id"], {}).get("applied_step") != answer.step:
            verdict.lost_changes.append(f"the revision of {made['id']} does not have its step {answer.step}")
    for agent in agents:
        verdict.doubled_changes += [f"{each} came again after its answer" for each in agent.log.repeated]


def _missing(asked: Asked, made: Mapping[str, object], by_decision: Mapping[str, Mapping[str, object]]) -> list[str]:
    """What the journal does not have as the operator was told."""
    told = asked.decision
    assert told is not None
    revision = by_decision.get(told.id, {})
    if made["id"] != told.id:
        return [f"{told.id} has become {made['id']}"]
    if (revision.get("revision"), revision.get("multipliers")) != (told.revision, dict(told.multipliers)):
        return [f"revision {told.revision} of {told.run} is {revision}"]
    return []


@contextmanager
def mounted(kind: str, folder: Path) -> Iterator[Disk]:
    """A small disk for a store of that kind."""
    disk = make_disk(kind, folder)
    try:
        yield disk
    finally:
        disk.unmount()


async def survive(scenario: Scenario, kind: str, seed: int, folder: Path) -> tuple[Verdict, Place, int]:
    """Runs one scenario; returns what was found, and how often the daemon was disturbed."""
    randomness = random.Random(seed)  # noqa: S311  no secret
    tls = Tls(folder) if scenario.has_tls else None
    with ExitStack() as stack:
        disk = stack.enter_context(mounted(kind, folder)) if scenario.has_disk else None
        (folder / "store").mkdir()
        store = make_store(kind, folder / "store" if disk is None else disk.folder)
        daemon = Daemon(folder, store.url, tls, has_clock=scenario.has_clock)
        links = Links(daemon.grpc, randomness) if scenario.has_links else None
        if links is not None:
            await links.open()

        def connect() -> grpc.aio.Channel:
            if tls is not None:
                return grpc.aio.secure_channel(daemon.grpc, tls.trusted(), options=_OPTIONS)
            return grpc.aio.insecure_channel(daemon.grpc if links is None else links.address, options=_OPTIONS)

        samples = bodies()
        agents = [Agent(f"run-{n}", connect, samples, random.Random(seed + n)) for n in range(_RUNS)]  # noqa: S311
        place = Place(daemon, store, disk, links, agents, tls, randomness)
        await daemon.start()
        operator = Operator(connect, daemon.token, [each.run_name for each in agents], random.Random(seed))  # noqa: S311
        try:
            disturbed = await _disturbed(scenario, place, operator)
            assert await daemon.stop() == 0
            verdict = Verdict()
            judge_samples(verdict, agents, store.url)
            judge_changes(verdict, operator, agents, store.url)
        finally:
            await daemon.kill()
            if links is not None:
                await links.close()
            await store.stop("immediate")
    return verdict, place, disturbed


async def _disturbed(scenario: Scenario, place: Place, operator: Operator) -> int:
    asked_enough, trained_enough = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for agent in place.agents:
            tasks.create_task(agent.train(trained_enough))
        asking = tasks.create_task(operator.work(asked_enough))
        await place.pause(1.0, 2.0)
        disturbed = await scenario.disturb(place)
        asked_enough.set()
        await asking
        for _ in range(int(PATIENCE)):
            if not await operator.under_way():
                break
            await asyncio.sleep(1.0)
        trained_enough.set()
    return disturbed


def _print(name: str, kind: str, verdict: Verdict, place: Place, disturbed: int) -> None:
    wait = max(each.log.longest_wait for each in place.agents)
    counts = [disturbed, verdict.samples, len(verdict.lost_samples), len(verdict.doubled_samples)]
    counts += [verdict.changes, len(verdict.lost_changes), len(verdict.doubled_changes)]
    print(f"| {name} | {kind} | " + " | ".join(f"{each:,}" for each in counts) + f" | {wait:.1f} |", flush=True)
    for complaint in verdict.complaints:
        print(f"  {complaint}", file=sys.stderr)
    if place.daemon.errors:
        print(f"  the daemon's errors: {dict(place.daemon.errors)}", file=sys.stderr)


def main(arguments: Sequence[str]) -> int:
    """Run the scenarios, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--store", choices=("sqlite", "postgresql"), help="default: both")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if unknown := set(given.scenarios) - set(SCENARIOS):
        parser.error(f"no scenario {min(unknown)!r}; there are: {', '.join(SCENARIOS)}")
    print("| scenario | store | disturbances | samples acknowledged | lost | doubled ", end="")
    print("| changes and answers acknowledged | lost | doubled | longest wait, s |")
    print("|" + "---|" * 10, flush=True)
    complaints = 0
    for name in given.scenarios or SCENARIOS:
        for kind in SCENARIOS[name].stores:
            if given.store not in (None, kind):
                continue
            with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
                Path(folder).chmod(0o755)  # PostgreSQL has a user of its own
                verdict, place, disturbed = asyncio.run(survive(SCENARIOS[name], kind, given.seed, Path(folder)))
            _print(name, kind, verdict, place, disturbed)
            complaints += len(list(verdict.complaints))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
