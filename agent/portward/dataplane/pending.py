"""The changes of the policy table that are being made, or are committed and not carried out in the kernel yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple


class Work(NamedTuple):
    """A step of the policy thread in words, and the time of its start by the monotonic clock."""

    what: str
    since: float

    def seconds(self) -> float:
        """The seconds since its start."""
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
        # The present step of the policy thread; None if it waits.
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
