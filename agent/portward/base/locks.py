"""Locks on files (flock(2)), and the process that holds one, from the kernel.

A process id in the lock file is not reliable: it may be from before the last boot, and belong to another process
now. So the holder of a lock is looked up here before it gets a signal. The lookup needs no privilege for processes
of the same user, and works under `ProtectProc=invisible` and `ProcSubset=pid`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
# A process id has up to 7 digits.
_NUMBER_BYTES: Final = 32


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Takes the lock on an open file; False if another process has it."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return True
    return False


def holder(descriptor: int) -> int | None:
    """The id of the process that holds the lock on an open file; None if there is none, or none that this user may
    see."""
    for number in _candidates(descriptor):
        if _holds(number, descriptor):
            return number
    return None


def signal_holder(descriptor: int, signal_number: int) -> bool:
    """Sends a signal to the other process that holds the lock on an open file, and never to a third one. False if
    no holder is visible, or if this user may not send it a signal."""
    number = holder(descriptor)
    if number is None or number == os.getpid():
        return False
    with contextlib.suppress(OSError):
        process = os.pidfd_open(number)
        try:
            # The descriptor becomes readable when the process ends. It has not, so it is still the same process.
            if _holds(number, descriptor) and not select.select([process], [], [], 0)[0]:
                signal.pidfd_send_signal(process, signal_number)
                return True
        finally:
            os.close(process)
    return False


def recorded_pid(descriptor: int) -> int | None:
    """The process id at the beginning of the file; None if there is none."""
    text = os.pread(descriptor, _NUMBER_BYTES, 0).split(b"\n")[0].strip()
    return int(text) if text.isdigit() and int(text) > 0 else None


def _candidates(descriptor: int) -> Iterator[int]:
    """All processes, beginning with the one that the file names, which is nearly always the holder."""
    named = recorded_pid(descriptor)
    if named is not None:
        yield named
    with contextlib.suppress(OSError):
        yield from (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())


def _holds(process: int, descriptor: int) -> bool:
    """Whether a process has a lock on the file, through one of its descriptors."""
    ours = os.fstat(descriptor)
    with contextlib.suppress(OSError):
        for entry in (_PROC / str(process) / "fd").iterdir():
            with contextlib.suppress(OSError):
                theirs = entry.stat()
                if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino) and _locks(process, entry.name):
                    return True
    return False


def _locks(process: int, number: str) -> bool:
    """Whether a descriptor of a process has an flock lock (proc(5), fdinfo)."""
    lines = (_PROC / str(process) / "fdinfo" / number).read_bytes().splitlines()
    return any(line.startswith(b"lock:") and b" FLOCK " in line for line in lines)
