"""Whether the threads that enforce make progress: policy, kernel, counting.

A *lane* is one of these threads. It is idle, or at a step that began at some time. A step that takes long by its
nature beats (`beat`) each time that it has got further. A lane is stuck if its step has not beaten for longer than
its bound: only then is the service manager's watchdog left unfed, which ends the agent and starts it again. The
ruleset and the cached verdicts stay in the kernel meanwhile, so nothing opens.

All times are of the monotonic clock, in seconds. `beat` and `stuck` may be called on any thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

_T = TypeVar("_T")

# The lane of the calling thread; a thread without one has no attribute `lane`.
_here = threading.local()

# A kernel or counting step takes 0.5 s with full sets. Sixty times that: a machine may be busy.
QUICK_S: Final = 30.0
# A policy step may wait for a disk to sync, which a busy one can hold up for many seconds. What takes longer by
# its nature beats: each entry that is decided, and a child process (`bulk`) as long as it gets on.
SLOW_S: Final = 60.0


class Lane:
    """One thread: what it is called, and for how long its step may go without a beat."""

    def __init__(self, name: str, bound: float) -> None:
        self.name, self.bound = name, bound
        self._last: float | None = None

    def step(self, work: Callable[[], _T]) -> _T:
        """Runs a step of this lane on the calling thread; gives and raises what it does."""
        _here.lane = self
        self._last = time.monotonic()
        try:
            return work()
        finally:
            self._last = None

    def beat(self) -> None:
        """The step that runs has got further."""
        if self._last is not None:
            self._last = time.monotonic()

    def silent_for(self) -> float:
        """For how many seconds the step that runs has not beaten; 0 if none runs."""
        last = self._last
        return 0.0 if last is None else time.monotonic() - last

    @property
    def stuck(self) -> bool:
        """Whether the step that runs has not beaten for longer than the bound."""
        return self.silent_for() > self.bound


class Heartbeat:
    """The lanes of the daemon."""

    def __init__(self) -> None:
        self.policy, self.kernel = Lane("policy", SLOW_S), Lane("kernel", QUICK_S)
        self.counting = Lane("counting", QUICK_S)

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """All of them."""
        return self.policy, self.kernel, self.counting

    def stuck(self) -> list[str]:
        """A sentence for each lane that is stuck; empty if all make progress."""
        return [
            f"the {lane.name} thread has been at one step for {lane.silent_for():.0f} s without getting further"
            for lane in self.lanes
            if lane.stuck
        ]


def beat() -> None:
    """The calling thread's step has got further. Does nothing on a thread without a lane (a verb, a child)."""
    lane: Lane | None = getattr(_here, "lane", None)
    if lane is not None:
        lane.beat()
