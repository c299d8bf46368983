"""The operator's connection to daemons of several shards: each call goes to the one that holds the run it is about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import grpc

from sharpwatch.common.shards import holder_in, shard_of, shard_order
from sharpwatch.errors import OperatorError
from sharpwatch.v1.operator_pb2 import GetDaemonRequest, GetDaemonResponse, ListRunsRequest, ListRunsResponse, Run
from sharpwatch.v1.operator_pb2_grpc import OperatorServiceStub

_SILENT = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})
_ANSWER_SECONDS = 3.0  # that a daemon has to say which shards it holds


class ShardedChannel:
    """What stubs use of a `grpc.Channel`, over the channels of several daemons.

    A call about a run goes to whoever holds its shard, a list of runs is of all daemons, and any other call goes to one
    that answers: they share the journal. With one daemon all calls go to that.

    Args:
        channels: The daemons' channels by address, in the order of their shards.

    Attributes:
        address: The daemon that was asked last.
        missing: Which shards the last list of runs has nothing of, and why; empty for none.
    """

    def __init__(self, channels: Mapping[str, grpc.Channel]) -> None:
        self._channels = channels
        self._addresses = list(channels)
        self._facts: dict[str, GetDaemonResponse | None] = {}  # None: it does not answer
        self._listed: dict[str, str] = {}  # by run, the daemon that has listed it
        self.address = self._addresses[0]
        self.missing = ""

    def unary_unary(self, method: str, *serializers: Any, **options: Any) -> Any:
        """Returns what makes calls with one answer."""
        calls = {address: each.unary_unary(method, *serializers, **options) for address, each in self._channels.items()}
        return _AllRuns(self, calls) if method.endswith("/ListRuns") else _Call(self, calls)

    def unary_stream(self, method: str, *serializers: Any, **options: Any) -> Any:
        """Returns what makes calls with a stream of answers."""
        calls = {
            address: each.unary_stream(method, *serializers, **options) for address, each in self._channels.items()
        }
        return _StreamCall(self, calls)

    def place(self, request: Any) -> str:
        """The daemon that a request is for.

        Raises:
            OperatorError: None of them holds the shard of its run, or none answers.
        """
        if len(self._addresses) == 1:
            return self.address
        run = getattr(request, "run", "")
        if run in self._listed:
            self.address = self._listed[run]
            return self.address
        count = len(self._addresses)
        for shard in shard_order(run, count) if run else range(count):
            facts = self._ask(self._addresses[shard])
            if facts is not None and (not run or shard_of(run, facts.shards) in facts.shards_held):
                self.address = self._addresses[shard]
                return self.address
        if run:
            for facts in filter(None, self._facts.values()):
                if facts.shards != count:
                    raise OperatorError(f"run {run}: {_wrong_list(facts.shards, count)}")
            raise OperatorError(
                f"no daemon holds shard {shard_of(run, count)}, which run {run} is of; {self._silent()}"
                "another one takes a shard within 30 s of its daemon's end"
            )
        raise OperatorError(f"no daemon answers; {self._silent()}is $SHARPWATCH_ADDRESS right?")

    def elsewhere(self, error: grpc.RpcError) -> str:
        """The daemon that a refusal sends on to; empty for none, or for an address that was not given."""
        holder = holder_in(error.details() or "") if error.code() is grpc.StatusCode.UNAVAILABLE else ""
        if holder in self._channels and holder != self.address:
            self.address = holder
            return holder
        return ""

    def list_runs(self, calls: Mapping[str, Any], request: ListRunsRequest) -> ListRunsResponse:
        """The runs of all daemons, all pages of them; `missing` says whose are not among them."""
        runs: dict[str, Run] = {}
        held: set[int] = set()
        shards = 0
        failed: dict[str, str] = {}
        tokens = dict.fromkeys(self._addresses, request.page_token)
        while tokens:
            # At once, so that those that do not answer hold up the list for one deadline.
            asked = {address: calls[address].future(_page(request, token)) for address, token in tokens.items()}
            tokens = {}
            for address, call in asked.items():
                try:
                    answer = call.result()
                except grpc.RpcError as error:
                    if error.code() not in _SILENT or len(calls) == 1:
                        self.address = address
                        raise
                    failed[address] = error.code().name
                    continue
                # An earlier daemon says nothing of shards: it has all runs.
                shards = answer.shards or 1
                held.update(answer.shards_held if answer.shards else {0})
                runs.update((run.run, run) for run in answer.runs)
                self._listed.update((run.run, address) for run in answer.runs)
                if answer.next_page_token:
                    tokens[address] = answer.next_page_token
        self.missing = self._missing(held, shards or len(calls), failed)
        in_order = sorted(runs.values(), key=lambda run: (run.training_job, run.run))
        return ListRunsResponse(runs=in_order, shards_held=sorted(held), shards=shards)

    def _missing(self, held: set[int], shards: int, failed: Mapping[str, str]) -> str:
        listed = len(self._addresses)
        found = [] if shards == listed else [_wrong_list(shards, listed)]
        # By what was answered, since a daemon that is gone is missed only until another one has its shard.
        without = [str(shard) for shard in range(shards) if shard not in held]
        if without:
            several = "s" if len(without) > 1 else ""
            why = ", ".join(f"{address} {code}" for address, code in failed.items()) or "all daemons answer"
            found.append(f"no answer for shard{several} {', '.join(without)}, whose runs are missing ({why})")
        return "; ".join(found)

    def _ask(self, address: str) -> GetDaemonResponse | None:
        """What a daemon says of itself; None where it does not answer."""
        if address not in self._facts:
            stub = OperatorServiceStub(self._channels[address])
            try:
                self._facts[address] = stub.GetDaemon(GetDaemonRequest(), timeout=_ANSWER_SECONDS)
            except grpc.RpcError as error:
                if error.code() not in _SILENT:
                    self.address = address
                    raise
                self._facts[address] = None
        return self._facts[address]

    def _silent(self) -> str:
        silent = [address for address, facts in self._facts.items() if facts is None]
        return f"{', '.join(silent)} did not answer; " if silent else ""


class OperatorStub(OperatorServiceStub):
    """The operator service of one daemon, or of the daemons of all shards.

    Args:
        channels: Their channels by address, in the order of their shards.
    """

    def __init__(self, channels: Mapping[str, grpc.Channel]) -> None:
        self._channel = ShardedChannel(channels)
        super().__init__(self._channel)  # type: ignore[call-arg]  # its types know __new__ alone

    @property
    def address(self) -> str:
        """The daemon that was asked last."""
        return self._channel.address

    @property
    def missing(self) -> str:
        """Which shards the last list of runs has nothing of, and why; empty for none."""
        return self._channel.missing


class _Call:
    """A call with one answer."""

    def __init__(self, channel: ShardedChannel, calls: Mapping[str, Any]) -> None:
        self._channel = channel
        self._calls = calls

    def __call__(self, request: Any, timeout: float | None = None) -> Any:
        """Asks the daemon that the request is for, and the one that this sends on to."""
        try:
            return self._calls[self._channel.place(request)](request, timeout=timeout)
        except grpc.RpcError as error:
            holder = self._channel.elsewhere(error)
            if not holder:
                raise
            return self._calls[holder](request, timeout=timeout)

    def future(self, request: Any) -> Any:
        """Asks the daemon that the request is for, and returns at once."""
        return self._calls[self._channel.place(request)].future(request)


class _StreamCall(_Call):
    """A call with a stream of answers."""

    def __call__(self, request: Any, timeout: float | None = None) -> Iterator[Any]:
        """As a call with one answer; a daemon sends on before its first answer."""
        try:
            yield from self._calls[self._channel.place(request)](request, timeout=timeout)
        except grpc.RpcError as error:
            holder = self._channel.elsewhere(error)
            if not holder:
                raise
            yield from self._calls[holder](request, timeout=timeout)


class _AllRuns(_Call):
    """The list of the runs of all daemons."""

    def __call__(self, request: Any, timeout: float | None = None) -> ListRunsResponse:
        """Asks all of them."""
        del timeout
        return self._channel.list_runs(self._calls, request)


def _wrong_list(shards: int, listed: int) -> str:
    has = "daemon has 1 shard" if shards == 1 else f"daemons have {shards} shards"
    return f"the {has}, --address lists {listed}: list all, in the order of their shards"


def _page(request: ListRunsRequest, token: str) -> ListRunsRequest:
    page = ListRunsRequest()
    page.CopyFrom(request)
    page.page_token = token
    return page
