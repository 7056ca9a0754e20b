"""How the policy table lies in its file: the keys and values of each of its parts. Pure bytes.

Parts of records have a key for each:

| part | key | value |
| --- | --- | --- |
| head | `head` | what the table agrees with: `Head` |
| links | interface index | `Link`: the segment behind it |
| segments | segment name | its number |
| names | segment number | its name |
| lengths | segment number, family | the prefix lengths in use, most specific first, with their counts |
| accounts | subscription number | subscription and exemption: `table/account.py` |

Parts of rows (`table/rows.py`) are sorted lists of rows of one size; what comes first finds a row:

| part | bytes | row |
| --- | --- | --- |
| entries4, entries6 | 20, 32 | place, subscription number, outcome: `Entry` |
| holdings4, holdings6 | 12, 24 | subscription number, place of an entry of its own |
| ids | 20 | UUID of the subscription, its number |
| expiries | 12 | microseconds since 1970, number of a subscription that is to be decided again then |

A *place* is segment number (3 bytes), prefix length (1) and network address (4 or 16). An *outcome* is one number
of 8 bytes: the last start in microseconds since 1970 (0: unknown), and in its last six bits the workload, whether
the subscription is only observed, and the reason, or in its place that the exemption carries a limit. Numbers are
big-endian, so that they sort; addresses are in network byte order.

A change of this layout raises `FORMAT`, which stands in the name of each part: a table of another format is not
looked at, and goes when the table was built anew.
"""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, NamedTuple

from portward.interfaces import decoded, encoded
from portward.model import Network, Reason

FORMAT: Final = 2
RECORDS: Final = (b"links", b"segments", b"names", b"lengths", b"accounts")
ROWS: Final = (b"entries4", b"entries6", b"holdings4", b"holdings6", b"ids", b"expiries")
PARTS: Final = (*RECORDS, *ROWS)
HEAD: Final = b"head"
# By the size of their addresses.
ENTRIES: Final = {4: b"entries4", 16: b"entries6"}
HOLDINGS: Final = {4: b"holdings4", 16: b"holdings6"}

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

REASONS: Final = tuple(Reason)
_REASON_NUMBER: Final = {reason: number for number, reason in enumerate(REASONS)}
# An outcome's bits: four for the reason, two flags, and 58 for a time, which reach beyond the year 9999.
_REASON, _OBSERVED, _PAAS, CODE_BITS = 15, 16, 32, 6
_CODE: Final = (1 << CODE_BITS) - 1
# In the place of a reason's number: exempt, within a limit of new connections.
_LIMITED: Final = 15
_BY_NUMBER: Final = dict(enumerate(REASONS)) | {_LIMITED: Reason.ALLOWED_EXEMPT}
# What a worker needs of an entry, by its code: the reason, whether it is only observed, whether it has a limit.
_FINDINGS: Final = tuple(
    (_BY_NUMBER.get(code & _REASON), bool(code & _OBSERVED), code & _REASON == _LIMITED)
    for code in range(_CODE + 1)
)

_HEAD = struct.Struct("<HQIBd32s16s")
_LINK = struct.Struct("<IB")
OUTCOME: Final = struct.Struct(">IQ")
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

    def decided(self) -> datetime:
        """When every entry was last decided, in UTC."""
        return datetime.fromtimestamp(self.decided_at, UTC)

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
        return _LINK.pack(self.segment, self.observed) + encoded(self.name)

    @classmethod
    def unpack(cls, data: bytes) -> Link:
        """The link that `pack` wrote."""
        segment, observed = _LINK.unpack_from(data)
        return cls(segment, bool(observed), decoded(data[_LINK.size :]))


class Entry(NamedTuple):
    """What is held of one attachment. `observed` where its subscription is only observed; `subscription` is
    the table's own number; `started` in microseconds since 1970, 0 where unknown; `limited` where the exemption by
    which it may send carries a limit."""

    reason: Reason
    observed: bool
    paas: bool
    subscription: int
    started: int
    limited: bool = False

    def row(self, place: bytes) -> bytes:
        """The row of the entry for a place."""
        code = code_of(self.reason, observed=self.observed, paas=self.paas, limited=self.limited)
        return place + OUTCOME.pack(self.subscription, self.started << CODE_BITS | code)

    @classmethod
    def of(cls, row: bytes) -> Entry:
        """The entry of a row."""
        subscription, outcome = OUTCOME.unpack_from(row, len(row) - OUTCOME.size)
        code = outcome & _CODE
        return cls(
            _BY_NUMBER[code & _REASON],
            bool(code & _OBSERVED),
            bool(code & _PAAS),
            subscription,
            outcome >> CODE_BITS,
            code & _REASON == _LIMITED,
        )


def code_of(reason: Reason, *, observed: bool, paas: bool, limited: bool = False) -> int:
    """The last bits of an outcome; `limited` is for those that an exemption lets through."""
    number = _LIMITED if limited else _REASON_NUMBER[reason]
    return number | (_OBSERVED if observed else 0) | (_PAAS if paas else 0)


def finding(row: bytes) -> tuple[Reason, bool, bool]:
    """Reason, observation and limit of an entry's row, as quickly as a worker wants them; raises ValueError."""
    reason, observed, limited = _FINDINGS[row[-1] & _CODE]
    if reason is None:
        raise ValueError(f"an entry of the policy table is damaged: {row.hex()}")
    return reason, observed, limited


def place_of(row: bytes) -> bytes:
    """The place of an entry's row."""
    return row[: -OUTCOME.size]


def make_holdings(rows: list[bytes]) -> None:
    """Turns the rows of entries into those of holdings, in their place: so many are not to be there twice."""
    for number, row in enumerate(rows):
        rows[number] = row[-12:-8] + row[:-12]


def stored_name(part: bytes) -> bytes:
    """The name of a part in the file."""
    return b"%s.%d" % (part, FORMAT)


def number(value: int) -> bytes:
    """A segment's or subscription's number as a key: 4 bytes, big-endian."""
    return value.to_bytes(4, "big")


def due(at: int, subscription: int) -> bytes:
    """The row of a time (microseconds) at which a subscription comes out otherwise: a grant ends, say."""
    return at.to_bytes(8, "big") + number(subscription)


def family_key(segment: int, address_bytes: int) -> bytes:
    """The key of the prefix lengths of a segment for the family of addresses of this size (4 or 16)."""
    return segment.to_bytes(3, "big") + (b"4" if address_bytes == 4 else b"6")


def pack_lengths(counts: dict[int, int]) -> bytes:
    """Prefix length → how many entries have it, as bytes, the longest first; without those that none has."""
    used = sorted(((length, count) for length, count in counts.items() if count > 0), reverse=True)
    return b"".join(_LENGTH.pack(length, count) for length, count in used)


def unpack_lengths(data: bytes) -> dict[int, int]:
    """What `pack_lengths` wrote, in its order."""
    return dict(_LENGTH.iter_unpack(data))


def prefix_of(segment: int, length: int) -> bytes:
    """What the places of the same segment and prefix length begin with."""
    return (segment << 8 | length).to_bytes(4, "big")


def after(prefix: bytes) -> bytes:
    """The `prefix_of` the next prefix length, behind all that begin with this one."""
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
    """How large the address of a place is: 4 or 16."""
    return len(place) - 4


def address_of(row: bytes, size: int) -> int:
    """The network address of an entry's row, which has so many bytes, as a number."""
    return int.from_bytes(row[4 : 4 + size], "big")


def masks(address_bytes: int) -> tuple[int, ...]:
    """The netmask of each prefix length of a family, as an integer."""
    bits = address_bytes * 8
    return tuple(((1 << length) - 1) << (bits - length) for length in range(bits + 1))


def microseconds(at: datetime | None) -> int:
    """Microseconds since 1970; 0 for None."""
    return 0 if at is None else (at - _EPOCH) // _MICROSECOND


def instant(at: int) -> datetime | None:
    """What `microseconds` was given; None for 0."""
    return None if at == 0 else datetime.fromtimestamp(at // 1_000_000, UTC).replace(microsecond=at % 1_000_000)
