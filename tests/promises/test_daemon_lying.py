"""Promise: whatever a daemon says, nothing breaks, nothing forbidden is applied, and refusals are reported."""

from __future__ import annotations

import math

from daemons import ack, response, welcome

from sharpwatch.v1 import agent_pb2, types_pb2

APPLIED, REFUSED = types_pb2.COMMAND_OUTCOME_APPLIED, types_pb2.COMMAND_OUTCOME_REFUSED


def multipliers(name, values, **fields):
    action = types_pb2.MultiplierSet(multipliers=values, **fields)
    return response(command=types_pb2.Command(id=name, set_multipliers=action))


def rollback(name, **fields):
    return response(command=types_pb2.Command(id=name, rollback=types_pb2.Rollback(**fields)))


# No SessionResponse: bytes that are none, a SessionRequest, a field of another type, too large a message.
GARBAGE = [
    b"\xff" * 64,
    b"\x00garbage",
    agent_pb2.SessionRequest(hello=agent_pb2.Hello(run="another")).SerializeToString(),
    b"\x12\x02\x0a\x00",
    response(refusal=agent_pb2.Refusal(sequence=2**63, code="\0?\n" * 1000, reason="x" * 10_000)),
    response(ack=agent_pb2.Ack(sequence=2**64 - 1)),
    welcome(acknowledged=2**64 - 1),
    response(),
    response(command=types_pb2.Command(id="x" * 2**17)),
]
# Commands that can be read and must be refused; those for another run name blocks and places that are not here.
BAD_COMMANDS = {
    "nothing": response(command=types_pb2.Command(id="nothing")),
    "another run's blocks": multipliers("another run's blocks", {"conv": 0.5}),
    "nan": multipliers("nan", {"ffn": math.nan}),
    "infinite": multipliers("infinite", {"ffn": math.inf}),
    "negative": multipliers("negative", {"ffn": -1.0}),
    "zero": multipliers("zero", {"ffn": 0.0}),
    "too much": multipliers("too much", {"ffn": 10.5}),
    "too little": multipliers("too little", {"emb": 1.0, "ffn": 0.009}),
    "nowhere": rollback("nowhere"),
    "ahead": rollback("ahead", checkpoint=types_pb2.Checkpoint(step=2**62, uri="file:///x")),
    "past": rollback("past", checkpoint=types_pb2.Checkpoint(step=-(2**63), uri="file:///x")),
    "no callback": rollback("no callback", checkpoint=types_pb2.Checkpoint(step=1, uri="file:///x")),
}


def results(daemon):
    return {each.command_id: each for sample in daemon.samples for each in sample.results}


def test_garbage_and_commands_that_are_not_allowed(train, serve, assert_unchanged):
    def lying(_, samples):
        yield welcome()
        yield ack(next(samples).sequence)
        yield from GARBAGE
        yield from BAD_COMMANDS.values()
        for sample in samples:
            yield ack(sample.sequence)

    daemon = serve(lying)
    trainer = train(address=daemon.address)
    trainer.wait(lambda: trainer.steps)
    daemon.wait(lambda: results(daemon).keys() >= BAD_COMMANDS.keys())
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert trainer.latest("swallowed") == 0
    assert trainer.latest("dropped") == {}
    assert daemon.sequences == list(range(1, len(trainer.steps) + 2))
    assert {each.outcome for each in results(daemon).values()} == {REFUSED}
    assert all(each.detail for each in results(daemon).values())


def test_more_commands_than_anyone_can_take(train, serve, assert_unchanged):
    """Far ahead, so that they wait; the trainer holds 64, and answers the others as they come."""
    flood = [
        types_pb2.Command(
            id=f"c{number}",
            apply_at_step=2**62,
            set_multipliers=types_pb2.MultiplierSet(multipliers={"ffn": 0.5}, revision=number + 1),
            reason="x" * 4_000,
        )
        for number in range(2_000)
    ]

    def flooding(_, samples):
        yield welcome()
        for sample in samples:
            yield ack(sample.sequence)
            while flood:
                yield response(command=flood.pop())

    daemon = serve(flooding)
    trainer = train(address=daemon.address)
    daemon.wait(lambda: results(daemon))
    answered = len(daemon.samples)
    trainer.more(20)
    daemon.wait(lambda: len(daemon.samples) > answered + 10)
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert trainer.latest("swallowed") == 0
    assert trainer.latest("dropped") == {}
    assert {each.outcome for each in results(daemon).values()} == {REFUSED}
    assert all("commands are waiting already" in each.detail for each in results(daemon).values())
    assert all(len(sample.results) <= 256 for sample in daemon.samples)


def test_a_replayed_command_is_applied_once_and_its_result_sent_again(train, serve):
    cut = multipliers("cut", {"ffn": 0.5}, revision=1)
    restore = multipliers("restore", {}, revision=2)

    def replaying(daemon, samples):
        yield welcome()
        for sample in samples:
            yield ack(sample.sequence)
            answered_ids = [each.command_id for sent in daemon.samples for each in sent.results]
            yield cut if "cut" not in answered_ids else restore if "restore" not in answered_ids else cut

    daemon = serve(replaying)
    trainer = train(address=daemon.address)
    trainer.wait(lambda: trainer.steps)

    def tellings():
        return [each for sample in daemon.samples for each in sample.results if each.command_id == "cut"]

    daemon.wait(lambda: "restore" in results(daemon))
    before = len(tellings())
    daemon.wait(lambda: len(tellings()) > before + 5)
    assert trainer.end() == 0
    assert {(each.outcome, each.step) for each in tellings()} == {(APPLIED, tellings()[0].step)}
    restored = results(daemon)["restore"].step
    in_force = {sample.health.lr_revision for sample in daemon.samples if sample.step >= restored}
    assert in_force == {2}
    assert trainer.latest("swallowed") == 0


def takes_nothing_of_any_size(_, samples):
    yield response(welcome=agent_pb2.Welcome(max_message_bytes=1))
    yield from (ack(sample.sequence) for sample in samples)


def goes_away(seconds):
    def script(_, samples):
        yield welcome()
        next(samples)
        yield response(drain=agent_pb2.Drain(reason="x" * 10_000, retry_after_seconds=seconds))

    return script


def test_absurd_numbers(train, serve, assert_unchanged):
    scripts = takes_nothing_of_any_size, goes_away(math.inf), goes_away(math.nan), goes_away(-1e300)
    addresses = [serve(script).address for script in scripts]
    code = f"""
for address in {addresses!r}:
    trainer = Trainer(address=address)
    trainer.train(20)
    trainer.close()
"""
    trainer = train(code)
    assert trainer.end() == 0
    assert_unchanged(trainer)
    assert trainer.all_values("swallowed") == [0] * 4
    sizes, *drains = trainer.all_values("dropped")
    assert sizes == {"oversized": 21}
    assert drains == [{"undelivered": 21}] * 3
