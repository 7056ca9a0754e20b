"""The changes of the policy table that are being made, or are committed and not carried out in the kernel yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple


class Work(NamedTuple):
    """What the policy thread does, in words, and since when by the monotonic clock."""

    what: str
    since: float

    def seconds(self) -> float:
        """For how many seconds it has been at it."""
        return time.monotonic() - self.since


class PendingChanges:
    """Counts changes. Every method may be called on any thread.

    A change counts from before its write transaction until `carried_out`. So if the table is newer than the kernel
    and no change counts, one was lost.
    """

    def __init__(self, generation: Callable[[], int]) -> None:
        """`generation` gives the generation of the policy table."""
        self.generation = generation
        self._lock = Lock()
        self._number = 0
        # What the policy thread is doing now.
        self.work: Work | None = None

    @property
    def any(self) -> bool:
        """Whether a change is under way."""
        return self._number > 0

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """The policy thread is at a step that may change the table."""
        self.handed_over()
        self.work = Work(what, time.monotonic())
        try:
            yield
        finally:
            self.work = None
            self.carried_out()

    def handed_over(self) -> None:
        """One more change is on its way to the kernel thread."""
        with self._lock:
            self._number += 1

    def carried_out(self) -> None:
        """The kernel thread is done with one, or it came to nothing."""
        with self._lock:
            self._number -= 1
