"""Changes of the mounts that this process sees.

Linux reports them at `/proc/self/mountinfo` (proc(5)) to `poll`, by POLLPRI. Unlike inotify, of which a user has
128 instances for all processes together, this has no limit of its own.
"""

from __future__ import annotations

import os
import select
from typing import Final

_MOUNTS: Final = "/proc/self/mountinfo"


class MountChanges:
    """A descriptor that is readable after a change of the mounts.

    The kernel reports each change once, to the first poll after it. A loop that adds the descriptor while a change
    waits may lose that change. So look at the mounts after the loop has the descriptor, and after each `drain`.
    """

    def __init__(self) -> None:
        """Raises OSError."""
        self._mounts = os.open(_MOUNTS, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # The file is always readable, so a loop that asks for POLLIN would spin. This set asks for POLLPRI
            # alone.
            self._changed = select.epoll()
        except OSError:
            os.close(self._mounts)
            raise
        self._changed.register(self._mounts, select.EPOLLPRI)

    def fileno(self) -> int:
        """The descriptor."""
        return self._changed.fileno()

    def drain(self) -> None:
        """Makes the descriptor unreadable until the next change."""
        self._changed.poll(0)

    def close(self) -> None:
        """Stops watching."""
        self._changed.close()
        os.close(self._mounts)
