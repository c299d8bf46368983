"""A message is taken by all ranks before the same step, or by none, however late each reads the words."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sharpwatch.agent.distributed.commit import CHUNK_BYTES, COMMIT_DELAY_STEPS, Ack, TwoPhaseCommit

STEPS = 40


class Ranks:
    """Ranks whose words come as late as `delays` says, by rank and step; one referee."""

    def __init__(self, size):
        answers = {}
        self.all = [TwoPhaseCommit(size, answers.setdefault) for _ in range(size)]
        self.said, self.read = [], [0] * size
        self.settled = [[] for _ in self.all]

    def step(self, number, delays):
        for rank, consent in enumerate(self.all):
            while self.read[rank] < number - delays[rank]:
                self.hear(rank)
            if consent.unclear(number):
                consent.give_up()
            self.settled[rank] += [(number, each.message, each.taken) for each in consent.settle(number)]
        parts = [consent.say(number, number - read) for consent, read in zip(self.all, self.read, strict=True)]
        self.said.append(Ack(parts[0].piece, parts[0].left, sum(part.standing for part in parts)))

    def hear(self, rank):
        word = self.read[rank]
        self.read[rank] += 1
        self.all[rank].hear(word, self.said[word], clock_unix_ns=word)


def test_a_message_of_several_words_is_taken_in_the_first_step_that_it_can_be():
    ranks, message = Ranks(3), bytes(range(256)) * 5
    ranks.all[0].send(message)
    for number in range(12):
        ranks.step(number, [0, 0, 0])
    pieces = -(-len(message) // CHUNK_BYTES)
    assert ranks.settled == [[(pieces + COMMIT_DELAY_STEPS, message, True)]] * 3


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=STEPS, max_size=STEPS))
def test_all_take_a_message_before_the_same_step_or_none_does(delays):
    ranks = Ranks(3)
    for message in (b"one", b"two" * CHUNK_BYTES, b"three"):
        ranks.all[0].send(message)
    for number in range(STEPS):
        ranks.step(number, delays[number])
    taken = [[one for one in settled if one[2]] for settled in ranks.settled]
    assert taken[0] == taken[1] == taken[2]


def test_a_rank_that_can_read_no_more_is_not_left_behind_by_the_others():
    ranks = Ranks(2)
    ranks.all[0].send(b"cut")
    for number in range(10):
        ranks.step(number, [0, 0 if number < 2 else 10])  # it has stood by it in the word of step 1
        if number == 2:
            ranks.all[1].give_up()
    assert [one for one in ranks.settled[0] if one[2]] == ranks.settled[1] == []
