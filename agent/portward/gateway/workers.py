"""The worker processes: started, watched, started again. Each has one queue and one block of counters.

While a worker is down its queue drops what comes: nothing opens. Its counters outlive it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from portward.config import Queue, QueueReader
from portward.errors import InputError, KernelError
from portward.gateway.learned import Source
from portward.gateway.tally import Tally
from portward.gateway.worker import READY
from portward.resources import PYTHON

# Set in portward.service, where `KillMode=process` stands.
STAY = "PORTWARD_WORKERS_STAY"
_LONGEST_STAY = 3600
_START_SECONDS = 10.0
_STOP_SECONDS = 3.0
# A worker that dies at once is started again after a pause that grows to this.
_LONGEST_PAUSE = 2.0

_log = logging.getLogger("portward.worker")


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
        self._block = Tally.create()
        self.tally = Tally(self._block)
        self.process: asyncio.subprocess.Process | None = None
        self.restarts = 0
        # How often in a row nothing was handled from this queue, by one process or by several.
        self.silences = 0
        # Whether the process has said that its queue is bound.
        self.ready = False
        self._lifeline = -1
        self._said: asyncio.Task[str] | None = None
        self._listening: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self.process is not None and self.process.returncode is None

    @property
    def stays(self) -> bool:
        """Whether the process outlives the daemon."""
        return self._stay > 0

    async def prepare(self) -> None:
        """Starts the process, which loads its program and then waits for `start`; raises OSError."""
        theirs, self._lifeline = os.pipe()
        try:
            self.process = await asyncio.create_subprocess_exec(
                *PYTHON, "-m", "portward.gateway.worker",
                "--queue", str(self.queue), "--length", str(self._length), "--reader", self._reader,
                "--table", os.fspath(self._table), "--tally", str(self._block), "--lifeline", str(theirs),
                "--stay", str(self._stay),
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, pass_fds=(self._block, theirs),
            )  # fmt: skip
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
        assert self.process.stdout is not None  # noqa: S101 # asked for in `prepare`
        try:
            # Not `wait_for`: it forgets a cancellation that comes together with the line.
            async with asyncio.timeout(_START_SECONDS):
                line = await self.process.stdout.readline()
        except TimeoutError:
            line = b""
        if line.decode().strip() != READY:
            self.kill()
            last = await self._said
            await self.process.wait()
            raise KernelError(last or f"the worker of queue {self.queue} did not start")
        self.ready = True
        self._listening = asyncio.create_task(self._listen(self.process.stdout))

    async def watch(self) -> None:
        """Starts the process again whenever it ends; never returns."""
        pause = 0.05
        while True:
            assert self.process is not None  # noqa: S101 # watched after its start only
            code = await self.process.wait()
            self.ready = False
            self._close_lifeline()
            self.restarts += 1
            _log.error("the worker of queue %d ended (%s): it is started again", self.queue, code)
            while True:
                try:
                    await self.start()
                    break
                except (KernelError, OSError) as error:  # OSError: no more processes, memory or descriptors
                    _log.error("the worker of queue %d cannot be started: %s", self.queue, error)
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE)
            pause = 0.05

    async def _listen(self, lines: asyncio.StreamReader) -> None:
        """Takes the sources that the process asks about, until it ends."""
        async for line in lines:
            try:
                index, _, address = line.decode().strip().partition(" ")
                source = Source(int(index), bytes.fromhex(address))
            except ValueError:  # a worker of another version, started after an upgrade
                _log.warning("worker of queue %d: a line that is not understood: %r", self.queue, line)
                continue
            self._asked(source)

    async def stop(self) -> None:
        """Ends the process: by its lifeline, and by force after some seconds. One that stays is left alone with
        its queue. Idempotent."""
        self._close_lifeline()
        if self._stay or self.process is None or self.process.returncode is not None:
            return
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await self.process.wait()
        except TimeoutError:
            self.kill()
            await self.process.wait()

    def kill(self) -> None:
        """Ends the process by force."""
        self.ready = False
        self._close_lifeline()
        with contextlib.suppress(ProcessLookupError):
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


async def _forward(process: asyncio.subprocess.Process) -> str:
    """Writes what a worker says on its stderr into the log; gives the last line."""
    last = ""
    assert process.stderr is not None  # noqa: S101 # asked for in `prepare`
    async for line in process.stderr:
        last = line.decode(errors="replace").rstrip()
        _log.info("worker: %s", last)
    return last
