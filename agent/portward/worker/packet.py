"""Parses a queued packet: which source sends to which port. Does no I/O and never raises.

The kernel has found the policy port already. The worker finds it again, so that it never gives a verdict to a
packet that it reads in another way than the kernel. It walks IPv6 extension headers as the kernel does
(hop-by-hop, routing, destination options, fragment; net/ipv6/exthdrs_core.c).
"""

from __future__ import annotations

from typing import Final, NamedTuple

# The protocol of an Ethernet frame by the IP version that it carries, 2 bytes, big-endian (linux/if_ether.h).
ETHERTYPES: Final = {4: b"\x08\x00", 6: b"\x86\xdd"}
_TCP: Final = 6
# Hop-by-hop, routing, destination options: next header, then the length beyond the first 8 bytes, in units of 8.
_OPTION_HEADERS: Final = frozenset({0, 43, 60})
_FRAGMENT: Final = 44
_AUTHENTICATION: Final = 51
# RFC 8200, 4.1 allows each header once and destination options twice, so an honest chain is far shorter. The walk
# must end whatever the bytes are.
_MAX_EXTENSION_HEADERS: Final = 16
_SYN_ACK_RST_FIN: Final = 0x17
_SYN: Final = 0x02
# The TCP flags of a segment that opens a connection.
ATTEMPTS: Final = frozenset(flags for flags in range(256) if flags & _SYN_ACK_RST_FIN == _SYN)


class Segment(NamedTuple):
    """The fields of a TCP segment that a verdict needs.

    `source` is the address in network byte order (4 or 16 bytes), `port` the destination port, `tcp` the offset of
    the TCP header from the start of the IP header in bytes. `attempt` is True for a SYN that opens a connection.
    """

    source: bytes
    port: int
    tcp: int
    attempt: bool


def parse(packet: bytes) -> Segment | None:
    """The TCP segment in an IPv4 or IPv6 packet (from the IP header on), or None if there is none."""
    if len(packet) < 20:
        return None
    version = packet[0] >> 4
    if version == 4:
        if packet[9] != _TCP or packet[6] & 0x1F or packet[7]:
            return None
        return _segment(packet, packet[12:16], (packet[0] & 0x0F) * 4)
    if version == 6 and len(packet) >= 40:
        start = _tcp_start(packet)
        return None if start is None else _segment(packet, packet[8:24], start)
    return None


def _segment(packet: bytes, source: bytes, tcp: int) -> Segment | None:
    # The shortest first fragment that chain `screen` matches ends after the ports.
    if tcp < 20 or len(packet) < tcp + 4:
        return None
    flags = packet[tcp + 13] if len(packet) > tcp + 13 else 0
    return Segment(source, packet[tcp + 2] << 8 | packet[tcp + 3], tcp, flags in ATTEMPTS)


def _tcp_start(packet: bytes) -> int | None:
    """The offset of the TCP header in an IPv6 packet in bytes, or None."""
    following, start = packet[6], 40
    for _ in range(_MAX_EXTENSION_HEADERS):
        if following == _TCP:
            return start
        if len(packet) < start + 8:
            return None
        if following == _FRAGMENT:
            if packet[start + 2] or packet[start + 3] & 0xF8:
                return None
            following, start = packet[start], start + 8
        elif following in _OPTION_HEADERS:
            following, start = packet[start], start + 8 + packet[start + 1] * 8
        elif following == _AUTHENTICATION:
            following, start = packet[start], start + (packet[start + 1] + 2) * 4
        else:
            return None
    return None
