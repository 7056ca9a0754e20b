"""The messages of nfnetlink_queue as bytes, in and out. Pure: the socket is `nfqueue.py`.

In comes a datagram for each packet: netlink header, nfgenmsg, attributes. Which attributes, and in which order,
is the kernel's choice and differs from packet to packet (net/netfilter/nfnetlink_queue.c,
nfqnl_build_packet_message): a mark of 0 is left out, a timestamp is there while any socket of the host asks for
timestamps, a link address where the link has one. `read` walks through any of them. The many that are alike go by
a `MessageTemplate`: where things stand in such a message, and all the bytes that must be as they were in the
message that the shape was taken from. What differs in one of them is of another shape, or walked through.

Netlink's own headers are in the host's byte order; what is in the queue's attributes is big-endian.
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
)
from portward.ipc import mark

_SUBSYS_QUEUE: Final = 3
_PACKET, _VERDICT, _CONFIG = (_SUBSYS_QUEUE << 8 | message for message in (0, 1, 2))
# enum nfqnl_attr_type
_PACKET_HDR, _VERDICT_HDR, _MARK, _INDEV, _HWADDR, _PAYLOAD = 1, 2, 3, 5, 9, 10
# enum nfqnl_attr_config
_CFG_CMD, _CFG_PARAMS, _CFG_MAXLEN, _CFG_MASK, _CFG_FLAGS = 1, 2, 3, 4, 5
_BIND, _COPY_PACKET = 1, 2
# Large packets come whole instead of in segments, and without checksums worked out for us. Never F_FAIL_OPEN,
# which accepts what a full queue cannot take.
_F_GSO: Final = 1 << 2

DROP, ACCEPT = 0, 1
# enum nf_inet_hooks, and its place in struct nfqnl_msg_packet_hdr: id (4 bytes), protocol (2), hook (1).
PREROUTING, FORWARD = 0, 2
_HOOK_BYTE: Final = 6

_BODY: Final = HEADER.size + NFGEN.size


class Packet(NamedTuple):
    """A packet that waits for its verdict. `id` None: the message does not tell which one it is. What a message
    leaves out is 0, None or empty; `link_address` has 8 bytes, of which an Ethernet address takes the first 6;
    `hook` is where the packet was queued, PREROUTING or FORWARD."""

    id: int | None
    indev: int
    mark: int
    link_address: bytes | None
    payload: bytes
    hook: int = 0


class Refused(NamedTuple):
    """The kernel's answer to a message of ours: an errno, 0 where it was asked to acknowledge it."""

    errno: int


def read(datagram: bytes) -> Iterator[Packet | Refused]:
    """What a datagram holds, whatever it looks like; a message that is cut off is read as far as it goes."""
    start = 0
    while start + HEADER.size <= len(datagram):
        length, kind, _, _, _ = HEADER.unpack_from(datagram, start)
        end = min(start + length, len(datagram)) if length >= HEADER.size else len(datagram)
        if kind == _PACKET:
            yield _packet(datagram[start:end])
        elif kind == NLMSG_ERROR and end >= start + HEADER.size + 4:
            yield Refused(-struct.unpack_from("=i", datagram, start + HEADER.size)[0])
        start = start + ((end - start + 3) & ~3)


def _packet(message: bytes) -> Packet:
    found = {kind: message[start:end] for kind, start, end in _attributes(message)}
    header, address = found.get(_PACKET_HDR, b""), found.get(_HWADDR)
    return Packet(
        int.from_bytes(header[:4], "big") if len(header) >= 4 else None,
        int.from_bytes(found.get(_INDEV, b"")[:4], "big"),
        int.from_bytes(found.get(_MARK, b"")[:4], "big"),
        address[4:12] if address else None,  # struct nfqnl_msg_packet_hw: length, padding, 8 bytes of address
        found.get(_PAYLOAD, b""),
        header[_HOOK_BYTE] if len(header) > _HOOK_BYTE else PREROUTING,
    )


def _attributes(message: bytes) -> Iterator[tuple[int, int, int]]:
    """The attributes of a message: type, and where its value starts and ends."""
    start = _BODY
    while start + ATTRIBUTE.size <= len(message):
        length, kind = ATTRIBUTE.unpack_from(message, start)
        if length < ATTRIBUTE.size:
            return
        yield kind & TYPE_MASK, start + ATTRIBUTE.size, min(start + length, len(message))
        start += (length + 3) & ~3


# What our bits of the mark say in a packet that asks for a verdict. A message where they say anything else, a
# query of the self-check for one, has no shape.
_ASKING: Final = frozenset(value.to_bytes(2, "big") for value in (mark.MISS, mark.MISS_OPEN))
_AF_INET, _AF_INET6 = 2, 10
# By address family: the IP header and TCP behind it up to the flags, as (first byte, fragment field, protocol,
# source, flags), and what the first byte may be where IP options and extension headers are none.
_LAYOUTS: Final = {
    _AF_INET: ("B5x2sxs2x4s17xB", frozenset({0x45})),
    _AF_INET6: ("B5x0ssx16s29xB", frozenset(range(0x60, 0x70))),
}
_TCP: Final = b"\x06"
# The fragment field of a whole IPv4 packet; IPv6 has none.
WHOLE: Final = frozenset({b"\0\0", b"\x40\0", b""})


class MessageTemplate(NamedTuple):
    """Messages that are laid out alike and carry a TCP segment behind a plain IP header. `unpack(buffer, start)`
    gives

        _, id, _, index, _, keep, *_, payload, _, first, fragment, _, source, flags

    `id`, `index` (of the interface) and `keep` (the half of the mark that is not ours) are bytes as the message
    has them; `payload` is the length of that attribute, `first` the first byte of the IP header, `fragment` its
    fragment field, `source` in network order, `flags` those of TCP. Of a message of `length` bytes they are true
    if `constants` of them are `expected`, `first in firsts`, `fragment in WHOLE`, `payload >= least` and `0 <=
    length - payload - before < 4`; `asks` says all of this.
    """

    unpack: Callable[[Any, int], tuple[Any, ...]]
    constants: Callable[[tuple[Any, ...]], tuple[bytes, ...]]
    expected: tuple[bytes, ...]
    firsts: frozenset[int]
    least: int
    before: int

    def asks(self, fields: tuple[Any, ...], length: int) -> bool:
        """Whether a message with these fields is of this shape."""
        return (
            self.constants(fields) == self.expected
            and fields[-5] in self.firsts
            and fields[-4] in WHOLE
            and fields[-7] >= self.least
            and 0 <= length - fields[-7] - self.before < 4
        )


def template_of(datagram: bytes) -> MessageTemplate | None:
    """The shape that a message is of; None where it has none and has to be walked through each time."""
    if len(datagram) < _BODY + 4 or HEADER.unpack_from(datagram)[:2] != (len(datagram), _PACKET):
        return None
    attributes = list(_attributes(datagram))
    kinds = [kind for kind, _, _ in attributes]
    layout = _LAYOUTS.get(datagram[HEADER.size])
    if layout is None or kinds[:3] != [_PACKET_HDR, _INDEV, _MARK] or kinds[-1] != _PAYLOAD:
        return None
    if len(set(kinds)) != len(kinds) or [end - start for _, start, end in attributes[:3]] != [7, 4, 4]:
        return None
    # The hook is among the constants of a shape: what was queued elsewhere is of none, since its mark is not ours.
    if datagram[attributes[0][1] + _HOOK_BYTE] != PREROUTING:
        return None
    # The length of the message; its header, that of the first attribute; id; the rest of it, the next header;
    # index; the next header; the mark, half of it ours.
    fields = ["=4x20s", "4s", "8s", "4s", "4s", "2s2s"]
    fields += [f"4s{(end - start + 3) & ~3}x" for _, start, end in attributes[3:-1]]
    fields += ["H2s", layout[0]]
    return _shape("".join(fields), datagram, layout[1], attributes[-1][1])


def _shape(fields: str, datagram: bytes, firsts: frozenset[int], payload: int) -> MessageTemplate | None:
    """The shape with these fields, whose payload starts at `payload`, if the datagram is of it."""
    form = struct.Struct(fields)
    if form.size > len(datagram):
        return None
    found = form.unpack_from(datagram)
    last = len(found)
    places = (0, 2, 4, *range(6, last - 7), last - 6, last - 3)
    constants: Callable[[tuple[Any, ...]], tuple[bytes, ...]] = itemgetter(*places)
    before = payload - ATTRIBUTE.size
    shape = MessageTemplate(form.unpack_from, constants, constants(found), firsts, form.size - before, before)
    plain = found[6] in _ASKING and found[-3] == _TCP
    return shape if plain and shape.asks(found, len(datagram)) else None


class Verdicts:
    """Messages with a verdict each, to be sent together: the kernel takes them one by one, and goes on where it
    refuses one."""

    SIZE: Final = 40  # bytes of each: headers, verdict and id, mark
    _MESSAGE: Final = HEADER.pack(SIZE, _VERDICT, NLM_F_REQUEST, 0, 0)
    _MARK_HEADER: Final = ATTRIBUTE.pack(8, _MARK)

    def __init__(self, queue: int, room: int) -> None:
        """Room for so many verdicts on packets of the queue with this number."""
        message = self._MESSAGE + NFGEN.pack(0, 0, queue) + ATTRIBUTE.pack(12, _VERDICT_HDR)
        self._buffer = bytearray(message.ljust(self.SIZE, b"\0") * room)
        self._view = memoryview(self._buffer)
        self._next = len(message)
        self._first = len(message)

    def accept(self, id_: bytes, keep: bytes, own: bytes) -> None:
        """Lets the packet go on; the mark in its two halves. All as bytes, big-endian."""
        _ACCEPTED(self._buffer, self._next, _ACCEPT_BYTES, id_, self._MARK_HEADER, keep, own)
        self._next += self.SIZE

    def give(self, verdict: int, id_: int, mark_: int) -> None:
        """ACCEPT or DROP, with the whole mark."""
        both = mark_.to_bytes(4, "big")
        _ACCEPTED(
            self._buffer, self._next, verdict.to_bytes(4, "big"), id_.to_bytes(4, "big"), self._MARK_HEADER,
            both[:2], both[2:],
        )  # fmt: skip
        self._next += self.SIZE

    def take(self) -> memoryview:
        """What was given since, to be sent before the next verdict is given."""
        given = self._view[: self._next - self._first]
        self._next = self._first
        return given


_ACCEPTED = struct.Struct("=4s4s4s2s2s").pack_into
_ACCEPT_BYTES: Final = ACCEPT.to_bytes(4, "big")


def bind_request(queue: int, length: int) -> bytes:
    """Binds a queue that may hold `length` packets; to be acknowledged. None comes before `copy_request`."""
    return _config(
        queue,
        NLM_F_ACK,
        attribute(_CFG_CMD, struct.pack(">BBH", _BIND, 0, 0))
        + attribute(_CFG_MAXLEN, struct.pack(">I", length))
        + attribute(_CFG_MASK, struct.pack(">I", _F_GSO))
        + attribute(_CFG_FLAGS, struct.pack(">I", _F_GSO)),
    )


def copy_request(queue: int, size: int) -> bytes:
    """Has the packets of a bound queue come, with so many bytes of each from its IP header on."""
    return _config(queue, 0, attribute(_CFG_PARAMS, struct.pack(">IB", size, _COPY_PACKET)))


def _config(queue: int, flags: int, attributes: bytes) -> bytes:
    body = NFGEN.pack(0, 0, queue) + attributes
    return HEADER.pack(HEADER.size + len(body), _CONFIG, NLM_F_REQUEST | flags, 0, 0) + body
