"""The messages of nfnetlink_queue: a packet is found in every layout of a message, and verdicts are right to the
byte."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

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


Attributes = tuple[tuple[int, bytes], ...]


def message_of(family: int, attributes: Iterable[tuple[int, bytes]]) -> bytes:
    """A message of the queue with these attributes (type, value). There is no padding behind the last one."""
    body = struct.pack(">BBH", family, 0, 0)
    for kind, value in attributes:
        body += bytes(-len(body) % 4) + struct.pack("=HH", 4 + len(value), kind) + value
    return struct.pack("=IHHII", 16 + len(body), 3 << 8, 0, 0, 0) + body


def message(
    payload: bytes = SYN,
    *,
    id_: int = 7,
    index: int = 3,
    mark_: int = MISS,
    between: Attributes = BETWEEN["checksum"],
    family: int | None = None,
    hook: int = PREROUTING,
) -> bytes:
    """The kernel's message for a packet. It has no mark if the mark is 0, and no padding behind the payload."""
    if family is None:
        family = 10 if payload[:1] and payload[0] >> 4 == 6 else 2
    attributes = [(1, struct.pack(">IHB", id_, 0x0800, hook)), (5, index.to_bytes(4, "big"))]
    attributes += [(3, mark_.to_bytes(4, "big"))] if mark_ else []
    return message_of(family, [*attributes, *between, (10, payload)])


# VLAN tags: protocol, then priority and number of the VLAN. The last one is a priority without a VLAN.
TAGS = {
    "untagged": b"",
    "802.1Q": b"\x81\x00\x20\x64",
    "802.1ad": b"\x88\xa8\x0f\xff",
    "priority": b"\x81\x00\xe0\x00",
}
BRIDGE = 50


def vlan(tag: bytes) -> tuple[int, bytes]:
    """NFQA_VLAN with a tag, nested and in the kernel's order."""
    return 19 | 0x8000, attribute(2, tag[2:]) + attribute(1, tag[:2])


def bridged_attributes(
    payload: bytes = SYN,
    *,
    id_: int = 7,
    port: int | None = 3,
    bridge: int = BRIDGE,
    mark_: int = MISS,
    tag: bytes = b"",
    protocol: int | None = None,
    between: Attributes = BETWEEN["checksum"],
    hook: int = PREROUTING,
) -> list[tuple[int, bytes]]:
    """The attributes of the kernel's message for a bridged frame, in the kernel's order. Without a `port` it names
    `bridge` alone, as a kernel without br_netfilter names the port. `protocol` is that of the payload."""
    if protocol is None:
        protocol = 0x86DD if payload[:1] and payload[0] >> 4 == 6 else 0x0800
    found = [(1, struct.pack(">IHB", id_, protocol, hook))]
    found += [(7, port.to_bytes(4, "big"))] if port is not None else []
    found += [(5, bridge.to_bytes(4, "big"))]
    found += [(3, mark_.to_bytes(4, "big"))] if mark_ else []
    found += [vlan(tag)] if tag else []
    # The header of the frame has two addresses and the protocol.
    return [*found, (20, bytes(12) + protocol.to_bytes(2, "big")), *between, (10, payload)]


def bridged(payload: bytes = SYN, **more: Any) -> bytes:
    """The kernel's message for a bridged frame: see `bridged_attributes`."""
    return message_of(7, bridged_attributes(payload, **more))


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


@pytest.mark.parametrize("tag", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("payload", [SYN, SYN6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("hook", [PREROUTING, FORWARD])
def test_a_bridged_frame_is_read_with_its_port_and_its_tag(payload: bytes, tag: bytes, hook: int) -> None:
    found = list(read(bridged(payload, tag=tag, hook=hook)))
    assert found == [Packet(7, 3, MISS, HARDWARE[1][4:], payload, hook, tag)]


def test_a_port_in_the_message_of_a_routed_packet_is_ignored() -> None:
    """With br_netfilter such a packet names the port, too. The rule that queued it matched the bridge."""
    for family, payload in ((2, SYN), (10, SYN6)):
        attributes = bridged_attributes(payload, between=(HARDWARE,), tag=TAGS["802.1Q"])
        assert list(read(message_of(family, attributes))) == [Packet(7, BRIDGE, MISS, HARDWARE[1][4:], payload)]
        # The kernel's order in such a message.
        routed = [attributes[0], attributes[2], attributes[1], *attributes[3:]]
        assert list(read(message_of(family, routed))) == [Packet(7, BRIDGE, MISS, HARDWARE[1][4:], payload)]


@pytest.mark.parametrize("payload", [SYN, SYN6], ids=["ipv4", "ipv6"])
def test_a_kernel_without_br_netfilter_names_the_port_as_the_interface(payload: bytes) -> None:
    frame = bridged(payload, port=None, bridge=0x0A0B0C0D)
    assert list(read(frame)) == [Packet(7, 0x0A0B0C0D, MISS, HARDWARE[1][4:], payload)]
    source = payload[12:16] if payload is SYN else payload[8:24]
    assert asked(frame, of=bridged(payload, port=None)) == (
        b"\0\0\0\7", b"\x0a\x0b\x0c\x0d", MISS.to_bytes(4, "big")[:2], source, b"\x02"
    )  # fmt: skip
    assert asked(frame, of=bridged(payload)) is None
    assert asked(bridged(payload), of=frame) is None


@pytest.mark.parametrize("port", [b"", b"\0\0\3", b"\0\0\0\0\3"], ids=["empty", "short", "long"])
def test_a_port_that_cannot_be_read_is_none(port: bytes) -> None:
    attributes = [(kind, port if kind == 7 else value) for kind, value in bridged_attributes()]
    (packet,) = read(message_of(7, attributes))
    assert isinstance(packet, Packet)
    assert packet.indev == 0
    assert template_of(message_of(7, attributes)) is None


# The rest of a second tag (priority and number of the VLAN, then the protocol), before the IP packet. Two of them
# look like the first bytes of an IP header.
SECOND_TAGS = [b"\x00\x64\x08\x00", b"\x45\x00\x08\x00", b"\x60\x00\x86\xdd"]
NO_IP = {
    "802.1Q in 802.1Q": (0x8100, SECOND_TAGS[0]),
    "IPv4 in its second tag": (0x8100, SECOND_TAGS[1]),
    "IPv6 in its second tag": (0x8100, SECOND_TAGS[2]),
    "802.1ad": (0x88A8, SECOND_TAGS[1]),
    "ARP": (0x0806, b"\0\1\x08\0"),
    "PPPoE": (0x8864, b"\x11\0\0\1\0\x2a\0\x21"),
    "the version of the other protocol": (0x86DD, b""),
}


@pytest.mark.parametrize(("protocol", "before"), NO_IP.values(), ids=NO_IP)
@pytest.mark.parametrize("tag", TAGS.values(), ids=TAGS)
def test_what_is_no_ip_by_its_protocol_has_no_payload(protocol: int, before: bytes, tag: bytes) -> None:
    """Otherwise a sender could write a source into its second tag that the kernel does not see."""
    frame = bridged(before + SYN, protocol=protocol, tag=tag)
    assert list(read(frame)) == [Packet(7, 3, MISS, HARDWARE[1][4:], b"", PREROUTING, tag)]
    assert template_of(frame) is None
    assert asked(frame, of=bridged(tag=tag)) is None


@given(cut=st.integers(0, 16), tag=st.sampled_from([tag for tag in TAGS.values() if tag]))
def test_a_tag_that_is_cut_off_is_not_known(cut: int, tag: bytes) -> None:
    """A reset that went out without a tag, or with half of it, would reach another network."""
    kind, nest = vlan(tag)
    (packet,) = read(message_of(7, [*bridged_attributes(), (kind, nest[:cut])]))
    assert isinstance(packet, Packet)
    # The last value ends two bytes before its attribute.
    assert packet.tag == (tag if cut >= 14 else None)


STRANGE_TAGS = {
    "no protocol": attribute(2, b"\0\x64"),
    "no number": attribute(1, b"\x81\0"),
    "another protocol": attribute(2, b"\0\x64") + attribute(1, b"\x91\0"),
    "a long number": attribute(2, b"\0\0\0\x64") + attribute(1, b"\x81\0"),
}


@pytest.mark.parametrize("nest", STRANGE_TAGS.values(), ids=STRANGE_TAGS)
def test_a_tag_that_the_kernel_does_not_take_off_is_not_known(nest: bytes) -> None:
    (packet,) = read(message_of(7, [*bridged_attributes(), (19, nest)]))
    assert isinstance(packet, Packet)
    assert packet.tag is None
    assert (packet.indev, packet.payload) == (3, SYN), "it gets a verdict all the same"


@given(length=st.integers(0, 8))
def test_a_port_of_another_length_is_none(length: int) -> None:
    attributes = [(kind, b"\0\0\0\3\0\0\0\0"[:length]) if kind == 7 else (kind, value)
                  for kind, value in bridged_attributes()]  # fmt: skip
    (packet,) = read(message_of(7, attributes))
    assert isinstance(packet, Packet)
    assert packet.indev == (3 if length == 4 else 0)
    assert (template_of(message_of(7, attributes)) is not None) == (length == 4)


@given(data=st.data(), tag=st.sampled_from(list(TAGS.values())), payload=st.sampled_from([SYN, SYN6]))
def test_a_bridged_frame_is_read_in_any_order_of_its_attributes(
    data: st.DataObject, tag: bytes, payload: bytes
) -> None:
    attributes = data.draw(st.permutations(bridged_attributes(payload, tag=tag, between=BETWEEN["all"])))
    shuffled = message_of(7, attributes)
    assert list(read(shuffled)) == [Packet(7, 3, MISS, HARDWARE[1][4:], payload, PREROUTING, tag)]
    if (shape := template_of(shuffled)) is not None:
        fields = shape.unpack(shuffled, 0)
        assert (fields[1], fields[3], fields[5]) == (b"\0\0\0\7", b"\0\0\0\3", b"\0\xab")


@given(data=st.data(), family=st.sampled_from([2, 7, 10]))
def test_any_attributes_are_read_and_a_shape_of_them_says_the_same(data: st.DataObject, family: int) -> None:
    attributes = bridged_attributes(data.draw(st.sampled_from([SYN, SYN6])), tag=TAGS["802.1Q"])
    one = st.tuples(st.sampled_from([1, 3, 5, 7, 9, 10, 19, 20, 999]), st.binary(max_size=20))
    for _ in range(data.draw(st.integers(0, 3))):  # some are replaced, left out, or there is one more
        place, length = data.draw(st.integers(0, len(attributes))), data.draw(st.integers(0, 1))
        attributes[place : place + length] = data.draw(
            st.lists(st.one_of(st.sampled_from(attributes), one), max_size=1)
        )
        if not attributes:
            break
    datagram = message_of(family, attributes)
    (packet,) = read(datagram)
    assert isinstance(packet, Packet)
    if (shape := template_of(datagram)) is None:
        return
    _, id_, _, index, _, keep, *_, source, flags = shape.unpack(datagram, 0)
    assert agree((id_, index, keep, source, bytes([flags])), packet)


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


def agree(fields: tuple[bytes, ...], packet: Packet) -> bool:
    """Whether the id, index, kept bits, source and flags are those of a packet."""
    assert packet.id is not None
    six = packet.payload[0] >> 4 == 6
    source = packet.payload[8:24] if six else packet.payload[12:16]
    flags = packet.payload[53:54] if six else packet.payload[33:34]
    id_, index, mark_ = (number.to_bytes(4, "big") for number in (packet.id, packet.indev, packet.mark))
    return fields == (id_, index, mark_[:2], source, flags)


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
@pytest.mark.parametrize("tag", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("payload", [SYN, SYN6], ids=["ipv4", "ipv6"])
def test_a_shape_gives_the_fields_of_other_bridged_frames_like_it(
    payload: bytes, tag: bytes, between: Attributes
) -> None:
    """They come by any port of any bridge. All VLANs of one kind of tag have the same shape."""
    like = payload[:8] + payload[8:].replace(b"\x04", b"\x05") + b"data"
    other = bridged(
        like, id_=0x01020304, port=0x0A0B0C0D, bridge=0x0E0F1011, mark_=0x12340000 | mark.MISS,
        tag=tag[:2] + b"\x0a\x0b" if tag else b"", between=between,
    )  # fmt: skip
    source = like[12:16] if payload is SYN else like[8:24]
    expected = (b"\1\2\3\4", b"\x0a\x0b\x0c\x0d", b"\x12\x34", source, b"\x02")
    assert asked(other, of=bridged(payload, tag=tag, between=between)) == expected


@pytest.mark.parametrize("payload", [SYN, SYN6], ids=["ipv4", "ipv6"])
def test_a_shape_is_of_one_family(payload: bytes) -> None:
    """Also if the attributes are the same, as with br_netfilter."""
    attributes = bridged_attributes(payload)
    frame, routed = message_of(7, attributes), message_of(2 if payload is SYN else 10, attributes)
    assert template_of(routed) is None
    assert asked(routed, of=frame) is None
    assert asked(message(payload), of=frame) is None
    assert asked(frame, of=message(payload)) is None
    port_alone = bridged(payload, port=None)
    assert asked(port_alone, of=message(payload)) is None
    assert asked(message(payload), of=port_alone) is None


def test_a_bridged_frame_in_forward_has_no_shape() -> None:
    frame = bridged(hook=FORWARD)
    assert template_of(frame) is None
    assert asked(frame, of=bridged()) is None


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
    "another family": message(SYN, family=5),  # netdev
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


@given(data=st.data(), payload=st.sampled_from([SYN, SYN6]), between=st.sampled_from(list(BETWEEN.values())))
def test_a_shape_never_says_what_reading_does_not(
    data: st.DataObject, payload: bytes, between: Attributes
) -> None:
    frames = [bridged(payload, tag=tag, between=between) for tag in TAGS.values()]
    whole = data.draw(st.sampled_from([message(payload, between=between), *frames]))
    changed = bytearray(whole)
    # From byte 4 on: the first bytes are the length, which the reader gets from the socket instead.
    changed[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.integers(0, 255))
    found = asked(bytes(changed), of=whole)
    if found is None:
        return
    (packet,) = read(bytes(changed))
    assert isinstance(packet, Packet)
    assert agree(found, packet)
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
