"""From an agent's worker to the next agent's: the queue changes hands, and hardly a packet is dropped.

A worker whose agent has ended may stay for some seconds (`GracePeriod`). It answers by the policy table as its
agent left it, which is what the kernel remembers too, and changes nothing. The next agent's worker claims the
queue by a locked file beside the table (`take_over_queue`) once it has loaded all that it needs: it asks the one
that stays to leave, and ends it by force where it does not. So nobody keeps a queue for ever, not even a process
that was stopped. Who gets a signal is the one that the kernel names as the holder of the lock (`locks`); the
number in the file is for people, and is written by who holds the lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from portward.base import locks

# How often one that stays looks whether it is to leave, in seconds: no longer does a queue stand still.
POLL_INTERVAL_S: Final = 0.02
# How long one that was asked to leave may take, and one that was ended by force.
_PATIENCE: Final = 0.5
_PAUSE: Final = 0.002
# How often a take_over_queue begins anew with a new file.
_TRIES: Final = 3
_WIDTH: Final = 10  # of a process id: it takes the place of the one before, and needs no more room

_T = TypeVar("_T")


class GracePeriod:
    """The seconds that a worker outlives its agent; counted from the first question whether they are over.

    They are over too when somebody deletes the file that is locked for `claimed`, a descriptor that
    `take_over_queue` gave: the table is gone with it, and the next worker would not find whom to ask for the
    queue.
    """

    def __init__(self, seconds: float, claimed: int = -1) -> None:
        self._seconds, self._claimed = seconds, claimed
        self._until: float | None = None
        self._asked = False

    def over(self) -> bool:
        """Whether it is time to leave."""
        if self._until is None:
            if self._seconds > 0:
                # From here on SIGTERM does not interrupt a batch: its packets get their verdicts.
                signal.signal(signal.SIGTERM, self._leave)
            self._until = time.monotonic() + self._seconds
        return self._asked or time.monotonic() >= self._until or self._deleted()

    def _deleted(self) -> bool:
        return self._claimed >= 0 and os.fstat(self._claimed).st_nlink == 0

    def _leave(self, *_: object) -> None:
        self._asked = True


def take_over_queue(folder: Path, queue: int) -> int:
    """Takes the place of the worker of this queue for as long as this process lives; whoever had it is gone then,
    or going. Gives the descriptor of the lock, -1 if there is none to be had (a full disk, somebody else's lock):
    then the queue is free, or cannot be bound until the other one has left."""
    path = folder / f"worker-{queue}"
    for _ in range(_TRIES):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return -1
        if _cleared(descriptor):
            if _same(path, descriptor):
                with contextlib.suppress(OSError):  # the disk is full, and nobody was here before
                    os.pwrite(descriptor, f"{os.getpid():<{_WIDTH}}\n".encode(), 0)
                return descriptor
        elif _same(path, descriptor):
            # It cannot be ended, or is no worker at all. One that stays leaves when its file is gone.
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(descriptor)
    return -1


def _cleared(descriptor: int) -> bool:
    """Takes the lock; first asks the holder to leave, then ends it. False if it is held all the same."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if locks.taken(descriptor):
            return True
        if not locks.send(descriptor, number):
            continue
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            if locks.taken(descriptor):
                return True
            time.sleep(_PAUSE)
    return locks.taken(descriptor)


def _same(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one at `path`: another claimer may have put a new one in its place."""
    with contextlib.suppress(OSError):
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    return False


def bound(bind: Callable[[], _T]) -> _T:
    """What `bind` gives; tried for a moment where the queue is not free yet. Raises OSError."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return bind()
        except OSError as error:
            if error.errno != errno.EPERM or time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE)
