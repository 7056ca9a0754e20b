"""How the policy table lies in its file: the keys and values of each part. Encodes and decodes bytes, and does no
I/O.

Parts of records have a key for each record:

| part | key | value |
| --- | --- | --- |
| head | `head` | what the table agrees with: `Head` |
| links | interface index | `Link`: the segment behind it |
| segments | segment name | its number |
| names | segment number | its name |
| lengths | segment number, family | the prefix lengths in use, most specific first, with their counts |
| accounts | subscription number | subscription and exemption: `table/account.py` |

Parts of rows (`Rows` in `database`) are sorted lists of rows of one size. A row is found by the bytes that it
begins with:

| part | bytes | row |
| --- | --- | --- |
| entries4, entries6 | 20, 32 | place, subscription number, outcome: `Entry` |
| holdings4, holdings6 | 12, 24 | subscription number, place of an entry of its own |
| ids | 20 | UUID of the subscription, its number |
| expiries | 12 | microseconds since 1970, number of a subscription that must be decided again then |
| early | 4 | number of a subscription that was denied ahead of a held change: see `Head.held` |

A *place* is the segment number (3 bytes), the prefix length (1) and the network address (4 or 16). An *outcome* is
a number of 8 bytes. Its first 7 bytes are the last start in microseconds since 1970, or 0 if it is unknown. Its
last byte is the code: the number of the reason (`base.codes`) in bits 0 to 4, bit 5 if the subscription is only
observed, bit 6 for the workload `paas`, bit 7 if the exemption has a rate limit. Numbers are big-endian, so that
they sort. Addresses are in network byte order.

A change of this layout raises `FORMAT`, which is in the head and in the name of each part. A table of another
format, older or newer, is never read. The daemon reads the store anew instead, and removes the other table after
that.

A row has no checksum. A row that no portward writes raises `DamagedError`, so that its reader can deny the one
source that it is about.
"""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, NamedTuple

from portward.base.codes import REASON_BITS, REASON_NUMBER, REASON_OF
from portward.base.interfaces import decoded, encoded
from portward.base.limits import LAST_TIME
from portward.model import Network, Reason

FORMAT: Final = 3
RECORDS: Final = (b"links", b"segments", b"names", b"lengths", b"accounts")
ROWS: Final = (b"entries4", b"entries6", b"holdings4", b"holdings6", b"ids", b"expiries", b"early")
PARTS: Final = (*RECORDS, *ROWS)
HEAD: Final = b"head"
# By the size of their addresses.
ENTRIES: Final = {4: b"entries4", 16: b"entries6"}
HOLDINGS: Final = {4: b"holdings4", 16: b"holdings6"}

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LAST: Final = datetime.max.replace(tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

# The bits of an outcome: 8 for the code, 56 for a time.
CODE_BITS: Final = 8
_REASON: Final = (1 << REASON_BITS) - 1
_OBSERVED, _PAAS, _LIMITED = 0x20, 0x40, 0x80
_CODE: Final = (1 << CODE_BITS) - 1
# The largest numbers of segments (3 bytes) and subscriptions (4 bytes).
LAST_SEGMENT: Final = (1 << 24) - 1
LAST_NUMBER: Final = (1 << 32) - 1
# The latest start that fits, in the year 4253. A later one is stored as this one: it has not come either.
LATEST_START: Final = (1 << 56) - 1


class CodeMeaning(NamedTuple):
    """The meaning of an entry's code for a worker. `damaged` if no version of portward writes that code; the
    source is denied then."""

    reason: Reason
    observed: bool
    limited: bool
    damaged: bool = False


class LookupResult(NamedTuple):
    """The table's answer for a source, and the generation of that answer.

    `observed` if the gateway, the segment or the subscription is only observed. `reject` if a denied packet is
    answered with a TCP reset. `limited` if the exemption has a rate limit. `damaged` if the entry of the source
    cannot be read, so that the source is denied.
    """

    reason: Reason
    observed: bool
    reject: bool
    generation: int
    limited: bool = False
    damaged: bool = False


def _meaning(code: int) -> CodeMeaning:
    reason, limited = REASON_OF.get(code & _REASON), bool(code & _LIMITED)
    if reason is None or (limited and reason is not Reason.ALLOWED_EXEMPT):
        return CodeMeaning(Reason.DENIED_UNKNOWN_SOURCE, observed=False, limited=False, damaged=True)
    return CodeMeaning(reason, bool(code & _OBSERVED), limited)


# By code, because a worker looks one up for each packet.
_MEANINGS: Final = tuple(map(_meaning, range(_CODE + 1)))

_HEAD = struct.Struct("<HQIBd32s16s32sQQ32s")
NO_HASH: Final = bytes(32)
_LINK = struct.Struct("<IB")
OUTCOME: Final = struct.Struct(">IQ")
_LENGTH = struct.Struct("<BI")


class DamagedError(ValueError):
    """Bytes of the policy table that no portward of this format writes."""


class Head(NamedTuple):
    """The state of the store, preset and time that the whole table agrees with.

    `generation` counts the changes of verdicts. `decided_at` is in seconds since 1970. `preset` is the digest of
    the preset. `store` identifies the store that the table was read from. `hash` is the hash of the store's log at
    `revision`: two histories of one store can share a revision, but never a hash.

    `held` is the revision of the store that waits for confirmation, or 0. While it waits, the table also holds the
    denials of later revisions, up to the revision `ahead` of the log, whose hash is `ahead_hash`.
    """

    revision: int
    generation: int
    observe: bool
    reject: bool
    decided_at: float
    preset: bytes
    store: bytes
    hash: bytes = NO_HASH
    held: int = 0
    ahead: int = 0
    ahead_hash: bytes = NO_HASH

    def pack(self) -> bytes:
        """The head as bytes, in the format `FORMAT`."""
        answers = self.observe | self.reject << 1
        return _HEAD.pack(
            FORMAT, self.revision, self.generation, answers, self.decided_at, self.preset, self.store,
            self.hash, self.held, self.ahead, self.ahead_hash,
        )  # fmt: skip

    def decided(self) -> datetime:
        """When every entry was last decided, in UTC."""
        return datetime.fromtimestamp(self.decided_at, UTC)

    @classmethod
    def unpack(cls, data: bytes) -> Head | None:
        """The head; None if the bytes are damaged or of another format, so that the store must be read anew."""
        if len(data) != _HEAD.size:
            return None
        form, revision, generation, answers, decided_at, *rest = _HEAD.unpack(data)
        # Another value is damage. It must not pass, because the agent's clock goes on from this time.
        if form != FORMAT or not 0 <= decided_at <= LAST_TIME.timestamp():
            return None
        return cls(revision, generation, bool(answers & 1), bool(answers & 2), decided_at, *rest)


class Link(NamedTuple):
    """The segment behind an interface index; `observed` if the segment is only observed."""

    segment: int
    observed: bool
    name: str

    def pack(self) -> bytes:
        """The link as bytes."""
        return _LINK.pack(self.segment, self.observed) + encoded(self.name)

    @classmethod
    def unpack(cls, data: bytes) -> Link:
        """The link that `pack` encoded. Raises DamagedError."""
        try:
            segment, observed = _LINK.unpack_from(data)
        except struct.error:
            raise DamagedError(f"a link cannot be read: {data.hex()}") from None
        return cls(segment, bool(observed), decoded(data[_LINK.size :]))


class Entry(NamedTuple):
    """The decision on one attachment. `observed` if its subscription is only observed. `subscription` is the
    table's own number. `started` is in microseconds since 1970, or 0 if it is unknown. `limited` if the attachment
    may send by an exemption that has a rate limit."""

    reason: Reason
    observed: bool
    paas: bool
    subscription: int
    started: int
    limited: bool = False

    @property
    def by_exemption(self) -> bool:
        """True if the attachment may send by an exemption."""
        return self.reason is Reason.ALLOWED_EXEMPT

    def row(self, place: bytes) -> bytes:
        """The row of the entry for a place."""
        code = code_of(self.reason, observed=self.observed, paas=self.paas, limited=self.limited)
        return place + OUTCOME.pack(self.subscription, self.started << CODE_BITS | code)

    @classmethod
    def of(cls, row: bytes) -> Entry:
        """The entry of a row; raises DamagedError for a code that has no meaning."""
        entry, damaged = cls.closed_if_damaged(row)
        if damaged:
            raise DamagedError(f"an entry's code has no meaning: {row.hex()}")
        return entry

    @classmethod
    def closed_if_damaged(cls, row: bytes) -> tuple[Entry, bool]:
        """The entry of a row, and whether its code has no meaning. Such an entry is denied."""
        subscription, outcome = OUTCOME.unpack_from(row, len(row) - OUTCOME.size)
        reason, observed, limited, damaged = _MEANINGS[outcome & _CODE]
        entry = cls(reason, observed, bool(outcome & _PAAS), subscription, outcome >> CODE_BITS, limited)
        return entry, damaged


def code_of(reason: Reason, *, observed: bool, paas: bool, limited: bool = False) -> int:
    """The last byte of an outcome."""
    flags = (_OBSERVED if observed else 0) | (_PAAS if paas else 0) | (_LIMITED if limited else 0)
    return REASON_NUMBER[reason] | flags


def meaning_of(row: bytes) -> CodeMeaning:
    """The meaning of an entry's row for a worker. Never raises: a damaged row denies its source."""
    return _MEANINGS[row[-1]]


def place_of(row: bytes) -> bytes:
    """The place of an entry's row."""
    return row[: -OUTCOME.size]


def make_holdings(rows: list[bytes]) -> None:
    """Turns rows of entries into rows of holdings in place, because a copy of a million rows would take memory."""
    for number, row in enumerate(rows):
        rows[number] = row[-12:-8] + row[:-12]


def stored_name(part: bytes) -> bytes:
    """The name of a part in the file."""
    return b"%s.%d" % (part, FORMAT)


def number(value: int) -> bytes:
    """The number of a segment or a subscription as a key: 4 bytes, big-endian."""
    return value.to_bytes(4, "big")


def due(at: int, subscription: int) -> bytes:
    """The row in `expiries` for a time (microseconds) at which the decision on a subscription changes by itself,
    for example because a grant ends."""
    return at.to_bytes(8, "big") + number(subscription)


def family_key(segment: int, address_bytes: int) -> bytes:
    """The key of the prefix lengths of a segment for the family of addresses of this size (4 or 16)."""
    return segment.to_bytes(3, "big") + (b"4" if address_bytes == 4 else b"6")


def pack_lengths(counts: dict[int, int]) -> bytes:
    """Encodes prefix length → number of entries, the longest prefix first, without lengths that no entry has."""
    used = sorted(((length, count) for length, count in counts.items() if count > 0), reverse=True)
    return b"".join(_LENGTH.pack(length, count) for length, count in used)


def unpack_lengths(data: bytes, address_bytes: int) -> dict[int, int]:
    """The counts that `pack_lengths` encoded for a family (addresses of 4 or 16 bytes). Raises DamagedError."""
    try:
        counts = dict(_LENGTH.iter_unpack(data))
    except struct.error:
        counts = {}
    lengths = list(counts)
    right = len(counts) * _LENGTH.size == len(data) and lengths == sorted(lengths, reverse=True)
    if not right or (lengths and lengths[0] > address_bytes * 8):
        raise DamagedError(f"prefix lengths cannot be read: {data.hex()}")
    return counts


def format_of(head: bytes) -> int:
    """The format of a table, from the bytes of its head. The head of every format begins with it."""
    return int.from_bytes(head[:2], "little")


def prefix_of(segment: int, length: int) -> bytes:
    """The 4 bytes with which all places of a segment and a prefix length begin."""
    return (segment << 8 | length).to_bytes(4, "big")


def after(prefix: bytes) -> bytes:
    """The `prefix_of` the next prefix length. It sorts behind all places that begin with `prefix`."""
    return (int.from_bytes(prefix, "big") + 1).to_bytes(4, "big")


def place(segment: int, network: Network) -> bytes:
    """The place of a prefix in a segment."""
    return prefix_of(segment, network.prefixlen) + network.network_address.packed


def network_of(place: bytes) -> tuple[int, Network]:
    """The segment number and the prefix of a place."""
    (segment, length), address = segment_and_length(place), place[4:]
    if len(address) == 4:
        return segment, IPv4Network((IPv4Address(address), length))
    return segment, IPv6Network((IPv6Address(address), length))


def segment_and_length(place: bytes) -> tuple[int, int]:
    """Segment number and prefix length of a place."""
    return int.from_bytes(place[:3], "big"), place[3]


def address_bytes(place: bytes) -> int:
    """The size of the address in a place: 4 or 16 bytes."""
    return len(place) - 4


def address_of(row: bytes, size: int) -> int:
    """The network address in an entry's row, of `size` bytes (4 or 16), as a number."""
    return int.from_bytes(row[4 : 4 + size], "big")


def masks(address_bytes: int) -> tuple[int, ...]:
    """The netmask of each prefix length of a family, as an integer."""
    bits = address_bytes * 8
    return tuple(((1 << length) - 1) << (bits - length) for length in range(bits + 1))


def microseconds(at: datetime | None) -> int:
    """Microseconds since 1970; 0 for None."""
    return 0 if at is None else (at - _EPOCH) // _MICROSECOND


def instant(at: int) -> datetime | None:
    """The inverse of `microseconds`: None for 0."""
    return None if at == 0 else datetime.fromtimestamp(at // 1_000_000, UTC).replace(microsecond=at % 1_000_000)


def moment(at: int) -> datetime:
    """The time of a row in `expiries`. A later time than Python knows is damage, and gives the last one it
    knows."""
    return _EPOCH + min(at, (_LAST - _EPOCH) // _MICROSECOND) * _MICROSECOND
