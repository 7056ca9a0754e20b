"""A bulk change of the policy table, made in a process of its own.

Python runs one thread of a process at a time, and a change of a million attachments holds the others up: freeing
its records alone takes 0.4 s, a pass of the garbage collector over them a second. So what is more than `LIMIT`
changes is made by a child process, which opens store and table, writes one transaction and reports what it has
changed. It ends with the daemon. If it is killed, LMDB keeps the table as it was before or after the transaction:
only the table says which, not how the child ended.

The job and its outcome are pickled: both processes are the same program, and nothing else writes to these pipes.
The outcome has a pipe of its own, because a library may print at any time; what it prints goes to the log.
"""

from __future__ import annotations

import logging
import os
import pickle
import select
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import IO, BinaryIO, Final, NamedTuple

from portward.base import heartbeat
from portward.base.descriptors import Reserve
from portward.base.resources import PYTHON
from portward.daemon.systemd import log_formatter
from portward.errors import StoreError
from portward.policy.preset import Preset
from portward.store.backends import open_store
from portward.store.flips import Flips, HeldError
from portward.table.database import TableError, open_database
from portward.table.follower import Follower, Waiting
from portward.table.writer import Answers, Committed, Writer

# Up to this many changes are made by the policy thread itself: starting the child takes 0.2 s.
LIMIT: Final = 20_000
_STDERR: Final = 2
# What pickle raises for bytes that are no pickle, or not the whole of one.
_UNREADABLE: Final = (
    pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError,
)  # fmt: skip

# How often the child is looked at while it works, in seconds.
_LOOK_S: Final = 1.0
# A million changes take 30 s on an idle machine. What takes 60 times that is taken for a hang.
_LONGEST_S: Final = 1_800.0
_PIECE_BYTES: Final = 1 << 20


class Job(NamedTuple):
    """What the child is to do. With a `store` (URL): take in what is new in it. Without: decide everything again;
    `may_flip` as for `Writer.settle`."""

    table: Path
    preset: Preset
    answers: Answers
    max_flip_share: float
    now: datetime
    store: str | None = None
    may_flip: bool = True
    # The records that could not be read so far: `store.unreadable`.
    unreadable: dict[str, str] | None = None


class BulkResult(NamedTuple):
    """What came of it: the change, if one was committed; the change that is held, if one is; how many records were
    refused, and which are unreadable now; how often the store had another history; whether the table is in step
    with the store; and in `error` the kind and the words of what went wrong."""

    committed: Committed | None = None
    waiting: Waiting | None = None
    refused: int = 0
    unreadable: dict[str, str] = {}  # noqa: RUF012 # nobody changes it
    histories: int = 0
    in_step: bool = False
    error: tuple[str, str] | None = None
    flips: Flips | None = None


class Bulk:
    """Runs one job after the other. `stop` may be called on any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        # To start a process with three pipes takes six, for a moment.
        self._reserve = Reserve(6)

    def run(self, job: Job) -> BulkResult:
        """Runs a job and gives its outcome. Raises StoreError or HeldError, and then the table is as it was, or
        TableError: then the child may have committed before it ended, and has ended now."""
        with self._lock:
            if self._stopped:
                raise TableError(f"{job.table}: the agent is stopping")
            try:
                with self._reserve.lent():
                    process, outcomes = _started()
            except OSError as error:
                raise TableError(f"{job.table}: no process for a bulk change: {error.strerror}") from error
            self._process = process
        try:
            outcome = _told(process, outcomes, job)
        except (*_UNREADABLE, BrokenPipeError) as error:
            # It was killed, perhaps while it wrote its outcome.
            raise TableError(f"{job.table}: the process of a bulk change ended ({process.returncode})") from error
        return _checked(outcome, job)

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def stop(self) -> None:
        """Ends the job that runs, and lets none begin."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()


def _started() -> tuple[subprocess.Popen[bytes], BinaryIO]:
    """A child, and the end of the pipe at which its outcome arrives; raises OSError."""
    ours, theirs = os.pipe()
    argv = [*PYTHON, "-m", "portward.daemon.bulk", str(theirs)]
    try:
        # What the child prints goes where it logs.
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=_STDERR, pass_fds=(theirs,))
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    return process, os.fdopen(ours, "rb")


def _told(process: subprocess.Popen[bytes], outcomes: BinaryIO, job: Job) -> BulkResult:
    """Gives the child its job, and waits for its outcome and its end. Raises BrokenPipeError, or one of
    _UNREADABLE, if it ended before it had read or written all."""
    assert process.stdin is not None  # noqa: S101 # asked for in `_started`
    with outcomes, process:
        # Its standard input stays open: it ends when this one does.
        process.stdin.write(pickle.dumps(job))
        process.stdin.flush()
        data = _read(process, outcomes)
    outcome = pickle.loads(data)  # noqa: S301 # from our own child
    if not isinstance(outcome, BulkResult):
        raise pickle.UnpicklingError(f"not an outcome: {type(outcome).__name__}")
    return outcome


def _read(process: subprocess.Popen[bytes], outcomes: IO[bytes]) -> bytes:
    """All that the child writes to this pipe. This thread beats each time that the child has used processor time
    since the last look, for `_LONGEST_S` seconds at most: so a child that waits for ever, or computes for ever,
    shows."""
    began, used, pieces = time.monotonic(), -1, list[bytes]()
    # Not `select`, which refuses a descriptor from 1024 on: an agent with 64 workers has more than that.
    waiting = select.poll()
    waiting.register(outcomes, select.POLLIN)
    while True:
        if waiting.poll(1000 * _LOOK_S):
            pieces.append(piece := os.read(outcomes.fileno(), _PIECE_BYTES))
            if not piece:
                return b"".join(pieces)
        now = _processor_ticks(process.pid)
        if now > used and time.monotonic() - began < _LONGEST_S:
            heartbeat.beat()
        used = now


def _processor_ticks(process: int) -> int:
    """The processor time that a process has used, in clock ticks; 0 if it has ended."""
    try:
        # After the name in brackets, which may hold anything: proc(5), utime and stime are fields 14 and 15.
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def _checked(outcome: BulkResult, job: Job) -> BulkResult:
    """The outcome, or what it says went wrong as the exception that it was."""
    if outcome.flips is not None:
        raise HeldError(outcome.flips, job.max_flip_share)
    if outcome.error is not None:
        kind, words = outcome.error
        raise StoreError(words) if kind == "store" else TableError(words)
    return outcome


def _done(job: Job) -> BulkResult:
    # Only to see that it can be read: a writer would put a damaged file aside, which the daemon has open.
    open_database(job.table, write=False).close()
    writer = Writer(job.table, job.preset, job.answers, max_flip_share=job.max_flip_share)
    if job.store is None:
        return BulkResult(writer.settle(now=job.now, may_flip=job.may_flip))
    follower = Follower(open_store(job.store, agent=True), writer, unreadable=job.unreadable)
    committed = follower.step(job.now)
    refused = follower.unreadable
    return BulkResult(
        committed, follower.waiting, refused.total, refused.now, follower.histories, follower.in_step
    )


def _outcome(job: Job) -> BulkResult:
    try:
        return _done(job)
    except HeldError as error:
        return BulkResult(flips=error.flips)
    except StoreError as error:
        return BulkResult(error=("store", str(error)))
    except TableError as error:
        return BulkResult(error=("table", str(error)))


def _end_with_the_daemon() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    """Reads a job from standard input, does it, and writes its outcome to the descriptor in the first argument."""
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(log_formatter())
    logging.basicConfig(level=logging.INFO, handlers=[out])
    job = pickle.load(sys.stdin.buffer)  # noqa: S301 # from the daemon that started this process
    threading.Thread(target=_end_with_the_daemon, daemon=True).start()
    outcome = _outcome(job)
    with os.fdopen(int(sys.argv[1]), "wb") as outcomes:
        outcomes.write(pickle.dumps(outcome))
    # Without freeing a million records first.
    os._exit(0)


if __name__ == "__main__":
    # Under its own name: as `__main__`, the classes would not be those of the daemon.
    from portward.daemon.bulk import main as run

    run()
