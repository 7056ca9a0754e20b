"""Watches whether the threads that enforce the policy make progress: policy, kernel, counting.

A *lane* is one of these threads. It is idle, or runs a step. A step that takes long calls `beat` whenever it has
made progress. A lane is stuck if its step has not called `beat` for longer than the lane's bound. Only then does
the agent stop feeding the service manager's watchdog, which restarts it. The ruleset and the cached verdicts stay
in the kernel meanwhile, so port 25 does not open.

All times are seconds of `time.monotonic`. `beat` and `stuck` may be called on any thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

_T = TypeVar("_T")

# The lane of the calling thread. A thread without a lane has no attribute `lane`.
_here = threading.local()

# A kernel or counting step takes 0.5 s with full sets. This is sixty times as long, for a busy machine.
QUICK_S: Final = 30.0
# A policy step may wait for the disk to sync, which takes many seconds on a busy disk. Longer steps beat: for each
# entry that they decide, and while a child process (`bulk`) makes progress.
SLOW_S: Final = 60.0


class Lane:
    """One thread: its name, and its bound, the longest time in seconds between two beats of a step."""

    def __init__(self, name: str, bound: float) -> None:
        self.name, self.bound = name, bound
        self._last: float | None = None

    def step(self, work: Callable[[], _T]) -> _T:
        """Runs a step of this lane on the calling thread. Returns and raises what `work` does."""
        _here.lane = self
        self._last = time.monotonic()
        try:
            return work()
        finally:
            self._last = None

    def beat(self) -> None:
        """Notes progress of the running step."""
        if self._last is not None:
            self._last = time.monotonic()

    def silent_for(self) -> float:
        """Seconds since the last beat of the running step; 0 if none runs."""
        last = self._last
        return 0.0 if last is None else time.monotonic() - last

    @property
    def stuck(self) -> bool:
        """Whether the running step has been silent for longer than the bound."""
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
    """Notes progress of the calling thread's step. Does nothing on a thread without a lane (a verb, a child)."""
    lane: Lane | None = getattr(_here, "lane", None)
    if lane is not None:
        lane.beat()
