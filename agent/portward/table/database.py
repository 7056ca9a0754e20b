"""The LMDB file of the policy table: opening it, its parts, and its errors in one line.

One writer (the daemon), many readers (workers, CLI). It must be opened after a process starts, never
across a fork. `sync=True` stays on: the table is what a gateway enforces after a power cut when the store
is not to be reached, and without it LMDB may leave a file that cannot be read.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final, TypeAlias

import lmdb

from portward.errors import PortwardError
from portward.table import layout

# Address space, not disk: the file grows as it fills. 4 GiB hold some 60 million attachments; a table
# that outgrows it is opened again at twice the size.
MAP_SIZE: Final = 4 << 30
MAX_READERS: Final = 512
# Parts of another format, which are opened to be dropped.
_OTHER_PARTS: Final = 32

Environment: TypeAlias = lmdb.Environment
Transaction: TypeAlias = "lmdb.Transaction[bytes]"
Cursor: TypeAlias = "lmdb.Cursor[bytes]"
Part: TypeAlias = "lmdb._Database"
DatabaseError = lmdb.Error
MapFullError = lmdb.MapFullError
MapResizedError = lmdb.MapResizedError
# What LMDB says of a file that it did not write, or that was damaged since.
_DAMAGED: Final = (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError, lmdb.PageNotFoundError)
FILE, LOCK_FILE, _ASIDE = "data.mdb", "lock.mdb", "data.mdb.damaged"

_log = logging.getLogger("portward.table")


class TableError(PortwardError):
    """The policy table cannot be opened, read or written."""


class OtherFormatError(TableError):
    """The policy table was written by another version of portward."""


def open_database(folder: Path, *, write: bool, map_size: int = MAP_SIZE) -> Environment:
    """Opens the table in `folder`. A writer makes folder and file where missing; raises TableError."""
    if not write and not (folder / FILE).exists():
        raise TableError(f"{folder}: there is no policy table here; `portward run` makes it")
    try:
        if write:
            folder.mkdir(parents=True, exist_ok=True)
        environment = lmdb.open(
            os.fspath(folder),
            map_size=map_size,
            max_dbs=len(layout.PARTS) + _OTHER_PARTS,
            max_readers=MAX_READERS,
            readonly=not write,
            create=write,
            # Keys are looked up at random: reading ahead would only fill the page cache.
            readahead=False,
        )
    except (lmdb.Error, OSError) as error:
        raise TableError(f"{folder}: the policy table cannot be opened: {error}") from error
    if write:
        # Slots of readers that were killed would keep old pages alive.
        environment.reader_check()
    return environment


def begun(environment: Environment, *, write: bool = False) -> Transaction:
    """A transaction on the table. Takes the map's size over first if another process has made it larger: the
    daemon, or its process of a bulk change. Raises lmdb's errors."""
    try:
        return environment.begin(write=write)
    except MapResizedError:
        environment.set_mapsize(0)
        return environment.begin(write=write)


def open_for_writing(folder: Path, map_size: int) -> tuple[Environment, dict[bytes, Part]]:
    """The table in `folder` and its parts; raises TableError.

    What LMDB cannot read is put aside and named in the log, and an empty table takes its place: it holds only
    what the store holds too, and the gateway begins with nothing until the store was read.
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
    """Keeps a damaged table under another name, and says so; raises TableError."""
    _log.error("%s: it is put aside as %s, and read from the store anew", why, _ASIDE)
    try:
        if (folder / FILE).exists():
            (folder / FILE).replace(folder / _ASIDE)
        (folder / LOCK_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise TableError(f"{folder}: the damaged table cannot be put aside: {error.strerror}") from error


def open_parts(environment: Environment, *, write: bool) -> dict[bytes, Part]:
    """The named parts of the table; raises TableError where a reader finds none yet."""
    try:
        return {
            part: environment.open_db(
                layout.stored_name(part), dupsort=part in layout.ROWS, dupfixed=part in layout.ROWS, create=write
            )
            for part in layout.PARTS
        }
    except lmdb.Error as error:
        if not write and (form := _other_format(environment)) is not None:
            raise OtherFormatError(
                f"{environment.path()}: the policy table is of format {form}, and this portward reads format "
                f"{layout.FORMAT} only"
            ) from error
        raise TableError(f"{environment.path()}: the policy table is incomplete: {error}") from error


def _other_format(environment: Environment) -> int | None:
    """The format of the table in the file, unless it is ours or there is none."""
    try:
        with environment.begin() as transaction:
            data = transaction.get(layout.HEAD)
    except lmdb.Error:
        return None
    return None if data is None or layout.format_of(data) == layout.FORMAT else layout.format_of(data)


def drop_other_formats(environment: Environment, transaction: Transaction) -> None:
    """Takes out what another version of portward left in the file."""
    ours = {layout.HEAD, *map(layout.stored_name, layout.PARTS)}
    with transaction.cursor() as cursor:
        others = [key for key in cursor.iternext(values=False) if key not in ours]
    for name in others:
        transaction.drop(environment.open_db(name, txn=transaction, create=False), delete=True)
