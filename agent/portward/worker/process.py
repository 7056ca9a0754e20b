"""The worker process: binds one queue and gives every packet in it a verdict.

    python -m portward.worker.process --queue 0 --table DIR --counters FD --lifeline FD [--length N]
        [--reader batch] [--stay SECONDS] [--instance NAME FILE]

It shares the policy table and a block of counters with the daemon, and nothing else. A byte on the lifeline says
that the table is there, and the worker opens it. When the queue is bound it writes `ready` to its stdout. From
then on it writes a line for each packet of a source whose rate limit the kernel does not know (`ipc.lines`).

The worker ends when the lifeline is closed because the daemon has ended, or `--stay` seconds later, or when the
next daemon's worker takes the queue over. `--instance` is the instance that its messages are about.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import logging
import os
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from portward.base import instance
from portward.config.keys import QueueReader
from portward.errors import PortwardError
from portward.ipc.counters import WorkerCounters
from portward.ipc.lines import READY, ask_line
from portward.table.reader import Reader
from portward.worker import batch
from portward.worker.batch import BatchReader
from portward.worker.handover import GracePeriod, take_over_queue
from portward.worker.reset import Resetter
from portward.worker.slow_path import SlowPath

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def main() -> int:
    """Runs the worker. Returns the exit code: 1, with a line on stderr, if it cannot begin."""
    arguments = _arguments()
    instance.note(instance.Own(*arguments.instance) if arguments.instance else None)
    messages = _keep_stdout()
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
    if not arguments.stay:
        _die_with_parent()
    # The daemon decides when a worker ends. A Ctrl-C reaches the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if not os.read(arguments.lifeline, 1):  # the daemon has ended before there was a policy
        return 0
    try:
        reader = Reader.open(arguments.table)
        counters = WorkerCounters(arguments.counters)
        slow_path = SlowPath(reader.lookup, reader.head, counters, Resetter(), partial(_ask, messages))
        ready = partial(_ready, messages)
        lock = take_over_queue(arguments.table, arguments.queue)
        if arguments.reader is QueueReader.BATCH:
            batches = BatchReader(arguments.queue, reader, slow_path, counters)
            grace = GracePeriod(arguments.stay, lock)
            batch.serve(arguments.queue, arguments.length, batches, arguments.lifeline, ready, grace)
        else:
            from portward.worker import single  # noqa: PLC0415 # its library is loaded only if it is configured

            answer = single.guarded(slow_path.handle, reader.lookup)
            single.serve(arguments.queue, arguments.length, answer, arguments.lifeline, ready)
    except PortwardError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(_bind_error(arguments.queue, error), file=sys.stderr)
        return 1
    return 0


def _keep_stdout() -> int:
    """Returns a descriptor of stdout for the lines to the daemon, and redirects stdout to stderr. A library that
    prints would garble these lines."""
    messages = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return messages


def _ready(messages: int) -> None:
    # The first newline ends what a library may have printed before `_keep_stdout`.
    os.write(messages, b"\n%s\n" % READY)
    # From here on a daemon that does not read must not block the worker.
    os.set_blocking(messages, False)
    os.set_blocking(sys.stderr.fileno(), False)


def _ask(messages: int, index: int, address: bytes) -> None:
    """Asks the daemon about a source whose rate limit or verdict the kernel does not know. If the line is lost,
    the source's next packet asks again."""
    with suppress(BlockingIOError, BrokenPipeError):
        os.write(messages, ask_line(index, address))


def _die_with_parent() -> None:
    """Ends this process when the daemon ends. Under a flood, NetfilterQueue does not return to check the lifeline,
    and an orphan would keep the queue."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _bind_error(queue: int, error: OSError) -> str:
    if error.errno == errno.EPERM or "Failed to create queue" in str(error):
        return (
            f"queue {queue} cannot be bound: another process has it "
            f"(see /proc/net/netfilter/nfnetlink_queue), or CAP_NET_ADMIN or CAP_NET_RAW is missing"
        )
    return f"queue {queue} cannot be served: {error}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="portward-worker", description="Answers the packets of one queue.")
    parser.add_argument("--queue", type=int, required=True)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--reader", type=QueueReader, default=QueueReader.BATCH)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--counters", type=int, required=True)
    parser.add_argument("--lifeline", type=int, required=True)
    parser.add_argument("--stay", type=float, default=0.0)
    parser.add_argument("--instance", nargs=2, metavar=("NAME", "FILE"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
