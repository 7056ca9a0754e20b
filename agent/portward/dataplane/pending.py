"""Whether a change of the policy table may still be on its way to the kernel, and the present step of the policy
thread."""

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
    """Counts everything that may still bring the kernel to a newer generation: steps of the policy thread that may
    commit, and commits that were handed over to the kernel thread. Every method may be called on any thread.

    A step counts from before its write transaction, so if the table is newer than the kernel while nothing counts,
    a change was lost on its way, and the kernel thread repairs. While a step runs, also an unrelated one, a lost
    change is not noticed.
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
        """Whether a change may be on its way."""
        return self._number > 0

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """The policy thread is at a step that may change the table. `what` names it for `status`."""
        self.begin()
        self.work = Work(what, time.monotonic())
        try:
            yield
        finally:
            self.work = None
            self.end()

    def begin(self) -> None:
        """One more counts: a step, or a commit that is handed over to the kernel thread."""
        with self._lock:
            self._number += 1

    def end(self) -> None:
        """One counts no longer: the step is over, or the kernel thread has carried the commit out."""
        with self._lock:
            self._number -= 1
