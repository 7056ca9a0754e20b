"""The SQLite store: revisions, the log, following changes, and its errors when it cannot be used."""

from __future__ import annotations

import contextlib
import os
import select
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from portward.errors import ConflictError, StoreError
from portward.store.backends import open_store
from portward.store.codec import key_of
from portward.store.sqlite.store import SqliteStore
from portward.store.values import NoStoreError, Put
from unit.store.samples import ALL, CONTOSO, FABRIKAM, MACHINE, NOON, held, opened, put, texts, write

PERMISSIONS = "check the permissions of the file and of its folder, and that their file system is not read-only"


def test_a_new_store_is_empty_at_revision_0(store: SqliteStore) -> None:
    assert store.revision() == 0
    assert held(store) == {}


def test_each_batch_is_one_revision(store: SqliteStore) -> None:
    assert write(store, *(put(record) for record in ALL)) == 1
    assert write(store, Put(key_of(MACHINE), None)) == 2
    assert store.revision() == 2
    assert held(store).keys() == {key_of(record) for record in ALL if record is not MACHINE}


def test_a_batch_that_changes_nothing_makes_no_revision(store: SqliteStore) -> None:
    write(store, put(CONTOSO))
    assert write(store, put(CONTOSO), Put(key_of(MACHINE), None)) == 1
    assert store.revision() == 1
    assert list(store.changes(1)) == []


def test_only_what_differs_is_logged(store: SqliteStore) -> None:
    write(store, put(CONTOSO))
    write(store, put(CONTOSO), put(FABRIKAM))
    assert [change.key for change in store.changes(1)] == [key_of(FABRIKAM)]


def test_the_log_says_who_changed_what_and_when(store: SqliteStore) -> None:
    key = key_of(CONTOSO)
    store.write([Put(key, "one")], expected=0, actor="ada", at=NOON)
    east = timezone(timedelta(hours=2))
    store.write([Put(key, "two")], expected=1, actor="grace", at=datetime(2026, 6, 1, 15, tzinfo=east))
    store.write([Put(key, None)], expected=2, actor="ada", at=NOON + timedelta(hours=2))
    assert [tuple(change) for change in store.changes(0)] == [
        (1, NOON, "ada", key, None, "one"),
        (2, NOON + timedelta(hours=1), "grace", key, "one", "two"),
        (3, NOON + timedelta(hours=2), "ada", key, "two", None),
    ]
    assert all(change.at.utcoffset() == timedelta(0) for change in store.changes(0))


def test_the_log_can_be_followed_from_any_revision(store: SqliteStore) -> None:
    for number in range(1, 6):
        write(store, Put(key_of(CONTOSO), str(number)))
    assert [change.after for change in store.changes(3)] == ["4", "5"]
    assert list(store.changes(5)) == []


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM change",
        "DELETE FROM revision",
        "UPDATE change SET after = 'x'",
        "UPDATE revision SET actor = 'x'",
    ],
)
def test_the_log_cannot_be_rewritten(store: SqliteStore, path: Path, statement: str) -> None:
    write(store, put(CONTOSO))
    with closing(sqlite3.connect(path)) as other, pytest.raises(sqlite3.IntegrityError, match="only grows"):
        other.execute(statement)


def test_a_reader_sees_one_revision_while_others_write(store: SqliteStore, path: Path) -> None:
    write(store, put(CONTOSO))
    revision, records = store.read_all()
    with closing(opened(path)) as other:
        write(other, put(FABRIKAM))
        assert other.revision() == 2
    assert (revision, list(records)) == (1, [put(CONTOSO)])
    assert store.revision() == 2


def test_a_conflict_names_both_revisions_and_who_was_quicker(store: SqliteStore, path: Path) -> None:
    write(store, put(CONTOSO))
    with closing(opened(path)) as other:
        write(other, put(FABRIKAM), actor="grace")
    with pytest.raises(ConflictError) as caught:
        store.write([put(MACHINE)], expected=1, actor="ada", at=NOON)
    assert str(caught.value) == (
        f"sqlite:{path}: it was read at revision 1 and is now at revision 2, by grace at "
        "2026-06-01T12:00:00+00:00; nothing was written; run it again"
    )
    assert caught.value.exit_code == 1
    assert store.revision() == 2
    assert key_of(MACHINE) not in held(store)


def test_a_conflict_with_a_store_that_was_made_anew_is_an_error(store: SqliteStore) -> None:
    with pytest.raises(ConflictError, match="read at revision 7 and is now at revision 0;"):
        store.write([put(MACHINE)], expected=7, actor="ada", at=NOON)


def test_a_batch_that_fails_halfway_leaves_nothing(store: SqliteStore) -> None:
    write(store, put(CONTOSO))

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write([put(FABRIKAM)], expected=1, actor="ada", at=NOON, progress=interrupted)
    assert (store.revision(), held(store)) == (1, texts(CONTOSO))
    assert write(store, put(FABRIKAM)) == 2


def test_a_writer_hears_how_far_it_is(store: SqliteStore) -> None:
    heard: list[int] = []
    batch = [Put(f"attachments/vni1/{number}", "x") for number in range(45_000)]
    store.write(batch, expected=0, actor="ada", at=NOON, progress=heard.append)
    assert heard == [20_000, 40_000, 45_000]


def test_a_follower_is_notified_once_the_change_can_be_read(store: SqliteStore, path: Path) -> None:
    with closing(opened(path)) as follower:
        assert not notified(follower, 0)
        write(store, put(CONTOSO))
        assert notified(follower, 60)
        assert follower.revision() == 1
        follower.drain()
        assert not notified(follower, 0)


def test_a_change_notifies_another_process(store: SqliteStore, path: Path) -> None:
    script = (
        "import sys\nfrom unit.store.samples import *\n"
        "write(opened(Path(sys.argv[1])), put(CONTOSO), actor='another')"
    )
    subprocess.run([sys.executable, "-c", script, path], check=True, env=environment())
    assert notified(store, 1)
    assert [change.actor for change in store.changes(0)] == ["another"]


def test_a_batch_without_effect_does_not_notify(store: SqliteStore) -> None:
    write(store, put(CONTOSO))
    store.drain()
    write(store, put(CONTOSO))
    assert not notified(store, 0)


def test_a_store_without_its_change_notifier_still_works(store: SqliteStore, path: Path) -> None:
    path.with_name("portward.db.bell").unlink()
    assert write(store, put(CONTOSO)) == 1
    with closing(opened(path)) as other:
        write(store, put(FABRIKAM))
        assert notified(other, 1)


def test_two_stores_have_different_identities(store: SqliteStore, path: Path, tmp_path: Path) -> None:
    with closing(opened(path)) as same, closing(opened(tmp_path / "other.db")) as other:
        assert store.identity() == same.identity() != other.identity()
        assert len(store.identity()) == 16


def test_a_file_put_in_place_of_the_open_one_is_noticed(store: SqliteStore, path: Path, tmp_path: Path) -> None:
    write(store, put(CONTOSO))
    opened(tmp_path / "backup.db").close()
    (tmp_path / "backup.db").rename(path)
    for use in (
        store.revision,
        store.read_all,
        lambda: store.write([put(MACHINE)], expected=1, actor="a", at=NOON),
    ):
        with pytest.raises(StoreError, match="another file was put in its place"):
            use()


def test_a_copy_that_left_wal_mode_comes_back_to_it(store: SqliteStore, path: Path, tmp_path: Path) -> None:
    """`VACUUM INTO` writes such a copy. Without WAL, each reader of it would block writers."""
    write(store, put(CONTOSO))
    copy = tmp_path / "copy.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("VACUUM INTO ?", (str(copy),))

    def mode() -> str:
        with closing(sqlite3.connect(copy)) as connection:
            return str(connection.execute("PRAGMA journal_mode").fetchone()[0])

    assert mode() == "delete"
    with closing(sqlite3.connect(copy, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        SqliteStore(copy, agent=True).close()
        assert mode() == "delete", "not while another process is at work"
    SqliteStore(copy, agent=True).close()
    assert mode() == "wal"


def test_another_store_that_is_restored_into_the_open_file_is_noticed(
    store: SqliteStore, path: Path, tmp_path: Path
) -> None:
    write(store, put(CONTOSO))
    before = store.identity(), store.hash_of(1)
    with closing(opened(tmp_path / "other.db")) as other:
        write(other, put(CONTOSO))
    with closing(sqlite3.connect(tmp_path / "other.db")) as have, closing(sqlite3.connect(path)) as into:
        have.backup(into)
    assert store.revision() == 1
    assert store.identity() != before[0]
    assert store.hash_of(1) != before[1]


def test_a_file_that_was_removed_is_noticed(store: SqliteStore, path: Path) -> None:
    path.unlink()
    with pytest.raises(NoStoreError, match="no such file: put it back from a backup"):
        store.revision()


def test_a_missing_store_is_not_made_by_reading(path: Path) -> None:
    with pytest.raises(NoStoreError) as caught:
        open_store(f"sqlite:{path}")
    assert str(caught.value) == (
        f"sqlite:{path}: no such file: put it back from a backup; only if there never was one, 'portward apply' "
        "makes a new one"
    )
    assert list(path.parent.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"there is no folder {tmp_path}/gone"):
        open_store(f"sqlite:{tmp_path}/gone/portward.db", create=True)


@pytest.mark.parametrize("create", [True, False])
def test_a_folder_in_place_of_the_store_is_an_error(tmp_path: Path, *, create: bool) -> None:
    with pytest.raises(StoreError, match="a folder; the store is a file"):
        open_store(f"sqlite:{tmp_path}", create=create)


def test_a_store_of_a_newer_version_is_left_alone(store: SqliteStore, path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 3")
    with pytest.raises(StoreError, match=r"written by a newer portward \(format 3, this one knows 2\)"):
        opened(path)


@pytest.mark.parametrize("create", [True, False])
def test_a_file_that_is_no_database_is_named(path: Path, *, create: bool) -> None:
    path.write_bytes(b"subscriptions:\n" * 100)
    with pytest.raises(StoreError) as caught:
        SqliteStore(path, create=create)
    assert str(caught.value) == f"sqlite:{path}: this file is no SQLite database"


def test_a_database_of_another_program_is_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE mail (x)")
    with pytest.raises(StoreError, match="but not portward's"):
        opened(path)


def test_an_empty_file_is_no_store_and_becomes_one(path: Path) -> None:
    path.touch()
    with pytest.raises(NoStoreError, match="only if it never held a store, 'portward apply' makes it one"):
        SqliteStore(path)
    with closing(opened(path)) as store:
        assert write(store, put(CONTOSO)) == 1


def test_a_store_that_is_locked_for_too_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portward.store.sqlite.database._LOCK_TIMEOUT_S", 0.05)
    with closing(opened(path)) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another process has held it locked"):
            write(store, put(CONTOSO))
        assert held(store) == {}


def test_a_writer_that_waits_says_so_and_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portward.store.sqlite.database._SILENT_S", 0.05)
    said: list[str] = []
    with closing(opened(path)) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:

        def release(text: str, *values: object) -> None:
            said.append(text % values)
            other.execute("ROLLBACK")

        monkeypatch.setattr("portward.store.sqlite.database._log.warning", release)
        assert write(store, put(CONTOSO)) == 1
        assert said == []
        other.execute("BEGIN IMMEDIATE")
        assert write(store, put(FABRIKAM)) == 2
    assert said == [f"sqlite:{path}: another process holds it locked: waiting for up to 20 s"]


def test_a_reader_of_a_store_without_wal_that_waits_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened(path).close()
    monkeypatch.setattr("portward.store.sqlite.database._SILENT_S", 0.05)
    monkeypatch.setattr("portward.store.sqlite.database._LOCK_TIMEOUT_S", 0.1)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match="another process has held it locked"):
            SqliteStore(path)
    assert caplog.messages == [f"sqlite:{path}: another process holds it locked: waiting for up to 0.1 s"]


def journal_mode(path: Path) -> str:
    """The journal mode that the file is in."""
    with closing(sqlite3.connect(path)) as other:
        found: str = other.execute("PRAGMA journal_mode").fetchone()[0]
        return found


@pytest.mark.parametrize("who", [{"create": True}, {"agent": True}], ids=["apply", "agent"])
def test_wal_that_another_tool_took_away_is_put_back(
    path: Path, who: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    """Without WAL, readers wait for writers."""
    opened(path).close()
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
    with closing(SqliteStore(path, **who)) as store:
        assert store.waits() == ""
    assert journal_mode(path) == "wal"
    assert "its journal mode was delete: WAL is put back" in caplog.text


def test_who_only_looks_leaves_the_journal_mode_as_it_is(path: Path) -> None:
    opened(path).close()
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
    SqliteStore(path).close()
    assert journal_mode(path) == "delete"


def test_an_agent_that_cannot_put_wal_back_says_so_and_does_not_wait_for_long(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("portward.store.sqlite.database.AGENT_LOCK_TIMEOUT_S", 0.05)
    monkeypatch.setattr("portward.store.sqlite.database._LOCK_TIMEOUT_S", 3600)
    opened(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN")
        other.execute("SELECT * FROM record").fetchone()
        with closing(SqliteStore(path, agent=True)) as store:
            assert store.waits().startswith("its journal mode is delete, and WAL cannot be put back now")
            assert store.waits() in caplog.text
            other.execute("ROLLBACK")
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(StoreError, match=r"another process has held it locked for 0\.05 s"):
                store.revision()


def test_a_full_disk_is_an_error_and_leaves_nothing(store: SqliteStore) -> None:
    write(store, put(CONTOSO))
    store._database.connection.execute("PRAGMA max_page_count = 12")
    with pytest.raises(StoreError, match="the disk is full; nothing was written"):
        write(store, *(Put(f"attachments/vni1/{number}", "x" * 500) for number in range(1_000)))
    assert (store.revision(), len(held(store))) == (1, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_full_disk_is_an_error_for_a_reader_too(tmp_path: Path) -> None:
    with mounted(tmp_path, "size=256k") as folder:
        with closing(opened(folder / "portward.db")) as store:
            write(store, put(CONTOSO))
        with contextlib.suppress(OSError):
            (folder / "fill").write_bytes(bytes(256 * 1024))
        with pytest.raises(StoreError, match="is there room on the disk"):
            SqliteStore(folder / "portward.db")
        (folder / "fill").unlink()
        with closing(SqliteStore(folder / "portward.db")) as store:
            assert store.revision() == 1, "nothing is lost"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_read_only_file_system_is_named(tmp_path: Path) -> None:
    with mounted(tmp_path, "size=1m") as folder:
        with closing(opened(folder / "portward.db")) as store:
            write(store, put(CONTOSO))
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(StoreError, match="their file system is not read-only"):
            SqliteStore(folder / "portward.db")


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system, mounted on a folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_accepted_changes_survive_a_power_cut(store: SqliteStore) -> None:
    # 2 is FULL: the WAL is synced at every commit (sqlite.org/pragma.html#pragma_synchronous).
    assert store._database.connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert store._database.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_write_protected_store_is_an_error_of_permission(tmp_path: Path) -> None:
    path = tmp_path / "portward.db"
    with closing(opened(path)) as store:
        write(store, put(CONTOSO))
    path.chmod(0o444)
    printed = as_another_user(tmp_path, "store = SqliteStore(path)\nwrite(store, put(FABRIKAM))")
    assert printed == f"StoreError: sqlite:{path}: it cannot be written: {PERMISSIONS}"


def test_an_unreadable_store_is_an_error_of_permission(path: Path) -> None:
    opened(path).close()
    path.chmod(0)
    printed = as_another_user(path.parent, "SqliteStore(path)")
    assert printed == f"StoreError: sqlite:{path}: it cannot be opened: {PERMISSIONS}"


def test_a_closed_folder_is_an_error_of_permission(path: Path) -> None:
    opened(path).close()
    printed = as_another_user(path.parent, "SqliteStore(path)", folder_mode=0)
    assert printed == f"StoreError: sqlite:{path}: Permission denied"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for others")
def test_what_root_makes_belongs_to_the_owner_of_the_folder(path: Path) -> None:
    os.chown(path.parent, 65534, 65534)
    with closing(opened(path)) as store:
        write(store, put(CONTOSO))
        assert {file.name: file.stat().st_uid for file in path.parent.iterdir()} == dict.fromkeys(
            ["portward.db", "portward.db-wal", "portward.db-shm", "portward.db.bell"], 65534
        )


def notified(store: SqliteStore, seconds: float) -> bool:
    """Whether the change notifier of a store notifies within this time."""
    descriptor = store.fileno()
    assert descriptor is not None
    return bool(select.select([descriptor], [], [], seconds)[0])


def environment() -> dict[str, str]:
    """Lets another Python find the package and these tests."""
    tests = Path(__file__).resolve().parents[2]
    return {**os.environ, "PYTHONPATH": f"{tests.parent / 'agent'}:{tests}"}


def as_another_user(folder: Path, statements: str, *, folder_mode: int = 0o555) -> str:
    """The output of these statements in a Python process of user 65534, or of this user if the tests do not run as
    root."""
    script = (
        "import os, sys\nfrom unit.store.samples import *\npath = Path(sys.argv[1])\n"
        "if os.geteuid() == 0:\n"
        "    os.setgroups([])\n"
        "    os.setgid(65534)\n"
        "    os.setuid(65534)\n"
        "try:\n" + "".join(f"    {line}\n" for line in statements.splitlines()) + "except Exception as error:\n"
        "    print(f'{type(error).__name__}: {error}')\n"
    )
    folders = {folder: folder_mode}
    if os.geteuid() == 0:  # pytest's own folders are closed to others
        folders |= {parent: mode(parent) | 0o011 for parent in folder.parents if not mode(parent) & 0o001}
    before = {each: mode(each) for each in folders}
    argv = [sys.executable, "-c", script, str(folder / "portward.db")]
    try:
        for each, wanted in folders.items():
            each.chmod(wanted)
        done = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment())
    finally:
        for each, was in before.items():
            each.chmod(was)
    return done.stdout.strip()


def mode(path: Path) -> int:
    """The permission bits of a file."""
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("bad", range(5))
def test_a_text_that_is_no_utf_8_keeps_no_other_from_being_read(tmp_path: Path, bad: int) -> None:
    """At any place of such a text, each record comes once, in the same order."""
    path = tmp_path / "portward.db"
    store = opened(path)
    write(store, *map(put, ALL))
    before = list(store.read_all()[1])
    key = before[bad][0]
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE record SET body = CAST(X'80' AS TEXT) WHERE key = ?", (key,))
        connection.commit()
    assert list(store.read_all()[1]) == [(found, "\\x80" if found == key else body) for found, body in before]
    store.close()


def test_reading_anew_is_one_state_though_another_reading_was_left_half_way(tmp_path: Path) -> None:
    store, other = opened(tmp_path / "portward.db"), opened(tmp_path / "portward.db")
    write(store, *map(put, ALL))
    _, left = store.read_all()
    next(left)
    revision, records = store.read_all()
    del left
    write(other, Put(key_of(MACHINE), None))
    assert (revision, dict(records)) == (1, texts(*ALL))
    store.close()
    other.close()
