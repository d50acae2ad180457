"""Two threads that take turns in the order of a plan."""

import threading
from typing import Literal

from mhc_megatron.pipeline.phases import Plan, Step

Thread = Literal["forward", "backward"]


class Abandoned(RuntimeError):
    """The other thread has failed; its error is the one that counts."""


class Turns:
    """Only the thread whose step is next runs; the other waits.

    Args:
        plan: F steps are the forward thread's, all others the backward thread's.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._at = plan, 0
        self._holder: Thread | None = None
        self._condition = threading.Condition()
        self._failed = False

    def next(self, thread: Thread) -> Step:
        """End this thread's step, if it has one, and wait for its next, which begins.

        Raises:
            Abandoned: the other thread has failed.
        """
        with self._condition:
            self._release(thread)
            self._condition.wait_for(lambda: self._failed or self._is_due(thread))
            if self._failed:
                raise Abandoned("the other side of the Overlap has failed")
            assert self._at < len(self._plan), f"the {thread} goes on after the plan's end"
            self._holder = thread
            return self._plan[self._at]

    def has_next(self, thread: Thread) -> bool:
        """Whether the plan has more steps of this thread, after one that it holds."""
        with self._condition:
            after = self._at + (self._holder == thread)
            return any(_owner(step) == thread for step in self._plan[after:])

    def end(self, thread: Thread) -> None:
        """End this thread's last step."""
        with self._condition:
            self._release(thread)
            rest = [step for step in self._plan[self._at :] if _owner(step) == thread]
            assert self._failed or not rest, f"the {thread} ended before {rest}"

    def fail(self) -> None:
        """Let the other thread go, into an error."""
        with self._condition:
            self._failed = True
            self._condition.notify_all()

    def _release(self, thread: Thread) -> None:
        if self._holder == thread:
            self._holder = None
            self._at += 1
            self._condition.notify_all()

    def _is_due(self, thread: Thread) -> bool:
        if self._holder is not None:
            return False
        return self._at == len(self._plan) or _owner(self._plan[self._at]) == thread


def _owner(step: Step) -> Thread:
    return "forward" if step.op == "F" else "backward"
