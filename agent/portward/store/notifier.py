"""The bell of a store that lies in a file: who commits rings it, who follows wakes.

It is an empty file beside the store. Watching the database itself would wake before the commit can be seen.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from inotify_simple import INotify, flags


def create_notifier(bell: Path, *, like: Path) -> None:
    """Makes a bell that whoever may write the file `like` may notify_followers. Nothing happens where one hangs,
    or where the folder cannot be written: followers also ask now and then."""
    with contextlib.suppress(OSError):
        status = like.stat()
        descriptor = os.open(bell, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if os.geteuid() == 0:
                os.fchown(descriptor, status.st_uid, status.st_gid)
            os.fchmod(descriptor, status.st_mode & 0o666)
        finally:
            os.close(descriptor)


def notify_followers(bell: Path) -> None:
    """Rings the bell; does nothing where there is none, or it may not be rung."""
    with contextlib.suppress(OSError):
        os.utime(bell)


class ChangeListener:
    """Hears a bell."""

    def __init__(self, bell: Path) -> None:
        """Raises OSError where there is no bell, or no more inotify instance to be had."""
        self._inotify = INotify(nonblocking=True)
        try:
            self._inotify.add_watch(os.fspath(bell), flags.ATTRIB)
        except OSError:
            self._inotify.close()
            raise

    def fileno(self) -> int:
        """A descriptor that can be read after the bell was rung."""
        return int(self._inotify.fileno())

    def drain(self) -> None:
        """Forgets the rings so far."""
        self._inotify.read(timeout=0)

    def close(self) -> None:
        """Stops listening."""
        self._inotify.close()
