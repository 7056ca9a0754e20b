"""The prefix lengths in use in each segment and family: read, counted, and written by an edit of the policy
table."""

from __future__ import annotations

from collections.abc import Mapping

from portward.table import layout
from portward.table.damage import Damage
from portward.table.database import Part, Rows, Transaction


class Lengths:
    """The prefix lengths of one write transaction. `write` must come last: until then only this object knows what
    was counted."""

    def __init__(self, transaction: Transaction, part: Part, entries: Mapping[int, Rows], damage: Damage) -> None:
        """`entries` are the rows of entries by the size of their addresses in bytes. If lengths cannot be read,
        they are counted anew from these, and `damage` takes that."""
        self._transaction, self._part, self._entries, self._damage = transaction, part, entries, damage
        # Key of segment and family → prefix length → number of entries.
        self._counts: dict[bytes, dict[int, int]] = {}
        # Key → the lengths in use, the longest first. Kept until `write`, because reading damaged lengths is slow.
        self._used: dict[bytes, list[int]] = {}

    def count(self, place: bytes, step: int) -> None:
        """Counts an entry that comes (+1), before it is written, or one that goes (-1), after it is removed."""
        segment, length = layout.segment_and_length(place)
        key = layout.family_key(segment, layout.address_bytes(place))
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = self._read(key, segment, layout.address_bytes(place))
        counts[length] = counts.get(length, 0) + step

    def used(self, segment: int, size: int) -> list[int]:
        """The lengths that were in use at the last `write`, the longest first; `size` of the addresses in
        bytes."""
        key = layout.family_key(segment, size)
        if key not in self._used:
            self._used[key] = sorted(self._read(key, segment, size), reverse=True)
        return self._used[key]

    def write(self) -> None:
        """Writes the lengths that were counted."""
        for key, counts in self._counts.items():
            self._transaction.put(key, layout.pack_lengths(counts), db=self._part)
        self._counts.clear()
        self._used.clear()

    def _read(self, key: bytes, segment: int, size: int) -> dict[int, int]:
        data = self._transaction.get(key, db=self._part)
        try:
            return {} if data is None else layout.unpack_lengths(data, size)
        except layout.DamagedError as error:
            self._damage.found(f"{error}; they are counted anew")
        starts = {length: layout.prefix_of(segment, length) for length in range(size * 8 + 1)}
        rows = self._entries[size]
        return {length: sum(1 for _ in rows.starting(start)) for length, start in starts.items()}
