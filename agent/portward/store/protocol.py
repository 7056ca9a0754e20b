"""The methods of every store of policy.

Each accepted batch of writes is one *revision*; revisions rise by one, and 0 is an empty store. A revision and its
changes are an *entry* of the log, which only grows; each entry has a hash and stores that of the entry before it
(`chain`). Records and keys are written by `codec`, the same in every store.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Protocol

from portward.store.values import Change, Entry, LogRow, Odd, Origin, Progress, Put


class Store(Protocol):
    """A store of policy. Every method raises StoreError if the store cannot be used; `revision`, `read_all`,
    `reading` and `write` raise its subclass NoStoreError if it is gone.

    The thread that opened the store calls its methods. Only `fileno` and `waits`, which do no I/O, may be called
    on any thread. A store must bear that a batch has a million records, that a `reading` is open for 30 s while
    other processes write, and that `revision` and `hash_of` are asked each second. No method may block for longer
    than a second on a lock or a network, unless it moves many records: the daemon's watchdog ends a thread that is
    stuck.

    `backends` opens a store, with two promises that a backend must keep. With `create`, a store that is missing is
    made; without, opening it raises NoStoreError. With `agent`, opening and every method wait only about a second
    for another process's lock, and then raise StoreError: the end of a grant must not wait behind a lock.
    """

    def identity(self) -> bytes:
        """16 bytes that no other store has. Revisions of two stores are not comparable."""

    def revision(self) -> int:
        """The newest revision; 0 for a store that never held a record."""

    def hash_of(self, revision: int) -> bytes | None:
        """32 bytes that identify the history of this store up to a revision: the hash of the log's entry, or of
        the log's origin for revision 0. None if the log has no such entry or has lost its hash. For a log without
        hashes, they are computed from number, time and actor alone."""

    def get(self, key: str) -> str | None:
        """The record under a key, as JSON; None if there is none."""

    def read_all(self) -> tuple[int, Generator[tuple[str, str], None, None]]:
        """A revision, and all records (key, JSON) at that revision. Attachments come last, because a decision on
        one needs its subscription and exemption. Do not call another method before the iterator has ended."""

    def under(self, prefix: str) -> Iterator[tuple[str, str]]:
        """The records (key, JSON) whose keys begin with `prefix`, in the order of the keys."""

    def history(self, key: str) -> Iterator[Change]:
        """All changes of one record, oldest first."""

    def changes(self, since: int) -> Generator[Change, None, None]:
        """The changes after revision `since`, oldest first, in whole revisions."""

    def waits(self) -> str:
        """Why a reader may have to wait for a writer, as text; empty if it never has to."""

    def written(self) -> datetime | None:
        """When the newest revision was written, in UTC; None for a store that never held a record. No revision has
        an earlier time than the one before it, whatever its writer's clock says."""

    def reading(self) -> AbstractContextManager[None]:
        """While this context is open, every method answers from one state of the store. Other processes may write
        meanwhile; this object may not."""

    def origin(self) -> Origin | None:
        """The beginning of the log's hash chain; None if the log has no hashes yet. The next change seals it."""

    def log(self, since: int | None = None) -> Iterator[Entry]:
        """The entries of the log after revision `since`, oldest first. None: all of them, also those with an
        impossible number."""

    def rows(self, revision: int) -> Iterator[LogRow]:
        """The changes of a revision as they are stored, in the order of their keys."""

    def strays(self) -> Iterator[int | Odd]:
        """The revisions that have changes but no entry. There are none, unless another tool wrote into the log."""

    def write(
        self,
        batch: Sequence[Put],
        *,
        expected: int,
        actor: str,
        at: datetime,
        progress: Progress | None = None,
    ) -> int:
        """Writes a batch as one revision, all of it or nothing, and returns the store's newest revision once the
        commit is durable: it survives a power cut.

        A batch that changes nothing makes no revision. No key may be in a batch twice. Seals a log that has no
        hashes yet. `progress` is called with the number of records written so far. Raises ConflictError if the
        store is no longer at revision `expected`.
        """

    def fileno(self) -> int | None:
        """A descriptor that becomes readable when any process writes a revision. None if there is none: the agent
        then finds a change at its poll, once a second."""

    def drain(self) -> None:
        """Makes that descriptor unreadable again, until the next revision."""

    def close(self) -> None:
        """Closes the store."""
