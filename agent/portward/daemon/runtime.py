"""Files of a running daemon beside its policy table: the lock, the status, and Python's report of a crash.

The lock lets only one daemon use a table. The status is a small JSON file. It is written once a second and renamed
into place, so a reader never sees half of it.
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
# A process that reads a page of a mapped file that was cut off gets this signal, and ends.
_CUT_OFF: Final = "Bus error"
# Increased if a key of the status is removed or gets another meaning. New keys do not change it.
STATUS_FORMAT: Final = 1
# `running` holds the lock for some microseconds to find out whether it is free. Ten tries within 0.2 s outlast
# that.
_MAX_TRIES: Final = 10
_PAUSE_S: Final = 0.02


class Runtime:
    """The lock of a table folder. It is held until `close`, or until the process ends.

    `crashed` is the first line of the report of a crash of the process before; empty if there is none.
    """

    def __init__(self, folder: Path) -> None:
        """Takes the lock, and makes the folder if it is missing. Raises PortwardError if another daemon has the
        lock (with its process id), or if other users may change files in the folder."""
        self._folder = folder
        for _ in range(_MAX_TRIES):
            self._take()
            if self._in_place():
                break
            # A refused start has just removed the folder that it had made. A lock on a removed file would not keep
            # another daemon away.
            os.close(self._lock)
        else:
            raise PortwardError(f"table {folder}: another process removes this folder again and again")
        # The status of a killed process or an earlier boot. From now on a reader would take it for this daemon's.
        with contextlib.suppress(OSError):
            (folder / _STATUS).unlink()
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        self.crashed = self._record_crashes()
        # A descriptor to write the status with, even if the process has no other one left.
        self._reserve = Reserve(1)

    def _take(self) -> None:
        """Opens the lock file and locks it; makes the folder if it is missing. Raises PortwardError."""
        folder = self._folder
        try:
            # The innermost folder first, so that `_unmake` can remove them in this order.
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
        """Whether the locked file is the one that another agent would open."""
        try:
            found = (self._folder / _LOCK).lstat()
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self._lock))

    def _record_crashes(self) -> str:
        """From now on Python writes the report of a crash into a file. Returns the first line of the report
        before."""
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
        """Whether the process before crashed because the table's file was cut off."""
        return _CUT_OFF in self.crashed

    def _locked(self) -> bool:
        """Takes the lock, with some tries, because `running` may hold it for a moment."""
        for _ in range(_MAX_TRIES):
            if locks.try_lock(self._lock):
                return True
            time.sleep(_PAUSE_S)
        return False

    def write_status(self, status: dict[str, Any]) -> None:
        """Replaces the status; raises OSError."""
        new = self._folder / f"{_STATUS}.new"
        with self._reserve.lent():
            ownership.write(new, msgspec.json.encode(status))
        new.replace(self._folder / _STATUS)
        # Files that LMDB and the workers have made since the last call.
        ownership.hand_over(self._folder)

    def close(self) -> None:
        """Removes the status and releases the lock. Also removes the folder if this daemon made it and it has no
        other files."""
        (self._folder / _STATUS).unlink(missing_ok=True)
        ownership.hand_over(self._folder)
        self._unmake()
        self._reserve.release()
        os.close(self._lock)

    def _unmake(self) -> None:
        """Removes the folder that this daemon made, so that a refused start (a mistyped `table`) leaves none
        behind."""
        with contextlib.suppress(OSError):
            # If the lock file is not in place, another process removed the folder, and the folder there now may be
            # another agent's.
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
    """The process id of the daemon on this table; 0 if its id is unknown, None if no daemon runs."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return None if locks.try_lock(descriptor, shared=True) else _owner(descriptor)
    finally:
        os.close(descriptor)


def in_another_network(folder: Path) -> int | None:
    """The process id of the daemon on this table, if it runs in another network namespace than this thread. None
    if it runs in this one, if no daemon runs, or if this user may not see it."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # The kernel says which process holds the lock. The number in the file may be from another pid namespace.
        process = None if locks.try_lock(descriptor, shared=True) else locks.holder(descriptor)
        if process is None:
            return None
        theirs, ours = (Path(f"/proc/{who}/ns/net").stat() for who in (process, "thread-self"))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino) else process


def _owner(descriptor: int) -> int:
    """The process that holds the lock. If this user may not see that, the number in the file; 0 if there is none.
    It is only shown to people; no signal is sent to it."""
    return locks.holder(descriptor) or locks.recorded_pid(descriptor) or 0


def age_of(status: dict[str, Any]) -> float:
    """Seconds since a status was written, by a clock that cannot be set. The status of an older version has only
    the time of the wall clock; if that is in the future, the age is 0."""
    found = status.get("clock")
    if found is None:
        written = datetime.fromisoformat(status["at"])
        return max(0.0, (clock.utc_now() - written).total_seconds())
    age = msgspec.convert(found, clock.Stamp).age()
    # A status of an earlier boot is older than this boot.
    return clock.monotonic() if age is None else age


def hidden(folder: Path) -> bool:
    """Whether this user may not see if a daemon runs on this table. Then `running` and `read_status` return
    None."""
    try:
        os.close(os.open(folder / _LOCK, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return isinstance(error, PermissionError)
    return False


def read_status(folder: Path) -> dict[str, Any] | None:
    """The status that the running daemon last wrote; None if there is none. Raises PortwardError for another
    format. A status without a format has format 1."""
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
