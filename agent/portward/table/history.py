"""Whether the table stands in the history of a store. The hash of the log says so: numbers alone are the same
again after a backup was restored and written on."""

from __future__ import annotations

from secrets import token_bytes
from typing import Final

from portward.store.codec import key_only, readable
from portward.store.confirmation import CONFIRMED, HOLD_BYTES
from portward.store.protocol import Store
from portward.store.values import HASH_BYTES
from portward.table import layout
from portward.table.reader import Reader

# What the hash in the head of a table begins with while another history is held: no hash of a log (SHA-256) looks
# like this. The other 24 bytes are the name of the hold.
_OTHER_HISTORY: Final = b"\xff" * (HASH_BYTES - HOLD_BYTES)


def hash_of_other_history() -> bytes:
    """The hash for the head of a table that holds back another history than its own. No log has it, so the table
    is in no history until everything was read anew. It carries a name that no other hold has (random bytes), so a
    confirmation that names it was written while it was held, whatever the clocks say."""
    return _OTHER_HISTORY + token_bytes(HOLD_BYTES)


def held_history(head: layout.Head) -> bytes | None:
    """The name of the hold (24 bytes) if another history than the table's is held; None if none is."""
    return head.hash[len(_OTHER_HISTORY) :] if head.hash.startswith(_OTHER_HISTORY) else None


def hash_at(store: Store, revision: int) -> bytes:
    """The hash of the store's log at a revision, as the table keeps it; raises StoreError."""
    return store.hash_of(revision) or layout.NO_HASH


def same_history(head: layout.Head, store: Store) -> bool:
    """Whether the store's log still has every entry that the table was written from; raises StoreError."""
    # A store that ends before has no hash there, and the table has none of a revision whose entry lost it.
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
    """Whether the table holds under a key what a change of the store has left there; None: nothing. `damaged` is
    the answer if the table holds something there that cannot be read."""
    record = key_only(key) if body is None else readable(key, body)
    if record is None:
        return False
    try:
        return reader.record_like(record) == (None if body is None else record)
    except layout.DamagedError:
        return damaged


def count_in_table(reader: Reader, store: Store, revision: int) -> tuple[int, int]:
    """How many of the records that a revision of the store changed are in the table as it left them, and how many
    it changed. Raises StoreError."""
    changed = [(str(key), None if body is None else str(body)) for key, _, body in store.rows(revision)]
    records = [(key, body) for key, body in changed if key != CONFIRMED]
    return sum(is_in_table(reader, key, body) for key, body in records), len(records)
