"""A packet → its verdict: `parse` → `Reader.lookup` → `classify` → the mark.

Every path gives a verdict: a packet without one would hold its slot in the queue for ever. What cannot be
judged is dropped and not remembered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from portward.base.codes import REASON_NUMBER
from portward.ipc import mark
from portward.ipc.counters import PacketOutcome, WorkerCounters, WorkerEvent
from portward.ipc.verdict import classify
from portward.table.layout import Head
from portward.table.reader import LookupResult
from portward.worker.messages import PREROUTING
from portward.worker.packet import parse
from portward.worker.reset import Budget, Resetter

_log = logging.getLogger("portward.worker")


class QueuedPacket(Protocol):
    """A packet that waits for its verdict, as NetfilterQueue hands one over. A mark after the verdict is lost."""

    @property
    def indev(self) -> int:
        """Index of the interface that it came from; 0: from none."""

    @property
    def hook(self) -> int:
        """Where it was queued: messages.PREROUTING, or messages.FORWARD by the guard."""

    def get_mark(self) -> int:
        """The whole mark."""

    def get_payload(self) -> bytes:
        """The packet from its IP header on, as far as it was copied."""

    def get_hw(self) -> bytes | None:
        """The link address that it came from, in the first 6 bytes; None where the link has none."""

    def set_mark(self, mark: int) -> None:
        """The mark that goes out with the verdict."""

    def accept(self) -> None:
        """On its way, to the next chain."""

    def drop(self) -> None:
        """Gone."""


class SlowPath:
    """Gives verdicts on packets; `lookup` and `head` are a `Reader`'s, `ask` is told of sources (interface index,
    address) whose limit or verdict the kernel does not know and cannot learn from a mark."""

    def __init__(
        self,
        lookup: Callable[[int, bytes], LookupResult | None],
        head: Callable[[], Head | None],
        counters: WorkerCounters,
        resetter: Resetter,
        ask: Callable[[int, bytes], None],
    ) -> None:
        self._lookup, self._head, self._tally, self._resetter = lookup, head, counters, resetter
        self._ask = ask
        # The kernel has a budget only for what it has cached.
        self.firsts = Budget()
        self._failed = False

    def handle(self, packet: QueuedPacket) -> None:
        """Gives one verdict on a packet; never raises."""
        try:
            self._judge(packet)
        except Exception:
            self._tally.event(WorkerEvent.ERROR)
            packet.drop()
            if not self._failed:  # once: a broken table would fill the log at the speed of the network
                self._failed = True
                _log.exception("a packet could not be judged and was dropped; such packets are counted")

    def _judge(self, packet: QueuedPacket) -> None:
        if packet.hook != PREROUTING:
            self._judge_forwarded(packet)
            return
        own = packet.get_mark() & mark.OWN
        if own == mark.PROBE:
            self._answer(packet)
            return
        payload = packet.get_payload()
        segment = parse(payload)
        if segment is None:
            self._refuse(packet, own, WorkerEvent.MALFORMED)
            return
        finding = self._lookup(packet.indev, segment.source)
        if finding is None:
            self._refuse(packet, own, WorkerEvent.NO_SEGMENT)
            return
        if finding.damaged:
            self._tally.event(WorkerEvent.DAMAGED)
        verdict, outcome = classify(finding)
        if own == mark.AGAIN and outcome is not PacketOutcome.RESET:
            # The policy has changed since the kernel counted the packet as rejected, and is about to forget the
            # source. To let the packet pass would count it again; the sender tries once more.
            packet.drop()
            return
        if outcome is PacketOutcome.RESET and own != mark.AGAIN and not self.firsts.take(packet.indev):
            outcome = PacketOutcome.DROPPED  # cached as rejected all the same: its next packet is answered
        if outcome is PacketOutcome.RESET and not self._resetter.answer(
            payload, segment.tcp, packet.indev, _link_address(packet)
        ):
            self._tally.event(WorkerEvent.RESET_FAILED)
        self._tally.verdict(REASON_NUMBER[finding.reason], outcome, attempt=segment.attempt)
        if own == mark.AGAIN:  # cached and counted already: `learn` has nothing to do
            packet.drop()
            return
        if outcome is PacketOutcome.DEFERRED:
            self._ask(packet.indev, segment.source)
            verdict = mark.Class.MISS  # `learn` counts the packet for its source, and drops it
        packet.set_mark(mark.stamp(packet.get_mark(), verdict, mark.epoch_of(finding.generation)))
        packet.accept()

    def _refuse(self, packet: QueuedPacket, own: int, event: WorkerEvent) -> None:
        """Gives up on a packet that has no verdict. `learn` drops what comes with the mark of a miss and counts it
        for its segment; a packet with AGAIN is counted already."""
        self._tally.event(event)
        if own == mark.AGAIN:
            packet.drop()
            return
        packet.set_mark((packet.get_mark() & mark.KEEP) | mark.MISS)
        packet.accept()

    def _judge_forwarded(self, packet: QueuedPacket) -> None:
        """Accepts or drops a packet that others may have translated. Its mark belongs to others and stays, so the
        kernel learns nothing from it: the daemon is asked to write the verdict. No reset is sent: it would come
        from an address to which the sender never wrote."""
        segment = parse(packet.get_payload())
        finding = None if segment is None else self._lookup(packet.indev, segment.source)
        if segment is None or finding is None:
            self._tally.event(WorkerEvent.MALFORMED if segment is None else WorkerEvent.NO_SEGMENT)
            packet.drop()
            return
        if finding.damaged:
            self._tally.event(WorkerEvent.DAMAGED)
        verdict, outcome = classify(finding)
        outcome = PacketOutcome.DROPPED if outcome is PacketOutcome.RESET else outcome
        self._tally.verdict(REASON_NUMBER[finding.reason], outcome, attempt=segment.attempt)
        self._ask(packet.indev, segment.source)
        if verdict in mark.PASSING and outcome is not PacketOutcome.DEFERRED:
            packet.accept()
        else:
            packet.drop()

    def _answer(self, packet: QueuedPacket) -> None:
        """Answers the self-check: with the epoch of the policy that this process sees."""
        head = self._head()
        self._tally.event(WorkerEvent.PROBED)
        if head is None:
            packet.drop()
            return
        packet.set_mark(mark.stamp(packet.get_mark(), mark.Class.MISS, mark.epoch_of(head.generation)))
        packet.accept()


def _link_address(packet: QueuedPacket) -> bytes | None:
    address = packet.get_hw()
    # The kernel gives 8 bytes, of which an Ethernet address takes 6.
    return None if address is None else address[:6]
