"""Netlink messages: headers and attributes as bytes. Pure.

Headers are in the host's byte order, except the last field of nfgenmsg (linux/netlink.h,
linux/netfilter/nfnetlink.h). The caller defines the byte order of attribute values.

This is not pyroute2, because pyroute2 does not notice that a dump was interrupted, and needs 9 s for 10,000
interfaces. docs/adr/0006-netlink-code-of-our-own.md has the measurements of both.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from errno import EBADMSG
from typing import Final

NETLINK_NETFILTER: Final = 12
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_ECHO, NLM_F_DUMP = 0x1, 0x4, 0x8, 0x300
NLM_F_DUMP_INTR: Final = 0x10  # on each message of a dump that a change has interrupted
NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x200, 0x400, 0x800
NESTED: Final = 0x8000
TYPE_MASK: Final = 0x3FFF

# struct nlmsghdr: length, type, flags, sequence, port. struct nfgenmsg: family, version, resource. struct nlattr:
# length, type.
HEADER = struct.Struct("=IHHII")
NFGEN = struct.Struct(">BBH")
ATTRIBUTE = struct.Struct("=HH")
_I32: Final = struct.Struct("=i")


def attribute(kind: int, value: bytes) -> bytes:
    """An attribute of this type, padded to four bytes."""
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(value), kind) + value + b"\0" * (-len(value) % 4)


def nest(kind: int, attributes: bytes) -> bytes:
    """An attribute that contains attributes."""
    return attribute(kind | NESTED, attributes)


def string(value: str) -> bytes:
    """A name as the value of an attribute."""
    return value.encode() + b"\0"


def messages_of(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """The messages of a datagram: (type, flags, sequence number, body). Ends at the first malformed one."""
    start = 0
    while start + HEADER.size <= len(data):
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, start)
        if length < HEADER.size:
            return
        yield kind, flags, sequence, data[start + HEADER.size : start + length]
        start += (length + 3) & ~3


def errno_of(kind: int, body: bytes) -> int:
    """The errno in the body of an NLMSG_ERROR, or of the NLMSG_DONE that ends a dump; 0 for success. A dump that
    fails half-way ends with it, too. An NLMSG_ERROR without an errno is EBADMSG, never a success."""
    if len(body) >= _I32.size:
        return -int(_I32.unpack_from(body)[0])
    return 0 if kind == NLMSG_DONE else EBADMSG


def attributes_of(data: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """The attributes of a message or of a nest: (type, value). Ends at the first malformed one."""
    end = len(data)
    while start + ATTRIBUTE.size <= end:
        length, kind = ATTRIBUTE.unpack_from(data, start)
        if length < ATTRIBUTE.size:
            return
        yield kind & TYPE_MASK, data[start + ATTRIBUTE.size : start + length]
        start += (length + 3) & ~3
