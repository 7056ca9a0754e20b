"""The policy table follows the store: what was committed there since is taken in, as one change.

A record that cannot be read is refused by itself: it is named, counted, and what the table holds under its
key stays in force; the rest of the change stands.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from datetime import datetime

from portward.model import Attachment, Record
from portward.store.protocol import Change, RecordError, Store, decode, named
from portward.table.writer import Committed, Writer

_log = logging.getLogger("portward.store")


class Follower:
    """Brings a table up to the revision of a store."""

    def __init__(self, store: Store, writer: Writer) -> None:
        self._store, self._writer = store, writer
        self.refused = 0

    def step(self, now: datetime) -> Committed | None:
        """Takes in what is new; None where nothing is. Raises StoreError or TableError, and then the table
        stands as it stood."""
        revision, identity = self._store.revision(), self._store.identity()
        head = self._writer.head()
        if head is None or head.store != identity or head.revision > revision:
            return self._replace(identity, now)
        if head.revision == revision:
            return None
        return self._apply(self._store.changes(head.revision), now)

    def _replace(self, identity: bytes, now: datetime) -> Committed:
        revision, records = self._store.read_all()
        return self._writer.replace(self._readable(records), revision=revision, store=identity, now=now)

    def _apply(self, changes: Iterable[Change], now: datetime) -> Committed | None:
        newest: dict[str, Change] = {}
        revision = 0
        for change in changes:
            newest[change.key] = change
            revision = change.revision
        if not newest:
            return None
        put = self._readable((change.key, change.after) for change in newest.values() if change.after is not None)
        # By its key alone: what the store held there last may be a record that was refused, and then the table
        # holds the one before.
        gone = (named(change.key) for change in newest.values() if change.after is None)
        removed = [record for record in gone if record is not None]
        return self._writer.apply(list(put), removed, revision=revision, now=now)

    def _readable(self, records: Iterable[tuple[str, str]]) -> Iterator[Record]:
        """The records that can be read, attachments last: they are decided by the others."""
        attachments: list[Attachment] = []
        for key, body in records:
            try:
                record = decode(key, body)
            except RecordError as error:
                self.refused += 1
                _log.error("record refused, the one before stays in force: %s", error)
                continue
            if isinstance(record, Attachment):
                attachments.append(record)
            else:
                yield record
        yield from attachments
