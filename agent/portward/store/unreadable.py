"""The records of a store that no gateway can read: another tool wrote them, or a disk flipped a bit.

Such a record affects only its own subscription or attachment. A gateway goes on with the version of the record
that it loaded before. If it has none, because the table is built anew, it denies the sources that the record is
about.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Final

from portward.model import Record
from portward.store.codec import decode
from portward.store.confirmation import CONFIRMED
from portward.store.packed import Packer
from portward.store.protocol import Store
from portward.store.values import RecordError

# Beyond this number, unreadable records are only counted: the list is in memory and in the status.
KNOWN: Final = 1_000

_log = logging.getLogger("portward.store")


class Unreadable:
    """The records that one follower of a store could not read. `total` counts failed reads. `now` maps the key of
    each record that is still unreadable to its error, in the order in which they were found."""

    def __init__(self, now: Mapping[str, str] | None = None) -> None:
        """`now` is that of an earlier follower of the same store."""
        self.total = 0
        self.now: dict[str, str] = dict(now or {})

    def read(self, key: str, body: str, *, anew: bool = False) -> Record | None:
        """The record with this key; None if it cannot be read, which is counted and logged. With `anew` the table
        is read from scratch, so it has no earlier record under the key."""
        try:
            record = decode(key, body)
        except RecordError as error:
            self.total += 1
            if len(self.now) < KNOWN or key in self.now:
                self.now[key] = str(error)
            effect = "its sources are denied" if anew else "the one before stays in force"
            _log.error("record refused, %s: %s", effect, error)
            return None
        self.right(key)
        return record

    def right(self, key: str) -> None:
        """Notes that the record with this key is readable or removed."""
        if self.now:
            self.now.pop(key, None)


def unreadable(store: Store) -> Iterator[RecordError]:
    """The errors of all records of a store that no gateway can read now. Reads every record, which takes some
    seconds for a million."""
    quick = Packer().quick
    for key, body in store.read_all()[1]:
        if key == CONFIRMED or quick(key, body) is not None:
            continue
        try:
            decode(key, body)
        except RecordError as error:
            yield error
