"""Promise: a daemon of a later version changes nothing that this agent does not know, and its commands are answered."""

from __future__ import annotations

from daemons import response
from newer import UNKNOWN, newer

from sharpwatch.v1 import agent_pb2, types_pb2

APPLIED, REFUSED = types_pb2.COMMAND_OUTCOME_APPLIED, types_pb2.COMMAND_OUTCOME_REFUSED


def later(**fields):
    return newer(agent_pb2.SessionResponse(**fields)).SerializeToString()


def test_what_a_newer_daemon_adds_is_ignored_and_its_commands_are_answered(train, serve):
    rates = types_pb2.MultiplierSet(multipliers={"ffn": 0.5}, revision=1)

    def script(_, samples):
        yield later(welcome=agent_pb2.Welcome(daemon_version="0.99.0", heartbeat_seconds=0))
        yield later(ack=agent_pb2.Ack(sequence=next(samples).sequence))
        yield UNKNOWN  # a kind of response that is not known
        yield later(command=types_pb2.Command(id="known", set_multipliers=rates))
        # An action of a later version: to this one, a command without any.
        yield response(command=newer(types_pb2.Command(id="unknown")))
        for sample in samples:
            yield later(ack=agent_pb2.Ack(sequence=sample.sequence))

    def results():
        return {each.command_id: each for sample in daemon.samples for each in sample.results}

    daemon = serve(script)
    trainer = train(
        "trainer = Trainer(control='lr')\ntrainer.train_until_stopped()\ntrainer.close()\n", address=daemon.address
    )
    daemon.wait(lambda: results().keys() >= {"known", "unknown"})
    assert trainer.end() == 0
    assert trainer.latest("swallowed") == 0
    assert trainer.latest("dropped") == {}
    assert {name: each.outcome for name, each in results().items()} == {"known": APPLIED, "unknown": REFUSED}
    assert "the daemon may be newer" in results()["unknown"].detail
    assert daemon.sequences == list(range(1, len(trainer.steps) + 2))
