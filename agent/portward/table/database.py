"""The LMDB file of the policy table: opening it, its parts, its rows, and its errors in one line.

It has one writer (the daemon) and many readers (workers, verbs). A process must open it after it has started,
never before a fork. `sync=True` stays on, because a gateway enforces this table after a power cut if it cannot
reach the store, and without it LMDB may leave a file that cannot be read.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import repeat
from pathlib import Path
from threading import Condition, Lock, get_ident
from typing import Final, TypeAlias

import lmdb

from portward.base import ownership
from portward.base.instance import unit
from portward.errors import PortwardError
from portward.table import layout

# 4 GiB of address space, not of disk: the file grows as it fills. They hold about 60 million attachments. A table
# that outgrows its map gets one of twice the size.
MAP_SIZE: Final = 4 << 30
MAX_READERS: Final = 512
# LMDB's lock file: a slot of 64 bytes for each reader, after two cache lines of its own.
_LOCK_BYTES: Final = 64 * (MAX_READERS + 2)
# A disk with less room than this counts as full. A commit of LMDB writes some pages of 4 KiB.
_FULL_BYTES: Final = 64 * 1024
# How many parts of another format may be opened to be dropped.
_OTHER_PARTS: Final = 32
# How often to try a transaction if the map is too small for what another process has committed. Each time that
# process has made the file twice as large, and eight times lead from MAP_SIZE to the largest map of a `Writer`.
_TRIES: Final = 8

Transaction: TypeAlias = "lmdb.Transaction[bytes]"
Cursor: TypeAlias = "lmdb.Cursor[bytes]"
Part: TypeAlias = "lmdb._Database"
# A part of rows is one sorted list of rows of the same size. LMDB keeps them as the values of this one key
# (MDB_DUPFIXED): they lie in its pages side by side, where a key for each row would cost some ten bytes more.
ROW_KEY: Final = b"r"
DatabaseError = lmdb.Error
MapFullError = lmdb.MapFullError
MapResizedError = lmdb.MapResizedError
# LMDB's errors for a file that it did not write, or that is damaged.
_DAMAGED: Final = (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError, lmdb.PageNotFoundError)
FILE, LOCK_FILE, _ASIDE = "data.mdb", "lock.mdb", "data.mdb.damaged"

_log = logging.getLogger("portward.table")


class TableError(PortwardError):
    """The policy table cannot be opened, read or written."""


class OtherFormatError(TableError):
    """The policy table was written by another version of portward."""


class _Gate:
    """Keeps a change of the map's size and the transactions of all threads apart.

    The change waits until no thread has a transaction open. While it waits, a thread without a transaction may not
    begin one, because threads that read all the time would starve the change. A thread with an open transaction
    may begin another one inside it, because the change waits for that thread, and blocking it would be a deadlock.
    """

    def __init__(self) -> None:
        # Thread → how many transactions it has open. Each thread writes its own item only.
        self._open: dict[int, int] = {}
        self._moved = Condition(Lock())
        # The number of threads that wait to change the size, and the number of changes so far.
        self._waiting = self._changes = 0

    def enter(self) -> int:
        """Call it before a transaction begins. Returns the number of changes so far."""
        thread, opened = get_ident(), self._open
        before = opened.get(thread, 0)
        # No lock, because it costs 0.2 µs. This thread writes its item and then checks for a waiting change.
        # `change` does both in the other order. So one of them sees the other.
        opened[thread] = before + 1
        if self._waiting and not before:
            self._let_change(thread)
        return self._changes

    def leave(self) -> bool:
        """Call it on the same thread when the transaction has ended. True if this thread has another one open."""
        thread, opened = get_ident(), self._open
        left = opened[thread] - 1
        if left:
            opened[thread] = left
            return True
        del opened[thread]
        if self._waiting:
            with self._moved:
                self._moved.notify_all()
        return False

    def change(self, work: Callable[[], None], since: int | None = None) -> None:
        """Runs `work`, which changes the size, while no thread has a transaction open. Does not run it if the size
        was changed after `enter` gave `since`. The calling thread must have no transaction open."""
        with self._moved:
            self._waiting += 1
            try:
                self._moved.wait_for(lambda: not self._open or self._is_changed(since))
                if not self._is_changed(since):
                    work()
                    self._changes += 1
            finally:
                self._waiting -= 1
                self._moved.notify_all()

    def _let_change(self, thread: int) -> None:
        """Waits until no thread waits to change the size."""
        with self._moved:
            del self._open[thread]
            self._moved.notify_all()
            self._moved.wait_for(lambda: not self._waiting)
            self._open[thread] = 1

    def _is_changed(self, since: int | None) -> bool:
        return since is not None and since != self._changes


class _Begun:
    """A transaction for a `with` statement. It is committed at the end, or aborted by an exception."""

    __slots__ = ("_environment", "_transaction", "_write")

    def __init__(self, environment: Environment, *, write: bool) -> None:
        self._environment, self._write = environment, write

    def __enter__(self) -> Transaction:
        environment, tries = self._environment, _TRIES
        while True:
            changes = environment._gate.enter()
            try:
                self._transaction = environment._lmdb.begin(write=self._write)
                return self._transaction
            except BaseException as error:
                nested, tries = environment._gate.leave(), tries - 1
                if nested or not tries or not isinstance(error, MapResizedError):
                    raise
            environment._adapt_size(changes)

    def __exit__(self, *raised: object) -> None:
        try:
            self._transaction.__exit__(*raised)
        finally:
            self._environment._gate.leave()


class Environment:
    """The file of the table in this process. Several threads may use it at once.

    LMDB maps the whole file. To change the size of the map it replaces the map, and from then on every open
    transaction of the process fails. So both go through one gate, and only this class calls LMDB's environment.

    A change of size waits for the longest transaction of another thread. In the daemon that is one lookup, because
    what walks through the table (`portward check`, `diagnose`) is a process of its own. The daemon's long
    transactions are changes of policy, and nothing waits for them: the thread that writes makes the map larger
    after its transaction, and while it writes, no other process can commit what needs a larger map.
    """

    def __init__(self, opened: lmdb.Environment) -> None:
        self._lmdb, self._gate = opened, _Gate()

    def begin(self, *, write: bool = False) -> AbstractContextManager[Transaction, None]:
        """A transaction for a `with` statement on one thread. A thread may begin one inside another one.

        Adapts the size of the map first if another process has made the file larger: the daemon, or its process
        for bulk changes. Entering raises lmdb's errors; MapResizedError only if this thread has a transaction
        open.
        """
        return _Begun(self, write=write)

    def open_part(self, name: bytes, *, create: bool, rows: bool) -> Part:
        """Opens the part with this name: a list of rows if `rows`, else keys with values. Not inside a
        transaction. Raises lmdb's errors."""
        while True:
            self._gate.enter()
            try:
                return self._lmdb.open_db(name, dupsort=rows, dupfixed=rows, create=create)
            except MapResizedError:
                pass
            finally:
                self._gate.leave()
            with self.begin():  # adapts the size
                pass

    def drop_part(self, name: bytes, transaction: Transaction) -> None:
        """Removes a part with its contents."""
        transaction.drop(self._lmdb.open_db(name, txn=transaction, create=False), delete=True)

    def grow(self, largest: int) -> None:
        """Doubles the map when no other thread has a transaction open. The calling thread must have none. Raises
        TableError if the map would be larger than `largest` bytes."""

        def grown() -> None:
            # The size now, not the one at the start: another process may have made it larger.
            size = self._lmdb.info()["map_size"]
            if 2 * size > largest:
                raise TableError(f"{self.path()}: the policy table is full at {size} bytes")
            self._lmdb.set_mapsize(2 * size)

        self._gate.change(grown)

    def path(self) -> str:
        """The folder of the file."""
        return self._lmdb.path()

    def cut_off(self) -> bool:
        """Whether the file is shorter than the pages that it says are used. Reading a missing page ends the
        process (SIGBUS). In rare cases also True for an intact file, whose last page was freed before it was
        written."""
        pages = self._lmdb.info()["last_pgno"] + 1
        return (Path(self.path()) / FILE).stat().st_size < pages * self._lmdb.stat()["psize"]

    def reader_check(self) -> None:
        """Frees the slots of killed readers. There are MAX_READERS slots, and each keeps old pages alive."""
        self._lmdb.reader_check()

    def close(self) -> None:
        """Closes the file, once no thread uses it."""
        self._lmdb.close()

    def _adapt_size(self, since: int) -> None:
        """Makes the map as large as another process has made its own. Does nothing if another thread has done so
        after `enter` returned `since`: it may have begun a change of policy, and this would wait for it."""
        self._gate.change(lambda: self._lmdb.set_mapsize(0), since)


def open_database(folder: Path, *, write: bool, map_size: int = MAP_SIZE) -> Environment:
    """Opens the table in `folder`. A writer creates folder and file if they are missing. Raises TableError."""
    try:
        if (
            not write and not (folder / FILE).exists()
        ):  # raises PermissionError if this user may not enter the folder
            raise TableError(
                f"{folder}: there is no policy table here: an agent makes it when it starts "
                f"(`systemctl restart {unit()}`)"
            )
        if write:
            folder.mkdir(mode=ownership.FOLDER_MODE, parents=True, exist_ok=True)
        _make_lock_file(folder / LOCK_FILE)
        opened = lmdb.open(
            os.fspath(folder),
            mode=ownership.FILE_MODE,
            map_size=map_size,
            max_dbs=len(layout.PARTS) + _OTHER_PARTS,
            max_readers=MAX_READERS,
            readonly=not write,
            create=write,
            # Lookups are random, so reading ahead would only fill the page cache.
            readahead=False,
        )
    except (lmdb.Error, OSError) as error:
        raise TableError(f"{folder}: the policy table cannot be opened: {in_words(error, folder)}") from error
    environment = Environment(opened)
    if write:
        environment.reader_check()
    return environment


def in_words(error: Exception, folder: Path) -> str:
    """An error of LMDB on the table in `folder`. On a full disk LMDB writes a part of a page and says EIO."""
    with contextlib.suppress(OSError):
        disk = os.statvfs(folder)
        if disk.f_bavail * disk.f_frsize < _FULL_BYTES:
            return f"{error} (the disk is full)"
    return str(error)


def _make_lock_file(path: Path) -> None:
    """Makes the lock file with all its blocks, if it is missing. LMDB would make it sparse and map it, so on a
    full disk the first use of a page would end the process by SIGBUS. Raises OSError."""
    # Also for readers: if root reads first, the agent must still be able to open the file.
    ownership.create(path)
    if path.stat().st_size:
        # In use, perhaps by this process: to close another descriptor of it would release LMDB's own lock.
        return
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, _LOCK_BYTES)
    finally:
        os.close(descriptor)


def open_for_writing(folder: Path, map_size: int) -> tuple[Environment, dict[bytes, Part]]:
    """Opens the table in `folder` and its parts. Raises TableError.

    A file that LMDB cannot read is put aside and named in the log, and an empty table replaces it. The store has
    all that the table had, and the gateway denies every source until the store was read.
    """
    try:
        environment = open_database(folder, write=True, map_size=map_size)
        try:
            return environment, open_parts(environment, write=True)
        except TableError:
            environment.close()
            raise
    except TableError as error:
        if not isinstance(error.__cause__, _DAMAGED):
            raise
        put_aside(folder, str(error))
    environment = open_database(folder, write=True, map_size=map_size)
    return environment, open_parts(environment, write=True)


def put_aside(folder: Path, why: str) -> None:
    """Renames a damaged table and logs it. Raises TableError."""
    _log.error("%s: it is put aside as %s, and read from the store anew", why, _ASIDE)
    try:
        if (folder / FILE).exists():
            (folder / FILE).replace(folder / _ASIDE)
        (folder / LOCK_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise TableError(f"{folder}: the damaged table cannot be put aside: {error.strerror}") from error


def open_parts(environment: Environment, *, write: bool) -> dict[bytes, Part]:
    """Opens the parts of the table. Raises TableError if a reader finds none yet."""
    try:
        return {
            part: environment.open_part(layout.stored_name(part), create=write, rows=part in layout.ROWS)
            for part in layout.PARTS
        }
    except lmdb.Error as error:
        if not write and (form := _other_format(environment)) is not None:
            raise OtherFormatError(
                f"{environment.path()}: the policy table is of format {form}, and this portward reads format "
                f"{layout.FORMAT} only"
            ) from error
        folder = Path(environment.path())
        raise TableError(f"{folder}: the policy table is incomplete: {in_words(error, folder)}") from error


def _other_format(environment: Environment) -> int | None:
    """The format of the table in the file; None if it is ours, or if there is none."""
    try:
        with environment.begin() as transaction:
            data = transaction.get(layout.HEAD)
    except lmdb.Error:
        return None
    return None if data is None or layout.format_of(data) == layout.FORMAT else layout.format_of(data)


def drop_other_formats(environment: Environment, transaction: Transaction) -> None:
    """Removes the parts that another version of portward left in the file."""
    ours = {layout.HEAD, *map(layout.stored_name, layout.PARTS)}
    with transaction.cursor() as cursor:
        others = [key for key in cursor.iternext(values=False) if key not in ours]
    for name in others:
        environment.drop_part(name, transaction)


class Rows:
    """A part that is a sorted list of rows of one size, as a transaction sees it."""

    def __init__(self, transaction: Transaction, part: Part) -> None:
        self._transaction, self._part = transaction, part
        self._cursor = transaction.cursor(part)

    def __iter__(self) -> Iterator[bytes]:
        with self._transaction.cursor(self._part) as cursor:
            yield from cursor.iternext(keys=False)

    def find(self, start: bytes) -> bytes | None:
        """The first row that begins with `start`."""
        return find(self._cursor, start)

    def around(self, start: bytes) -> tuple[bytes | None, bytes | None]:
        """The last row that sorts before `start`, and the first one that does not."""
        there = self._cursor.set_range_dup(ROW_KEY, start)
        after = self._cursor.value() if there else None
        found = self._cursor.prev_dup() if there else self._cursor.last()
        return self._cursor.value() if found else None, after

    def first(self) -> bytes | None:
        """The first row of all."""
        return self._cursor.value() if self._cursor.first() else None

    def starting(self, start: bytes) -> Iterator[bytes]:
        """The rows that begin with `start`, in their order."""
        with self._transaction.cursor(self._part) as cursor:
            if cursor.set_range_dup(ROW_KEY, start):
                for row in cursor.iternext_dup():
                    if not row.startswith(start):
                        return
                    yield row

    def put(self, row: bytes) -> None:
        """Adds a row. Does nothing if it is there."""
        self._cursor.put(ROW_KEY, row)

    def remove(self, row: bytes) -> None:
        """Removes a row. Does nothing if it is not there."""
        if self._cursor.set_key_dup(ROW_KEY, row):
            self._cursor.delete()

    def extend(self, rows: Sequence[bytes]) -> None:
        """Adds sorted rows, none of which is there yet. If all sort behind the present ones they are appended,
        which is fastest and fills every page. Raises TableError if one is there."""
        if not rows:
            return
        last = self._cursor.value() if self._cursor.last() else b""
        _, added = self._cursor.putmulti(zip(repeat(ROW_KEY), rows), append=rows[0] > last)
        if added != len(rows):
            raise TableError(f"{len(rows) - added} of {len(rows)} rows stand twice in the policy table")


def find(cursor: Cursor, start: bytes) -> bytes | None:
    """The first row that begins with `start`, by a cursor on a part of rows."""
    if cursor.set_range_dup(ROW_KEY, start):
        row = cursor.value()
        if row.startswith(start):
            return row
    return None
