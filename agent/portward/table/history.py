"""Does the table stand in the history of a store? The hash of the store's log says so. Revisions alone cannot,
because they repeat after a backup was restored and written to.
"""

from __future__ import annotations

from secrets import token_bytes
from typing import Final

from portward.store.codec import key_only, readable
from portward.store.confirmation import CONFIRMED, HOLD_BYTES
from portward.store.protocol import Store
from portward.store.values import HASH_BYTES
from portward.table import layout
from portward.table.reader import Reader

# The first 8 bytes of the hash in the table's head while another history is held. No SHA-256 of a log begins so.
# The other 24 bytes are the name of the hold.
_OTHER_HISTORY: Final = b"\xff" * (HASH_BYTES - HOLD_BYTES)


def hash_of_other_history() -> bytes:
    """The hash for the head of a table that holds back another history than its own. No log has this hash, so the
    table is in no history until everything was read anew. It has a random name, so a confirmation with this name
    was written during this hold, whatever the clocks say."""
    return _OTHER_HISTORY + token_bytes(HOLD_BYTES)


def held_history(head: layout.Head) -> bytes | None:
    """The name of the hold (24 bytes) if another history than the table's is held; None if none is."""
    return head.hash[len(_OTHER_HISTORY) :] if head.hash.startswith(_OTHER_HISTORY) else None


def hash_at(store: Store, revision: int) -> bytes:
    """The hash of the store's log at a revision, NO_HASH if the log has none. Raises StoreError."""
    return store.hash_of(revision) or layout.NO_HASH


def same_history(head: layout.Head, store: Store) -> bool:
    """Whether the store's log still has every entry from which the table was written. Raises StoreError."""
    # A store with fewer revisions has no hash there, and the table may have none either.
    if head.store != store.identity() or head.revision > store.revision():
        return False
    if head.hash != hash_at(store, head.revision):
        return False
    return not head.ahead or bool(ahead_of(head, store))


def ahead_of(head: layout.Head, store: Store) -> int:
    """The revision up to which denials were taken in ahead of a held change; 0 if none were, or if the store's log
    has another entry there. Raises StoreError."""
    if not 0 < head.ahead <= store.revision():
        return 0
    return head.ahead if head.ahead_hash == hash_at(store, head.ahead) else 0


def is_in_table(reader: Reader, key: str, body: str | None, *, damaged: bool = False) -> bool:
    """Whether the table has under `key` what a change of the store left there: the record `body`, or none. Returns
    `damaged` if the table's record cannot be read."""
    record = key_only(key) if body is None else readable(key, body)
    if record is None:
        return False
    try:
        return reader.record_like(record) == (None if body is None else record)
    except layout.DamagedError:
        return damaged


def count_in_table(reader: Reader, store: Store, revision: int) -> tuple[int, int]:
    """How many records of a revision are in the table as the revision left them, and how many the revision
    changed. Raises StoreError."""
    changed = [(str(key), None if body is None else str(body)) for key, _, body in store.rows(revision)]
    records = [(key, body) for key, body in changed if key != CONFIRMED]
    return sum(is_in_table(reader, key, body) for key, body in records), len(records)
