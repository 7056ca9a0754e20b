"""The self-check's question to a worker: a packet over the loopback that the kernel puts into the worker's queue.

Chain `screen` recognises it by mark and source address, and queues it to the worker that its source port names.
The worker answers with the epoch that it sees. Chain `learn` counts the answer and drops the packet. No other
firewall sees it, because it is sent below the output hooks and ends before connection tracking. Needs CAP_NET_RAW.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from portward.ipc import mark

# The same as PROBE_SOURCE in portward.nft.
SOURCE: Final = bytes([127, 80, 87, 25])
_LOOPBACK: Final = ("lo", 0x0800, 0, 0, b"\0" * 6)
_SO_MARK: Final = 36  # asm-generic/socket.h


class Prober:
    """Asks workers in the network namespace of the thread that creates it."""

    def __init__(self) -> None:
        """Raises OSError (EPERM) without CAP_NET_RAW or CAP_NET_ADMIN."""
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_MARK, mark.PROBE)
        self._socket.setblocking(False)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def ask(self, place: int, port: int) -> None:
        """Asks the worker of the queue at `place` (from 0), with a segment to the policy port `port`. Raises
        OSError if it cannot be sent, for example because the loopback is down."""
        self._socket.sendto(query(place, port), _LOOPBACK)


def query(place: int, port: int) -> bytes:
    """The IPv4 packet of a question. Its checksums are right, else the kernel would drop it before any hook."""
    tcp: bytes = struct.pack(">HHIIBBHHH", place + 1, port, 0, 0, 5 << 4, 0, 0, 0, 0)
    ip: bytes = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, 6, 0) + SOURCE + SOURCE
    total = sum(struct.unpack(">10H", ip))
    folded = ~((total >> 16) + (total & 0xFFFF)) & 0xFFFF
    checked: bytes = ip[:10] + folded.to_bytes(2, "big") + ip[12:]
    return checked + tcp
