"""One queue → one verdict for each of its packets. Runs as a process of its own:

    python -m portward.gateway.worker --queue 0 --table DIR --tally FD --lifeline FD [--length 4096]

packet → `parse` → `Reader.lookup` → `judge` → the mark. It shares nothing with the daemon but the policy
table and a block of counters. It prints `ready` when its queue is bound, and ends when the daemon does.

Every path gives a verdict: a packet without one would hold its slot in the queue for ever. What cannot be
judged is dropped and not remembered.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import logging
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import netfilterqueue

from portward.errors import PortwardError
from portward.gateway import mark
from portward.gateway.packet import parse
from portward.gateway.reset import Resetter
from portward.gateway.tally import REASONS, Event, Outcome, Tally
from portward.model import Reason
from portward.table.layout import Head
from portward.table.reader import Finding, Reader

READY: Final = "ready"
# Enough for IP and TCP headers with all their options; the rest of a packet stays in the kernel.
_COPY_BYTES: Final = 512
# Bytes of netlink messages that may wait: some thousands of packets.
_RECEIVE_BUFFER: Final = 8 << 20
_NUMBER: Final = {reason: number for number, reason in enumerate(REASONS)}

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h

_log = logging.getLogger("portward.worker")


def judge(finding: Finding) -> tuple[mark.Class, Outcome]:
    """What the kernel is told for a finding, and how it is counted."""
    if finding.reason.allows:
        return mark.Class.ALLOW, Outcome.PASSED
    if finding.observed:
        return mark.Class.OBSERVED, Outcome.OBSERVED
    if finding.reason is Reason.DENIED_UNKNOWN_SOURCE:
        return mark.Class.UNKNOWN, Outcome.DROPPED
    if finding.reject:
        return mark.Class.REFUSED, Outcome.RESET
    return mark.Class.DENY, Outcome.DROPPED


class Worker:
    """Gives verdicts on packets; `lookup` and `head` are a `Reader`'s."""

    def __init__(
        self,
        lookup: Callable[[int, bytes], Finding | None],
        head: Callable[[], Head | None],
        tally: Tally,
        resetter: Resetter,
    ) -> None:
        self._lookup, self._head, self._tally, self._resetter = lookup, head, tally, resetter
        self._failed = False

    def handle(self, packet: Any) -> None:
        """Gives one verdict on a packet of NetfilterQueue; never raises."""
        try:
            self._judge(packet)
        except Exception:
            self._tally.event(Event.ERROR)
            packet.drop()
            if not self._failed:  # once: a broken table would fill the log at the speed of the network
                self._failed = True
                _log.exception("a packet could not be judged and was dropped; such packets are counted")

    def _judge(self, packet: Any) -> None:
        if packet.get_mark() & mark.OWN == mark.PROBE:
            self._answer(packet)
            return
        payload = packet.get_payload()
        segment = parse(payload)
        if segment is None:
            self._tally.event(Event.MALFORMED)
            packet.drop()
            return
        finding = self._lookup(packet.indev, segment.source)
        if finding is None:
            self._tally.event(Event.NO_SEGMENT)
            packet.drop()
            return
        verdict, outcome = judge(finding)
        if outcome is Outcome.RESET and not self._resetter.answer(
            payload, segment.tcp, packet.indev, _link_address(packet)
        ):
            self._tally.event(Event.RESET_FAILED)
        self._tally.verdict(_NUMBER[finding.reason], outcome, attempt=segment.attempt)
        packet.set_mark(mark.stamp(packet.get_mark(), verdict, mark.epoch_of(finding.generation)))
        packet.accept()

    def _answer(self, packet: Any) -> None:
        """Answers the self-check: with the epoch of the policy that this process sees."""
        head = self._head()
        self._tally.event(Event.PROBED)
        if head is None:
            packet.drop()
            return
        packet.set_mark(mark.stamp(packet.get_mark(), mark.Class.MISS, mark.epoch_of(head.generation)))
        packet.accept()


def _link_address(packet: Any) -> bytes | None:
    address: bytes | None = packet.get_hw()
    # The kernel gives 8 bytes, of which an Ethernet address takes 6.
    return None if address is None else address[:6]


def serve(queue: int, length: int, handle: Callable[[Any], None], lifeline: int) -> None:
    """Binds the queue and answers its packets until the other end of `lifeline` is closed or SIGTERM comes.

    `length` is how many packets may wait. Raises OSError: EPERM where another process has the queue, or
    without CAP_NET_ADMIN.
    """
    bound = netfilterqueue.NetfilterQueue()
    bound.bind(queue, handle, max_len=length, mode=netfilterqueue.COPY_PACKET, range=_COPY_BYTES,
               sock_len=_RECEIVE_BUFFER)  # fmt: skip
    try:
        print(READY, flush=True)
        poll = select.poll()
        poll.register(bound.get_fd(), select.POLLIN)
        poll.register(lifeline, select.POLLIN)
        while all(descriptor != lifeline for descriptor, _ in poll.poll()):
            bound.run(block=False)
    finally:
        bound.unbind()


def main() -> int:
    """The worker process; prints one line on stderr and gives 1 where it cannot begin."""
    arguments = _arguments()
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
    _die_with_parent()
    # The daemon decides when a worker ends; a Ctrl-C reaches the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        reader = Reader.open(arguments.table)
        worker = Worker(reader.lookup, reader.head, Tally(arguments.tally), Resetter())
        serve(arguments.queue, arguments.length, worker.handle, arguments.lifeline)
    except PortwardError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(_bind_error(arguments.queue, error), file=sys.stderr)
        return 1
    return 0


def _die_with_parent() -> None:
    """Under a flood `run` does not come back to look at the lifeline, and an orphan would keep the queue."""
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
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--tally", type=int, required=True)
    parser.add_argument("--lifeline", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
