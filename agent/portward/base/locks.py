"""Who holds a lock on a file (flock(2)), as the kernel says.

A number that somebody has written into the file says little: it may be from before the last start of the machine,
and its process another one by now. So whoever is to be asked to leave, or ended, is looked up here first. It takes
no privilege for processes of one's own user, and works under `ProtectProc=invisible` and `ProcSubset=pid`.
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
# A number with room to spare; what is longer is none.
_NUMBER_BYTES: Final = 32


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Takes the lock on an open file; False if another one has it."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return True
    return False


def holder(descriptor: int) -> int | None:
    """The process that holds the lock on an open file; None if there is none that this user may see."""
    for number in _candidates(descriptor):
        if _holds(number, descriptor):
            return number
    return None


def signal_holder(descriptor: int, signal_number: int) -> bool:
    """Sends a signal to the other process that holds the lock on an open file, and to no third one. False if there
    is none that can be seen, or it may get no signal from this user."""
    number = holder(descriptor)
    if number is None or number == os.getpid():
        return False
    with contextlib.suppress(OSError):
        process = os.pidfd_open(number)
        try:
            # It has not ended since, so it is the one that was looked at. It can be read when it has ended.
            if _holds(number, descriptor) and not select.select([process], [], [], 0)[0]:
                signal.pidfd_send_signal(process, signal_number)
                return True
        finally:
            os.close(process)
    return False


def recorded_pid(descriptor: int) -> int | None:
    """The number that the file begins with; None if it is none of a process."""
    text = os.pread(descriptor, _NUMBER_BYTES, 0).split(b"\n")[0].strip()
    return int(text) if text.isdigit() and int(text) > 0 else None


def _candidates(descriptor: int) -> Iterator[int]:
    """All processes, first the one that the file names, which is right nearly always."""
    named = recorded_pid(descriptor)
    if named is not None:
        yield named
    with contextlib.suppress(OSError):
        yield from (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())


def _holds(process: int, descriptor: int) -> bool:
    """Whether a process has a lock on the file, by one of its descriptors."""
    ours = os.fstat(descriptor)
    with contextlib.suppress(OSError):
        for entry in (_PROC / str(process) / "fd").iterdir():
            with contextlib.suppress(OSError):
                theirs = entry.stat()
                if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino) and _locks(process, entry.name):
                    return True
    return False


def _locks(process: int, number: str) -> bool:
    """Whether a lock was taken by a descriptor of a process: proc(5), fdinfo."""
    lines = (_PROC / str(process) / "fdinfo" / number).read_bytes().splitlines()
    return any(line.startswith(b"lock:") and b" FLOCK " in line for line in lines)
