"""How the policy table lies in its file: the keys and values of each of its parts. Pure bytes.

| part | key | value |
| --- | --- | --- |
| head | `head` | what the table agrees with: `Head` |
| links | interface index | `Link`: the segment behind it |
| segments | segment name | its number |
| lengths | segment number, family | the prefix lengths in use, most specific first, with their counts |
| entries | segment number, prefix length, address | `Entry`: the reason, and what it was decided from |
| subscriptions | subscription number | subscription and exemption, as JSON |
| ids | UUID of the subscription | its number |
| holdings | subscription number | the keys of its entries (many) |
| expiries | microseconds since 1970 | number of a subscription whose grant ends then (many) |

Numbers in keys are big-endian, so that they sort; addresses are in network byte order. A change of this
layout raises `FORMAT`, and a table of another format is built anew.
"""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, NamedTuple

from portward.model import Network, Reason

FORMAT: Final = 1
PARTS: Final = (
    b"links", b"segments", b"lengths", b"entries", b"subscriptions", b"ids", b"holdings", b"expiries",
)  # fmt: skip
# Parts whose keys hold many values each, sorted.
MANY: Final = frozenset({b"holdings", b"expiries"})
HEAD: Final = b"head"

# Prefix lengths of IPv6 stand above those of IPv4 in the one byte of a key.
_V6: Final = 64
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

REASONS: Final = tuple(Reason)
_REASON_NUMBER: Final = {reason: number for number, reason in enumerate(REASONS)}
_OBSERVED, _PAAS = 1, 2

_HEAD = struct.Struct("<HQIBd32s16s")
_LINK = struct.Struct("<IB")
_ENTRY = struct.Struct("<BBIq")
_LENGTH = struct.Struct("<BI")


class Head(NamedTuple):
    """What the whole table agrees with. `generation` counts the changes of verdicts; `decided_at` is in
    seconds since 1970; `preset` is the digest of the preset; `store` says which store it was read from."""

    revision: int
    generation: int
    observe: bool
    reject: bool
    decided_at: float
    preset: bytes
    store: bytes

    def pack(self) -> bytes:
        """The head as bytes."""
        answers = self.observe | self.reject << 1
        return _HEAD.pack(
            FORMAT, self.revision, self.generation, answers, self.decided_at, self.preset, self.store
        )

    @classmethod
    def unpack(cls, data: bytes) -> Head | None:
        """The head, or None where the bytes are of another format."""
        if len(data) != _HEAD.size:
            return None
        form, revision, generation, answers, decided_at, preset, store = _HEAD.unpack(data)
        if form != FORMAT:
            return None
        return cls(revision, generation, bool(answers & 1), bool(answers & 2), decided_at, preset, store)


class Link(NamedTuple):
    """The segment behind an interface index; `observed` where the segment is only observed."""

    segment: int
    observed: bool
    name: str

    def pack(self) -> bytes:
        """The link as bytes."""
        return _LINK.pack(self.segment, self.observed) + self.name.encode()

    @classmethod
    def unpack(cls, data: bytes) -> Link:
        """The link that `pack` wrote."""
        segment, observed = _LINK.unpack_from(data)
        return cls(segment, bool(observed), data[_LINK.size :].decode())


class Entry(NamedTuple):
    """What is held of one attachment. `observed` where its subscription is only observed; `subscription` is
    the table's own number; `started` in microseconds since 1970, 0 where unknown."""

    reason: Reason
    observed: bool
    paas: bool
    subscription: int
    started: int

    def pack(self) -> bytes:
        """The entry as 14 bytes."""
        flags = (_OBSERVED if self.observed else 0) | (_PAAS if self.paas else 0)
        return _ENTRY.pack(_REASON_NUMBER[self.reason], flags, self.subscription, self.started)

    @classmethod
    def unpack(cls, data: bytes) -> Entry:
        """The entry that `pack` wrote."""
        reason, flags, subscription, started = _ENTRY.unpack(data)
        return cls(REASONS[reason], bool(flags & _OBSERVED), bool(flags & _PAAS), subscription, started)


def number(value: int) -> bytes:
    """A segment's or subscription's number as a key: 4 bytes, big-endian."""
    return value.to_bytes(4, "big")


def family_key(segment: int, address_bytes: int) -> bytes:
    """The key of the prefix lengths of a segment for the family of addresses of this size (4 or 16)."""
    return segment.to_bytes(3, "big") + (b"4" if address_bytes == 4 else b"6")


def pack_lengths(counts: dict[int, int]) -> bytes:
    """Prefix length → how many entries have it, as bytes, the longest first."""
    return b"".join(_LENGTH.pack(length, count) for length, count in sorted(counts.items(), reverse=True))


def unpack_lengths(data: bytes) -> dict[int, int]:
    """What `pack_lengths` wrote, in its order."""
    return dict(_LENGTH.iter_unpack(data))


def entry_key(segment: int, length: int, address: bytes) -> bytes:
    """The key of an entry; `address` is the network address (4 or 16 bytes), `length` its prefix length."""
    return entry_start(segment, length, len(address)) + address


def entry_start(segment: int, length: int, address_bytes: int) -> bytes:
    """What the keys of all entries of a segment with this prefix length begin with, before the address."""
    return segment.to_bytes(3, "big") + bytes((length + _V6 if address_bytes == 16 else length,))


def key_of(segment: int, network: Network) -> bytes:
    """The key of the entry for a prefix in a segment."""
    return entry_key(segment, network.prefixlen, network.network_address.packed)


def network_of(key: bytes) -> tuple[int, Network]:
    """The segment number and the prefix of an entry's key."""
    segment, length, address = int.from_bytes(key[:3], "big"), key[3], key[4:]
    if len(address) == 4:
        return segment, IPv4Network((IPv4Address(address), length))
    return segment, IPv6Network((IPv6Address(address), length - _V6))


def masks(address_bytes: int) -> tuple[int, ...]:
    """The netmask of each prefix length of a family, as an integer."""
    bits = address_bytes * 8
    return tuple(((1 << length) - 1) << (bits - length) for length in range(bits + 1))


def microseconds(at: datetime | None) -> int:
    """Microseconds since 1970; 0 for None."""
    if at is None:
        return 0
    since = at - _EPOCH
    return (since.days * 86400 + since.seconds) * 1_000_000 + since.microseconds


def instant(at: int) -> datetime | None:
    """What `microseconds` was given; None for 0."""
    return None if at == 0 else datetime.fromtimestamp(at // 1_000_000, UTC).replace(microsecond=at % 1_000_000)
