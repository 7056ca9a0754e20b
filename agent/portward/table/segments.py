"""The table's numbers of segments: keys are shorter by them. A number once given is kept."""

from __future__ import annotations

from portward.interfaces import decoded, encoded
from portward.table import layout
from portward.table.database import Part, TableError, Transaction


class Segments:
    """The numbers as a write transaction sees them; asked one by one, since there may be many thousands."""

    def __init__(self, transaction: Transaction, parts: dict[bytes, Part]) -> None:
        self._transaction, self._parts = transaction, parts
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        """The number of a segment, a new one where it has none."""
        number = self._numbers.get(name)
        if number is None:
            known = self._transaction.get(encoded(name), db=self._parts[b"segments"])
            number = self._numbers[name] = self._add(name) if known is None else int.from_bytes(known, "big")
        return number

    def name(self, number: int) -> str:
        """The name of the segment with that number."""
        name = self._transaction.get(layout.number(number), db=self._parts[b"names"])
        if name is None:
            raise TableError(f"the policy table is damaged: no segment has the number {number}")
        return decoded(name)

    def _add(self, name: str) -> int:
        number: int = self._transaction.stat(self._parts[b"names"])["entries"] + 1
        self._transaction.put(encoded(name), layout.number(number), db=self._parts[b"segments"])
        self._transaction.put(layout.number(number), encoded(name), db=self._parts[b"names"])
        return number
