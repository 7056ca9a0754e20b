"""The memory map of the table's file grows while threads of the process read. No read fails or waits for ever."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest

from portward.model import Reason, Record
from portward.table import layout
from portward.table.database import MAP_SIZE, Environment, MapResizedError, TableError, open_database, open_parts
from portward.table.reader import Reader
from portward.table.writer import Writer
from unit.table.test_table import AZURE, ENFORCE, NOW, attachment, load, subscription

# Just large enough for a table with a few rows.
SMALL = 1 << 17
GROWTHS = 50
PATIENCE_S = 60
ALLOWED, DENIED = (ip_address(address).packed for address in ("10.0.0.4", "10.0.0.5"))


def until(true: Callable[[], object], what: str) -> None:
    """Waits until `true()` is true, and fails after a deadline."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)  # pause: of a poll


def started(work: Callable[[], object]) -> threading.Thread:
    """Starts a thread that does this work."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def end(*threads: threading.Thread) -> None:
    """Waits until these threads have ended."""
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "a thread waits for ever"


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    """A table with a small map, in which `ALLOWED` may send, and `DENIED` is unknown."""
    with closing(made(tmp_path / "table")) as found:
        yield found


def made(folder: Path) -> Writer:
    """Makes a new table like that of `writer`."""
    found = Writer(folder, AZURE, ENFORCE, map_size=SMALL)
    load(found, [subscription(1), attachment("10.0.0.4", 1)])
    found.put_links({1: ("vni1", False)}, touched=frozenset(), now=NOW)
    return found


def machines(first: str, number: int) -> list[Record]:
    """Attachments of one address each, `number` of them from `first` on."""
    start = int(ip_address(first))
    return [attachment(str(ip_address(start + offset)), 1) for offset in range(number)]


class Readers:
    """Threads that read the table of a writer without a pause, each by a reader of its own."""

    def __init__(self, writer: Writer, number: int = 3, *, nested: bool = True) -> None:
        """`nested`: they also begin a transaction within another one."""
        self._writer, self._nested, self._ended = writer, nested, threading.Event()
        self.failed: list[str] = []
        self.rounds = [0] * number
        self._interval = sys.getswitchinterval()
        self._threads = [threading.Thread(target=self._run, args=(place,)) for place in range(number)]

    def __enter__(self) -> Readers:
        # By default, a thread that never pauses may delay every call of LMDB by 5 ms.
        sys.setswitchinterval(0.0001)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        sys.setswitchinterval(self._interval)
        self._ended.set()
        end(*self._threads)

    def go_on(self) -> None:
        """Waits until each thread has read everything two more times, or one has failed."""
        before = list(self.rounds)
        until(
            lambda: self.failed or all(now >= then + 2 for now, then in zip(self.rounds, before, strict=True)),
            "the readers do not go on",
        )
        assert not self.failed

    def _run(self, place: int) -> None:
        reader = self._writer.reader()
        while not self._ended.is_set():
            try:
                self._read(reader)
            except BaseException as error:
                self.failed.append(f"{type(error).__name__}: {error}")
                return
            self.rounds[place] += 1

    def _read(self, reader: Reader) -> None:
        with reader.view():
            assert reason(reader, ALLOWED) is Reason.ALLOWED_OFFER
            assert not self._nested or self._writer.head() is not None
            assert reason(reader, DENIED) is Reason.DENIED_UNKNOWN_SOURCE
        assert reason(reader, ALLOWED) is Reason.ALLOWED_OFFER
        found = reader.owner(1, ALLOWED)
        assert found is not None
        assert found[1] is not None
        account = reader.account(found[1].subscription)
        assert account is not None
        assert account.id == UUID(int=1)
        assert reader.counts()[1] == 1


def reason(reader: Reader, source: bytes) -> Reason:
    """The reason of a source in the only segment."""
    found = reader.lookup(1, source)
    assert found is not None
    return found.reason


@contextmanager
def other_process(folder: Path) -> Iterator[Callable[[], None]]:
    """Another process. Each call makes it grow the file beyond the maps of all other processes."""
    program = f"""
import sys, lmdb
with lmdb.open({str(folder)!r}, map_size={SMALL}, max_dbs=64) as environment:
    filler = environment.open_db(b"filler")
    for number, _ in enumerate(sys.stdin):
        size, last = environment.info()["map_size"], environment.info()["last_pgno"]
        page = environment.stat()["psize"]
        # Values of this size lie on pages that follow each other, so they go to the end of the file.
        value = bytes(size + 2 * page - last * page)
        environment.set_mapsize(size + len(value) + 16 * page)
        with environment.begin(write=True) as transaction:
            transaction.put(b"%d" % number, value, db=filler)
        assert environment.info()["last_pgno"] * page > size
        print("grown", flush=True)
"""
    argv = [sys.executable, "-c", program]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        to, of = process.stdin, process.stdout

        def grow() -> None:
            to.write("\n")
            assert of.readline() == "grown\n"

        yield grow
        to.close()


def size(environment: Environment) -> int:
    """The size of the map, in bytes."""
    return environment._lmdb.info()["map_size"]


def test_threads_read_on_while_a_change_makes_the_map_larger(writer: Writer, tmp_path: Path) -> None:
    """An example is a policy thread that writes more than the map holds while the kernel thread looks sources
    up."""
    with Readers(writer) as readers:
        for number in range(4):
            writer.apply(machines(f"10.{number + 1}.0.0", 1_000), [], revision=number + 2, now=NOW)
            readers.go_on()
    assert size(writer._environment) > SMALL
    assert writer.reader().counts() == (4_001, 1)


def test_threads_read_on_however_often_the_map_grows(tmp_path: Path) -> None:
    grown = 0
    while grown < GROWTHS:
        with closing(made(tmp_path / str(grown))) as writer, Readers(writer) as readers:
            for _ in range(16):
                before = size(writer._environment)
                writer._environment.grow(MAP_SIZE)
                readers.go_on()
                grown += size(writer._environment) > before
                if 2 * size(writer._environment) > MAP_SIZE:
                    break


def test_threads_read_on_while_another_process_makes_the_file_larger(writer: Writer, tmp_path: Path) -> None:
    """An example is a bulk change that makes the file larger than the daemon's map."""
    with Readers(writer, nested=False) as readers, other_process(tmp_path / "table") as grow:
        for _ in range(GROWTHS):
            before = size(writer._environment)
            grow()
            readers.go_on()
            assert size(writer._environment) > before


def test_a_change_of_policy_takes_a_larger_file_over_while_threads_read(writer: Writer, tmp_path: Path) -> None:
    with Readers(writer, nested=False) as readers, other_process(tmp_path / "table") as grow:
        for number in range(GROWTHS):
            grow()
            writer.apply(machines(f"10.{number + 1}.0.0", 2), [], revision=number + 2, now=NOW)
            readers.go_on()
    assert writer.reader().counts() == (1 + 2 * GROWTHS, 1)


def test_a_table_can_be_opened_while_another_process_makes_it_larger(writer: Writer, tmp_path: Path) -> None:
    """The file may become larger than the map between the opening and the first transaction."""
    writer.close()  # a process opens a file once
    folder = tmp_path / "table"
    with other_process(folder) as grow, closing(open_database(folder, write=False, map_size=SMALL)) as environment:
        grow()
        assert open_parts(environment, write=False).keys() == set(layout.PARTS)
        with environment.begin() as transaction:
            assert transaction.get(layout.HEAD) is not None


def test_the_map_is_made_twice_as_large_as_it_is_and_not_as_it_was(writer: Writer, tmp_path: Path) -> None:
    with other_process(tmp_path / "table") as grow:
        for _ in range(20):
            grow()
    assert writer.head() is not None
    taken_over = size(writer._environment)
    assert taken_over > 4 * SMALL
    writer._environment.grow(MAP_SIZE)
    assert size(writer._environment) == 2 * taken_over


def test_a_map_is_not_made_larger_than_the_largest(writer: Writer) -> None:
    with pytest.raises(TableError, match=f"full at {SMALL} bytes"):
        writer._environment.grow(2 * SMALL - 1)
    assert size(writer._environment) == SMALL
    assert reason(writer.reader(), ALLOWED) is Reason.ALLOWED_OFFER
    writer._environment.grow(2 * SMALL)
    assert size(writer._environment) == 2 * SMALL


# --- threads that wait for each other ---


def test_a_thread_with_a_transaction_goes_on_while_the_map_waits_to_grow(writer: Writer) -> None:
    """That thread may begin another transaction. A thread without one waits for the growth, because many such
    threads could otherwise delay it for ever."""
    environment, reader = writer._environment, writer.reader()
    seen: list[int] = []

    def late() -> None:
        with environment.begin():
            seen.append(size(environment))

    with reader.view():
        growing = started(lambda: environment.grow(MAP_SIZE))
        until(lambda: environment._gate._waiting, "nothing waits to make the map larger")
        coming = started(late)
        for _ in range(100):
            assert writer.head() is not None
        assert (growing.is_alive(), coming.is_alive(), seen, size(environment)) == (True, True, [], SMALL)
        assert reason(reader, ALLOWED) is Reason.ALLOWED_OFFER
    end(growing, coming)
    assert seen == [2 * SMALL]


def test_a_size_that_another_thread_has_taken_over_is_not_waited_for(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy thread takes the size over and begins a long change just before the kernel thread would do so."""
    environment, found, take_over = writer._environment, [], Environment._adapt_size
    writing, over = threading.Event(), threading.Event()

    def change() -> None:
        with environment.begin(write=True):
            writing.set()
            assert over.wait(PATIENCE_S)

    changing = threading.Thread(target=change, daemon=True)

    def late(self: Environment, since: int) -> None:
        if threading.current_thread() is not changing:
            changing.start()
            assert writing.wait(PATIENCE_S)
        take_over(self, since)

    monkeypatch.setattr(Environment, "_adapt_size", late)
    with other_process(tmp_path / "table") as grow:
        grow()
    try:
        end(started(lambda: found.append(reason(writer.reader(), ALLOWED))))
        assert changing.is_alive()
    finally:
        over.set()
    end(changing)
    assert found == [Reason.ALLOWED_OFFER]


def test_a_transaction_within_another_one_waits_for_no_size(writer: Writer, tmp_path: Path) -> None:
    """Its thread would wait for itself. The outer transaction goes on, and the next one uses the new size."""
    reader = writer.reader()
    found: list[Reason] = []

    def read() -> None:
        with reader.view():
            grow()
            with pytest.raises(MapResizedError):
                writer.head()
            found.append(reason(reader, ALLOWED))

    with other_process(tmp_path / "table") as grow:
        end(started(read))
    assert found == [Reason.ALLOWED_OFFER]
    assert writer.head() is not None


def test_within_a_view_everything_is_read_at_its_commit(writer: Writer) -> None:
    """So a reader begins no second transaction within its own, which could fail."""
    reader = writer.reader()
    with reader.view():
        writer.apply([subscription(2), attachment("10.0.0.5", 2)], [], revision=2, now=NOW)
        writer.put_links({1: ("vni1", False), 2: ("vni2", False)}, touched=frozenset(), now=NOW)
        found = reader.owner(1, DENIED)
        assert found is not None
        assert (found[1], reader.account(2), reader.counts(), set(reader.links())) == (None, None, (1, 1), {1})
    found = reader.owner(1, DENIED)
    assert found is not None
    assert found[1] is not None
    assert (reader.account(2) is None, reader.counts(), set(reader.links())) == (False, (2, 2), {1, 2})


class Damaged:
    """LMDB's view of a file whose size never fits."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def begin(self, *, write: bool) -> Any:
        """Raises, as LMDB does for a page number beyond the map."""
        raise MapResizedError(f"write={write}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)


def test_a_size_that_never_fits_is_an_error_and_no_endless_loop(writer: Writer) -> None:
    environment, raised = writer._environment, []

    def read() -> None:
        with pytest.raises(MapResizedError):
            writer.head()
        raised.append(True)

    opened, environment._lmdb = environment._lmdb, cast("Any", Damaged(environment._lmdb))
    end(started(read))
    assert raised
    environment._lmdb = opened
    environment.grow(MAP_SIZE)  # no transaction counts as open
    assert writer.head() is not None
