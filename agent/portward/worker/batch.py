"""Reads packets from a queue in batches and sends one verdict for each of them: the fast path of a worker.

For each batch, the worker receives the packets, opens one view of the policy table, classifies every packet,
closes the view, and sends all verdicts. The view begins after the packets were received, so a verdict is never
older than its packet. Each verdict carries the epoch of the table generation that the view shows, so the kernel
does not cache a verdict that was found under another policy (chain `learn` compares the epoch). No view is open
while the worker waits or while the kernel acts on verdicts.

The fast path takes a plain TCP segment whose mark says that the kernel has no cached verdict. It reads the packet
by a `MessageTemplate`, and looks its source up in a range cache that lives as long as one snapshot of the table.
Every other packet, and every packet at which the fast path fails, goes through `SlowPath.handle`, the same code
that `[queue] reader = "netfilterqueue"` uses.
"""

from __future__ import annotations

import errno
import logging
import os
import select
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from portward.base.codes import REASON_NUMBER
from portward.ipc import mark
from portward.ipc.counters import WorkerCounters, WorkerEvent
from portward.ipc.mark import PacketOutcome, classify
from portward.table.layout import LookupResult
from portward.table.reader import Reader
from portward.worker.handover import POLL_INTERVAL_S, GracePeriod, bound
from portward.worker.messages import (
    ACCEPT,
    DROP,
    WHOLE,
    MessageTemplate,
    Packet,
    Refused,
    Verdicts,
    read,
    template_of,
)
from portward.worker.nfqueue import SLOT, Queue
from portward.worker.packet import ATTEMPTS
from portward.worker.slow_path import SlowPath

# Packets in one batch. More of them share the cost of a batch; with fewer the first packet waits less.
BATCH: Final = 64
# Address ranges in the cache, at about 200 bytes each. An attachment makes two ranges at most (the prefix and the
# gap beside it), so this covers a segment of 2,048 attachments.
_MAX_RANGES: Final = 4096
# After this many misses while the cache is full, clear it: it is not helping.
_MAX_MISSES_WHILE_FULL: Final = 16 * _MAX_RANGES
# Message templates kept: IPv4 or IPv6; routed, bridged, or bridged with a VLAN tag; checksum verified or not;
# payload cut to the copied size or not.
_MAX_TEMPLATES: Final = 24
# Verdicts that one batch can need. The smallest message that carries a packet id has 32 bytes (nfnetlink header,
# the attribute NFQA_PACKET_HDR), so a receive slot holds SLOT // 32 of them at most.
_MAX_VERDICTS: Final = BATCH * (SLOT // 32)

_log = logging.getLogger("portward.worker")


class _NeedsSlowPath(Exception):  # noqa: N818 # not an error: it sends the packet to the slow path
    """The template and the source alone do not give the verdict of this packet."""


# The template before the first message: it has the number of fields that the loop unpacks, and matches no message.
_NO_TEMPLATE: Final = MessageTemplate(lambda buffer, start: (b"",) * 14, tuple, (), frozenset(), 0, 0)


class _PendingPacket:
    """A received packet in the form that `SlowPath.handle` takes. Its verdict goes into `verdicts`."""

    def __init__(self, packet: Packet, id_: int, verdicts: Verdicts) -> None:
        self.indev, self.hook = packet.indev, packet.hook
        self._packet, self._id, self._verdicts, self._mark = packet, id_, verdicts, packet.mark

    def get_mark(self) -> int:
        return self._mark

    def get_payload(self) -> bytes:
        return self._packet.payload

    def get_hw(self) -> bytes | None:
        return self._packet.link_address

    def set_mark(self, mark: int) -> None:
        self._mark = mark

    def accept(self) -> None:
        self._verdicts.give(ACCEPT, self._id, self._mark)

    def drop(self) -> None:
        self._verdicts.give(DROP, self._id, self._mark)


class _Answer:
    """The answer to all sources with the same lookup result: bits 15 to 0 of the mark, with class and
    epoch (2 bytes, big-endian), and how
    the packets are counted. `packets` and `attempts` are those of this batch that were not added to the counters
    yet."""

    __slots__ = ("attempts", "outcome", "own", "packets", "reason")

    def __init__(self, result: LookupResult, verdict: mark.Class, outcome: PacketOutcome) -> None:
        self.own = mark.stamp(0, verdict, mark.epoch_of(result.generation)).to_bytes(2, "big")
        self.reason, self.outcome = REASON_NUMBER[result.reason], outcome
        self.packets = self.attempts = 0


class _RangeCache:
    """Answers by range of source addresses. From one entry of the policy table to the next, all addresses have the
    same answer, so a few ranges soon cover all sources that send.

    A source is one number: the interface index, then the address. The addresses of one interface and family lie
    side by side. IPv6 sources lie beyond all IPv4 sources, because the index is never 0: 20 bytes against 8.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Empties the cache."""
        # The first number of each range, ascending, and beside it the last number and the answer. An empty range
        # stands before all others, so that a search always finds one.
        self._starts = [-1]
        self._ends: list[tuple[int, _Answer | None]] = [(-2, None)]
        self._misses_while_full = 0

    def get(self, source: bytes) -> _Answer | None:
        """The cached answer to a source (4 bytes of interface index, then the address, big-endian); None if none
        is cached."""
        number = int.from_bytes(source, "big")
        last, answer = self._ends[bisect_right(self._starts, number) - 1]
        return answer if number <= last else None

    def has_room(self) -> bool:
        """Whether `put` may be called after a miss. Counts the misses while the cache is full, and clears it when
        there are too many."""
        if len(self._starts) < _MAX_RANGES:
            return True
        self._misses_while_full += 1
        if self._misses_while_full < _MAX_MISSES_WHILE_FULL:
            return False
        self.clear()
        return True

    def put(self, index: bytes, size: int, reach: tuple[int, int], answer: _Answer) -> None:
        """Caches the answer for the addresses `reach` (first and last, as numbers) of `size` bytes behind the
        interface `index` (4 bytes, big-endian)."""
        offset = int.from_bytes(index, "big") << size * 8
        place = bisect_right(self._starts, offset + reach[0])
        self._starts.insert(place, offset + reach[0])
        self._ends.insert(place, (offset + reach[1], answer))


class BatchReader:
    """Gives the verdicts of batches of packets. `slow_path` uses the same `reader`."""

    def __init__(self, queue: int, reader: Reader, slow_path: SlowPath, counters: WorkerCounters) -> None:
        self._reader, self._slow_path, self._counters = reader, slow_path, counters
        self._verdicts = Verdicts(queue, _MAX_VERDICTS)
        self._templates: list[MessageTemplate] = []
        # The caches of one snapshot of the table: an answer for each lookup result, and the answers by source
        # range.
        self._snapshot = -1
        self._answers: dict[LookupResult, _Answer] = {}
        # Answers to rejected sources while their segment's budget of resets is spent.
        self._without_reset: dict[LookupResult, _Answer] = {}
        self._ranges = _RangeCache()
        self._logged: set[str] = set()

    def answer(self, buffer: bytearray, lengths: Iterable[tuple[int]]) -> memoryview:
        """Classifies the datagrams in the slots of `buffer`, each of the length given (bytes). Returns the verdict
        messages, one for each packet, to be sent before the next call. Never raises."""
        waiting = enumerate(lengths)
        try:
            with self._reader.view() as snapshot:
                if snapshot != self._snapshot:
                    self._snapshot = snapshot
                    self._answers.clear()
                    self._without_reset.clear()
                    self._ranges.clear()
                self._classify(buffer, waiting)
        except Exception:
            # No view could be opened. The slow path opens its own for each packet that is left. If that fails too,
            # it drops the packet, counts it and logs the error.
            for number, (length,) in waiting:
                self._answer_slowly(buffer[number * SLOT : number * SLOT + length])
        self._count()
        return self._verdicts.take()

    def _count(self) -> None:
        try:
            for answer in (*self._answers.values(), *self._without_reset.values()):
                if answer.packets:
                    packets, attempts = answer.packets, answer.attempts
                    answer.packets = answer.attempts = 0
                    self._counters.add(answer.reason, answer.outcome, packets=packets, attempts=attempts)
        except Exception:  # out of memory, for example: the verdicts matter more
            self._log_once("packets were answered and could not be counted")

    def _classify(self, buffer: bytearray, waiting: Iterator[tuple[int, tuple[int]]]) -> None:
        """Classifies the packets that wait, within one view. This loop is nearly all that a packet costs, so it
        uses local names and calls few functions."""
        cached, accept = self._ranges.get, self._verdicts.accept
        unpack, constants, expected, firsts, least, before = (
            self._templates[0] if self._templates else _NO_TEMPLATE
        )
        for number, (length,) in waiting:
            start = number * SLOT
            try:
                fields = unpack(buffer, start)
                # The same test as `MessageTemplate.asks`, without a call.
                _, id_, _, index, _, keep, *_, payload, _, first, fragment, _, source, flags = fields
                if not (
                    constants(fields) == expected
                    and first in firsts
                    and fragment in WHOLE
                    and payload >= least
                    and 0 <= length - payload - before < 4
                ):
                    unpack, constants, expected, firsts, least, before = self._template(buffer, start, length)
                    _, id_, _, index, _, keep, *_, _, _, _, _, _, source, flags = unpack(buffer, start)
                answer = cached(index + source) or self._look_up(index, source)
                answer.packets += 1
                answer.attempts += flags in ATTEMPTS
                accept(id_, keep, answer.own)
            except Exception:  # _NeedsSlowPath, or an error, which the slow path meets again and logs
                self._answer_slowly(buffer[start : start + length])

    def _template(self, buffer: bytearray, start: int, length: int) -> MessageTemplate:
        """The template of a message that does not match the one used last. Moves it to the front. Raises
        _NeedsSlowPath if the message gives no template."""
        for place, template in enumerate(self._templates):
            if template.asks(template.unpack(buffer, start), length):
                self._templates.insert(0, self._templates.pop(place))
                return template
        found = template_of(bytes(buffer[start : start + length]))
        if found is None:
            raise _NeedsSlowPath
        self._templates.insert(0, found)
        del self._templates[_MAX_TEMPLATES:]
        return found

    def _look_up(self, index: bytes, source: bytes) -> _Answer:
        """The answer to a source (interface index and address, big-endian) that no range covers. Raises
        _NeedsSlowPath if it takes more than a verdict: a reset, a question to the daemon, or a damaged entry."""
        result = self._reader.lookup(int.from_bytes(index, "big"), source)
        if result is None or result.damaged:
            raise _NeedsSlowPath
        answer = self._answers.get(result)
        if answer is None:
            verdict, outcome = classify(result)
            if outcome is PacketOutcome.RESET and not self._slow_path.first_resets.left(
                int.from_bytes(index, "big")
            ):
                # Not cached by source, because the budget may allow a reset in the next second.
                return self._without_reset.setdefault(result, _Answer(result, verdict, PacketOutcome.DROPPED))
            if outcome in (PacketOutcome.RESET, PacketOutcome.DEFERRED):
                raise _NeedsSlowPath
            answer = self._answers[result] = _Answer(result, verdict, outcome)
        # If many small ranges are asked for in turn, caching them costs more than it saves.
        if self._ranges.has_room():
            self._ranges.put(index, len(source), self._reader.reach(int.from_bytes(index, "big"), source), answer)
        return answer

    def _answer_slowly(self, datagram: bytearray) -> None:
        """Answers all packets in a datagram of any content through the slow path. Never raises."""
        for message in read(bytes(datagram)):
            if isinstance(message, Refused):
                # ENOENT: the packet has gone. Removing any hook drops all packets that wait in queues.
                if message.errno not in (0, errno.ENOENT):
                    self._log_once(f"the kernel refused a message of the worker: {os.strerror(message.errno)}")
            elif message.id is None:
                self._counters.event(WorkerEvent.ERROR)
                self._log_once("a message of the queue names no packet, so it cannot be answered")
            else:
                self._slow_path.handle(_PendingPacket(message, message.id, self._verdicts), message.tag)

    def _log_once(self, error: str) -> None:
        if error not in self._logged:  # else it would fill the log at the speed of the network
            self._logged.add(error)
            _log.error(error)


def serve(
    number: int, length: int, batches: BatchReader, lifeline: int, ready: Callable[[], None], grace: GracePeriod
) -> None:
    """Binds the queue `number` and answers its packets until the other end of the descriptor `lifeline` is closed
    or SIGTERM comes. From then on it goes on for the grace period.

    `length` is how many packets may wait in the queue. `ready` is called when the queue is bound. Raises OSError:
    EPERM if another process has the queue, or without CAP_NET_ADMIN.
    """
    queue = bound(lambda: Queue(number, length, BATCH))
    try:
        ready()
        poll = select.poll()
        poll.register(queue, select.POLLIN)
        poll.register(lifeline, select.POLLIN)
        while all(descriptor != lifeline for descriptor, _ in poll.poll()):
            _answer(queue, batches)
        poll.unregister(lifeline)
        while not grace.over():
            poll.poll(POLL_INTERVAL_S * 1000)
            _answer(queue, batches)
    finally:
        queue.close()


def _answer(queue: Queue, batches: BatchReader) -> None:
    if lengths := queue.receive():
        queue.send(batches.answer(queue.buffer, lengths))
