"""If several processes write to one store, one succeeds, the others get a conflict, and no change is lost or half
written."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from portward.store.sqlite.store import SqliteStore
from unit.store.samples import CONTOSO, held, opened, put, texts, write
from unit.store.test_sqlite import environment

BATCHES = 60

# Writes BATCHES revisions, retries each until it is accepted, and prints the errors.
WRITER = f"""
import sys
from unit.store.samples import *
from portward.errors import ConflictError
store, who = SqliteStore(Path(sys.argv[1])), sys.argv[2]
print("ready", flush=True)
sys.stdin.read()
accepted, conflicts, expected = [], 0, store.revision()
while len(accepted) < {BATCHES}:
    key = f"attachments/{{who}}/{{len(accepted)}}"
    try:
        batch = [Put(key, who), Put("subscriptions/last", key)]
        expected = store.write(batch, expected=expected, actor=who, at=NOON)
        accepted.append(expected)
    except ConflictError:
        conflicts += 1
        expected = store.revision()
print(*accepted)
print(conflicts)
"""

# Writes a large batch, and stops for ever in the middle of it.
HALFWAY = """
import signal, sys, time
from unit.store.samples import *
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background begins without
store = SqliteStore(Path(sys.argv[1]))
def stop(done):
    print(done, flush=True)
    time.sleep(60)
batch = [Put(f"attachments/vni1/{number}", "x" * 200) for number in range(50_000)]
store.write(batch, expected=store.revision(), actor="ada", at=NOON, progress=stop)
"""


def python(script: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """Starts another Python process with a script."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip


def test_two_processes_lose_nothing_and_repeat_nothing(store: SqliteStore, path: Path) -> None:
    writers = {who: python(WRITER, path, who) for who in ("ada", "grace")}
    for writer in writers.values():
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers.values():
        assert writer.stdin is not None
        writer.stdin.close()
    accepted: dict[int, str] = {}
    conflicts = 0
    for who, writer in writers.items():
        assert writer.stdout is not None
        lines = writer.stdout.read().splitlines()
        assert writer.wait() == 0
        accepted |= dict.fromkeys(map(int, lines[0].split()), who)
        conflicts += int(lines[1])
    assert sorted(accepted) == list(range(1, 2 * BATCHES + 1))
    assert conflicts > 0, "the two never met: the test shows nothing"
    log = list(store.changes(0))
    assert {change.revision: change.actor for change in log} == accepted
    own = [change.key for change in log if change.key != "subscriptions/last"]
    assert sorted(own) == sorted(f"attachments/{who}/{number}" for who in writers for number in range(BATCHES))
    assert held(store).keys() == {*own, "subscriptions/last"}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_writer_that_dies_in_the_middle_leaves_the_old_state(store: SqliteStore, path: Path, how: int) -> None:
    write(store, put(CONTOSO))
    writer = python(HALFWAY, path)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "20000\n"
    with closing(opened(path)) as reader:
        assert reader.revision() == 1
    writer.send_signal(how)
    writer.communicate()
    with closing(opened(path)) as reader:
        assert (reader.revision(), held(reader)) == (1, texts(CONTOSO))
        assert [change.revision for change in reader.changes(0)] == [1]
        assert write(reader, put(CONTOSO)._replace(body="{}")) == 2
