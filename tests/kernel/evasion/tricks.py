"""Tricks with which a sender may hide that a packet goes to port 25.

A trick builds its packets, from the IP header on, for a source and a destination. `reason` says what must stop
them if the source is denied: the source's verdict (DENY), portward's counter of a rule or a worker (HEADERS,
UNREAD, NO_IP), or the kernel itself, by one of its own counters (`Ip…`). HARMLESS packets go through, because no
receiver finds a port in them. `arrives` says whether the same packets from an allowed source reach the listener's
stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from scapy.layers.inet import (
    IP,
    TCP,
    IPOption,
    IPOption_LSRR,
    IPOption_NOP,
    IPOption_Router_Alert,
    IPOption_RR,
    IPOption_SSRR,
    fragment,
)
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    IPv6ExtHdrSegmentRouting,
    PadN,
)
from scapy.packet import Packet, Raw

DENY: Final = "deny"
HEADERS: Final = "headers"
HARMLESS: Final = "harmless"
# A worker reads 512 bytes of a packet. It drops a packet whose port comes after them.
UNREAD: Final = "malformed"
# On a bridge, frames that are no well-formed packets.
NO_IP: Final = "unknown_frames"
# The kernel keeps the fragments until the rest comes, which may be never.
WAITS: Final = "IpReasmReqds"

Packets: TypeAlias = Sequence[Packet]
Build: TypeAlias = Callable[[str, str], Packets]

_DATA: Final = b"EHLO spam.example\r\n"
_PORTS: Final = b"\x0f\xa0\x00\x19"  # 4000, 25


class Trick(NamedTuple):
    """A trick, see above. `build(source, destination)` gives its packets. If the gateway tracks connections it
    reassembles fragments first, and then `tracked`, if set, is the reason instead of `reason`. A bridge does not,
    and no IP stack looks at the packet before the rules: there `bridged`, if set, is the reason."""

    name: str
    build: Build
    reason: str = DENY
    arrives: bool = True
    tracked: str = ""
    bridged: str = ""

    def stopped_by(self, *, bridged: bool, conntrack: bool) -> str:
        """The reason for which such a gateway must stop its packets."""
        if bridged:
            return self.bridged or self.reason
        return self.tracked if conntrack and self.tracked else self.reason


def _tcp(flags: str | int = "S", data: bytes = b"", **fields: Any) -> Packet:
    found: Packet = TCP(**{"sport": 4000, "dport": 25, "seq": 1, "flags": flags, **fields})
    return found / Raw(data) if data else found


def _v4(flags: str | int = "S", data: bytes = b"", **fields: Any) -> Build:
    """One TCP segment over IPv4; `fields` are TCP's."""
    return lambda source, to: [IP(src=source, dst=to) / _tcp(flags, data, **fields)]


def _ip(**fields: Any) -> Build:
    """A SYN under an IPv4 header with these fields."""
    return lambda source, to: [IP(src=source, dst=to, **fields) / _tcp()]


def _every_flag(source: str, to: str) -> Packets:
    header = IPv6 if ":" in source else IP
    return [header(src=source, dst=to) / _tcp(flags) for flags in range(512)]


def _cut(source: str, to: str, *, size: int = 8) -> list[Packet]:
    """A segment with data, in fragments of `size` bytes."""
    whole = IP(src=source, dst=to, id=7) / _tcp("PA", _DATA)
    pieces: list[Packet] = fragment(whole, fragsize=size)  # type: ignore[no-untyped-call] # scapy's
    return pieces


def _piece(source: str, to: str, offset: int, data: bytes, *, more: bool = True, number: int = 9) -> Packet:
    """One IPv4 fragment; `offset` is in units of 8 bytes."""
    return IP(src=source, dst=to, id=number, proto=6, frag=offset, flags="MF" if more else 0) / Raw(data)


def _port_rewritten(source: str, to: str) -> Packets:
    """RFC 1858: the first fragment says port 587, another one with offset 0 says port 25."""
    honest, spam = bytes(_tcp(dport=587)), bytes(_tcp())
    return [
        _piece(source, to, 0, honest[:8]),
        _piece(source, to, 0, spam[:8]),
        _piece(source, to, 1, spam[8:], more=False),
    ]


def _flags_rewritten(source: str, to: str) -> Packets:
    """RFC 3128: the first fragment says ACK, an overlapping one with offset 1 says SYN."""
    return [
        _piece(source, to, 0, bytes(_tcp("A"))[:16]),
        _piece(source, to, 1, bytes(_tcp("S"))[8:], more=False),
    ]


def _empty_first(source: str, to: str) -> Packets:
    segment = bytes(_tcp())
    return [
        _piece(source, to, 0, b""),
        _piece(source, to, 0, segment[:8]),
        _piece(source, to, 1, segment[8:], more=False),
    ]


FOUR: Final = (
    Trick("syn", _v4()),
    Trick("syn-fin", _v4("SF")),
    Trick("syn-rst", _v4("SR")),
    Trick("syn-psh-urg", _v4("SPU")),
    Trick("syn-ece-cwr", _v4("SEC")),
    Trick("syn-ack", _v4("SA")),
    Trick("fin", _v4("F")),
    Trick("rst", _v4("R")),
    Trick("lone-ack", _v4("A")),
    Trick("no-flags", _v4(0)),
    Trick("christmas-tree", _v4("FPU")),
    Trick("every-flag", _every_flag),
    Trick("data-in-the-syn", _v4("S", _DATA)),
    Trick("data-without-a-connection", _v4("PA", _DATA)),
    Trick("fast-open-with-a-cookie", _v4("S", _DATA, options=[(34, b"\1\2\3\4\5\6\7\x08")])),
    Trick("fast-open-experimental", _v4("S", _DATA, options=[(254, b"\xf9\x89\1\2\3\4")])),
    Trick("mptcp-capable", _v4(options=[(30, b"\x01\x81")])),
    Trick("mptcp-join", _v4(options=[(30, b"\x10\x01" + bytes(8))])),
    Trick("mptcp-data", _v4("PA", _DATA, options=[(30, b"\x20\x05" + bytes(12))])),
    Trick("md5-signature", _v4(options=[(19, bytes(16))])),
    Trick("forty-bytes-of-options", _v4(options=[("NOP", None)] * 40)),
    Trick("option-without-a-length", _v4(options=[(99, b"")])),
    Trick("data-offset-too-small", _v4(dataofs=4)),
    Trick("data-offset-beyond-the-end", _v4(dataofs=15)),
    Trick("reserved-bits", _v4(reserved=7)),
    Trick("urgent-pointer", _v4("SU", urgptr=65535)),
    Trick("from-port-25", _v4(sport=25)),
    Trick("from-port-0", _v4(sport=0)),
    Trick("wrong-tcp-checksum", _v4(chksum=0xDEAD)),
    Trick("wrong-ip-checksum", _ip(chksum=0xDEAD), "IpInHdrErrors", arrives=False, bridged=DENY),
    Trick("header-too-short", _ip(ihl=4), "IpInHdrErrors", arrives=False, bridged=NO_IP),
    Trick("version-6-in-an-ipv4-frame", _ip(version=6), "IpInHdrErrors", arrives=False, bridged=NO_IP),
    Trick("header-beyond-the-end", _ip(ihl=15), "IpInHdrErrors", arrives=False, bridged=NO_IP),
    Trick("longer-than-the-frame", _ip(len=1400), "IpExtInTruncatedPkts", arrives=False, bridged=NO_IP),
    Trick("cut-after-the-ports", _ip(len=24)),
    Trick("cut-within-the-ports", _ip(len=23), HARMLESS, bridged=DENY),
    Trick("no-hop-left", _ip(ttl=1), arrives=False),
    Trick("no-hop-at-all", _ip(ttl=0), arrives=False),
    Trick("evil-bit", _ip(flags="evil")),
    Trick("type-of-service", _ip(tos=0xFF)),
    Trick("loose-source-route", _ip(options=IPOption_LSRR(routers=["203.0.113.25"])), arrives=False),
    Trick("strict-source-route", _ip(options=IPOption_SSRR(routers=["203.0.113.25"])), arrives=False),
    Trick("record-route", _ip(options=IPOption_RR(routers=["192.0.2.1"] * 9, pointer=40))),
    Trick("timestamps", _ip(options=IPOption(b"\x44\x0c\x05\x00" + bytes(8)))),
    Trick("router-alert", _ip(options=IPOption_Router_Alert())),
    Trick("forty-bytes-of-ip-options", _ip(options=[IPOption_NOP()] * 40)),
    Trick("fragments-of-8-bytes", _cut),
    Trick("fragments-of-24-bytes", lambda source, to: _cut(source, to, size=24)),
    Trick("fragments-last-first", lambda source, to: _cut(source, to)[::-1]),
    Trick("fragments-out-of-order", lambda source, to: _cut(source, to)[1::2] + _cut(source, to)[::2]),
    Trick("first-fragment-twice", lambda source, to: _cut(source, to)[:1] + _cut(source, to)),
    Trick("only-a-first-fragment", lambda source, to: _cut(source, to)[:1], arrives=False, tracked=WAITS),
    Trick("port-rewritten-by-a-fragment", _port_rewritten, arrives=False, tracked=WAITS),
    Trick("flags-rewritten-by-a-fragment", _flags_rewritten, arrives=False, tracked=WAITS),
    Trick("empty-first-fragment", _empty_first),
    Trick("fragment-of-its-own", lambda source, to: [_piece(source, to, 0, bytes(_tcp()), more=False)]),
)


def _pad(count: int = 4) -> list[Packet]:
    return [PadN(optdata=bytes(count))]


def _v6(*headers: Callable[[], Packet], flags: str | int = "S", data: bytes = b"", **fields: Any) -> Build:
    """A TCP segment behind these extension headers; `fields` are IPv6's."""

    def build(source: str, to: str) -> Packets:
        packet: Packet = IPv6(src=source, dst=to, **fields)
        for header in headers:
            packet /= header()
        return [packet / _tcp(flags, data)]

    return build


def _hop() -> Packet:
    return IPv6ExtHdrHopByHop(options=_pad())


def _dest() -> Packet:
    return IPv6ExtHdrDestOpt(options=_pad())


def _long_dest() -> Packet:
    return IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(250)) for _ in range(4)])


def _route(kind: int, left: int = 0) -> Callable[[], Packet]:
    return lambda: IPv6ExtHdrRouting(type=kind, segleft=left, addresses=["2001:db8:25::25"])


def _atomic() -> Packet:
    return IPv6ExtHdrFragment(offset=0, m=0, id=5)


def _first(**fields: Any) -> Callable[[], Packet]:
    return lambda: IPv6ExtHdrFragment(**{"offset": 0, "m": 1, "id": 7, **fields})


def _cut6(
    source: str, to: str, *sizes: int, before: bytes = b"", kind: int = 6, data: bytes = _DATA
) -> list[Packet]:
    """`before` (extension headers of type `kind`) and a TCP segment, cut after each of `sizes` bytes."""
    # The checksum covers the addresses, which scapy knows only in a whole packet.
    segment = bytes(IPv6(src=source, dst=to) / _tcp("PA", data))[40:]
    whole, start = before + segment, 0
    pieces: list[Packet] = []
    for size in (*sizes, len(before) + len(segment) - sum(sizes)):
        end = start + size
        header = IPv6ExtHdrFragment(nh=kind, offset=start // 8, m=int(end < len(whole)), id=11)
        pieces.append(IPv6(src=source, dst=to) / header / Raw(whole[start:end]))
        start = end
    return pieces


def _headless(*headers: Callable[[], Packet]) -> Build:
    """A first fragment that ends before the TCP header (RFC 7112), then the rest."""

    def build(source: str, to: str) -> Packets:
        packet: Packet = IPv6(src=source, dst=to)
        for header in headers:
            packet /= header()
        return [packet]

    return build


_OPTIONS: Final = bytes(IPv6ExtHdrDestOpt(nh=6, options=[PadN(optdata=bytes(4))]))

SIX: Final = (
    Trick("syn", _v6()),
    Trick("every-flag", _every_flag),
    Trick("data-in-the-syn", _v6(data=_DATA)),
    Trick("hop-by-hop", _v6(_hop)),
    Trick("destination-options", _v6(_dest)),
    Trick("hop-by-hop-and-destination-options", _v6(_hop, _dest)),
    Trick("long-destination-options", _v6(_long_dest), UNREAD, arrives=False),
    Trick("hop-by-hop-not-first", _v6(_dest, _hop), arrives=True),
    Trick("routing-0", _v6(_route(0))),
    Trick("routing-0-with-a-hop-left", _v6(_route(0, 1))),
    Trick("routing-2", _v6(_route(2))),
    Trick("routing-3", _v6(_route(3))),
    Trick("routing-253", _v6(_route(253))),
    Trick("segment-routing", _v6(lambda: IPv6ExtHdrSegmentRouting(addresses=["2001:db8:25::25"], segleft=0))),
    Trick("atomic-fragment", _v6(_atomic)),
    Trick("atomic-fragment-behind-options", _v6(_hop, _dest, _atomic)),
    Trick("options-behind-an-atomic-fragment", _v6(_atomic, _dest)),
    Trick("two-atomic-fragments", _v6(_atomic, _atomic)),
    Trick("no-hop-left", _v6(hlim=1), arrives=False),
    Trick("flow-label-and-class", _v6(fl=0xFFFFF, tc=0xFF)),
    Trick("payload-longer-than-the-frame", _v6(plen=1400), "Ip6InTruncatedPkts", arrives=False, bridged=NO_IP),
    Trick("cut-after-the-ports", _v6(plen=4)),
    Trick("fragments", lambda source, to: _cut6(source, to, 24)),
    Trick("fragments-of-8-bytes", lambda source, to: _cut6(source, to, 8, 8, 8)),
    Trick("fragments-last-first", lambda source, to: _cut6(source, to, 24)[::-1]),
    Trick(
        "first-fragment-with-options-only",
        lambda source, to: _cut6(source, to, 8, before=_OPTIONS, kind=60),
        HEADERS,
        arrives=False,
    ),
    Trick(
        "first-fragment-with-half-of-the-options",
        lambda source, to: _cut6(
            source, to, 16, before=bytes(IPv6ExtHdrDestOpt(nh=6, options=[PadN(optdata=bytes(20))])), kind=60
        ),
        HEADERS,
        arrives=False,
    ),
    Trick(
        "first-fragment-behind-hop-by-hop", _headless(_hop, _first(nh=60), lambda: Raw(_OPTIONS)), HEADERS, False
    ),
    Trick("first-fragment-of-nothing", _headless(_first(nh=6)), HEADERS, arrives=False),
    Trick("first-fragment-of-two-bytes", _headless(_first(nh=6), lambda: Raw(_PORTS[:2])), HEADERS, arrives=False),
    Trick("fragment-within-a-fragment", _headless(_first(nh=44), _first(nh=6, id=9)), HEADERS, arrives=False),
    Trick("nothing-behind-no-next-header", _v6(lambda: IPv6ExtHdrDestOpt(nh=59, options=_pad())), HARMLESS),
)
