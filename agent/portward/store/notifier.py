"""The change notifier of a store in a file: a writer touches it after each commit, and followers wake.

It is an empty file beside the store. A watch on the database itself would wake before the commit is visible.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from inotify_simple import INotify, flags


def create_notifier(notifier: Path, *, like: Path) -> None:
    """Makes the notifier, with the owner and mode of the file `like`, so that every writer may touch it. Does
    nothing if it exists, or if the folder is not writable: followers also poll now and then."""
    with contextlib.suppress(OSError):
        status = like.stat()
        descriptor = os.open(notifier, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if os.geteuid() == 0:
                os.fchown(descriptor, status.st_uid, status.st_gid)
            os.fchmod(descriptor, status.st_mode & 0o666)
        finally:
            os.close(descriptor)


def notify_followers(notifier: Path) -> None:
    """Wakes all listeners. Does nothing if the notifier is missing or not writable."""
    with contextlib.suppress(OSError):
        os.utime(notifier)


class ChangeListener:
    """Waits for changes of a store, by inotify."""

    def __init__(self, notifier: Path) -> None:
        """Raises OSError if the notifier is missing, or if the user has no more inotify instances."""
        self._inotify = INotify(nonblocking=True)
        try:
            self._inotify.add_watch(os.fspath(notifier), flags.ATTRIB)
        except OSError:
            self._inotify.close()
            raise

    def fileno(self) -> int:
        """A descriptor that is readable after a change."""
        return int(self._inotify.fileno())

    def drain(self) -> None:
        """Makes the descriptor unreadable again, until the next change."""
        self._inotify.read(timeout=0)

    def close(self) -> None:
        """Stops listening."""
        self._inotify.close()
