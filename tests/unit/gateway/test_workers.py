"""The processes that the daemon starts."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from portward.config import QueueReader
from portward.errors import InputError, KernelError
from portward.gateway import workers as module
from portward.gateway.learned import Source
from portward.gateway.workers import STAY, Worker, stay_seconds

START = """
import asyncio
from pathlib import Path
from typing import Any, cast
from portward.config import QueueReader
from portward.gateway.workers import Worker

async def begin() -> None:
    worker = Worker(0, 16, QueueReader.BATCH, Path("table"), print)
    await worker.prepare()
    await worker.stop()

asyncio.run(begin())
"""


@pytest.mark.parametrize("option", ["-I", "-B"])
def test_a_worker_of_an_isolated_daemon_imports_nothing_from_its_folder(tmp_path: Path, option: str) -> None:
    """The package's program is isolated; without that the folder counts, as always with `-m`."""
    (tmp_path / "argparse.py").write_text("open('taken', 'w').close()\n")
    begin = tmp_path / "begin" / "begin.py"
    begin.parent.mkdir()
    begin.write_text(START)
    subprocess.run([sys.executable, option, str(begin)], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "taken").exists() == (option != "-I")


def test_workers_stay_for_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STAY, raising=False)
    assert stay_seconds() == 0
    monkeypatch.setenv(STAY, "60")
    assert stay_seconds() == 60


@pytest.mark.parametrize("text", ["60s", "", "-1", "inf", "nan", "3601"])
def test_what_is_no_number_of_seconds_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(STAY, text)
    with pytest.raises(InputError, match=rf"^{STAY}: '{text}': seconds from 0 to 3600 are wanted$"):
        stay_seconds()


def test_a_line_that_is_not_understood_ends_no_listening() -> None:
    """A worker of another version may write other lines; sources with a limit are still asked about."""
    asked: list[Source] = []

    async def listen() -> None:
        worker = Worker(0, 16, QueueReader.BATCH, Path("table"), asked.append)
        lines = asyncio.StreamReader()
        lines.feed_data(b"5 0a00000g\nlimit 10.0.0.1\n\n\xff\n5 0a000001\n")
        lines.feed_eof()
        await worker._listen(lines)

    asyncio.run(listen())
    assert asked == [Source(5, bytes([10, 0, 0, 1]))]


class Ended:
    """A process that is over."""

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

    monkeypatch.setattr("portward.gateway.workers.asyncio.sleep", pause)
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
        async with asyncio.timeout(20):
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
    monkeypatch.setattr("portward.gateway.workers.asyncio.wait_for", wait_for)
    asyncio.run(stop())
    assert sorted(killed) == [0, 1, 2, 3]
    for worker in workers:
        os.close(worker._block)
