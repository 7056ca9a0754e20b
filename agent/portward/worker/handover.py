"""Hands a queue over from an agent's worker to the next agent's worker, so that hardly a packet is dropped.

A worker may go on for some seconds after its agent has ended (`GracePeriod`). It answers by the policy table as
its agent left it, and changes nothing. The kernel's cached verdicts come from the same table.

The next agent's worker takes the queue over (`take_over_queue`) once it has loaded all that it needs. It locks a
file beside the table. If another process holds the lock, it asks that process to leave by SIGTERM, and ends it by
SIGKILL if it does not. So no process keeps a queue for ever, not even a stopped one. The signal goes to the
process that the kernel names as the holder of the lock (`base.locks`). The process id in the file is only for
people.
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

# How often a worker in its grace period checks whether to leave, in seconds. The queue stands still no longer than
# this when it changes hands.
POLL_INTERVAL_S: Final = 0.02
# How long a worker may take to leave after SIGTERM, and again after SIGKILL: 25 poll intervals.
_SIGNAL_TIMEOUT_S: Final = 0.5
# Between two tries of the lock or the queue: short beside the poll interval.
_RETRY_INTERVAL_S: Final = 0.002
# How often to begin again with a new lock file, because another process replaced the file meanwhile.
_ATTEMPTS: Final = 3
# The process id is padded to the longest one (a 32-bit number), so that it overwrites the one before in place: on
# a full disk a file cannot grow.
_PID_CHARACTERS: Final = 10

_T = TypeVar("_T")


class GracePeriod:
    """The time that a worker goes on after its agent has ended, in seconds from the first call of `over`.

    It also ends when the lock file behind `lock`, a descriptor from `take_over_queue`, is deleted. The table's
    folder is gone then, and the next worker could not find this one to ask for the queue.
    """

    def __init__(self, seconds: float, lock: int = -1) -> None:
        self._seconds, self._lock = seconds, lock
        self._until: float | None = None
        self._asked = False

    def over(self) -> bool:
        """Whether the worker must leave now."""
        if self._until is None:
            if self._seconds > 0:
                # From here on SIGTERM does not interrupt a batch, so all its packets get their verdicts.
                signal.signal(signal.SIGTERM, self._leave)
            self._until = time.monotonic() + self._seconds
        return self._asked or time.monotonic() >= self._until or self._deleted()

    def _deleted(self) -> bool:
        return self._lock >= 0 and os.fstat(self._lock).st_nlink == 0

    def _leave(self, *_: object) -> None:
        self._asked = True


def take_over_queue(folder: Path, queue: int) -> int:
    """Makes this process the worker of the queue for as long as it lives, and makes the worker before leave.

    Returns the descriptor of the lock in `folder`, or -1 if there is none (a full disk, or another user's lock).
    Then the queue is free already, or it cannot be bound until the other worker has left by itself.
    """
    path = folder / f"worker-{queue}"
    for _ in range(_ATTEMPTS):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return -1
        if _cleared(descriptor):
            if _same(path, descriptor):
                with contextlib.suppress(OSError):  # the disk is full, and the file is new
                    os.pwrite(descriptor, f"{os.getpid():<{_PID_CHARACTERS}}\n".encode(), 0)
                return descriptor
        elif _same(path, descriptor):
            # The holder cannot be ended, or is no worker. A worker in its grace period leaves when its file is
            # gone.
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(descriptor)
    return -1


def _cleared(descriptor: int) -> bool:
    """Takes the lock. Asks its holder to leave first, and then ends it. False if the lock is still taken."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if locks.try_lock(descriptor):
            return True
        if not locks.signal_holder(descriptor, number):
            continue
        deadline = time.monotonic() + _SIGNAL_TIMEOUT_S
        while time.monotonic() < deadline:
            if locks.try_lock(descriptor):
                return True
            time.sleep(_RETRY_INTERVAL_S)
    return locks.try_lock(descriptor)


def _same(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one at `path`. Another worker may have replaced it."""
    with contextlib.suppress(OSError):
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    return False


def bound(bind: Callable[[], _T]) -> _T:
    """Calls `bind` until the queue is free, for half a second at most, and returns what it gives. Raises
    OSError."""
    deadline = time.monotonic() + _SIGNAL_TIMEOUT_S
    while True:
        try:
            return bind()
        except OSError as error:
            if error.errno != errno.EPERM or time.monotonic() > deadline:
                raise
        time.sleep(_RETRY_INTERVAL_S)
