"""The processes that the daemon starts."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from portward.config.keys import QueueReader
from portward.daemon import workers as module
from portward.daemon.child_output import lines_of
from portward.daemon.workers import STAY, Worker, grace_seconds
from portward.dataplane.verdict_cache import Source
from portward.errors import InputError, KernelError

START = """
import asyncio
from pathlib import Path
from typing import Any, cast
from portward.config.keys import QueueReader
from portward.daemon.workers import Worker

async def begin() -> None:
    worker = Worker(0, 16, QueueReader.BATCH, Path("table"), print)
    await worker.prepare()
    await worker.stop()

asyncio.run(begin())
"""


@pytest.mark.parametrize("option", ["-I", "-B"])
def test_a_worker_of_an_isolated_daemon_imports_nothing_from_its_folder(tmp_path: Path, option: str) -> None:
    """The package's program runs isolated. Otherwise `-m` would import from the current folder."""
    (tmp_path / "argparse.py").write_text("open('taken', 'w').close()\n")
    begin = tmp_path / "begin" / "begin.py"
    begin.parent.mkdir()
    begin.write_text(START)
    subprocess.run([sys.executable, option, str(begin)], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "taken").exists() == (option != "-I")


def test_workers_stay_for_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STAY, raising=False)
    assert grace_seconds() == 0
    monkeypatch.setenv(STAY, "60")
    assert grace_seconds() == 60


def test_a_worker_runs_only_once_it_has_bound_its_queue_and_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    worker = Worker(0, 16, QueueReader.BATCH, Path("table"), lambda source: None)
    assert worker.standing() == ("starting", 0.0, "")
    now[0] += 3
    assert worker.standing() == ("starting", 3.0, "")
    worker.ready = True
    assert worker.standing() == ("unanswered", 0.0, "")
    worker.answers = True
    assert worker.standing() == ("answers", 0.0, "")
    worker.kill()
    worker.trouble = "queue 0 cannot be bound"
    assert worker.standing() == ("trying", 0.0, "queue 0 cannot be bound")
    os.close(worker._block)


@pytest.mark.parametrize("text", ["60s", "", "-1", "inf", "nan", "3601"])
def test_what_is_no_number_of_seconds_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(STAY, text)
    with pytest.raises(InputError, match=rf"^{STAY}: '{text}': seconds from 0 to 3600 are wanted$"):
        grace_seconds()


FOREIGN = {
    "another version": b"limit 10.0.0.1\n",
    "an empty line before": b"\nprinted\n",
    "no hexadecimal number": b"5 0a00000g\n",
    "digits of another script": "\u0665 0a000001\n".encode(),
    "an address of three bytes": b"5 0a0000\n",
    "an address of spaces": b"5 0a 00 00 01\n",
    "no interface": b"0 0a000001\n",
    "negative": b"-5 0a000001\n",
    "an index beyond the kernel's": b"2147483648 0a000001\n",
    "an index of thousands of digits": b"9" * 5_000 + b" 0a000001\n",
    "a library's print": b"DeprecationWarning: something is going to change\n",
    "not UTF-8": b"\xff\xfe\x80\n",
    "binary": bytes(range(11, 256)) + b"\0\0\n",
    "carriage returns": b"progress 10 %\rprogress 20 %\r\n",
    "longer than asyncio's limit": b"x" * 300_000 + b"\n",
    "half a line before ours": b"half 5 0a000001\n",
}


@pytest.fixture
def make() -> Iterator[Callable[..., Worker]]:
    """Makes workers without a process. Their requests go into a list."""
    made: list[Worker] = []

    def one(asked: Callable[[Source], None] = print) -> Worker:
        made.append(Worker(0, 16, QueueReader.BATCH, Path("table"), asked))
        return made[-1]

    yield one
    for worker in made:
        os.close(worker._block)


@pytest.mark.parametrize("line", FOREIGN.values(), ids=FOREIGN)
def test_foreign_output_is_skipped_and_counted(
    make: Callable[..., Worker], line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests before and after it still arrive."""
    asked: list[Source] = []
    worker = make(asked.append)

    async def listen() -> None:
        stream = asyncio.StreamReader()
        stream.feed_data(b"5 0a000001\n" + line + b"7 " + b"00" * 15 + b"01\n")
        stream.feed_eof()
        await worker._listen(lines_of(stream))

    asyncio.run(listen())
    assert asked == [Source(5, bytes([10, 0, 0, 1])), Source(7, bytes(15) + b"\1")]
    assert worker.foreign_lines == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("worker of queue 0: not understood, and skipped: ")
    assert record.getMessage().isprintable()
    assert len(record.getMessage()) < 20_000


def printing(script: str) -> tuple[str, ...]:
    """A command for a process that runs this script (Python) instead of a worker."""
    return sys.executable, "-I", "-c", f"import os, sys, time\n{script}", "--"


async def started(worker: Worker) -> None:
    """Prepares and starts a worker."""
    await worker.prepare()
    await worker.start()


@pytest.mark.parametrize("line", FOREIGN.values(), ids=FOREIGN)
def test_a_worker_starts_whatever_is_printed_before_it_is_ready(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: bytes
) -> None:
    (tmp_path / "line").write_bytes(line)
    script = f"os.write(1, open({os.fspath(tmp_path / 'line')!r}, 'rb').read()); os.write(1, b'ready\\n')"
    monkeypatch.setattr(module, "PYTHON", printing(f"{script}\ntime.sleep(60)"))
    worker = make()

    async def begin() -> None:
        await started(worker)
        worker.kill()
        assert worker.process is not None
        await worker.process.wait()

    asyncio.run(begin())
    assert worker.foreign_lines == 1


def test_a_worker_that_prints_without_an_end_on_stderr_does_not_stand_still(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that no process reads holds 64 KiB; then the writer waits."""
    monkeypatch.setattr(module, "PYTHON", printing("os.write(2, b'x' * 1_000_000); os.write(1, b'ready\\n')"))
    worker = make()

    async def begin() -> None:
        await started(worker)
        assert worker.process is not None
        assert await worker.process.wait() == 0

    asyncio.run(begin())


def test_what_a_library_prints_in_a_worker_does_not_reach_the_daemon(tmp_path: Path) -> None:
    """It goes to stderr, the log; a message that follows half a line of it is still read."""
    code = (
        "import os, sys; from portward.worker import process as worker; messages = worker._keep_stdout();"
        "print('half a line', end='', flush=True); os.write(1, b'from C');"
        "worker._ready(messages); worker._ask(messages, 5, bytes([10, 0, 0, 1]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert found.stdout == b"\nready\n5 0a000001\n"
    assert found.stderr == b"half a linefrom C"


def test_a_worker_whose_messages_nobody_reads_goes_on(tmp_path: Path) -> None:
    """This holds for its log lines, too."""
    code = (
        "import os, sys, logging; from portward.worker import process as worker; messages = worker._keep_stdout();"
        "logging.basicConfig(stream=sys.stderr); worker._ready(messages);"
        "[worker._ask(messages, 5, bytes(4)) for _ in range(20_000)];"
        "[logging.warning('x' * 100) for _ in range(2_000)]; open(sys.argv[1], 'w').close()"
    )
    argv = [sys.executable, "-c", code, os.fspath(tmp_path / "done")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.wait(60)
    assert (tmp_path / "done").exists()


class Ended:
    """A process that has ended."""

    returncode = 1

    async def wait(self) -> int:
        """At once."""
        return 1


@pytest.mark.parametrize("error", [KernelError("no queue"), OSError("no more processes")])
def test_a_worker_that_cannot_be_started_is_tried_after_pauses_that_grow_to_two_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    pauses: list[float] = []
    worker = Worker(0, 16, QueueReader.BATCH, tmp_path, lambda source: None)
    worker.process = cast("Any", Ended())

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    async def start() -> None:
        if len(pauses) % 8:  # each eighth try works, and the process ends again at once
            raise error
        pauses.append(-1)
        if len(pauses) > 20:
            raise asyncio.CancelledError

    monkeypatch.setattr("portward.daemon.workers.asyncio.sleep", pause)
    monkeypatch.setattr(worker, "start", start)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(worker.watch())
    row = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0]
    assert pauses == [*([-1, *row] * 3), -1], "the pause begins anew after a start that worked"
    assert worker.restarts >= 2
    assert not worker.ready
    os.close(worker._block)


class Hanging:
    """A process that ends only when it is killed."""

    def __init__(self, killed: list[int], queue: int) -> None:
        self.returncode: int | None = None
        self._killed, self._queue, self._over = killed, queue, asyncio.Event()

    async def wait(self) -> int:
        """Until it is killed."""
        await self._over.wait()
        return 9

    def kill(self) -> None:
        """Ends it."""
        self._killed.append(self._queue)
        self.returncode = 9
        self._over.set()


def test_workers_that_hang_are_ended_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All lifelines are cut before the first process is waited for, and no process waits for another's end."""
    killed: list[int] = []
    waiting: list[float | None] = []

    async def wait_for(waited: Any, seconds: float | None) -> None:
        waited.close()
        waiting.append(seconds)
        async with asyncio.timeout(60):
            while len(waiting) < 4:  # until the others wait too
                await asyncio.sleep(0)
        assert not killed
        assert [worker._lifeline for worker in workers] == [-1] * 4
        await asyncio.sleep(0)  # the others look too
        raise TimeoutError

    async def stop() -> None:
        for worker in workers:
            worker.process = cast("Any", Hanging(killed, worker.queue))
            theirs, worker._lifeline = os.pipe()
            os.close(theirs)
        await module.stop(workers)

    workers = [Worker(number, 16, QueueReader.BATCH, tmp_path, lambda source: None) for number in range(4)]
    monkeypatch.setattr("portward.daemon.workers.asyncio.wait_for", wait_for)
    asyncio.run(stop())
    assert sorted(killed) == [0, 1, 2, 3]
    for worker in workers:
        os.close(worker._block)
