"""The database file: opening and making it, locks, journal mode, text decoding, and SQLite's errors in plain
words."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from portward.errors import StoreError
from portward.store.sqlite.cells import text_of_bytes
from portward.store.sqlite.schema import FORMAT
from portward.store.values import NoStoreError

# How long a writer waits for another one: a revision of a million records takes about ten seconds.
_LOCK_TIMEOUT_S = 20.0
# How long an agent waits for a lock. It tries again each second, and the end of a grant must not wait behind a
# lock.
AGENT_LOCK_TIMEOUT_S: Final = 1.0
# How long a verb waits for a lock before it logs that it waits: a change of a few records takes milliseconds.
_SILENT_S: Final = 1.0
# The size that the WAL shrinks to after a large change: one bulk change must not keep its space on the disk for
# ever, and the usual changes fit into this many times over.
_WAL_LIMIT_BYTES: Final = 64 * 1024 * 1024
# Raised when a text that is fetched with the factory `str` is not UTF-8.
NotUtf8Error: Final = sqlite3.OperationalError
# SQLite keeps the primary result code in the lowest 8 bits of an extended one.
_PRIMARY_CODE: Final = 0xFF
# The owner and group of the file may write it; umask takes the rest.
_FILE_MODE: Final = 0o660

_log = logging.getLogger("portward.store")

# portward cannot know whether there was a store: an empty one in place of a lost one would begin a new history.
_NO_FILE: Final = (
    "no such file: put it back from a backup; only if there never was one, 'portward apply' makes a new one"
)
_EMPTY_FILE: Final = (
    "an empty file: put it back from a backup; only if it never held a store, 'portward apply' makes it one"
)
_CHECK_PERMISSIONS: Final = (
    "check the permissions of the file and of its folder, and that their file system is not read-only"
)
_WORDS: Final = {
    "SQLITE_NOTADB": "this file is no SQLite database",
    "SQLITE_READONLY": f"it cannot be written: {_CHECK_PERMISSIONS}",
    "SQLITE_CANTOPEN": f"it cannot be opened: {_CHECK_PERMISSIONS}",
    "SQLITE_PERM": f"it cannot be opened: {_CHECK_PERMISSIONS}",
    # On a full disk also for a reader: the index of the WAL, beside the file, needs some room.
    "SQLITE_IOERR": "it cannot be read or written (disk I/O error): is there room on the disk, is the disk whole?",
    "SQLITE_FULL": "the disk is full; nothing was written",
    "SQLITE_CORRUPT": "the database is damaged; restore it from a backup, or apply the inventory to a new one",
}


class Database:
    """The open database file at `path`. `waits` is as for `Store.waits`."""

    def __init__(self, path: Path, *, create: bool, agent: bool) -> None:
        """Opens the file, and makes an empty one if it is missing and `create`. An `agent` waits for a lock only
        `AGENT_LOCK_TIMEOUT_S`. Raises as for `SqliteStore`."""
        self.path, self.name = path.absolute(), f"sqlite:{path}"
        self.waits = ""
        self._timeout_s = AGENT_LOCK_TIMEOUT_S if agent else _LOCK_TIMEOUT_S
        # True while `SqliteStore.reading` keeps a read transaction open.
        self.pinned = False
        with self.errors():
            self._find(create=create)
            # With a URI, SQLite does not make a file that has disappeared meanwhile.
            self.connection = sqlite3.connect(
                f"{self.path.as_uri()}?mode=rw", uri=True, timeout=self._timeout_s, isolation_level=None
            )
        self.connection.text_factory = text_of_bytes
        self._file = (0, 0)

    def close(self) -> None:
        """Closes the file."""
        self.connection.close()

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Raises StoreError, with the store's name, for an error of SQLite or of the file system."""
        try:
            yield
        except sqlite3.ProgrammingError:
            raise  # a bug of portward
        except sqlite3.DatabaseError as error:
            raise StoreError(f"{self.name}: {self._in_words(error)}") from error
        except OSError as error:
            raise StoreError(f"{self.name}: {error.strerror}") from error

    def execute(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        """Executes one statement."""
        return self.connection.execute(statement, values)

    def execute_patiently(self, statement: str) -> None:
        """Executes a statement that may wait for a lock, and logs it if the wait takes longer than a moment."""
        if self._timeout_s > _SILENT_S:
            try:
                self.execute(f"PRAGMA busy_timeout = {_SILENT_S * 1000:.0f}")
                self.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & _PRIMARY_CODE != sqlite3.SQLITE_BUSY:
                    raise
                waits = "%s: another process holds it locked: waiting for up to %g s"
                _log.warning(waits, self.name, self._timeout_s)
            finally:
                self.execute(f"PRAGMA busy_timeout = {self._timeout_s * 1000:.0f}")
        self.execute(statement)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """A write transaction that takes the lock at its beginning. Commits at its end, unless an exception is
        raised or `end_transaction` was called."""
        self.execute_patiently("BEGIN IMMEDIATE")
        try:
            yield
            if self.connection.in_transaction:
                self.execute("COMMIT")
        finally:
            self.end_transaction()

    def end_transaction(self) -> None:
        """Ends an open transaction without a commit, unless the state is pinned."""
        self.connection.text_factory = text_of_bytes
        if self.connection.in_transaction and not self.pinned:
            self.execute("ROLLBACK")

    @contextlib.contextmanager
    def decoding(self, decode: Callable[[bytes], object]) -> Iterator[None]:
        """Decodes the text columns that are fetched in this context with `decode`. Keep it short: other iterators
        use the same connection."""
        before: Any = self.connection.text_factory
        self.connection.text_factory = decode
        try:
            yield
        finally:
            self.connection.text_factory = before

    def format(self) -> int:
        """The number of the format; 0 for an empty database."""
        return int(self.execute("PRAGMA user_version").fetchone()[0])

    def expect_format(self) -> None:
        """Raises StoreError if a newer portward wrote the store."""
        version = self.format()
        if version > FORMAT:
            problem = f"written by a newer portward (format {version}, this one knows {FORMAT})"
            raise StoreError(f"{self.name}: {problem}")

    def is_empty(self, *, create: bool) -> bool:
        """Whether the database has no store yet. Raises NoStoreError if it has none and not `create`, StoreError
        if it belongs to another program."""
        if self.format() != 0:
            return False
        if self.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise StoreError(f"{self.name}: an SQLite database, but not portward's")
        if not create:
            raise NoStoreError(f"{self.name}: {_EMPTY_FILE}")
        return True

    def restore_wal(self) -> None:
        """Puts WAL mode back if another tool has changed the mode, which is stored in the file.

        A store is made in WAL mode, in which readers and a writer do not wait for each other. SQLite can change
        the mode only while no other process has the store open.
        """
        mode = self.execute("PRAGMA journal_mode").fetchone()[0]
        if mode == "wal":
            return
        with contextlib.suppress(sqlite3.OperationalError):
            if self.execute("PRAGMA journal_mode = WAL").fetchone()[0] == "wal":
                _log.warning("%s: its journal mode was %s: WAL is put back", self.name, mode)
                return
        self.waits = (
            f"its journal mode is {mode}, and WAL cannot be put back now: readers wait for writers (close what "
            "else has it open, or check the permissions of its folder)"
        )
        _log.warning("%s: %s", self.name, self.waits)

    def configure(self) -> None:
        """Sets what holds for this connection only."""
        self.execute("PRAGMA synchronous = FULL")
        self.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")

    def note_file(self) -> None:
        """Notes which file is open, for `expect_same_file`."""
        self._file = self._file_now()

    def expect_same_file(self) -> None:
        """Raises StoreError if another file is at the path now: a restored backup replaces the file, and then
        nothing that this connection writes reaches it."""
        try:
            now = self._file_now()
        except FileNotFoundError:
            raise NoStoreError(f"{self.name}: {_NO_FILE}") from None
        if now != self._file:
            raise StoreError(f"{self.name}: another file was put in its place; it has to be opened again")

    def _file_now(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_dev, status.st_ino

    def _find(self, *, create: bool) -> None:
        if "\0" in str(self.path):
            raise StoreError(f"{self.name}: no file has a NUL in its name")
        if not self.path.parent.is_dir():
            raise StoreError(f"{self.name}: there is no folder {self.path.parent}")
        if self.path.is_dir():
            raise StoreError(f"{self.name}: a folder; the store is a file")
        if self.path.exists():
            return
        if not create:
            raise NoStoreError(f"{self.name}: {_NO_FILE}")
        with contextlib.suppress(FileExistsError):  # another process made it meanwhile
            self._make_file()

    def _make_file(self) -> None:
        """Makes an empty file. If root makes it, it belongs to the owner of the folder, because the agent runs as
        another user and could not open it. SQLite gives the files beside it to the same owner."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
        try:
            if os.geteuid() == 0:
                folder = self.path.parent.stat()
                os.fchown(descriptor, folder.st_uid, folder.st_gid)
        finally:
            os.close(descriptor)

    def _in_words(self, error: sqlite3.DatabaseError) -> str:
        """SQLite's message, or for the common errors, what to do about them."""
        # Extended codes begin with the name of what they extend, for example SQLITE_READONLY_DBMOVED.
        kind = "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])
        if kind == "SQLITE_BUSY":
            return f"another process has held it locked for {self._timeout_s:g} s; try again"
        return _WORDS.get(kind, str(error))


def statements(script: str) -> Iterator[str]:
    """The statements of a script, one by one: `executescript` would commit first, and so release the lock."""
    statement = ""
    for line in script.strip().splitlines():
        statement += f"{line}\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
