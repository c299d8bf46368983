"""The external gate: a policy raises rates only once somebody outside has let it, and no answer means no.

Nothing waits here. A raise that is about to be sent is asked about, and put off; at a later sample the policies come to
it again, with all guards, and find the answer. So a daemon that restarts in between asks once more, and sends nothing
twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sharpwatch.daemon.decisions.guards import OK
from sharpwatch.daemon.records import Decision

ASK_AGAIN = 60.0  # seconds that a no holds
_FORGOTTEN = 3600.0  # seconds after which a question is no longer of use
_GATE = "gate"  # the guard's name
_About = tuple[str, str, str, str]  # run, policy, incident and action
# The decision as the gate has it, which is given how many steps an answer holds; None while there is no answer.
AskGate = Callable[[Decision, int], Decision | None]


@dataclass(slots=True)
class _Question:
    """What was asked: the decision as it then was. `verdict` is "ok" or the guard's, empty without an answer.

    A no holds from `held_since`, when it was first found: the answer may take longer than it holds. None before.
    """

    made: Decision
    verdict: str = ""
    why: str = ""
    held_since: float | None = None


def no_gate(made: Decision, life: int) -> Decision | None:
    """Lets everything pass, where no gate is configured."""
    del life
    return made


class Gate:
    """The questions about raises of all runs, and their answers.

    Args:
        ask: Has a decision asked about; must not wait. The answer comes by `answer`.
    """

    def __init__(self, ask: Callable[[Decision], None]) -> None:
        self._ask = ask
        self._asked: dict[_About, _Question] = {}

    def judge(self, made: Decision, life: int) -> Decision | None:
        """The verdict on a raise that all other guards let pass.

        Args:
            made: The decision, not recorded so far.
            life: How many steps an answer holds.

        Returns:
            The decision under the id by which it was asked about: as it is where the gate let it pass, with the guard
            `gate` where not. None while there is no answer.
        """
        about = made.run, made.policy, made.alert_id, made.action
        asked = self._asked.get(about)
        if asked is None or _is_void(asked, made, life):
            self._forget(made.made_at)
            self._asked[about] = _Question(made)
            self._ask(made)
            return None
        if not asked.verdict:
            return None
        if asked.verdict == OK:
            del self._asked[about]
            return replace(made, id=asked.made.id, detail=f"{made.detail}; the gate let it pass: {asked.why}")
        if asked.held_since is None:
            asked.held_since = made.made_at
        return replace(made, id=asked.made.id, guard=asked.verdict)

    def answer(self, identity: str, why: str, *, passed: bool) -> None:
        """Takes an answer to the question about the decision of an id; one that comes too late changes nothing."""
        for asked in self._asked.values():
            if asked.made.id == identity:
                asked.verdict, asked.why = OK if passed else f"{_GATE}: {why}", why

    def _forget(self, now: float) -> None:
        old = [about for about, asked in self._asked.items() if now - asked.made.made_at > _FORGOTTEN]
        for about in old:
            del self._asked[about]


def _is_void(asked: _Question, made: Decision, life: int) -> bool:
    """Whether a question, or its answer, is not about a decision any more."""
    if asked.made.multipliers != made.multipliers:
        return True
    if not asked.verdict:
        return False
    if asked.verdict == OK:
        return not asked.made.step <= made.step <= asked.made.step + life
    return asked.held_since is not None and made.made_at - asked.held_since >= ASK_AGAIN
