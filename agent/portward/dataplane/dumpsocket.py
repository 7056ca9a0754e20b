"""Dumps over rtnetlink and generic netlink: a request goes out, the bodies of all messages come back.

nf_tables has its own socket class in `nfnetlink`, with transactions and batches.
"""

from __future__ import annotations

import os
import socket
from typing import Final

from portward.base.netlink import (
    HEADER,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    errno_of,
    messages_of,
)

# The kernel fills a message of a dump up to the size of this buffer. No event is as long.
BUFFER_BYTES: Final = 1 << 17
# A dump that a change interrupts is repeated this many times. Each try takes milliseconds.
_TRIES: Final = 100


class DumpSocket:
    """A netlink socket in the network namespace of the thread that makes it."""

    def __init__(self, protocol: int) -> None:
        """`protocol` is NETLINK_…. Raises OSError if the kernel does not have it."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> DumpSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def dump(self, kind: int, payload: bytes) -> list[tuple[int, bytes]]:
        """All messages of a dump: type and body. Raises OSError with the kernel's errno, and BlockingIOError if
        changes interrupt every try."""
        for _ in range(_TRIES):
            found = self._dump_once(kind, payload)
            if found is not None:
                return found
        raise BlockingIOError("the kernel's list changes all the time")

    def _dump_once(self, kind: int, payload: bytes) -> list[tuple[int, bytes]] | None:
        """None if a change interrupted the dump, so that it may lack something."""
        self._sequence += 1
        head = HEADER.pack(HEADER.size + len(payload), kind, NLM_F_REQUEST | NLM_F_DUMP, self._sequence, 0)
        self._socket.send(head + payload)
        found: list[tuple[int, bytes]] = []
        interrupted = False
        while True:
            for kind_in, flags, sequence, body in messages_of(self._socket.recv(BUFFER_BYTES)):
                if sequence != self._sequence:
                    continue
                interrupted |= bool(flags & NLM_F_DUMP_INTR)
                if kind_in in (NLMSG_DONE, NLMSG_ERROR):
                    if (code := errno_of(kind_in, body)) > 0:
                        raise OSError(code, os.strerror(code))
                    return None if interrupted else found
                found.append((kind_in, body))
