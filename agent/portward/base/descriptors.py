"""File descriptors for an emergency.

A process without free descriptors cannot repair a gateway: libnftables calls exit() if it gets no socket, and a
worker that ended cannot be restarted. So each part of the agent that must work then keeps a `Reserve` of open
descriptors, and closes them while it needs free ones.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from typing import Final

# The agent also runs with fewer, but without a margin for the unexpected.
ENOUGH: Final = 1024


def limit() -> int:
    """The maximum number of descriptors of this process (the soft limit)."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_limit() -> int:
    """Raises the soft limit of this process to its hard limit, if that is allowed. Returns the new soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # a sandbox forbids it: the soft limit stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft


def few_text(number: int) -> str:
    """A warning for a low limit."""
    return (
        f"this process may have {number} file descriptors: {ENOUGH} or more would be right (LimitNOFILE=, "
        "`ulimit -Hn`)"
    )


class Reserve:
    """Descriptors that one part of the agent can free whenever it needs some. For one thread at a time.

    Each is an open file of its own, not a duplicate. So the reserve also helps if the whole machine is out of
    files (ENFILE), a limit that only root may exceed.
    """

    def __init__(self, size: int) -> None:
        """Opens `size` descriptors, or as many as the process can get: see `missing`."""
        self._size = size
        self._held: list[int] = []
        self._blocks = 0
        self.refill()

    @property
    def missing(self) -> int:
        """How many descriptors this reserve lacks."""
        return self._size - len(self._held)

    def refill(self, used: int = 0) -> None:
        """Opens the missing descriptors, as many as the process can get, except the `used` ones that the owner
        uses now. Never raises."""
        with contextlib.suppress(OSError):
            while self.missing > used:
                self._held.append(os.eventfd(0, os.EFD_CLOEXEC))

    def release(self) -> None:
        """Closes all descriptors. Idempotent."""
        while self._held:
            # It leaves the list first, so that no descriptor is closed twice whatever happens here.
            os.close(self._held.pop())

    def give_one(self) -> None:
        """Closes one descriptor, if there is one."""
        if self._held:
            os.close(self._held.pop())

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Within this context the reserve is closed, and its descriptors are free; afterwards it opens them again.
        Contexts may be nested."""
        self._blocks += 1
        self.release()
        try:
            yield
        finally:
            self._blocks -= 1
            if not self._blocks:
                self.refill()

    @contextlib.contextmanager
    def ensured(self, number: int) -> Iterator[None]:
        """As `lent`, but raises OSError (EMFILE) if fewer than `number` descriptors are free even then. For
        libraries that end the process in that case."""
        with self.lent():
            if not available(number):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            yield

    def __del__(self) -> None:
        self.release()


def available(number: int) -> bool:
    """Whether this process can open `number` descriptors now. Opens and closes them."""
    probe = Reserve(number)
    enough = not probe.missing
    probe.release()
    return enough
