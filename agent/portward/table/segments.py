"""The table's numbers of segments, which make keys shorter. A segment keeps its number for ever."""

from __future__ import annotations

from portward.base.interfaces import decoded, encoded, shown
from portward.table import layout
from portward.table.damage import Damage
from portward.table.database import Part, TableError, Transaction


class Segments:
    """The numbers in a write transaction. They are read one by one, because there may be many thousands."""

    def __init__(self, transaction: Transaction, parts: dict[bytes, Part], damage: Damage) -> None:
        self._transaction, self._parts, self._damage = transaction, parts, damage
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        """The number of a segment, a new one if it has none. Raises TableError if all numbers are used."""
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = self._known(name) or self._add(name)
        return number

    def name(self, number: int) -> str:
        """The name of the segment with this number. Raises TableError if there is none."""
        name = self._transaction.get(layout.number(number), db=self._parts[b"names"])
        if name is None:
            raise TableError(f"no segment has the number {number}")
        return decoded(name)

    def _known(self, name: str) -> int | None:
        """The number of a segment; None if it has none, or if the number belongs to another segment."""
        known = self._transaction.get(encoded(name), db=self._parts[b"segments"])
        if known is None:
            return None
        if self._transaction.get(known, db=self._parts[b"names"]) != encoded(name):
            self._damage.found(
                f"segment {shown(name)} has a number that is not its own; it gets a new one, without sources"
            )
            return None
        return int.from_bytes(known, "big")

    def _add(self, name: str) -> int:
        names = self._parts[b"names"]
        number: int = self._transaction.stat(names)["entries"] + 1
        while self._transaction.get(layout.number(number), db=names) is not None:  # after a damage only
            number += 1
        if number > layout.LAST_SEGMENT:
            raise TableError("the policy table has no number left for another segment")
        self._transaction.put(encoded(name), layout.number(number), db=self._parts[b"segments"])
        self._transaction.put(layout.number(number), encoded(name), db=self._parts[b"names"])
        return number
