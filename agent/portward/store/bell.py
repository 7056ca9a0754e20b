"""The bell of a store that lies in files: who commits touches it, who follows wakes.

Watching the database itself would wake before the commit can be seen.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from inotify_simple import INotify, flags


def ring(bell: Path) -> None:
    """Touches the bell; a folder that cannot be written is left alone, since followers also ask now and then."""
    with contextlib.suppress(OSError):
        bell.touch()


class Listener:
    """Hears a bell."""

    def __init__(self, bell: Path) -> None:
        """Raises OSError where the bell is not there."""
        self._inotify = INotify(nonblocking=True)
        try:
            self._inotify.add_watch(os.fspath(bell), flags.ATTRIB | flags.MODIFY)
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
