"""How costs grow with the number of attachments, from a thousand to five million: loading them from the store, the
size of the table, a lookup, one change, memory, a start.

One store grows from size to size. SQL writes its records, because `apply` would take minutes. For each size, one
process loads the store into a new table, as the daemon does. Another process looks sources up in it, as a worker
does: random attachments, and as many sources that no attachment covers, 64 in each view of the table. Then the
agent starts on that table.
"""

from __future__ import annotations

import json
import random
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import inventory
from bench.figures import Curve, Figure
from portward.base.clock import utc_now
from portward.model import Standing, Subscription
from portward.policy import presets
from portward.store.backends import open_store
from portward.store.codec import encode, key_of
from portward.store.sqlite.store import SqliteStore
from portward.store.values import Put
from portward.table.commits import Answers
from portward.table.database import FILE
from portward.table.follower import Follower
from portward.table.reader import Reader
from portward.table.writer import Writer

SIZES: Final = {"1k": 1_000, "10k": 10_000, "100k": 100_000, "1m": 1_000_000, "5m": 5_000_000}
_CHANGES, _LOOKUPS, _VIEW = 40, 64_000, 64
_STARTED: Final = "2026-01-10T08:00:00Z"


def measure(folder: Path, sizes: dict[str, int] = SIZES) -> Iterator[Figure | Curve]:
    """`load_s_…`, `table_bytes_per_attachment…`, `lookup_ns_…`, `change_ms_…` and memory by size, and curves."""
    # The processes that load and look up run this file too. This import would add to their memory.
    from bench import start

    store, rows, before = folder / "portward.db", {}, 0
    for name, size in sizes.items():
        _grow(store, before, size)
        before, table = size, folder / f"table-{name}"
        row = _in_process("load", store, table, size) | _in_process("look", store, table, size)
        yield from _of_one_size(name, row)
        started = start.measure(folder, name, table)
        yield started
        rows[name] = row | {"start_s": [started.value, started.low, started.high]}
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
    if {"1k", "1m", "5m"} <= rows.keys():
        yield _figure("table_bytes_per_attachment", rows["1m"]["bytes"], "bytes, at a million", "<= 48")
        yield _figure("lookup_5m_vs_1k", _grown(rows, "lookup_ns"), "times as long", "<= 3")
        yield _figure("change_5m_vs_1k", _grown(rows, "change_ms"), "times as long", "<= 3")
    yield from _curves(sizes, rows)


def _of_one_size(name: str, row: dict[str, Any]) -> Iterator[Figure]:
    yield _figure(f"load_s_{name}", row["load_s"], "s, SQLite to table", "<= 8" if name == "1m" else "")
    yield _figure(f"table_bytes_per_attachment_{name}", row["bytes"], "bytes")
    yield _figure(f"lookup_ns_{name}", row["lookup_ns"], "ns in a view of 64, from Python")
    yield _figure(f"change_ms_{name}", row["change_ms"], "ms, store's commit → table's commit")
    yield _figure(f"daemon_private_mb_{name}", row["daemon_mb"], "MB after a load")
    yield _figure(f"worker_private_mb_{name}", row["worker_mb"], "MB", "<= 80")


def _figure(name: str, value: float | list[float], unit: str, goal: str = "") -> Figure:
    """A value, or median, least and largest."""
    middle, low, high = value if isinstance(value, list) else [value] * 3
    return Figure(name, middle, low, high, unit, goal)


def _grown(rows: dict[str, dict[str, Any]], what: str) -> float:
    return float(rows["5m"][what][0] / rows["1k"][what][0])


def _curves(sizes: dict[str, int], rows: dict[str, dict[str, Any]]) -> Iterator[Curve]:
    def points(what: str) -> list[tuple[float, float]]:
        values = ((sizes[name], row[what]) for name, row in rows.items())
        return [(float(size), float(value[0] if isinstance(value, list) else value)) for size, value in values]

    x = "attachments"
    yield Curve("growth-lookup", "A lookup", x, "ns", {"random, half of them unknown": points("lookup_ns")})
    yield Curve("growth-load", "SQLite → policy table", x, "s", {"load": points("load_s")})
    yield Curve(
        "growth-change", "One change, store's commit → table's commit", x, "ms", {"change": points("change_ms")}
    )
    yield Curve("growth-size", "Size of the table", x, "bytes for each", {"table": points("bytes")})
    yield Curve("growth-start", "Start of the agent → first verdict", x, "s", {"start": points("start_s")})
    memory = {"daemon, after a load": points("daemon_mb"), "worker": points("worker_mb")}
    yield Curve("growth-memory", "Private memory", x, "MB", memory)


def _in_process(part: str, store: Path, table: Path, size: int) -> dict[str, Any]:
    argv = [sys.executable, __file__, part, str(store), str(table), str(size)]
    printed: dict[str, Any] = json.loads(
        subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout
    )
    return printed


def _grow(path: Path, have: int, want: int) -> None:
    """Writes subscriptions and attachments from number `have` up to `want` into the store, without log entries."""
    if not path.exists():
        first = Subscription(id=inventory.subscription(0), offer=inventory.OFFERS[0], created=date(2022, 6, 30))
        made = SqliteStore(path, create=True)
        made.write([Put(key_of(first), encode(first))], expected=0, actor="bench", at=datetime.now(UTC))
        made.close()
    with sqlite3.connect(path, isolation_level=None) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        connection.executemany("INSERT OR REPLACE INTO record VALUES (?, ?)", _records(have, want))
        # `portward audit` would report these rows, because the log lacks them. The load does not check hashes.
        connection.execute(
            "INSERT INTO revision SELECT max(number) + 1, ?, 'bench', zeroblob(32), zeroblob(32) FROM revision",
            (_STARTED,),
        )
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _records(have: int, want: int) -> Iterator[tuple[str, str]]:
    for number in range(have // 10, want // 10):
        subscription, offer = inventory.subscription(number), inventory.OFFERS[number % len(inventory.OFFERS)]
        record = Subscription(id=subscription, name=f"customer-{number}", offer=offer, created=date(2022, 6, 30))
        yield key_of(record), encode(record)
    for number in range(have, want):
        segment, address = inventory.place(number)
        yield (
            f"attachments/{segment}/{address}",
            f'{{"segment":"{segment}","address":"{address}",'
            f'"subscription":"{inventory.subscription(number // 10)}","workload":"vm","started":"{_STARTED}"}}',
        )


# --- in a process of its own ---


def _load(path: Path, folder: Path, size: int) -> dict[str, Any]:
    store = open_store(f"sqlite:{path}")
    writer = Writer(folder, presets.load("azure-2020"), Answers(observe=False, reject=False))
    follower = Follower(store, writer)
    began = time.monotonic()
    if follower.step(utc_now()) is None or writer.reader().counts()[0] != size:
        raise RuntimeError(f"not {size} attachments were loaded")
    load_s = time.monotonic() - began
    used = (folder / FILE).stat().st_size
    segments = {1 + number: (f"vni{1001 + number}", False) for number in range(-(-size // inventory.PER_SEGMENT))}
    writer.put_links(segments, touched=frozenset(), now=utc_now())
    changes = []
    for number in range(_CHANGES):
        record = Subscription(
            id=inventory.subscription(_denied(size)), offer="enterprise-agreement",
            created=date(2022, 6, 30), standing=(Standing.DISABLED, Standing.GOOD)[number % 2],
        )  # fmt: skip
        put = [Put(key_of(record), encode(record))]
        store.write(put, expected=store.revision(), actor="bench", at=datetime.now(UTC))
        began = time.monotonic()
        follower.step(utc_now())
        changes.append((time.monotonic() - began) * 1000)
    return {
        "load_s": load_s,
        "bytes": used / size,
        "change_ms": (statistics.median(changes), min(changes), max(changes)),
        "daemon_mb": _private_mb(),
    }


def _denied(size: int) -> int:
    """The number of a subscription that may not send. The start is measured with one that may."""
    return random.randrange(size // 100) * 10 + random.randrange(1, len(inventory.OFFERS))


def _look(_store: Path, folder: Path, size: int) -> dict[str, Any]:
    reader = Reader.open(folder)
    times = []
    # Made beforehand, because making them takes longer than the lookups, and would push the table out of the
    # caches.
    batches = [
        [_source(random.randrange(size), known=number % 2 == 0) for number in range(_VIEW)]
        for _ in range(_LOOKUPS // _VIEW)
    ]
    for batch in batches:
        began = time.perf_counter_ns()
        with reader.view():
            found = [reader.lookup(index, address) for index, address in batch]
        times.append((time.perf_counter_ns() - began) / len(batch))
        if None in found:
            raise RuntimeError("a segment is not known")
    return {"lookup_ns": (statistics.median(times), min(times), max(times)), "worker_mb": _private_mb()}


def _source(number: int, *, known: bool) -> tuple[int, bytes]:
    """The interface and address of an attachment or, if not `known`, an address in its segment without one."""
    segment, address = inventory.place(number)
    offset = 0 if known else 1 << 16
    return int(segment.removeprefix("vni")) - 1000, (int(IPv4Address(address)) + offset).to_bytes(4, "big")


def _private_mb() -> float:
    """The memory that only this process has written, in MiB. Clean private pages are left out: those are pages of
    the table that no other process reads just now. They belong to the page cache, and the kernel can take them
    back."""
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in rollup if line.startswith("Private_Dirty:")) / 1024


if __name__ == "__main__":
    part, store, table, count = sys.argv[1:]
    print(json.dumps({"load": _load, "look": _look}[part](Path(store), Path(table), int(count))))
