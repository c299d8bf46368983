"""A command is applied by all ranks before the same step, or by none, however late each reads the messages."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sharpwatch.agent.distributed.commit import CHUNK_BYTES, COMMIT_DELAY_STEPS, Ack, TwoPhaseCommit

STEPS = 40


class Ranks:
    """Ranks whose messages arrive as late as `delays` says, by rank and step; one arbiter."""

    def __init__(self, size):
        answers = {}
        self.all = [TwoPhaseCommit(size, answers.setdefault) for _ in range(size)]
        self.sent, self.read = [], [0] * size
        self.committed, self.objected = [[] for _ in self.all], [[] for _ in self.all]
        self.refused = []

    def step(self, number, delays):
        for rank, commit in enumerate(self.all):
            while self.read[rank] < number - delays[rank]:
                self.receive(rank)
            if commit.in_doubt(number):
                commit.abort()
            committed = commit.committed(number)
            self.committed[rank] += [(number, each.command) for each in committed if not each.objected]
            self.objected[rank] += [(number, each.command) for each in committed if each.objected]
        if self.all[0].stopped:
            self.refused += self.all[0].withdraw()
        parts = [commit.outgoing(number, number - read) for commit, read in zip(self.all, self.read, strict=True)]
        acknowledged, objections = (
            sum(getattr(part, name) for part in parts) for name in ("acknowledged", "objections")
        )
        self.sent.append(Ack(parts[0].chunk, parts[0].bytes_left, acknowledged, objections))

    def receive(self, rank):
        message = self.read[rank]
        self.read[rank] += 1
        self.all[rank].receive(message, self.sent[message], clock_unix_ns=message)


def test_a_command_of_several_chunks_is_applied_before_the_first_step_that_it_can_be():
    ranks, command = Ranks(3), bytes(range(256)) * 5
    ranks.all[0].propose(command)
    for number in range(12):
        ranks.step(number, [0, 0, 0])
    chunks = -(-len(command) // CHUNK_BYTES)
    assert ranks.committed == [[(chunks + COMMIT_DELAY_STEPS, command)]] * 3
    assert not ranks.refused


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=STEPS, max_size=STEPS))
def test_all_ranks_apply_a_command_before_the_same_step_or_none_does(delays):
    ranks = Ranks(3)
    commands = [b"one", b"two" * CHUNK_BYTES, b"three"]
    for command in commands:
        ranks.all[0].propose(command)
    for number in range(STEPS):
        ranks.step(number, delays[number])
    for number in range(STEPS, STEPS + 30):
        ranks.step(number, [0, 0, 0])
    first = [command for _, command in ranks.committed[0]]
    assert ranks.committed == [ranks.committed[0]] * 3
    assert first + ranks.refused == commands  # each is answered
    if ranks.refused:
        assert all(commit.stopped for commit in ranks.all)


def test_a_command_is_refused_once_a_rank_misses_the_message_that_may_commit_it():
    ranks = Ranks(2)
    ranks.all[0].propose(b"cut")
    for number in range(10):
        # Rank 0 acknowledges in message 1 and can read none from then on, for a while; it decides before rank 1.
        ranks.step(number, [0 if number < 2 or number > 7 else 10, 0])
    ranks.all[0].propose(b"cut again")
    ranks.step(10, [0, 0])
    assert ranks.committed == [[], []]
    assert ranks.refused == [b"cut", b"cut again"]


def test_a_rank_that_can_read_no_more_is_not_left_behind_by_the_others():
    ranks = Ranks(2)
    ranks.all[0].propose(b"cut")
    for number in range(10):
        ranks.step(number, [0, 0 if number < 2 else 10])  # it has acknowledged in message 1
        if number == 2:
            ranks.all[1].abort()
    assert ranks.committed == [[], []]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=STEPS, max_size=STEPS), st.integers(0, 2))
def test_what_one_rank_objects_to_is_refused_by_all_at_the_same_step(delays, objecting):
    ranks = Ranks(3)
    asked = []
    ranks.all[objecting].objects = lambda command: asked.append(command) or command == b"two"
    for command in (b"one", b"two", b"three"):
        ranks.all[0].propose(command)
    for number in range(STEPS):
        ranks.step(number, delays[number])
    for number in range(STEPS, STEPS + 30):
        ranks.step(number, [0, 0, 0])
    assert ranks.committed == [ranks.committed[0]] * 3
    assert ranks.objected == [ranks.objected[0]] * 3
    answered = [*ranks.committed[0], *ranks.objected[0]]
    assert [command for _, command in sorted(answered)] + ranks.refused == [b"one", b"two", b"three"]
    assert all(command == b"two" for _, command in ranks.objected[0])
    assert all(command != b"two" for _, command in ranks.committed[0])
    assert asked == [b"one", b"two", b"three"][: len(asked)]  # once for each
