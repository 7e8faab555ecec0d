"""The time of a search: how much of it is left, and what part of it a pass may take."""

from __future__ import annotations

import time

__all__ = ["DONE", "Clock"]

DONE = "nothing left to try"
_SHARE = 1 / 3
"""The part of the time left that may go into one question: into telling simplifications apart,
which share a verdict else, or into timing once more what is undecided."""


class Clock:
    """Counts a search's seconds down; one pass at a time has its turn, which is a part of them.

    Attributes:
        end: why nothing more is tried, as far as is known: the last word on it.
    """

    def __init__(self, seconds: float) -> None:
        self.end = DONE
        self._deadline = time.monotonic() + seconds
        self._turn = self._deadline

    def allot(self, part: float) -> None:
        """Let a turn begin that may take *part* of all the time left."""
        now = time.monotonic()
        self._turn = now + part * max(self._deadline - now, 0.0)

    def allot_all(self) -> None:
        """Let what comes next take all the time left."""
        self._turn = self._deadline

    def affords(self, seconds: float) -> bool:
        """Whether one question may take so long in this turn."""
        return seconds <= _SHARE * max(self._turn - time.monotonic(), 0.0)

    def has_time(self) -> bool:
        """Whether this turn is not over yet; if it is, that is why nothing more is tried."""
        left = time.monotonic() < self._turn
        if not left:
            self.end = "the time of this effort was spent"
        return left

    def is_run_down(self) -> bool:
        """Whether not only this turn is over, but all time is spent."""
        return time.monotonic() >= self._deadline
