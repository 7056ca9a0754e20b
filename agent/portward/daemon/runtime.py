"""What a running daemon leaves beside its policy table: a lock, so that there is one, its status, and what Python
said when it crashed.

The status is a small JSON file, written anew each second and by renaming, so a reader never sees half of it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from portward.base import clock, locks, ownership
from portward.base.descriptors import Reserve
from portward.errors import PortwardError

_LOCK: Final = "daemon.lock"
_STATUS: Final = "status.json"
_CRASH: Final = "crash"
# Who reads a page of a mapped file that has been cut off gets this signal, and cannot go on.
_CUT_OFF: Final = "Bus error"
# Raised if a key of the status goes or gets another meaning. New keys may come without.
STATUS_FORMAT: Final = 1
_TRIES: Final = 10
_PAUSE: Final = 0.02  # seconds


class Runtime:
    """The lock of a table folder, held as long as this object's process lives.

    `crashed` is what the process before said when it crashed; empty where it did not, or could say nothing.
    """

    def __init__(self, folder: Path) -> None:
        """Takes the lock, making the folder where it is missing; raises PortwardError where another daemon
        has it, and names that one's process id, or where others may change what is in the folder."""
        self._folder = folder
        for _ in range(_TRIES):
            self._take()
            if self._in_place():
                break
            # A refused start has just removed the folder that it made: a lock on a file that is gone keeps nobody
            # away.
            os.close(self._lock)
        else:
            raise PortwardError(f"table {folder}: another process removes this folder again and again")
        # Of a process that was killed, or of an earlier boot: from here on a reader would take it for this one's.
        with contextlib.suppress(OSError):
            (folder / _STATUS).unlink()
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        self.crashed = self._listen_for_crashes()
        # For the new status.
        self._reserve = Reserve(1)

    def _take(self) -> None:
        """Opens the lock file and locks it, making the folder where it is missing; raises PortwardError."""
        folder = self._folder
        try:
            # The deepest first.
            self._made = [place for place in (folder, *folder.parents) if not place.exists()]
            ownership.make(folder)
            self._lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise PortwardError(f"table {folder}: {error.strerror}") from error
        if not self._locked():
            other = _owner(self._lock)
            os.close(self._lock)
            raise PortwardError(f"table {folder}: portward runs already, as process {other}")

    def _in_place(self) -> bool:
        """Whether the file that is locked is the one that another agent would lock."""
        try:
            found = (self._folder / _LOCK).lstat()
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self._lock))

    def _listen_for_crashes(self) -> str:
        """From now on a crash is written down; gives what is written there."""
        path = self._folder / _CRASH
        before = ""
        with contextlib.suppress(OSError):
            before = path.read_text("utf-8", "replace").partition("\n")[0]
        with contextlib.suppress(OSError):
            ownership.write(path, b"")
            self._crash = path.open("w", encoding="utf-8")
            faulthandler.enable(self._crash)
        return before

    @property
    def table_cut_off(self) -> bool:
        """Whether the process before ended since the table's file was shorter than what it says of itself."""
        return _CUT_OFF in self.crashed

    def _locked(self) -> bool:
        """Takes the lock; some tries, since `running` holds it for a moment to find out."""
        for _ in range(_TRIES):
            if locks.taken(self._lock):
                return True
            time.sleep(_PAUSE)
        return False

    def write_status(self, status: dict[str, Any]) -> None:
        """Replaces the status; raises OSError."""
        new = self._folder / f"{_STATUS}.new"
        with self._reserve.lent():
            ownership.write(new, msgspec.json.encode(status))
        new.replace(self._folder / _STATUS)
        # What LMDB and the workers have made since.
        ownership.hand_over(self._folder)

    def close(self) -> None:
        """Gives the lock back and takes the status away; also the folder, if it was made here and nothing of use
        came into it."""
        (self._folder / _STATUS).unlink(missing_ok=True)
        ownership.hand_over(self._folder)
        self._unmake()
        self._reserve.release()
        os.close(self._lock)

    def _unmake(self) -> None:
        """A refused start, with a mistyped `table` for example, leaves no folder behind."""
        with contextlib.suppress(OSError):
            # Not in place: somebody removed the folder, and what is there now may be another agent's.
            if (
                self._made
                and self._in_place()
                and {path.name for path in self._folder.iterdir()} <= {_LOCK, _CRASH}
            ):
                (self._folder / _CRASH).unlink(missing_ok=True)
                (self._folder / _LOCK).unlink()
                for place in self._made:
                    place.rmdir()


def running(folder: Path) -> int | None:
    """The process id of the daemon that works on this table, 0 if that is not known; None where none runs."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return None if locks.taken(descriptor, shared=True) else _owner(descriptor)
    finally:
        os.close(descriptor)


def in_another_network(folder: Path) -> int | None:
    """The process id of the daemon that works on this table, if its network namespace is not that of this thread.
    None if it is, if no daemon runs, or if this user may not see it."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # A number in the file may be of another pid namespace: what counts is who holds the lock.
        process = None if locks.taken(descriptor, shared=True) else locks.holder(descriptor)
        if process is None:
            return None
        theirs, ours = (Path(f"/proc/{who}/ns/net").stat() for who in (process, "thread-self"))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino) else process


def _owner(descriptor: int) -> int:
    """The process that has the lock; what it says itself if this user may not look into it, 0 if it says nothing.
    Only for people: nothing is sent to it."""
    return locks.holder(descriptor) or locks.written(descriptor) or 0


def age_of(status: dict[str, Any]) -> float:
    """Seconds since a status was written, by a clock that nobody can set. An older agent's has only the time of
    the wall clock; it counts as 0 s old if that lies in the future."""
    found = status.get("clock")
    if found is None:
        written = datetime.fromisoformat(status["at"])
        return max(0.0, (clock.utc_now() - written).total_seconds())
    age = msgspec.convert(found, clock.Stamp).age()
    # Of an earlier boot: older than all that this boot can say.
    return clock.monotonic() if age is None else age


def hidden(folder: Path) -> bool:
    """Whether this user may not see if a daemon works on this table; `running` and `read_status` say None."""
    try:
        os.close(os.open(folder / _LOCK, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return isinstance(error, PermissionError)
    return False


def read_status(folder: Path) -> dict[str, Any] | None:
    """The status that the running daemon last wrote; None where there is none. Raises PortwardError for one in a
    newer format. One without a format is of the first."""
    try:
        status: dict[str, Any] = msgspec.json.decode((folder / _STATUS).read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        return None
    if (form := status.get("format", STATUS_FORMAT)) != STATUS_FORMAT:
        raise PortwardError(
            f"{folder / _STATUS}: the status is of format {form}, and this portward reads format {STATUS_FORMAT}: "
            "the agent that runs is of another version"
        )
    return status
