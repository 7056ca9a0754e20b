"""A bulk change by a child process has the same result as one by the daemon itself."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest

from portward.base import instance
from portward.daemon import bulk as module
from portward.daemon.bulk import Bulk, BulkResult, Job
from portward.errors import StoreError
from portward.model import Attachment, Record, Standing, Subscription
from portward.policy import presets
from portward.store.codec import encode, key_of
from portward.store.flips import UnconfirmedError
from portward.store.sqlite.store import SqliteStore
from portward.store.values import Put
from portward.table.commits import Answers, ChangedPlace, Committed
from portward.table.database import TableError
from portward.table.follower import BulkError, Follower
from portward.table.writer import Writer

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
ANSWERS = Answers(observe=False, reject=False)
PRESET = presets.load("azure-2020")
NUMBER = 30


def subscription(number: int, standing: Standing = Standing.GOOD) -> Subscription:
    """A subscription that may send if its standing is good."""
    offer, created = "enterprise-agreement", date(2022, 6, 30)
    return Subscription(id=UUID(int=number), offer=offer, created=created, standing=standing)


def attachment(number: int) -> Attachment:
    """The machine of the subscription with that number."""
    return Attachment(segment="vni1", address=ip_network((0x0A000000 + number, 32)), subscription=UUID(int=number))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    """A store with `NUMBER` subscriptions, each with a machine."""
    found = SqliteStore(tmp_path / "portward.db", create=True)
    numbers = range(1, NUMBER + 1)
    write(found, *(subscription(number) for number in numbers), *(attachment(number) for number in numbers))
    yield found
    found.close()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    """The daemon's own access to the table."""
    found = Writer(tmp_path / "table", PRESET, ANSWERS, max_flip_share=0.1)
    yield found
    found.close()


def write(store: SqliteStore, *records: Record) -> None:
    """Writes records as one revision."""
    batch = [Put(key_of(record), encode(record)) for record in records]
    store.write(batch, expected=store.revision(), actor="test", at=NOW)


def job(tmp_path: Path) -> Job:
    """The job with which the daemon makes a child read the store."""
    return Job(tmp_path / "table", PRESET, ANSWERS, 0.1, NOW, f"sqlite:{tmp_path / 'portward.db'}")


def test_more_than_the_limit_is_left_to_a_child(store: SqliteStore, writer: Writer) -> None:
    with pytest.raises(BulkError):
        Follower(store, writer, 2 * NUMBER - 1).step(NOW)
    assert writer.head() is None
    committed = Follower(store, writer, 2 * NUMBER).step(NOW)
    assert committed is not None
    assert committed.everything
    write(store, *(subscription(number, Standing.PAST_DUE) for number in (1, 2)))
    with pytest.raises(BulkError):
        Follower(store, writer, 1).step(NOW)
    assert Follower(store, writer, 2).step(NOW) is not None
    write(store, subscription(3, Standing.PAST_DUE))
    assert Follower(store, writer, 1).step(NOW) is not None, "what was taken in before does not count"


def test_a_child_takes_the_store_in(store: SqliteStore, writer: Writer, tmp_path: Path) -> None:
    outcome = Bulk().run(job(tmp_path))
    head = writer.head()
    assert head is not None
    assert outcome.committed is not None
    assert (outcome.committed.revision, outcome.committed.generation) == (1, head.generation)
    assert outcome.committed.everything
    assert writer.reader().counts() == (NUMBER, NUMBER)
    assert Follower(store, writer, 0).step(NOW) is None, "nothing is left to be done"


def test_a_child_is_heard_by_an_agent_with_many_descriptors(
    store: SqliteStore, writer: Writer, tmp_path: Path
) -> None:
    """An agent with 64 workers has more than 1,024 descriptors, the most that select() takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2_048:
        pytest.skip(f"this process may have {hard} descriptors")
    with contextlib.ExitStack() as open_:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        open_.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1_024):
            open_.callback(os.close, os.eventfd(0))
        outcome = Bulk().run(job(tmp_path))
    assert outcome.committed is not None


def test_a_child_says_which_records_it_refused(store: SqliteStore, writer: Writer, tmp_path: Path) -> None:
    store.write([Put("attachments/vni1/10.9.9.9", "{")], expected=1, actor="test", at=NOW)
    outcome = Bulk().run(job(tmp_path)._replace(unreadable={"attachments/vni1/10.8.8.8": "as before"}))
    assert outcome.refused == 1
    # The child has read all records again, so earlier entries of the list are gone.
    assert list(outcome.unreadable) == ["attachments/vni1/10.9.9.9"]
    assert writer.reader().counts() == (NUMBER, NUMBER)


def test_a_child_holds_what_flips_too_many(store: SqliteStore, writer: Writer, tmp_path: Path) -> None:
    Follower(store, writer).step(NOW)
    before = writer.head()
    write(store, *(subscription(number, Standing.DISABLED) for number in range(1, NUMBER + 1)))
    outcome = Bulk().run(job(tmp_path))
    itself = Follower(store, writer)
    assert itself.step(NOW) is None
    assert itself.held is not None
    assert outcome.waiting is not None
    assert outcome.waiting.held == itself.held
    assert outcome.committed is None
    after = writer.head()
    assert before is not None
    assert after is not None
    assert after._replace(held=0, ahead=0, ahead_hash=before.ahead_hash) == before, "only that it is held"


def test_a_child_of_an_instance_names_the_command_for_that_instance(
    store: SqliteStore, writer: Writer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The child writes the same log as the agent."""
    Follower(store, writer, 2 * NUMBER).step(NOW)
    write(store, *(subscription(number, Standing.DISABLED) for number in range(1, NUMBER + 1)))
    instance.note(instance.Own("blue", "/etc/portward/blue.toml"))
    try:
        Bulk().run(job(tmp_path))
    finally:
        instance.note(None)
    assert "`portward apply --confirm --config /etc/portward/blue.toml` lets it through" in capfd.readouterr().err


def test_a_store_that_a_child_cannot_read_is_named(writer: Writer, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such file"):
        Bulk().run(job(tmp_path))
    assert writer.head() is None


def test_a_child_decides_everything_for_another_preset(store: SqliteStore, writer: Writer, tmp_path: Path) -> None:
    Follower(store, writer).step(NOW)
    before = writer.head()
    other = presets.load("aws")
    again = job(tmp_path)._replace(store=None, preset=other)
    with pytest.raises(UnconfirmedError) as told:
        Bulk().run(again._replace(may_flip=False))
    assert told.value.flips.flipped == NUMBER
    after = writer.head()
    assert before is not None
    assert after is not None
    assert after._replace(held=0, ahead=0, ahead_hash=before.ahead_hash) == before, "only that it is held"
    committed = Bulk().run(again).committed
    assert committed is not None
    assert before is not None
    assert committed.generation == (before.generation + 1) % 2**32
    writer.preset = other
    assert not writer.is_decided_otherwise()


def test_a_stop_ends_a_child_and_leaves_the_table_as_it_was(
    store: SqliteStore, writer: Writer, tmp_path: Path
) -> None:
    Follower(store, writer).step(NOW)
    before = writer.head()
    write(store, subscription(1, Standing.PAST_DUE))
    bulk, ended = Bulk(), []

    def run() -> None:
        try:
            bulk.run(job(tmp_path))
        except TableError as error:
            ended.append(str(error))

    # The child waits for the table.
    with writer._environment.begin(write=True):
        thread = threading.Thread(target=run)
        thread.start()
        bulk.stop()
        thread.join(60)
        assert not thread.is_alive()
    assert len(ended) == 1
    after = writer.head()
    assert before is not None
    assert after is not None
    assert after._replace(held=0, ahead=0, ahead_hash=before.ahead_hash) == before, "only that it is held"
    with pytest.raises(TableError, match="stopping"):
        bulk.run(job(tmp_path))


def test_a_map_that_a_child_has_made_larger_is_taken_over(store: SqliteStore, tmp_path: Path) -> None:
    write(store, *(attachment(number) for number in range(NUMBER + 1, 200 * NUMBER)))
    # Just large enough for an empty table.
    writer = Writer(tmp_path / "table", PRESET, ANSWERS, map_size=1 << 17)
    try:
        assert Bulk().run(job(tmp_path)).committed is not None
        assert (tmp_path / "table" / "data.mdb").stat().st_size > 1 << 17
        assert writer.head() is not None
        assert writer.put_links({7: ("vni1", False)}, touched=frozenset(), now=NOW).links == {7}
        finding = writer.reader().lookup(7, attachment(1).address.network_address.packed)
        assert finding is not None
        assert finding.reason.allows
    finally:
        writer.close()


class Slow:
    """The LMDB environment of a process that waits to write: another process does `meanwhile` before."""

    def __init__(self, environment: Any, meanwhile: Callable[[], object]) -> None:
        self._environment, self._meanwhile = environment, [meanwhile]

    def begin(self, *, write: bool = False) -> Any:
        """Begins a transaction. The work of the other process comes before the first one that writes."""
        if write and self._meanwhile:
            self._meanwhile.pop()()
        return self._environment.begin(write=write)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)


def test_a_commit_of_another_process_just_before_ones_own_is_kept(
    store: SqliteStore, writer: Writer, tmp_path: Path
) -> None:
    """A bulk change whose daemon was killed may still commit, once the next daemon has opened the table."""
    Follower(store, writer).step(NOW)
    before = writer.head()
    assert before is not None
    write(store, subscription(1, Standing.DISABLED))
    writer._environment = cast("Any", Slow(writer._environment, lambda: Bulk().run(job(tmp_path))))
    settled = writer.decide_due(now=NOW)
    after = writer.head()
    assert after is not None
    assert (after.revision, after.generation) == (2, (before.generation + 1) % 2**32)
    assert (settled.revision, settled.generation) == (after.revision, after.generation)


def test_a_change_that_was_worked_out_from_an_older_table_is_not_taken_in(
    store: SqliteStore, writer: Writer, tmp_path: Path
) -> None:
    """It would undo a later revision that another process has written to the table meanwhile."""
    Follower(store, writer).step(NOW)
    write(store, subscription(1, Standing.PAST_DUE))

    def meanwhile() -> None:
        other = SqliteStore(tmp_path / "portward.db")
        write(other, subscription(1, Standing.DISABLED))
        other.close()
        Bulk().run(job(tmp_path))

    follower = Follower(store, writer)
    writer._environment = cast("Any", Slow(writer._environment, meanwhile))
    with pytest.raises(TableError, match="another process has changed the policy table"):
        follower.step(NOW)
    head, account = writer.head(), writer.reader().account_of(UUID(int=1))
    assert head is not None
    assert account is not None
    assert (head.revision, account.subscription) == (3, subscription(1, Standing.DISABLED))
    assert follower.step(NOW) is None, "nothing is left to be done"
    assert follower.in_step


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Runs `code` (Python) instead of the child of a bulk change."""
    monkeypatch.setattr(module, "PYTHON", (sys.executable, "-I", "-c", code, "--"))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_child_that_is_killed_while_it_writes_its_outcome_is_an_error_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    places = tuple(
        ChangedPlace("vni1", ip_network(f"10.{number >> 8}.{number & 255}.0/24")) for number in range(3_000)
    )
    whole = pickle.dumps(BulkResult(Committed(5, 6, places), refused=3))
    (tmp_path / "outcome").write_bytes(whole[: int(len(whole) * share)])
    child(
        monkeypatch,
        "import os, sys; sys.stdin.buffer.read(1);"
        f"os.write(int(sys.argv[-1]), open({str(tmp_path / 'outcome')!r}, 'rb').read());"
        "os.kill(os.getpid(), 9)",
    )
    with pytest.raises(TableError, match=r"the process of a bulk change ended \(-9\)"):
        Bulk().run(job(tmp_path))


def test_a_child_that_ends_before_it_has_read_its_job_is_an_error_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(monkeypatch, "raise SystemExit(3)")
    # More than a pipe holds.
    large = job(tmp_path)._replace(store="x" * (1 << 20))
    with pytest.raises(TableError, match=r"the process of a bulk change ended \(3\)"):
        Bulk().run(large)


@pytest.mark.parametrize(("program", "beats"), [("while 1: pass", True), ("import time; time.sleep(60)", False)])
def test_only_a_child_that_gets_on_keeps_the_policy_thread_from_being_stuck(
    monkeypatch: pytest.MonkeyPatch, program: str, beats: bool
) -> None:
    looks: list[bool] = []
    started: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(module, "_CHECK_S", 0.1)
    monkeypatch.setattr("portward.base.heartbeat.beat", lambda: looks.append(True))
    real = module._processor_ticks

    def ticks(process: int) -> int:
        looks.append(False)
        if looks.count(False) > 20:
            started[0].kill()
        return real(process)

    monkeypatch.setattr(module, "_processor_ticks", ticks)
    with subprocess.Popen([sys.executable, "-S", "-c", program], stdout=subprocess.PIPE) as child:
        started.append(child)
        assert child.stdout is not None
        assert module._read(child, child.stdout) == b""
    # Its start uses processor time too.
    assert (True in looks[-15:]) is beats


NOISE = "import sys; sys.stdout.write('half a line'); sys.stdout.buffer.write(b'\\xff\\x80.\\n' * 50_000);"


def test_what_a_library_prints_is_no_outcome(
    store: SqliteStore, writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library prints before the child works, and while it does."""
    child(
        monkeypatch,
        f"{NOISE} sys.stdout.flush(); import portward.daemon.bulk as module; done = module._done;"
        "module._done = lambda job: (print('in between', flush=True), done(job))[1]; sys.argv[1] = sys.argv[-1];"
        "module.main()",
    )
    outcome = Bulk().run(job(tmp_path))
    assert outcome.committed is not None
    assert outcome.committed.revision == 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"warning: something\n",
        b"\xff" * 100,
        b"cnowhere\nThing\n.",
        b"I1\n.",
        b"N.",
        b"0.",
        b"i\n",
        b"(lp0\n",
    ],
)
def test_bytes_that_are_no_outcome_are_an_error_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    child(monkeypatch, f"import os, sys; sys.stdin.buffer.read(1); os.write(int(sys.argv[-1]), {data!r})")
    with pytest.raises(TableError, match=r"the process of a bulk change ended \(-?\d+\)"):
        Bulk().run(job(tmp_path))
