"""The worker processes: started, watched, started again. Each has one queue and one block of counters.

While a worker is down its queue drops what comes: nothing opens. Its counters outlive it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from portward.base.descriptors import Reserve
from portward.base.resources import PYTHON
from portward.config.keys import Queue, QueueReader
from portward.daemon import children
from portward.daemon.child_output import LogLimiter, lines_of
from portward.daemon.children import Child
from portward.dataplane.verdict_cache import Source
from portward.errors import InputError, KernelError
from portward.ipc.counters import WorkerCounters
from portward.ipc.lines import READY, asked_source

# Set in portward.service, where `KillMode=process` stands.
STAY = "PORTWARD_WORKERS_STAY"
_LONGEST_STAY = 3600
_START_SECONDS = 10.0
_STOP_SECONDS = 3.0
# A worker that dies at once is started again after a pause that grows to this.
_LONGEST_PAUSE = 2.0

_log = logging.getLogger("portward.worker")


class Standing(NamedTuple):
    """What a worker does, for the status: `answers`, `unanswered` (its queue is bound, and it has answered no
    question since), `starting`, `trying` (it ended, and is started again). `seconds` is for how long it has done
    so, `why` is why it has to be started again."""

    state: str
    seconds: float
    why: str = ""


class Worker:
    """One worker process and what it needs: its queue, its counters, its lifeline."""

    def __init__(
        self,
        queue: int,
        length: int,
        reader: QueueReader,
        table: Path,
        asked: Callable[[Source], None],
        stay: float = 0.0,
    ) -> None:
        """`asked` is told of sources whose limit the kernel does not know; for `stay` seconds the process outlives
        the daemon."""
        self._asked, self._stay = asked, stay
        self.queue, self._length, self._reader, self._table = queue, length, reader, table
        self._block = WorkerCounters.create()
        # To start a process takes nine, for a moment.
        self._reserve = Reserve(12)
        self.counters = WorkerCounters(self._block)
        self.process: Child | None = None
        self.restarts = 0
        # How often in a row nothing was handled from this queue, by one process or by several.
        self.silences = 0
        # Whether the process has said that its queue is bound.
        self.ready = False
        # Whether it has answered the last question since then.
        self.answers = False
        # Why it has to be started again, if it has.
        self.trouble = ""
        # What it does, and since when by the monotonic clock: see `standing`.
        self._noted = "", 0.0
        self._lifeline = -1
        self._said: asyncio.Task[str] | None = None
        self._listening: asyncio.Task[None] | None = None
        # Lines on the process's stdout that are no message of ours: other programs' output.
        self.foreign_lines = 0
        self._foreign = LogLimiter(_log)

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self.process is not None and self.process.returncode is None

    def standing(self) -> Standing:
        """What the worker does now."""
        state = "trying" if self.trouble else "starting"
        if self.ready:
            state = "answers" if self.answers else "unanswered"
        now = time.monotonic()
        if state != self._noted[0]:
            self._noted = state, now
        return Standing(state, now - self._noted[1], "" if self.ready else self.trouble)

    async def prepare(self) -> None:
        """Starts the process, which loads its program and then waits for `start`; raises OSError."""
        with self._reserve.lent():
            await self._prepare()

    async def _prepare(self) -> None:
        theirs, self._lifeline = os.pipe()
        try:
            argv = (
                *PYTHON, "-m", "portward.worker.process",
                "--queue", str(self.queue), "--length", str(self._length), "--reader", self._reader,
                "--table", os.fspath(self._table), "--counters", str(self._block), "--lifeline", str(theirs),
                "--stay", str(self._stay),
            )  # fmt: skip
            self.process = await children.start(argv, pass_fds=(self._block, theirs))
        finally:
            os.close(theirs)
        self._said = asyncio.create_task(_forward(self.process))

    async def start(self) -> None:
        """Lets the process begin, a new one where there is none, and waits until its queue is bound. The policy
        table must be there. Raises KernelError with what the process said, or OSError."""
        if not self.running:
            self._close_lifeline()
            await self.prepare()
        assert self.process is not None and self._said is not None  # noqa: S101, PT018 # by `prepare`
        with contextlib.suppress(BrokenPipeError):  # it has ended: what it said follows
            os.write(self._lifeline, b"\n")
        lines = lines_of(self.process.stdout)
        if not await self._is_ready(lines):
            self.kill()
            last = await self._said
            await self.process.wait()
            raise KernelError(last or f"the worker of queue {self.queue} did not start")
        self.ready, self.trouble = True, ""
        self._listening = asyncio.create_task(self._listen(lines))

    async def _is_ready(self, lines: AsyncIterator[bytes]) -> bool:
        """Waits until the process says that its queue is bound; False if it ends or takes too long."""
        with contextlib.suppress(TimeoutError):
            # Not `wait_for`: it forgets a cancellation that comes together with the line.
            async with asyncio.timeout(_START_SECONDS):
                async for line in lines:
                    if line == READY:
                        return True
                    self._skip(line)
        return False

    async def watch(self) -> None:
        """Starts the process again whenever it ends; never returns."""
        pause = 0.05
        while True:
            assert self.process is not None  # noqa: S101 # watched after its start only
            code = await self.process.wait()
            self.ready = self.answers = False
            self.trouble = f"its process ended ({code})"
            self._close_lifeline()
            self.restarts += 1
            _log.error("the worker of queue %d ended (%s): it is started again", self.queue, code)
            while True:
                try:
                    await self.start()
                    break
                except (KernelError, OSError) as error:  # OSError: no more processes, memory or descriptors
                    self.trouble = str(error)
                    _log.error("the worker of queue %d cannot be started: %s", self.queue, error)
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE)
            pause = 0.05

    async def _listen(self, lines: AsyncIterator[bytes]) -> None:
        """Takes the sources that the process asks about, until it ends."""
        async for line in lines:
            asked = asked_source(line)
            if asked is None:
                self._skip(line)
            else:
                self._asked(Source(*asked))

    def _skip(self, line: bytes) -> None:
        """Counts a line that is no message of ours: a library printed it, or a worker of another version. An empty
        one stands before `READY`."""
        if not line:
            return
        self.foreign_lines += 1
        self._foreign.line(logging.WARNING, f"worker of queue {self.queue}: not understood, and skipped: ", line)

    async def stop(self) -> None:
        """Ends the process: by its lifeline, and by force after some seconds. One that stays is left alone with
        its queue. Idempotent."""
        self._close_lifeline()
        if self.process is None or self.process.returncode is not None:
            return
        if self._stay:
            self.process.leave()
            return
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await self.process.wait()
        except TimeoutError:
            self.kill()
            await self.process.wait()

    def kill(self) -> None:
        """Ends the process by force."""
        self.ready = self.answers = False
        self._close_lifeline()
        if self.process is not None:
            self.process.kill()

    def _close_lifeline(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


async def stop(running: Iterable[Worker]) -> None:
    """Ends all of these processes, as `Worker.stop`; side by side, since the service manager waits 10 s for the
    whole agent (`TimeoutStopSec`)."""
    await asyncio.gather(*(worker.stop() for worker in running))


def make(queue: Queue, table: Path, asked: Callable[[Source], None]) -> list[Worker]:
    """The workers of a configuration, not yet started; `asked` as for each of them."""
    numbers = range(queue.first, queue.first + queue.workers)
    stay = stay_seconds() if queue.reader is QueueReader.BATCH else 0.0
    return [Worker(number, queue.length, queue.reader, table, asked, stay) for number in numbers]


def stay_seconds() -> float:
    """For how many seconds workers outlive the daemon: as the service manager's unit says, since that must not end
    them either; else not at all. Raises InputError for what is no number of seconds."""
    text = os.environ.get(STAY, "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= _LONGEST_STAY:
        raise InputError(f"{text!r}: seconds from 0 to {_LONGEST_STAY} are wanted", field=STAY)
    return seconds


async def _forward(process: Child) -> str:
    """Writes what a worker says on its stderr into the log; gives the last line."""
    last, limited = "", LogLimiter(_log)
    async for line in lines_of(process.stderr):
        last = limited.line(logging.INFO, "worker: ", line)
    return last
