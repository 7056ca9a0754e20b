"""The table's numbers of segments: keys are shorter by them. A number once given is kept."""

from __future__ import annotations

from portward.base.interfaces import decoded, encoded, shown
from portward.table import layout
from portward.table.damage import Damage
from portward.table.database import Part, TableError, Transaction


class Segments:
    """The numbers as a write transaction sees them; asked one by one, since there may be many thousands."""

    def __init__(self, transaction: Transaction, parts: dict[bytes, Part], damage: Damage) -> None:
        self._transaction, self._parts, self._damage = transaction, parts, damage
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        """The number of a segment, a new one where it has none."""
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = self._known(name) or self._add(name)
        return number

    def name(self, number: int) -> str:
        """The name of the segment with that number; raises TableError."""
        name = self._transaction.get(layout.number(number), db=self._parts[b"names"])
        if name is None:
            raise TableError(f"no segment has the number {number}")
        return decoded(name)

    def _known(self, name: str) -> int | None:
        """The number that a segment has; None without one, or if it is another segment's."""
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
