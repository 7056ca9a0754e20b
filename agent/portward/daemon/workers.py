"""The worker processes: the daemon starts them, watches them, and starts them again.

Each worker has one queue and one block of shared counters. While a worker is down, packets for its queue are
dropped; only those of observed segments, or with `on_agent_down = "open"`, pass. The counters outlive the process.
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

from portward.base import instance
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

# Set in portward.service, together with `KillMode=process`.
STAY = "PORTWARD_WORKERS_STAY"
# An hour without an agent is a fault to repair, not a restart.
_MAX_GRACE_S = 3600
# A start takes 0.3 s on an idle machine.
_START_TIMEOUT_S = 10.0
# systemd kills the whole agent 10 s after SIGTERM (`TimeoutStopSec`).
_STOP_TIMEOUT_S = 3.0
# A worker that ends at once is started again after a pause that doubles between these two.
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.05, 2.0

_log = logging.getLogger("portward.worker")


class WorkerState(NamedTuple):
    """The state of a worker, for the status.

    `state` is `answers`, `unanswered` (its queue is bound, but it has not answered a query since), `starting`, or
    `trying` (it ended and is being started again). `seconds` is how long it has been in this state. `why` is why
    it must be started again.
    """

    state: str
    seconds: float
    why: str = ""


class Worker:
    """One worker process with its queue, its counters and its lifeline (a pipe whose end makes it stop)."""

    def __init__(
        self,
        queue: int,
        length: int,
        reader: QueueReader,
        table: Path,
        on_ask: Callable[[Source], None],
        grace_s: float = 0.0,
    ) -> None:
        """`on_ask` is called with each source whose rate limit or verdict the kernel does not have. The process
        outlives the daemon for `grace_s` seconds."""
        self._on_ask, self._grace_s = on_ask, grace_s
        self.queue, self._length, self._reader, self._table = queue, length, reader, table
        self._block = WorkerCounters.create()
        # Starting a process takes nine descriptors for a moment; three more are spare.
        self._reserve = Reserve(12)
        self.counters = WorkerCounters(self._block)
        self.process: Child | None = None
        self.restarts = 0
        # How many health checks in a row found no packet handled from this queue, by one process or several.
        self.silences = 0
        # Whether the process has reported that its queue is bound.
        self.ready = False
        # Whether it has answered the last query since then.
        self.answers = False
        # Why it must be started again; empty if it need not be.
        self.trouble = ""
        # The state that `standing` last returned, and since when (monotonic, s).
        self._noted = "", 0.0
        self._lifeline = -1
        self._said: asyncio.Task[str] | None = None
        self._listening: asyncio.Task[None] | None = None
        # Lines on the process's stdout that are not messages of portward.
        self.foreign_lines = 0
        self._foreign = LogLimiter(_log)

    @property
    def running(self) -> bool:
        """Whether the process exists."""
        return self.process is not None and self.process.returncode is None

    def standing(self) -> WorkerState:
        """The state of the worker now."""
        state = "trying" if self.trouble else "starting"
        if self.ready:
            state = "answers" if self.answers else "unanswered"
        now = time.monotonic()
        if state != self._noted[0]:
            self._noted = state, now
        return WorkerState(state, now - self._noted[1], "" if self.ready else self.trouble)

    async def prepare(self) -> None:
        """Starts the process. It loads its program and then waits for `start`. Raises OSError."""
        with self._reserve.lent():
            await self._prepare()

    async def _prepare(self) -> None:
        theirs, self._lifeline = os.pipe()
        try:
            argv = (
                *PYTHON, "-m", "portward.worker.process",
                "--queue", str(self.queue), "--length", str(self._length), "--reader", self._reader,
                "--table", os.fspath(self._table), "--counters", str(self._block), "--lifeline", str(theirs),
                "--stay", str(self._grace_s), *instance.options(),
            )  # fmt: skip
            self.process = await children.start(argv, pass_fds=(self._block, theirs))
        finally:
            os.close(theirs)
        self._said = asyncio.create_task(_forward(self.process))

    async def start(self) -> None:
        """Lets the process begin (first starts one if none runs), and waits until its queue is bound. The policy
        table must exist. Raises KernelError with the last line that the process logged, or OSError."""
        if not self.running:
            self._close_lifeline()
            await self.prepare()
        assert self.process is not None and self._said is not None  # noqa: S101, PT018 # by `prepare`
        with contextlib.suppress(BrokenPipeError):  # it has ended; its last line is read below
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
        """Waits until the process reports that its queue is bound; False if it ends or takes too long."""
        with contextlib.suppress(TimeoutError):
            # `wait_for` would lose a cancellation that comes together with the line.
            async with asyncio.timeout(_START_TIMEOUT_S):
                async for line in lines:
                    if line == READY:
                        return True
                    self._skip(line)
        return False

    async def watch(self) -> None:
        """Starts the process again each time that it ends; never returns."""
        pause = _FIRST_PAUSE_S
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
                    pause = min(pause * 2, _MAX_PAUSE_S)
            pause = _FIRST_PAUSE_S

    async def _listen(self, lines: AsyncIterator[bytes]) -> None:
        """Passes on the sources that the process asks about, until it ends."""
        async for line in lines:
            asked = asked_source(line)
            if asked is None:
                self._skip(line)
            else:
                self._on_ask(Source(*asked))

    def _skip(self, line: bytes) -> None:
        """Counts and logs a line that is not a message of portward: a library printed it, or a worker of another
        version. An empty line comes before `READY`."""
        if not line:
            return
        self.foreign_lines += 1
        self._foreign.line(logging.WARNING, f"worker of queue {self.queue}: not understood, and skipped: ", line)

    async def stop(self) -> None:
        """Ends the process by its lifeline, and by force after `_STOP_TIMEOUT_S`. A process that outlives the
        daemon is left alone with its queue. Idempotent."""
        self._close_lifeline()
        if self.process is None or self.process.returncode is not None:
            return
        if self._grace_s:
            self.process.leave()
            return
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
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
    """Ends all these workers at the same time, because systemd waits 10 s for the whole agent
    (`TimeoutStopSec`)."""
    await asyncio.gather(*(worker.stop() for worker in running))


def make(queue: Queue, table: Path, on_ask: Callable[[Source], None]) -> list[Worker]:
    """The workers of a configuration, not yet started. `on_ask` is as for `Worker`."""
    numbers = range(queue.first, queue.first + queue.workers)
    grace_s = grace_seconds() if queue.reader is QueueReader.BATCH else 0.0
    return [Worker(number, queue.length, queue.reader, table, on_ask, grace_s) for number in numbers]


def grace_seconds() -> float:
    """How many seconds workers outlive the daemon. The systemd unit says it, because systemd must not end them
    either; without it 0. Raises InputError if it is not a number of seconds in range."""
    text = os.environ.get(STAY, "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= _MAX_GRACE_S:
        raise InputError(f"{text!r}: seconds from 0 to {_MAX_GRACE_S} are wanted", field=STAY)
    return seconds


async def _forward(process: Child) -> str:
    """Logs what a worker prints on stderr. Returns the last line."""
    last, limited = "", LogLimiter(_log)
    async for line in lines_of(process.stderr):
        last = limited.line(logging.INFO, "worker: ", line)
    return last
