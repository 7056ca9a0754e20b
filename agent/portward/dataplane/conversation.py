"""Questions to the kernel's routing and generic netlink: a dump goes out, the bodies of its messages come back.

nf_tables has a conversation of its own in `nfnetlink`, with transactions and batches.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Final

from portward.base.netlink import HEADER, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, messages_of

# The kernel gives as much in one message of a dump as fits here, and no event is as long.
BUFFER: Final = 1 << 17
_DUMP_INTERRUPTED: Final = 0x10
# How often a dump is asked for again that a change interrupted. Each try takes milliseconds.
_TRIES: Final = 100


class Conversation:
    """A netlink socket in the network namespace of the thread that makes it."""

    def __init__(self, protocol: int) -> None:
        """Raises OSError if the kernel does not have this protocol (NETLINK_…)."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def dump(self, kind: int, payload: bytes) -> list[tuple[int, bytes]]:
        """All messages of a dump: type and body. Raises OSError with the kernel's errno, and EAGAIN if what is
        asked for changes all the time."""
        for _ in range(_TRIES):
            found = self._once(kind, payload)
            if found is not None:
                return found
        raise BlockingIOError("the kernel's list changes all the time")

    def _once(self, kind: int, payload: bytes) -> list[tuple[int, bytes]] | None:
        """None if a change interrupted the dump, which then may miss something."""
        self._sequence += 1
        head = HEADER.pack(HEADER.size + len(payload), kind, NLM_F_REQUEST | NLM_F_DUMP, self._sequence, 0)
        self._socket.send(head + payload)
        found: list[tuple[int, bytes]] = []
        interrupted = False
        while True:
            for kind_in, flags, sequence, body in messages_of(self._socket.recv(BUFFER)):
                if sequence != self._sequence:
                    continue
                interrupted |= bool(flags & _DUMP_INTERRUPTED)
                if kind_in in (NLMSG_DONE, NLMSG_ERROR):
                    # A dump that fails half-way says so in its last message.
                    code = -struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
                    if code > 0:
                        raise OSError(code, os.strerror(code))
                    return None if interrupted else found
                found.append((kind_in, body))
