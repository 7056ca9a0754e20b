"""Makes a bulk change of the policy table in a process of its own.

Python runs one thread of a process at a time, so a change of a million attachments would delay the other threads:
freeing its records alone takes 0.4 s, and a pass of the garbage collector over them a second. So a child process
makes changes of more than `MAX_INLINE_CHANGES`. It opens store and table, writes one transaction, and reports the
change. It ends with the daemon. If it is killed, the table is as before or as after the transaction. Only the
table shows which, because the child can be killed between its commit and its report.

Job and result are pickled, because both processes are the same program and nothing else writes to these pipes. The
result has a pipe of its own, because a library may print at any time. The output of the child goes to the log.
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

from portward.base import heartbeat, instance
from portward.base.descriptors import Reserve
from portward.base.resources import PYTHON
from portward.daemon.systemd import log_formatter
from portward.errors import StoreError
from portward.policy.preset import Preset
from portward.store.backends import open_store
from portward.store.flips import Flips, UnconfirmedError
from portward.table.commits import Answers, Committed
from portward.table.database import TableError, open_database
from portward.table.follower import Follower, Waiting
from portward.table.writer import Writer

# Up to this many changes the policy thread works itself, because starting the child takes 0.2 s.
MAX_INLINE_CHANGES: Final = 20_000
_STDERR: Final = 2
# The errors of pickle for bytes that are not a pickle, or not a whole one.
_UNREADABLE: Final = (
    pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError,
)  # fmt: skip

# How often the progress of the child is checked. A thread counts as stuck after 60 s without progress.
_CHECK_S: Final = 1.0
# A million changes take 30 s on an idle machine. A child that takes 60 times as long counts as hanging.
_MAX_RUN_S: Final = 1_800.0
_READ_BYTES: Final = 1 << 20


class Job(NamedTuple):
    """The task of the child. With `store` (a URL) it reads what is new in the store. Without `store` it decides
    everything again; `may_flip` is as for `Writer.decide_due`."""

    table: Path
    preset: Preset
    answers: Answers
    max_flip_share: float
    now: datetime
    store: str | None = None
    may_flip: bool = True
    # The records that could not be read so far: key → error (`store.unreadable`).
    unreadable: dict[str, str] | None = None
    # The instance that messages of the child are about; set by `Bulk.run`.
    own: instance.Own | None = None


class BulkResult(NamedTuple):
    """The result of a job.

    `committed` is the change, if one was committed; `waiting` the change that is held, if one is. `refused` counts
    records that could not be read; `unreadable` has those that cannot be read now (key → error). `histories`
    counts how often the store had another history. `in_step`: the table has all that the store has. `error` is the
    kind (`store` or `table`) and the text of an error; `flips` is set if the change was refused because of its
    flips.
    """

    committed: Committed | None = None
    waiting: Waiting | None = None
    refused: int = 0
    unreadable: dict[str, str] = {}  # noqa: RUF012 # it is never changed
    histories: int = 0
    in_step: bool = False
    error: tuple[str, str] | None = None
    flips: Flips | None = None


class Bulk:
    """Runs jobs one after the other. Any thread may call `stop`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        # Starting a process with three pipes takes six descriptors for a moment.
        self._reserve = Reserve(6)

    def run(self, job: Job) -> BulkResult:
        """Runs a job and returns its result. Raises StoreError or UnconfirmedError, and then the table has not
        changed. Raises TableError, and then the child has ended, but may have committed before."""
        with self._lock:
            if self._stopped:
                raise TableError(f"{job.table}: the agent is stopping")
            try:
                with self._reserve.lent():
                    process, results = _started()
            except OSError as error:
                raise TableError(f"{job.table}: no process for a bulk change: {error.strerror}") from error
            self._process = process
        try:
            result = _result_of(process, results, job._replace(own=instance.noted()))
        except (*_UNREADABLE, BrokenPipeError) as error:
            # It was killed, perhaps while it wrote its result.
            raise TableError(f"{job.table}: the process of a bulk change ended ({process.returncode})") from error
        return _checked(result, job)

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def stop(self) -> None:
        """Ends the running job, and lets no other start."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()


def _started() -> tuple[subprocess.Popen[bytes], BinaryIO]:
    """A child, and the end of the pipe at which its result arrives. Raises OSError."""
    ours, theirs = os.pipe()
    argv = [*PYTHON, "-m", "portward.daemon.bulk", str(theirs)]
    try:
        # Output of the child goes to stderr, as its log does.
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=_STDERR, pass_fds=(theirs,))
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    return process, os.fdopen(ours, "rb")


def _result_of(process: subprocess.Popen[bytes], results: BinaryIO, job: Job) -> BulkResult:
    """Sends the job to the child, and waits for its result and its end. Raises BrokenPipeError or one of
    _UNREADABLE if the child ended before it had read or written everything."""
    assert process.stdin is not None  # noqa: S101 # asked for in `_started`
    with results, process:
        # Its stdin stays open. The child ends when this process does, because stdin is closed then.
        process.stdin.write(pickle.dumps(job))
        process.stdin.flush()
        data = _read(process, results)
    result = pickle.loads(data)  # noqa: S301 # from our own child
    if not isinstance(result, BulkResult):
        raise pickle.UnpicklingError(f"not a result: {type(result).__name__}")
    return result


def _read(process: subprocess.Popen[bytes], results: IO[bytes]) -> bytes:
    """Everything that the child writes to this pipe.

    The calling thread reports progress (`heartbeat.beat`) each time that the child has used processor time since
    the last check, for `_MAX_RUN_S` at most. So a child that waits or computes for ever makes the thread count as
    stuck.
    """
    began, used, pieces = time.monotonic(), -1, list[bytes]()
    # `select` would refuse a descriptor from 1024 on, and an agent with 64 workers has more than that.
    waiting = select.poll()
    waiting.register(results, select.POLLIN)
    while True:
        if waiting.poll(1000 * _CHECK_S):
            pieces.append(piece := os.read(results.fileno(), _READ_BYTES))
            if not piece:
                return b"".join(pieces)
        now = _processor_ticks(process.pid)
        if now > used and time.monotonic() - began < _MAX_RUN_S:
            heartbeat.beat()
        used = now


def _processor_ticks(process: int) -> int:
    """The processor time that a process has used, in clock ticks; 0 if the process has ended."""
    try:
        # The name in brackets may contain any byte, so count from its end. By proc(5), utime is field 14, stime
        # 15.
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def _checked(result: BulkResult, job: Job) -> BulkResult:
    """The result. Raises the error that it contains as the exception that it was."""
    if result.flips is not None:
        raise UnconfirmedError(result.flips, job.max_flip_share)
    if result.error is not None:
        kind, words = result.error
        raise StoreError(words) if kind == "store" else TableError(words)
    return result


def _done(job: Job) -> BulkResult:
    # Raises TableError for a damaged file. A writer would put the file aside, although the daemon has it open.
    open_database(job.table, write=False).close()
    writer = Writer(job.table, job.preset, job.answers, max_flip_share=job.max_flip_share)
    if job.store is None:
        return BulkResult(writer.decide_due(now=job.now, may_flip=job.may_flip))
    follower = Follower(open_store(job.store, agent=True), writer, unreadable=job.unreadable)
    committed = follower.step(job.now)
    refused = follower.unreadable
    return BulkResult(
        committed, follower.waiting, refused.total, refused.now, follower.histories, follower.in_step
    )


def _result(job: Job) -> BulkResult:
    try:
        return _done(job)
    except UnconfirmedError as error:
        return BulkResult(flips=error.flips)
    except StoreError as error:
        return BulkResult(error=("store", str(error)))
    except TableError as error:
        return BulkResult(error=("table", str(error)))


def _end_with_the_daemon() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    """Reads a job from stdin, does it, and writes its result to the descriptor in the first argument."""
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(log_formatter())
    logging.basicConfig(level=logging.INFO, handlers=[out])
    job = pickle.load(sys.stdin.buffer)  # noqa: S301 # from the daemon that started this process
    instance.note(job.own)
    threading.Thread(target=_end_with_the_daemon, daemon=True).start()
    result = _result(job)
    with os.fdopen(int(sys.argv[1]), "wb") as results:
        results.write(pickle.dumps(result))
    # A normal exit would first free a million records.
    os._exit(0)


if __name__ == "__main__":
    # Imported by its own name. As `__main__`, its classes would not be those that the daemon pickles.
    from portward.daemon.bulk import main as run

    run()
