"""What is done to the daemon while it is written to: one function a scenario, each returns how often it disturbed."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from benchmarks.chaos.clients import Agent
from benchmarks.chaos.machine import PATIENCE, Daemon, Disk, Store, Tls, free_port, until

KILLS = 50
_STEPS_OF_CLOCK = (3.0, -5.0, 26.0, -1.0, 0.0)  # hours


@dataclass
class Place:
    """All that a scenario can disturb, and chance."""

    daemon: Daemon
    store: Store
    disk: Disk | None
    links: Links | None
    agents: Sequence[Agent]
    tls: Tls | None
    random: random.Random

    async def pause(self, least: float, most: float) -> None:
        """Lets some time go by."""
        await asyncio.sleep(self.random.uniform(least, most))

    async def ready(self, wanted: bool = True) -> None:
        """Waits until the daemon's journal takes writes, or does not."""
        await until(lambda: self.daemon.is_ready() is wanted, f"ready={wanted}")


async def kill(place: Place) -> int:
    """Kills the daemon at any moment, also while it starts."""
    for _ in range(KILLS):
        await place.pause(0.0, 1.5)
        await place.daemon.kill()
        moment = place.random.random()
        if moment < 0.1:
            await place.daemon.launch()
            continue
        await place.daemon.start()
        if moment < 0.8:  # its runs are back, so that samples go on between kills
            await place.ready()
    await place.ready()
    return KILLS


async def full_disk(place: Place) -> int:
    """Fills the disk until the journal fails, and gives the space back; once the daemon is killed meanwhile."""
    assert place.disk is not None
    for number in range(3):
        await place.pause(1.0, 3.0)
        filled = asyncio.Event()
        filling = asyncio.create_task(_keep_full(place.disk, filled))
        await place.ready(wanted=False)
        await place.pause(1.0, 3.0)
        if number == 1:
            await place.daemon.kill()
        filled.set()
        await filling
        place.disk.free()
        await place.store.start()
        if number == 1:
            await place.daemon.start()
        await place.ready()
    return 3


async def _keep_full(disk: Disk, over: asyncio.Event) -> None:
    while not over.is_set():  # the store frees files of its own
        await asyncio.to_thread(disk.fill)
        await asyncio.sleep(0.2)


async def read_only(place: Place) -> int:
    """Has the disk fail, so that it is read-only, and mounts it again, for which nothing may have it open."""
    assert place.disk is not None
    is_file = place.store.url.startswith("sqlite")
    for _ in range(3):
        await place.pause(2.0, 4.0)
        await asyncio.to_thread(place.disk.fail)
        await place.ready(wanted=False)
        await place.pause(0.5, 1.5)
        if is_file:
            assert await place.daemon.stop() == 0
            await _does_not_start(place.daemon)
        await place.store.stop("immediate")
        await asyncio.to_thread(place.disk.repair)
        await place.store.start()
        if is_file:
            await place.daemon.start()
        await place.ready()
    return 3


async def _does_not_start(daemon: Daemon) -> None:
    try:
        await daemon.start()
    except RuntimeError:
        return
    raise AssertionError("the daemon has started on a disk that it can't write to")


async def restart_postgresql(place: Place) -> int:
    """Restarts the server in order, and kills it, in turn."""
    for number in range(8):
        await place.pause(0.5, 2.0)
        await place.store.stop("kill" if number % 2 else "fast")
        await place.pause(0.0, 1.0)
        await place.store.start()
        await place.ready()
    return 8


async def clock(place: Place) -> int:
    """Steps the daemon's clock back and forth, and once has it start with another one."""
    for number, hours in enumerate(_STEPS_OF_CLOCK):
        await place.pause(2.0, 3.0)
        place.daemon.step_clock(hours)
        if number == 1:
            await place.daemon.kill()
            await place.daemon.start()
    await place.pause(6.0, 7.0)  # so that the daemon looks for stalled runs once more
    return len(_STEPS_OF_CLOCK)


async def certificates(place: Place) -> int:
    """Replaces the daemon's certificate; every second agent connects again, and the others must not have to."""
    assert place.tls is not None
    host, port = place.daemon.grpc.split(":")
    staying = place.agents[::2]
    before = [each.log.sessions for each in staying]
    for _ in range(6):
        await place.pause(1.0, 2.0)
        written = ssl.PEM_cert_to_DER_cert((await asyncio.to_thread(place.tls.renew)).read_text())

        def is_shown(wanted: bytes = written) -> bool:
            return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate((host, int(port)))) == wanted

        await until(is_shown, "the new certificate")
        for agent in place.agents[1::2]:
            await agent.reconnect()
    await place.pause(1.0, 2.0)
    assert [each.log.sessions for each in staying] == before, "sessions ended when the certificate changed"
    return 6


class Links:
    """A proxy on TCP that harms the connections through it, each in another way and at another time.

    Args:
        target: Where connections go on to.
        randomness: Which harm is done when.

    Attributes:
        harmed: How many connections were.
    """

    def __init__(self, target: str, randomness: random.Random) -> None:
        self._host, port = target.rsplit(":", 1)
        self._port = int(port)
        self._random = randomness
        self._tasks: set[asyncio.Task[None]] = set()
        self.harmed = 0
        self.address = ""

    async def open(self) -> None:
        """Takes connections."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", free_port())
        self.address = "{}:{}".format(*server.sockets[0].getsockname())
        self._server = server

    async def close(self) -> None:
        """Ends all connections."""
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with suppress(OSError, asyncio.CancelledError):
            try:
                there = await asyncio.open_connection(self._host, self._port)
                await self._link((reader, writer), there)
            finally:
                writer.close()
        self._tasks.discard(task)

    async def _link(self, *ends: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        link, ((here, answer), (there, request)) = _Link(), ends
        passing = [asyncio.create_task(link.passes(here, request)), asyncio.create_task(link.passes(there, answer))]
        try:
            done, _ = await asyncio.wait(
                passing, timeout=self._random.uniform(0.0, 4.0), return_when=asyncio.FIRST_COMPLETED
            )
            if done:
                return
            self.harmed += 1
            match self._random.choice(("slow", "dead", "cut", "reset")):
                case "slow":
                    link.delay = self._random.uniform(0.05, 0.5)
                case "dead":  # both ends stay open, and the far one never hears that the near one has left
                    link.is_dead = True
                    await asyncio.sleep(PATIENCE)
                case "cut":  # one of the ends, by chance, hears it some seconds before the other
                    self._random.choice((answer, request)).close()
                    await asyncio.sleep(3.0)
                case "reset":
                    for writer in (answer, request):
                        found = writer.get_extra_info("socket")
                        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        writer.transport.abort()
            await asyncio.wait(passing, timeout=4.0, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in passing:
                task.cancel()
            request.close()


@dataclass
class _Link:
    """How a link is at the moment."""

    delay: float = 0.0
    is_dead: bool = False

    async def passes(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(2**16):
                if self.is_dead:
                    continue
                await asyncio.sleep(self.delay)
                writer.write(data)
                await writer.drain()


async def links(place: Place) -> int:
    """Lets agents and operator talk through links that are slow, cut, reset, or dead on one side or both."""
    assert place.links is not None
    await asyncio.sleep(20.0)
    return place.links.harmed


@dataclass(frozen=True)
class Scenario:
    """A scenario, and what it needs around the daemon."""

    disturb: Callable[[Place], Awaitable[int]]
    stores: tuple[str, ...] = ("sqlite", "postgresql")
    has_disk: bool = False
    has_clock: bool = False
    has_tls: bool = False
    has_links: bool = False


SCENARIOS = {
    "kill": Scenario(kill),
    "full-disk": Scenario(full_disk, has_disk=True),
    "read-only": Scenario(read_only, has_disk=True),
    "postgresql": Scenario(restart_postgresql, stores=("postgresql",)),
    "clock": Scenario(clock, has_clock=True),
    "certificates": Scenario(certificates, has_tls=True),
    "links": Scenario(links, has_links=True),
}
