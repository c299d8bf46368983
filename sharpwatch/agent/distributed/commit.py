"""What rank 0 has to say to all ranks: taken by all before the same step, or by none. Pure, but for the referee.

Time is the number of the word. Rank 0 puts a message into its words, piece by piece. A rank that has heard all of it,
and has read all but the newest words, stands by it in each further word. The first word in which all stand by it names
the time: `COMMIT_DELAY_STEPS` words later. So a rank must have read by then each word in which it stood by the message,
and no other; if it has not, it gives the message up. No exchange of words alone could make all ranks decide alike:
before anyone acts a referee is asked, who holds to what he was told first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

COMMIT_DELAY_STEPS = 3  # words from the one that all stand by to the step before which the message is taken
CHUNK_BYTES = 512  # bytes of a message in a word
_PROMPT = 2  # words under way to a rank that keeps up
_NEVER = "never"

Arbiter = Callable[[str, str], str]  # what is settled for a name: what the first rank proposed


@dataclass(frozen=True, slots=True)
class Ack:
    """A word's part of it: rank 0's piece, and how many bytes are left with it; the message stood by, or 0."""

    piece: bytes = b""
    left: int = 0
    standing: int = 0


@dataclass(frozen=True, slots=True)
class Committed:
    """A message that is to be taken now, by rank 0's clock when all stood by it; or by nobody."""

    message: bytes
    taken: bool
    clock_unix_ns: int


class TwoPhaseCommit:
    """This rank's side of it, among `size`."""

    def __init__(self, size: int, referee: Arbiter) -> None:
        self._size = size
        self._referee = referee
        self._number = 1  # of the message that is under way, or will be
        self._unsent: deque[bytes] = deque()  # rank 0's, the first of them under way
        self._sent = 0  # bytes of it
        self._heard = b""
        self._whole = False
        self._stood: deque[int] = deque()  # words, not read yet, in which this rank stands by it
        self._at: int | None = None  # before this word's step it is taken
        self._clock = 0
        self._given_up = False
        self._overdue: list[Committed] = []  # settled by now for the others, while this rank was behind

    @property
    def expecting(self) -> bool:
        """Whether a message may be taken before the next step."""
        return self._whole

    def send(self, message: bytes) -> None:
        """Rank 0 has `message` for all."""
        self._unsent.append(message)

    def say(self, word: int, unread: int) -> Ack:
        """For word `word`, with `unread` earlier ones still under way to this rank."""
        piece, left = b"", 0
        if self._unsent:
            left = len(self._unsent[0]) - self._sent
            piece = self._unsent[0][self._sent : self._sent + CHUNK_BYTES]
            self._sent += len(piece)
        if not self._whole or unread > _PROMPT:
            return Ack(piece, left)
        self._stood.append(word)
        return Ack(piece, left, self._number)

    def hear(self, word: int, said: Ack, clock_unix_ns: int) -> None:
        """Word `word` of all: rank 0's piece, and the sum of what each stands by."""
        if self._at is not None and self._at <= word:  # given up and read late: this is about the next message
            self._overdue.append(self._end(taken=False))
        if self._stood and self._stood[0] == word:
            self._stood.popleft()
        if self._at is None and said.standing == self._size * self._number:
            self._at, self._clock = word + COMMIT_DELAY_STEPS, clock_unix_ns
        if said.left:
            self._heard += said.piece
            self._whole = said.left <= CHUNK_BYTES

    def unclear(self, word: int) -> bool:
        """Whether an earlier word has to be read to know what is to be taken before the step of `word`."""
        stood = self._stood[0] if self._stood else word
        return self._at is None and not self._given_up and stood + COMMIT_DELAY_STEPS <= word

    def give_up(self) -> None:
        """Words can't be read in time: have all leave the message, unless one has taken it."""
        if self._at is not None or self._stood:
            self._at, self._given_up = None, True  # also where the referee is gone
            answer = self._settle(_NEVER)
            self._at = None if answer == _NEVER else int(answer)

    def settle(self, word: int) -> list[Committed]:
        """What is to become of messages before the step of `word`."""
        settled, self._overdue = self._overdue, []
        if self._at is not None and self._at <= word:
            settled.append(self._end(taken=self._settle(str(self._at)) != _NEVER))
        return settled

    def _end(self, *, taken: bool) -> Committed:
        """The message under way is settled: the next one's turn."""
        settled = Committed(self._heard, taken, self._clock)
        if self._unsent:
            self._unsent.popleft()
        self._number += 1
        self._sent, self._heard, self._whole, self._at, self._given_up = 0, b"", False, None, False
        self._stood.clear()
        return settled

    def _settle(self, proposal: str) -> str:
        return self._referee(f"message {self._number}", proposal)
