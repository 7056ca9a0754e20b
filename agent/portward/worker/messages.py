"""Encodes and decodes the messages of nfnetlink_queue. Does no I/O: the socket is in `nfqueue`.

The kernel sends a datagram for each packet: netlink header, nfgenmsg, attributes. It chooses which attributes, and
their order, for each packet (net/netfilter/nfnetlink_queue.c, nfqnl_build_packet_message). A mark of 0 is left
out, a timestamp is there while any socket of the host asks for timestamps, and a link address is there if the link
has one. `read` decodes any of them. Messages that are alike are decoded by a `MessageTemplate`, which says where
the fields are in such a message, and which bytes must be the same. A message that differs in one of these bytes
needs another template, or `read`.

A message of family AF_BRIDGE carries a bridged frame. Its NFQA_IFINDEX_PHYSINDEV is the port of the bridge by
which the frame came, and its NFQA_IFINDEX_INDEV is the bridge. A kernel that was built without br_netfilter
(CONFIG_BRIDGE_NETFILTER) gives no NFQA_IFINDEX_PHYSINDEV: there NFQA_IFINDEX_INDEV is the port. The port has the
segment, so it is the interface of the frame. A message of another family may have an NFQA_IFINDEX_PHYSINDEV, too,
if br_netfilter is loaded. It is ignored: the rule that queued the packet matched NFQA_IFINDEX_INDEV.

Netlink's own headers are in the host's byte order. The attributes of the queue are big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, Final, NamedTuple

from portward.base.netlink import (
    ATTRIBUTE,
    HEADER,
    NFGEN,
    NLM_F_ACK,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    TYPE_MASK,
    attribute,
    attributes_of,
    errno_of,
)
from portward.ipc import mark
from portward.worker.packet import ETHERTYPES

_SUBSYS_QUEUE: Final = 3
_PACKET, _VERDICT, _CONFIG = (_SUBSYS_QUEUE << 8 | message for message in (0, 1, 2))
# enum nfqnl_attr_type
_PACKET_HDR, _VERDICT_HDR, _MARK, _INDEV, _PHYSINDEV, _HWADDR, _PAYLOAD, _VLAN = 1, 2, 3, 5, 7, 9, 10, 19
# enum nfqnl_vlan_attr
_VLAN_PROTO, _VLAN_TCI = 1, 2
# enum nfqnl_attr_config
_CFG_CMD, _CFG_PARAMS, _CFG_MAXLEN, _CFG_MASK, _CFG_FLAGS = 1, 2, 3, 4, 5
_BIND, _COPY_PACKET = 1, 2
# NFQA_CFG_F_GSO: large packets come whole instead of in segments, and the kernel does not compute their checksums.
# Never NFQA_CFG_F_FAIL_OPEN, which accepts packets that a full queue cannot take.
_F_GSO: Final = 1 << 2

DROP, ACCEPT = 0, 1
# enum nf_inet_hooks; linux/netfilter_bridge.h has the same numbers (NF_BR_PRE_ROUTING, NF_BR_FORWARD).
PREROUTING, FORWARD = 0, 2
# Places in struct nfqnl_msg_packet_hdr: id (4 bytes), protocol (2), hook (1).
_PROTOCOL: Final = slice(4, 6)
_HOOK_BYTE: Final = 6
# The protocols of a VLAN tag that the kernel takes off a frame: 802.1Q and 802.1ad.
_TAG_PROTOCOLS: Final = frozenset({b"\x81\x00", b"\x88\xa8"})

_BODY: Final = HEADER.size + NFGEN.size
# The byte of a message that is its address family.
_FAMILY: Final = HEADER.size
_AF_INET, _AF_BRIDGE, _AF_INET6 = 2, 7, 10


class Packet(NamedTuple):
    """A packet that waits for its verdict. A field that the message leaves out is 0, None or empty; without an
    `id` the packet cannot be answered. `indev` is the index of the interface by which it came; for a bridged frame
    the port, and 0 if the message names none. `link_address` has 8 bytes, of which an Ethernet address
    takes the first 6. `payload` is empty if a bridged frame carries no IP packet, or a VLAN tag behind its first
    one. `hook` is where the packet was queued, PREROUTING or FORWARD. `tag` is the VLAN tag of a bridged frame:
    protocol and TCI, 2 bytes each, big-endian. It is empty for an untagged frame, and None if there is a tag that
    cannot be read."""

    id: int | None
    indev: int
    mark: int
    link_address: bytes | None
    payload: bytes
    hook: int = 0
    tag: bytes | None = b""


class Refused(NamedTuple):
    """The kernel's answer to a message of ours: an errno, or 0 for an acknowledgement."""

    errno: int


def read(datagram: bytes) -> Iterator[Packet | Refused]:
    """The messages in a datagram of any content. A message that is cut off is read as far as it goes."""
    start = 0
    while start + HEADER.size <= len(datagram):
        length, kind, _, _, _ = HEADER.unpack_from(datagram, start)
        end = min(start + length, len(datagram)) if length >= HEADER.size else len(datagram)
        if kind == _PACKET:
            yield _packet(datagram[start:end])
        elif kind == NLMSG_ERROR and end >= start + HEADER.size + 4:
            yield Refused(errno_of(kind, datagram[start + HEADER.size : end]))
        start = start + ((end - start + 3) & ~3)


def _packet(message: bytes) -> Packet:
    found = {kind: message[start:end] for kind, start, end in _attributes(message)}
    header, address = found.get(_PACKET_HDR, b""), found.get(_HWADDR)
    packet = Packet(
        int.from_bytes(header[:4], "big") if len(header) >= 4 else None,
        int.from_bytes(found.get(_INDEV, b"")[:4], "big"),
        int.from_bytes(found.get(_MARK, b"")[:4], "big"),
        address[4:12] if address else None,  # struct nfqnl_msg_packet_hw: length, padding, 8 bytes of address
        found.get(_PAYLOAD, b""),
        header[_HOOK_BYTE] if len(header) > _HOOK_BYTE else PREROUTING,
    )
    if not found or message[_FAMILY] != _AF_BRIDGE:
        return packet
    port = found.get(_PHYSINDEV, found.get(_INDEV, b""))
    return packet._replace(
        indev=int.from_bytes(port, "big") if len(port) == 4 else 0,
        payload=packet.payload if _is_ip(header[_PROTOCOL], packet.payload) else b"",
        tag=_tag(found.get(_VLAN)),
    )


def _is_ip(protocol: bytes, payload: bytes) -> bool:
    """Whether the payload of a bridged frame is an IP packet, by the frame's `protocol` (2 bytes) and by its own
    version. The kernel takes one VLAN tag off a frame. If there is a second one, the payload begins with the rest
    of it, which the sender can make look like an IP header."""
    return bool(payload) and ETHERTYPES.get(payload[0] >> 4, b"") == protocol


def _tag(nest: bytes | None) -> bytes | None:
    """The tag in the attribute NFQA_VLAN (None if the message has none), as `Packet.tag` has it."""
    if nest is None:
        return b""
    found = dict(attributes_of(nest))
    protocol, tci = found.get(_VLAN_PROTO, b""), found.get(_VLAN_TCI, b"")
    return protocol + tci if protocol in _TAG_PROTOCOLS and len(tci) == 2 else None


def _attributes(message: bytes) -> Iterator[tuple[int, int, int]]:
    """The attributes of a message: type, and the offsets at which the value starts and ends."""
    start = _BODY
    while start + ATTRIBUTE.size <= len(message):
        length, kind = ATTRIBUTE.unpack_from(message, start)
        if length < ATTRIBUTE.size:
            return
        yield kind & TYPE_MASK, start + ATTRIBUTE.size, min(start + length, len(message))
        start += (length + 3) & ~3


_Unpack = Callable[[Any, int], tuple[Any, ...]]
# Our half of the mark in a packet that asks for a verdict. A message in which it has another value, such as a
# query of the self-check, has no template.
_ASKING: Final = frozenset(value.to_bytes(2, "big") for value in (mark.MISS, mark.MISS_OPEN))
# A bridged frame has the layout of the family that its protocol names.
_FAMILIES: Final = {ETHERTYPES[4]: _AF_INET, ETHERTYPES[6]: _AF_INET6}
# The first attributes of a packet that asks for a verdict, in the kernel's order, and their lengths in bytes.
_FIRST: Final = ([_PACKET_HDR, _INDEV, _MARK], [7, 4, 4])
_FIRST_BRIDGED: Final = ([_PACKET_HDR, _PHYSINDEV, _INDEV, _MARK], [7, 4, 4, 4])
# By address family: the IP header, and the TCP header up to the flags, as (first byte, fragment field, protocol,
# source, flags); and the values of the first byte of an IP header without options and extension headers.
_LAYOUTS: Final = {
    _AF_INET: ("B5x2sxs2x4s17xB", frozenset({0x45})),
    _AF_INET6: ("B5x0ssx16s29xB", frozenset(range(0x60, 0x70))),
}
_TCP: Final = b"\x06"
# The fragment field of a whole IPv4 packet; IPv6 has none.
WHOLE: Final = frozenset({b"\0\0", b"\x40\0", b""})


class MessageTemplate(NamedTuple):
    """How to decode messages that are laid out alike and carry a TCP segment behind a plain IP header. The family
    is among the bytes that must be the same, so a template for bridged frames never matches a routed packet.
    `unpack(buffer, start)` returns

        _, id, _, index, _, keep, *_, payload, _, first, fragment, _, source, flags

    `id`, `index` (of the interface, for a bridged frame the port) and `keep` (the half of the mark that is not
    ours) are bytes as the message has them. `payload` is the length of that attribute in bytes, `first` the first
    byte of the IP header, `fragment` its fragment field, `source` the address in network byte order, `flags` the
    TCP flags. They hold for a message of `length` bytes if `constants(fields) == expected`, `first in firsts`,
    `fragment in WHOLE`, `payload >= least` and `0 <= length - payload - before < 4`. `asks` tests all of this.
    """

    unpack: _Unpack
    constants: Callable[[tuple[Any, ...]], tuple[bytes, ...]]
    expected: tuple[bytes, ...]
    firsts: frozenset[int]
    least: int
    before: int

    def asks(self, fields: tuple[Any, ...], length: int) -> bool:
        """Whether this template decodes a message of `length` bytes with these fields."""
        return (
            self.constants(fields) == self.expected
            and fields[-5] in self.firsts
            and fields[-4] in WHOLE
            and fields[-7] >= self.least
            and 0 <= length - fields[-7] - self.before < 4
        )


def template_of(datagram: bytes) -> MessageTemplate | None:
    """The template of a message; None if only `read` can decode it."""
    if len(datagram) < _BODY + 4 or HEADER.unpack_from(datagram)[:2] != (len(datagram), _PACKET):
        return None
    attributes = list(_attributes(datagram))
    kinds = [kind for kind, _, _ in attributes]
    bridged = datagram[_FAMILY] == _AF_BRIDGE
    with_bridge = bridged and _PHYSINDEV in kinds
    first, lengths = _FIRST_BRIDGED if with_bridge else _FIRST
    number = len(first)
    if kinds[:number] != first or kinds[-1] != _PAYLOAD:
        return None
    if len(set(kinds)) != len(kinds) or [end - start for _, start, end in attributes[:number]] != lengths:
        return None
    # Hook and protocol are constants. A packet that another hook queued has no template: its mark is not ours.
    header = datagram[attributes[0][1] : attributes[0][2]]
    layout = _LAYOUTS.get(_FAMILIES.get(header[_PROTOCOL], 0) if bridged else datagram[_FAMILY])
    if layout is None or header[_HOOK_BYTE] != PREROUTING:
        return None
    # The length of the message; its header and the first attribute's header; id; the rest of that attribute and
    # the next header; index; if the message names port and bridge the next header, and the bridge, of which any
    # will do; the next header; the mark in two halves, of which the second is ours.
    fields = ["=4x20s", "4s", "8s", "4s", "4s4x" if with_bridge else "", "4s", "2s2s"]
    fields += [f"4s{(end - start + 3) & ~3}x" for _, start, end in attributes[number:-1]]
    fields += ["H2s", layout[0]]
    form = struct.Struct("".join(fields))
    if form.size > len(datagram):
        return None
    unpack = _mark_forward(form) if with_bridge else form.unpack_from
    return _template(unpack, form.size, datagram, layout[1], attributes[-1][1])


def _mark_forward(form: struct.Struct) -> _Unpack:
    """Unpacks a bridged frame into fields at the places that `MessageTemplate` has for all: the header before the
    bridge goes behind the mark. That makes the fast path some 15 % slower for bridged frames. The loop stays as it
    is, so routed packets pay nothing."""
    unpack, number = form.unpack_from, len(form.unpack(bytes(form.size)))
    ordered: Callable[[tuple[Any, ...]], tuple[Any, ...]] = itemgetter(0, 1, 2, 3, 5, 6, 7, 4, *range(8, number))
    return lambda buffer, start: ordered(unpack(buffer, start))


def _template(
    unpack: _Unpack, size: int, datagram: bytes, firsts: frozenset[int], payload: int
) -> MessageTemplate | None:
    """The template with this `unpack`, which reads `size` bytes, and the payload at offset `payload`, if it
    decodes the datagram."""
    found = unpack(datagram, 0)
    last = len(found)
    places = (0, 2, 4, *range(6, last - 7), last - 6, last - 3)
    constants: Callable[[tuple[Any, ...]], tuple[bytes, ...]] = itemgetter(*places)
    before = payload - ATTRIBUTE.size
    template = MessageTemplate(unpack, constants, constants(found), firsts, size - before, before)
    plain = found[6] in _ASKING and found[-3] == _TCP
    return template if plain and template.asks(found, len(datagram)) else None


class Verdicts:
    """Verdict messages that are sent together. The kernel takes them one by one, and goes on after one that it
    refuses."""

    SIZE: Final = 40  # bytes of each: headers, verdict and id, mark
    _MESSAGE: Final = HEADER.pack(SIZE, _VERDICT, NLM_F_REQUEST, 0, 0)
    _MARK_HEADER: Final = ATTRIBUTE.pack(8, _MARK)

    def __init__(self, queue: int, room: int) -> None:
        """Reserves room for `room` verdicts on packets of the queue with this number."""
        message = self._MESSAGE + NFGEN.pack(0, 0, queue) + ATTRIBUTE.pack(12, _VERDICT_HDR)
        self._buffer = bytearray(message.ljust(self.SIZE, b"\0") * room)
        self._view = memoryview(self._buffer)
        self._next = len(message)
        self._first = len(message)

    def accept(self, id_: bytes, keep: bytes, own: bytes) -> None:
        """Accepts a packet and sets its mark: `keep` is the half of others, `own` ours. All as bytes,
        big-endian."""
        _ACCEPTED(self._buffer, self._next, _ACCEPT_BYTES, id_, self._MARK_HEADER, keep, own)
        self._next += self.SIZE

    def give(self, verdict: int, id_: int, mark_: int) -> None:
        """Adds the verdict ACCEPT or DROP on packet `id_`, with the whole mark."""
        both = mark_.to_bytes(4, "big")
        _ACCEPTED(
            self._buffer, self._next, verdict.to_bytes(4, "big"), id_.to_bytes(4, "big"), self._MARK_HEADER,
            both[:2], both[2:],
        )  # fmt: skip
        self._next += self.SIZE

    def take(self) -> memoryview:
        """The verdicts since the last call, to be sent before the next one is added."""
        given = self._view[: self._next - self._first]
        self._next = self._first
        return given


_ACCEPTED = struct.Struct("=4s4s4s2s2s").pack_into
_ACCEPT_BYTES: Final = ACCEPT.to_bytes(4, "big")


def bind_request(queue: int, length: int) -> bytes:
    """The message that binds a queue of `length` packets and asks for an acknowledgement. No packet comes before
    `copy_request`."""
    return _config(
        queue,
        NLM_F_ACK,
        attribute(_CFG_CMD, struct.pack(">BBH", _BIND, 0, 0))
        + attribute(_CFG_MAXLEN, struct.pack(">I", length))
        + attribute(_CFG_MASK, struct.pack(">I", _F_GSO))
        + attribute(_CFG_FLAGS, struct.pack(">I", _F_GSO)),
    )


def copy_request(queue: int, size: int) -> bytes:
    """The message that makes the packets of a bound queue come, each with `size` bytes from its IP header on."""
    return _config(queue, 0, attribute(_CFG_PARAMS, struct.pack(">IB", size, _COPY_PACKET)))


def _config(queue: int, flags: int, attributes: bytes) -> bytes:
    body = NFGEN.pack(0, 0, queue) + attributes
    return HEADER.pack(HEADER.size + len(body), _CONFIG, NLM_F_REQUEST | flags, 0, 0) + body
