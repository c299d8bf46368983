"""A bare gRPC server: it answers each message of a stream by an acknowledgement, and does nothing else.

Run by `benchmarks.load`: `python -m benchmarks.load.bare` prints its address and serves until standard input ends.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import grpc

from sharpwatch.v1 import agent_pb2


def _response(**fields: object) -> bytes:
    return agent_pb2.SessionResponse(**fields).SerializeToString()  # type: ignore[arg-type]


async def _session(requests: AsyncIterator[bytes], _: object) -> AsyncIterator[bytes]:
    await anext(requests)  # the Hello
    yield _response(welcome=agent_pb2.Welcome(daemon_version="bare"))
    sequence = 0
    async for _message in requests:
        sequence += 1
        yield _response(ack=agent_pb2.Ack(sequence=sequence))


async def _main() -> None:
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    handler = grpc.stream_stream_rpc_method_handler(_session)  # messages stay bytes, both ways
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("sharpwatch.v1.AgentService", {"Session": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(_main())
