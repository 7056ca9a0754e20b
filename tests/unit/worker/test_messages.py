"""The messages of nfnetlink_queue: a packet is found in every layout of a message, and verdicts are right to the
byte."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrHopByHop

from portward.ipc import mark
from portward.worker.messages import (
    ACCEPT,
    DROP,
    FORWARD,
    PREROUTING,
    Packet,
    Refused,
    Verdicts,
    bind_request,
    copy_request,
    read,
    template_of,
)

SYN = bytes(IP(src="10.0.0.4", dst="203.0.113.25") / TCP(sport=4000, dport=25, flags="S"))
SYN6 = bytes(IPv6(src="2001:db8::4", dst="2001:db8:25::25") / TCP(sport=4000, dport=25, flags="S"))
MISS = 0x00AB0000 | mark.MISS
# Attributes that the kernel may put between the mark and the payload: priority, link address, timestamp, owner,
# full length of the packet, offload.
HARDWARE = (9, b"\0\x06\0\0" + b"\x02\0\0\0\0\x01\0\0")
BETWEEN = {
    "nothing": (),
    "address": (HARDWARE,),
    "checksum": (HARDWARE, (14, b"\0\0\0\4")),
    "timestamp": (HARDWARE, (4, bytes(16)), (14, b"\0\0\0\4")),
    "all": ((21, b"\0\0\0\7"), HARDWARE, (4, bytes(16)), (16, bytes(4)), (17, bytes(4)), (13, b"\0\0\5\xdc")),
    "unknown": ((999, b"later"),),
}


def attribute(kind: int, value: bytes) -> bytes:
    """A netlink attribute with its padding."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(
    payload: bytes = SYN,
    *,
    id_: int = 7,
    index: int = 3,
    mark_: int = MISS,
    between: tuple[tuple[int, bytes], ...] = BETWEEN["checksum"],
    family: int | None = None,
    hook: int = PREROUTING,
) -> bytes:
    """The kernel's message for a packet. It has no mark if the mark is 0, and no padding behind the payload."""
    if family is None:
        family = 10 if payload[:1] and payload[0] >> 4 == 6 else 2
    body = struct.pack(">BBH", family, 0, 0)
    body += attribute(1, struct.pack(">IHB", id_, 0x0800, hook)) + attribute(5, index.to_bytes(4, "big"))
    body += attribute(3, mark_.to_bytes(4, "big")) if mark_ else b""
    body += b"".join(attribute(kind, value) for kind, value in between)
    body += attribute(10, payload)[: 4 + len(payload)]
    return struct.pack("=IHHII", 16 + len(body), 3 << 8, 0, 0, 0) + body


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
@pytest.mark.parametrize("mark_", [0, MISS, 0xFFFFFFFF])
def test_a_packet_is_read_whatever_comes_with_it(between: tuple[tuple[int, bytes], ...], mark_: int) -> None:
    address = b"\x02\0\0\0\0\x01\0\0" if HARDWARE in between else None
    found = list(read(message(between=between, mark_=mark_)))
    assert found == [Packet(7, 3, mark_, address, SYN)]


def test_what_was_queued_in_forward_is_of_no_shape() -> None:
    """Its mark belongs to another program, even if it looks like a miss."""
    forwarded = message(hook=FORWARD)
    assert list(read(forwarded)) == [Packet(7, 3, MISS, HARDWARE[1][4:], SYN, FORWARD)]
    assert template_of(forwarded) is None
    shape = template_of(message())
    assert shape is not None
    assert shape.asks(shape.unpack(message(), 0), len(forwarded))
    assert not shape.asks(shape.unpack(forwarded, 0), len(forwarded))


def test_every_packet_of_a_datagram_is_read() -> None:
    two = message(id_=1) + bytes(-len(message()) % 4) + message(id_=2)
    assert [packet.id for packet in read(two) if isinstance(packet, Packet)] == [1, 2]


def test_a_message_that_is_cut_off_still_names_its_packet() -> None:
    whole = message()
    for length in range(28, len(whole)):
        (packet,) = read(whole[:length])
        assert isinstance(packet, Packet)
        assert packet.id == 7
        assert SYN.startswith(packet.payload)


def test_a_message_without_a_packet_header_says_so() -> None:
    (packet,) = read(struct.pack("=IHHII", 20, 3 << 8, 0, 0, 0) + bytes(4))
    assert packet == Packet(None, 0, 0, None, b"")


def test_a_refusal_of_the_kernel_is_returned() -> None:
    refusal = struct.pack("=IHHIIi", 36, 2, 0, 0, 0, -2) + bytes(16)
    assert list(read(refusal)) == [Refused(2)]


@given(st.binary(max_size=200))
def test_any_bytes_are_read_to_their_end(data: bytes) -> None:
    list(read(data))
    template_of(data)


def asked(datagram: bytes, of: bytes) -> tuple[bytes, ...] | None:
    """The id, index, kept bits, source and flags that the shape of message `of` finds in `datagram`; None if it
    has another shape."""
    shape = template_of(of)
    assert shape is not None
    slot = datagram.ljust(1024, b"\xee")
    fields = shape.unpack(slot, 0)
    if not shape.asks(fields, len(datagram)):
        return None
    _, id_, _, index, _, keep, *_, source, flags = fields
    return id_, index, keep, source, bytes([flags])


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
@pytest.mark.parametrize("payload", [SYN, SYN6], ids=["ipv4", "ipv6"])
def test_a_shape_gives_the_fields_of_other_messages_like_it(
    payload: bytes, between: tuple[tuple[int, bytes], ...]
) -> None:
    like = payload[:8] + payload[8:].replace(b"\x04", b"\x05") + b"data"
    other = message(like, id_=0x01020304, index=0x0A0B0C0D, mark_=0x12340000 | mark.MISS, between=between)
    source = like[12:16] if payload is SYN else like[8:24]
    expected = (b"\1\2\3\4", b"\x0a\x0b\x0c\x0d", b"\x12\x34", source, b"\x02")
    assert asked(other, of=message(payload, between=between)) == expected


OTHERS = {
    "no mark": message(mark_=0),
    "a verdict's mark": message(mark_=1),
    "a query": message(mark_=mark.PROBE),
    "no packet header": struct.pack("=IHHII", 20, 3 << 8, 0, 0, 0) + bytes(4),
    "UDP": message(bytes(IP(src="10.0.0.4") / UDP(dport=25)).ljust(60, b"\0")),
    "IP options": message(bytes(IP(src="10.0.0.4", options=[b"\1" * 4]) / TCP(dport=25))),
    "a later fragment": message(bytes(IP(src="10.0.0.4", frag=3) / TCP(dport=25))),
    "a first fragment": message(bytes(IP(src="10.0.0.4", flags="MF") / TCP(dport=25))),
    "a short payload": message(SYN[:33]),
    "no payload": message(b"", family=2),
    "not the version of its family": message(SYN6, family=2),
    "extension headers": message(bytes(IPv6(src="::1") / IPv6ExtHdrHopByHop() / TCP(dport=25))),
    "another family": message(SYN, family=7),
    "an error": struct.pack("=IHHIIi", 36, 2, 0, 0, 0, -2) + bytes(96),
    "cut off": message(SYN + bytes(400))[:200],
    "two messages": message() + message(),
    "something behind the payload": message(between=(*BETWEEN["checksum"], (10, SYN), (14, bytes(4)))),
}


@pytest.mark.parametrize("datagram", OTHERS.values(), ids=OTHERS)
def test_what_is_not_plain_has_no_shape_and_is_of_none(datagram: bytes) -> None:
    assert template_of(datagram) is None
    for between in BETWEEN.values():
        for payload in (SYN, SYN6):
            assert asked(datagram, of=message(payload, between=between)) is None


# From byte 4 on: the first bytes are the length, which the reader gets from the socket instead.
@given(place=st.integers(4, 83), value=st.integers(0, 255), between=st.sampled_from(list(BETWEEN.values())))
def test_a_shape_never_says_what_reading_does_not(
    place: int, value: int, between: tuple[tuple[int, bytes], ...]
) -> None:
    whole = message(between=between)
    changed = bytearray(whole)
    changed[place] = value
    found = asked(bytes(changed), of=whole)
    if found is None:
        return
    (packet,) = read(bytes(changed))
    assert isinstance(packet, Packet)
    assert packet.id is not None
    source, flags = packet.payload[12:16], packet.payload[33:34]
    assert found == (
        packet.id.to_bytes(4, "big"), packet.indev.to_bytes(4, "big"), packet.mark.to_bytes(4, "big")[:2],
        source, flags,
    )  # fmt: skip
    assert packet.mark & mark.OWN in (mark.MISS, mark.MISS_OPEN)


def test_verdicts_are_what_the_kernel_expects() -> None:
    verdicts = Verdicts(5, 3)
    verdicts.give(DROP, 258, 0x00AB0003)
    verdicts.accept(b"\0\0\1\3", b"\x12\x34", b"\0\x0d")
    given_ = bytes(verdicts.take())
    for number, (verdict, id_, both) in enumerate([(DROP, 258, 0x00AB0003), (ACCEPT, 259, 0x1234000D)]):
        one = given_[number * 40 :][:40]
        assert one[:16] == struct.pack("=IHHII", 40, 3 << 8 | 1, 1, 0, 0)
        assert one[16:20] == b"\0\0\0\5", "the number of the queue"
        assert one[20:32] == attribute(2, struct.pack(">II", verdict, id_))
        assert one[32:40] == attribute(3, struct.pack(">I", both))
    assert len(given_) == 80
    assert not verdicts.take(), "each is taken once"


def test_a_bound_queue_accepts_nothing_when_it_is_full() -> None:
    request = bind_request(5, 4096)
    assert attribute(3, struct.pack(">I", 4096)) in request
    # The mask of the flags to set, and their values: F_GSO alone, not F_FAIL_OPEN (1).
    assert request.endswith(attribute(4, struct.pack(">I", 4)) + attribute(5, struct.pack(">I", 4)))
    assert attribute(2, struct.pack(">IB", 512, 2)) in copy_request(5, 512)
