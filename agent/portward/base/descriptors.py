"""File descriptors for an emergency.

A process that is out of descriptors cannot do what repairs a gateway: libnftables calls exit() if it gets no
socket, and a worker that ended cannot be started again. So each part of the agent that must work then keeps a
`Reserve`: it holds descriptors that it does not need, and gives them back for as long as they are needed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from typing import Final

# With fewer the agent runs too, but nothing is left for what nobody has thought of.
ENOUGH: Final = 1024


def limit() -> int:
    """The number of descriptors that this process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_limit() -> int:
    """Raises the soft limit of this process to its hard one, as far as that is allowed. Gives the number of
    descriptors that the process may have now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # a sandbox forbids it: the soft limit stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft


def few_text(number: int) -> str:
    """A line that says that there are few descriptors."""
    return (
        f"this process may have {number} file descriptors: {ENOUGH} or more would be right (LimitNOFILE=, "
        "`ulimit -Hn`)"
    )


class Reserve:
    """Descriptors that one part of the agent can have whenever it needs them. For one thread at a time.

    Each is an open file of its own, not a copy of one: so it also counts where the whole machine is out of files
    (ENFILE), which root alone may exceed.
    """

    def __init__(self, size: int) -> None:
        """Opens `size` descriptors, or as many as there are: see `missing`."""
        self._size = size
        self._held: list[int] = []
        self._blocks = 0
        self.refill()

    @property
    def missing(self) -> int:
        """How many descriptors this reserve lacks."""
        return self._size - len(self._held)

    def refill(self, used: int = 0) -> None:
        """Takes what is missing, as far as there are descriptors; `used` of them the owner uses now. Never
        raises."""
        with contextlib.suppress(OSError):
            while self.missing > used:
                self._held.append(os.eventfd(0, os.EFD_CLOEXEC))

    def release(self) -> None:
        """Gives all descriptors back. Idempotent."""
        while self._held:
            # It leaves the list first: no descriptor is closed twice, whatever happens here.
            os.close(self._held.pop())

    def give_one(self) -> None:
        """Gives one descriptor back, if there is one."""
        if self._held:
            os.close(self._held.pop())

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Within this block the reserve's descriptors are free for others; afterwards it takes them again. Such
        blocks may stand in each other."""
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
        """As `lent`; raises OSError (EMFILE) if fewer than `number` descriptors are free even so. For code of
        others that ends the process then."""
        with self.lent():
            if not available(number):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            yield

    def __del__(self) -> None:
        self.release()


def available(number: int) -> bool:
    """Whether this process could open so many descriptors now. Needs no memory that is worth counting, and leaves
    none of them open."""
    probe = Reserve(number)
    enough = not probe.missing
    probe.release()
    return enough
