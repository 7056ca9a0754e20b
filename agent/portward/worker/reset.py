"""Sends the RST of a rejected connection out of the interface by which its packet came.

The kernel's own `reject` routes the RST by the main table. If tenants' addresses overlap, it would reach the wrong
tenant, with the other one's sequence numbers. Here the RST goes out as a frame to the sender's link address,
without a route. The RST to a bridged frame goes out of the port of the bridge, with the VLAN tag of that frame.
Needs CAP_NET_RAW.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import Final

from portward.worker.packet import ETHERTYPES

_RST, _ACK, _RST_ACK = 0x04, 0x10, 0x14
_SYN, _FIN = 0x02, 0x01
_TCP = struct.Struct(">HHIIBBHHH")

# Resets that a worker sends per second and segment to sources that the kernel has not cached yet. The default of
# `segment_resets`, which limits resets to cached sources, is the same. A reset takes several times as long as a
# verdict, and a tenant with a rejected /64 can send every packet from a new source.
FIRST_RESETS_PER_SECOND: Final = 500


class Budget:
    """Counts, for each interface, the resets of this second to sources that the kernel has not cached yet."""

    def __init__(self) -> None:
        self._second = 0
        # Interface index → resets sent in this second.
        self._spent: dict[int, int] = {}

    def left(self, index: int) -> bool:
        """Whether one more reset may be sent through the interface `index`."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._spent = second, {}
        return self._spent.get(index, 0) < FIRST_RESETS_PER_SECOND

    def take(self, index: int) -> bool:
        """Counts one more reset; False if none is left."""
        if not self.left(index):
            return False
        self._spent[index] = self._spent.get(index, 0) + 1
        return True


class Resetter:
    """Sends resets through a packet socket, in the network namespace of the thread that creates it."""

    def __init__(self) -> None:
        """Raises OSError (EPERM) without CAP_NET_RAW."""
        # Protocol 0: the socket receives nothing.
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0)
        self._socket.setblocking(False)

    def send(self, reset: bytes, index: int, link_address: bytes | None, tag: bytes | None = b"") -> bool:
        """Sends an IP packet that `reset_for` made through the interface `index` to `link_address`, with the VLAN
        tag `tag` (see `messages.Packet`). Returns False if it could not be sent, also if the link has no addresses
        or the tag is not known: without its tag, a reset would reach another network."""
        if not link_address or tag is None:
            return False
        try:
            name = socket.if_indextoname(index)
            protocol, data = framed(reset, tag)
            self._socket.sendto(data, (name, protocol, 0, 0, link_address))
        except (OSError, UnicodeError):  # UnicodeError: the name is not UTF-8
            return False
        return True


def framed(reset: bytes, tag: bytes) -> tuple[int, bytes]:
    """The protocol of the Ethernet frame for an IP packet, and what stands behind the frame's header. `tag` is a
    VLAN tag of 4 bytes (protocol, TCI), or empty."""
    ethertype = ETHERTYPES[reset[0] >> 4]
    if tag:
        return int.from_bytes(tag[:2], "big"), tag[2:] + ethertype + reset
    return int.from_bytes(ethertype, "big"), reset


def reset_for(packet: bytes, tcp: int) -> bytes | None:
    """The IP packet that resets the connection of `packet` (RFC 9293, 3.10.7.1); None if no reset is due.

    A reset never gets a reset, nor does a fragment that ends before the TCP flags.
    """
    if len(packet) < tcp + 20:
        return None
    source, destination, sequence, acknowledged, offset, flags = struct.unpack_from(">HHIIBB", packet, tcp)
    if flags & _RST:
        return None
    if flags & _ACK:
        numbers = (acknowledged, 0, _RST)
    else:
        length = _tcp_length(packet, tcp, (offset >> 4) * 4) + bool(flags & _SYN) + bool(flags & _FIN)
        numbers = (0, (sequence + length) & 0xFFFFFFFF, _RST_ACK)
    header = _TCP.pack(destination, source, numbers[0], numbers[1], 5 << 4, numbers[2], 0, 0, 0)
    return _ipv4(packet, header) if packet[0] >> 4 == 4 else _ipv6(packet, header)


def _tcp_length(packet: bytes, tcp: int, header: int) -> int:
    """The length of the segment's data in bytes, from the length in the IP header."""
    total: int = (
        struct.unpack_from(">H", packet, 2)[0]
        if packet[0] >> 4 == 4
        else 40 + struct.unpack_from(">H", packet, 4)[0]
    )
    return max(0, total - tcp - header)


def _ipv4(packet: bytes, tcp: bytes) -> bytes:
    source, destination = packet[16:20], packet[12:16]
    pseudo = source + destination + struct.pack(">BBH", 0, 6, len(tcp))
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, 6, 0) + source + destination
    ip = ip[:10] + _checksum(ip) + ip[12:]
    return ip + tcp[:16] + _checksum(pseudo + tcp) + tcp[18:]


def _ipv6(packet: bytes, tcp: bytes) -> bytes:
    source, destination = packet[24:40], packet[8:24]
    pseudo = source + destination + struct.pack(">II", len(tcp), 6)
    ip = struct.pack(">IHBB", 6 << 28, len(tcp), 6, 64) + source + destination
    return ip + tcp[:16] + _checksum(pseudo + tcp) + tcp[18:]


def _checksum(data: bytes) -> bytes:
    """The Internet checksum of `data` (RFC 1071), 2 bytes. The checksum field in `data` must be zero."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    folded: int = ~(total + (total >> 16)) & 0xFFFF
    return folded.to_bytes(2, "big")
