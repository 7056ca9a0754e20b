"""Reads packets from a queue one by one, through the library NetfilterQueue.

This reader gives no verdict on a bridged frame, because the library does not say which address family a packet
has. If br_netfilter is loaded, a routed packet has the same `indev` (the bridge) and `physindev` (the port) as a
bridged frame. Nor does the library give the VLAN tag, so a reset could reach another network. `guarded` refuses
each packet that may be a bridged frame.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Protocol

import netfilterqueue

from portward.table.layout import LookupResult
from portward.worker.nfqueue import COPY_BYTES, RECEIVE_BYTES
from portward.worker.slow_path import QueuedPacket


class LibraryPacket(QueuedPacket, Protocol):
    """A packet of NetfilterQueue."""

    @property
    def physindev(self) -> int:
        """Index of the port of a bridge by which it came; 0 if there is none."""


class _Unclear:
    """A packet that may be a bridged frame. It has no interface here, so the slow path refuses it, and counts it
    as NO_SEGMENT."""

    indev = 0

    def __init__(self, packet: LibraryPacket) -> None:
        self.hook = packet.hook
        self.get_mark, self.get_payload, self.get_hw = packet.get_mark, packet.get_payload, packet.get_hw
        self.set_mark, self.accept, self.drop = packet.set_mark, packet.accept, packet.drop


def guarded(
    handle: Callable[[QueuedPacket], None], lookup: Callable[[int, bytes], LookupResult | None]
) -> Callable[[LibraryPacket], None]:
    """`handle` with the packets that may be bridged frames refused. Like it, the result gives each packet one
    verdict and never raises. `lookup` is a method of a `Reader`.

    A packet may be a bridged frame if it came by a port that has a segment. One such frame is not noticed: if the
    table does not know the segment of a new port yet, and the bridge has a segment, too.
    """

    def answer(packet: LibraryPacket) -> None:  # a closure: a method takes twice as long
        if packet.physindev and _may_have_segment(lookup, packet.physindev):
            handle(_Unclear(packet))
        else:
            handle(packet)

    return answer


def _may_have_segment(lookup: Callable[[int, bytes], LookupResult | None], index: int) -> bool:
    try:
        return lookup(index, bytes(4)) is not None  # a segment has an answer to every source
    except Exception:  # the slow path meets the error again, and logs it
        return True


def serve(
    number: int, length: int, answer: Callable[[LibraryPacket], None], lifeline: int, ready: Callable[[], None]
) -> None:
    """Binds the queue `number` and gives its packets to `answer` until the other end of the descriptor `lifeline`
    is closed or SIGTERM comes.

    `length` is how many packets may wait in the queue. `ready` is called when the queue is bound. Raises OSError:
    EPERM if another process has the queue, or without CAP_NET_ADMIN.
    """
    bound = netfilterqueue.NetfilterQueue()
    bound.bind(number, answer, max_len=length, mode=netfilterqueue.COPY_PACKET, range=COPY_BYTES,
               sock_len=RECEIVE_BYTES)  # fmt: skip
    try:
        ready()
        poll = select.poll()
        poll.register(bound.get_fd(), select.POLLIN)
        poll.register(lifeline, select.POLLIN)
        while all(descriptor != lifeline for descriptor, _ in poll.poll()):
            bound.run(block=False)
    finally:
        bound.unbind()
