"""The records of a store that no gateway can read, by their keys: another tool wrote them, or a disk turned a bit.

Each costs what it is about, and nothing else. A gateway goes on with the record that it took in before; if it has
none (the table is read anew), what the record is about is denied.
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

# So many are known by their keys; beyond that only their readings are counted.
KNOWN: Final = 1_000

_log = logging.getLogger("portward.store")


class Unreadable:
    """What one follower of a store could not read. `total` counts readings; `now` has the records that are like
    that still, with what is wrong with each, in the order in which they were found."""

    def __init__(self, now: Mapping[str, str] | None = None) -> None:
        """`now` as an earlier follower of the same store left it."""
        self.total = 0
        self.now: dict[str, str] = dict(now or {})

    def read(self, key: str, body: str) -> Record | None:
        """The record under a key; None, counted and logged, if it cannot be read."""
        try:
            record = decode(key, body)
        except RecordError as error:
            self.total += 1
            if len(self.now) < KNOWN or key in self.now:
                self.now[key] = str(error)
            _log.error("record refused, the one before stays in force: %s", error)
            return None
        self.right(key)
        return record

    def right(self, key: str) -> None:
        """The record under this key can be read, or is gone."""
        if self.now:
            self.now.pop(key, None)


def unreadable(store: Store) -> Iterator[RecordError]:
    """Each record of a store that no gateway can read, now. Looks at all of them: some seconds for a million."""
    quick = Packer().quick
    for key, body in store.read_all()[1]:
        if key == CONFIRMED or quick(key, body) is not None:
            continue
        try:
            decode(key, body)
        except RecordError as error:
            yield error
