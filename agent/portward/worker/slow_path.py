"""Gives the verdict of one packet, whatever it looks like: `parse`, `Reader.lookup`, `classify`, then the mark.

Every path ends with a verdict, because a packet without one would keep its slot in the queue for ever. A packet
that cannot be classified is dropped, and the kernel does not cache that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from portward.base.codes import REASON_NUMBER
from portward.ipc import mark
from portward.ipc.counters import WorkerCounters, WorkerEvent
from portward.ipc.mark import PacketOutcome, classify
from portward.table.layout import Head, LookupResult
from portward.worker.messages import PREROUTING
from portward.worker.packet import parse
from portward.worker.reset import Budget, Resetter, reset_for

_log = logging.getLogger("portward.worker")


class QueuedPacket(Protocol):
    """A packet that waits for its verdict, with the methods of NetfilterQueue's packets. A mark that is set after
    the verdict is lost."""

    @property
    def indev(self) -> int:
        """Index of the interface by which it came, for a bridged frame the port of the bridge; 0 if there is none,
        which is the interface of no segment."""

    @property
    def hook(self) -> int:
        """The hook that queued it: messages.PREROUTING, or messages.FORWARD for the forward guard."""

    def get_mark(self) -> int:
        """The packet mark, 32 bits."""

    def get_payload(self) -> bytes:
        """The bytes from the IP header on, as far as the kernel copied them."""

    def get_hw(self) -> bytes | None:
        """The link address of the sender, in the first 6 bytes; None if the link has no addresses."""

    def set_mark(self, mark: int) -> None:
        """Sets the mark that goes out with the verdict."""

    def accept(self) -> None:
        """Sends the packet on to the next chain."""

    def drop(self) -> None:
        """Drops the packet."""


class SlowPath:
    """Gives the verdict of single packets. `lookup` and `head` are methods of a `Reader`. `ask` reports a source
    (interface index, address) to the daemon, if the kernel lacks its rate limit or its verdict and cannot cache it
    from a mark."""

    def __init__(
        self,
        lookup: Callable[[int, bytes], LookupResult | None],
        head: Callable[[], Head | None],
        counters: WorkerCounters,
        resetter: Resetter,
        ask: Callable[[int, bytes], None],
    ) -> None:
        self._lookup, self._head, self._counters, self._resetter = lookup, head, counters, resetter
        self._ask = ask
        # The resets to sources that the kernel has not cached yet. For cached ones the ruleset has a limit.
        self.first_resets = Budget()
        self._failed = False

    def handle(self, packet: QueuedPacket, tag: bytes | None = b"") -> None:
        """Gives the packet one verdict. `tag` is the VLAN tag of its frame, as `messages.Packet` has it. Never
        raises."""
        try:
            self._give_verdict(packet, tag)
        except Exception:
            self._counters.event(WorkerEvent.ERROR)
            packet.drop()
            if not self._failed:  # log once: a broken table would fill the log at the speed of the network
                self._failed = True
                _log.exception("a packet could not be classified and was dropped; such packets are counted")

    def _give_verdict(self, packet: QueuedPacket, tag: bytes | None) -> None:
        if packet.hook != PREROUTING:
            self._answer_forwarded(packet)
            return
        own = packet.get_mark() & mark.OWN
        if own == mark.PROBE:
            self._answer_probe(packet)
            return
        payload = packet.get_payload()
        segment = parse(payload)
        if segment is None:
            self._refuse(packet, own, WorkerEvent.MALFORMED)
            return
        result = self._lookup(packet.indev, segment.source)
        if result is None:
            self._refuse(packet, own, WorkerEvent.NO_SEGMENT)
            return
        if result.damaged:
            self._counters.event(WorkerEvent.DAMAGED)
        verdict, outcome = classify(result)
        if own == mark.AGAIN and outcome is not PacketOutcome.RESET:
            # The kernel counted the packet as rejected, and the policy has changed since. The kernel is about to
            # drop the source from its cache. If the packet passed now, it would be counted twice. The sender
            # retries.
            packet.drop()
            return
        if outcome is PacketOutcome.RESET:
            outcome = self._reset(packet, tag, payload, segment.tcp, again=own == mark.AGAIN)
        self._counters.verdict(REASON_NUMBER[result.reason], outcome, attempt=segment.attempt)
        if own == mark.AGAIN:  # the kernel has cached and counted it: chain `learn` has nothing to do
            packet.drop()
            return
        if outcome is PacketOutcome.DEFERRED:
            self._ask(packet.indev, segment.source)
            verdict = mark.Class.ANSWER  # chain `learn` counts the packet for its source and drops it
        packet.set_mark(mark.stamp(packet.get_mark(), verdict, mark.epoch_of(result.generation)))
        packet.accept()

    def _reset(
        self, packet: QueuedPacket, tag: bytes | None, payload: bytes, tcp: int, *, again: bool
    ) -> PacketOutcome:
        """Answers a rejected packet, whose TCP header is at offset `tcp`, with a reset. `again`: the kernel has
        cached its source, and has a limit for its resets. Returns RESET, or DROPPED if no reset is due or none is
        left."""
        reply = reset_for(payload, tcp)
        if reply is None:
            return PacketOutcome.DROPPED
        if not again and not self.first_resets.take(packet.indev):
            return PacketOutcome.DROPPED  # the kernel caches it as rejected, and its next packet is answered
        if not self._resetter.send(reply, packet.indev, _link_address(packet), tag):
            self._counters.event(WorkerEvent.RESET_FAILED)
        return PacketOutcome.RESET

    def _refuse(self, packet: QueuedPacket, own: int, event: WorkerEvent) -> None:
        """Gives up on a packet that cannot be classified. Chain `learn` drops a packet with the mark of a miss,
        and counts it for its segment. A packet with AGAIN is counted already."""
        self._counters.event(event)
        if own == mark.AGAIN:
            packet.drop()
            return
        packet.set_mark((packet.get_mark() & mark.KEEP) | mark.MISS)
        packet.accept()

    def _answer_forwarded(self, packet: QueuedPacket) -> None:
        """Accepts or drops a packet that another program may have translated. Its mark belongs to other programs
        and stays, so the kernel cannot cache the verdict from it. The daemon is asked to write it instead. No
        reset is sent, because it would come from an address to which the sender never wrote."""
        segment = parse(packet.get_payload())
        result = None if segment is None else self._lookup(packet.indev, segment.source)
        if segment is None or result is None:
            self._counters.event(WorkerEvent.MALFORMED if segment is None else WorkerEvent.NO_SEGMENT)
            packet.drop()
            return
        if result.damaged:
            self._counters.event(WorkerEvent.DAMAGED)
        verdict, outcome = classify(result)
        outcome = PacketOutcome.DROPPED if outcome is PacketOutcome.RESET else outcome
        self._counters.verdict(REASON_NUMBER[result.reason], outcome, attempt=segment.attempt)
        self._ask(packet.indev, segment.source)
        if verdict in mark.PASSING and outcome is not PacketOutcome.DEFERRED:
            packet.accept()
        else:
            packet.drop()

    def _answer_probe(self, packet: QueuedPacket) -> None:
        """Answers the question of the self-check with the epoch of the policy that this process sees."""
        head = self._head()
        self._counters.event(WorkerEvent.PROBED)
        if head is None:
            packet.drop()
            return
        packet.set_mark(mark.stamp(packet.get_mark(), mark.Class.ANSWER, mark.epoch_of(head.generation)))
        packet.accept()


def _link_address(packet: QueuedPacket) -> bytes | None:
    address = packet.get_hw()
    # The kernel gives 8 bytes (struct nfqnl_msg_packet_hw); an Ethernet address takes 6.
    return None if address is None else address[:6]
