"""Every packet gets exactly one verdict, for every table and every packet, from both queue readers."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from scapy.layers.inet import IP, TCP, UDP

from portward.ipc import mark
from portward.ipc.counters import WorkerCounters, WorkerEvent
from portward.ipc.mark import PacketOutcome, classify
from portward.model import Reason
from portward.table.layout import LookupResult
from portward.worker.batch import BatchReader
from portward.worker.messages import FORWARD, PREROUTING
from portward.worker.nfqueue import SLOT
from portward.worker.reset import FIRST_RESETS_PER_SECOND, Resetter
from portward.worker.slow_path import SlowPath
from unit.worker.test_messages import BRIDGE, TAGS, bridged, message

SYN = bytes(IP(src="10.0.0.4", dst="203.0.113.25") / TCP(dport=25, flags="S"))
RST = bytes(IP(src="10.0.0.4", dst="203.0.113.25") / TCP(dport=25, flags="R"))


class QueuedPacket:
    """A packet like those of NetfilterQueue, which records its verdicts in `said`."""

    indev = 3

    def __init__(self, payload: bytes = SYN, before: int = 0, hook: int = PREROUTING) -> None:
        self._payload, self.mark, self.hook, self.said = payload, before, hook, list[str]()

    def get_payload(self) -> bytes:
        return self._payload

    def get_hw(self) -> bytes:
        return b"\x02\0\0\0\0\x01\0\0"

    def get_mark(self) -> int:
        return self.mark

    def set_mark(self, value: int) -> None:
        assert not self.said, "a mark after the verdict is lost"
        self.mark = value

    def accept(self) -> None:
        self.said.append("accept")

    def drop(self) -> None:
        self.said.append("drop")


class Answers:
    """A fake resetter, which records the receivers of resets in `to`, and their VLAN tags in `tags`."""

    def __init__(self, *, sent: bool = True) -> None:
        self.sent, self.to = sent, list[tuple[int, bytes | None]]()
        self.sources: list[tuple[int, bytes]] = []
        self.tags: list[bytes | None] = []

    def send(self, reset: bytes, index: int, link_address: bytes | None, tag: bytes | None = b"") -> bool:
        self.to.append((index, link_address))
        self.tags.append(tag)
        return self.sent

    def asked(self, index: int, address: bytes) -> None:
        """Records the sources that the daemon is asked about."""
        self.sources.append((index, address))


class Table:
    """A fake policy table."""

    def __init__(self, lookup: Callable[[int, bytes], LookupResult | None]) -> None:
        self.lookup = lookup

    def head(self) -> None:
        return None

    @contextmanager
    def view(self) -> Iterator[int]:
        yield 1

    def reach(self, index: int, source: bytes) -> tuple[int, int]:
        return int.from_bytes(source, "big"), int.from_bytes(source, "big")


class Batched:
    """A batch reader that gets packets like those of NetfilterQueue, each as a batch of one."""

    def __init__(self, table: Table, careful: SlowPath, counters: WorkerCounters) -> None:
        self.reader = BatchReader(0, table, careful, counters)  # type: ignore[arg-type] # as much of a Reader as it uses

    def handle(self, packet: QueuedPacket) -> None:
        datagram = message(packet.get_payload(), index=packet.indev, mark_=packet.mark, hook=packet.hook)
        given = bytes(self.reader.answer(bytearray(datagram.ljust(SLOT)), [(len(datagram),)]))
        while given:
            verdict, id_, mark_ = struct.unpack_from(">II4xI", given, 24)
            assert id_ == 7
            packet.set_mark(mark_)
            (packet.accept if verdict else packet.drop)()
            given = given[40:]


Worker = Callable[..., tuple[SlowPath | Batched, WorkerCounters]]


def worker(
    lookup: Callable[[int, bytes], LookupResult | None], answers: Answers | None = None
) -> tuple[SlowPath, WorkerCounters]:
    """A slow path over a lookup function, and its counters."""
    counters = WorkerCounters(WorkerCounters.create())
    resetter: Resetter = answers or Answers()  # type: ignore[assignment] # only `send` is used
    asked: Callable[[int, bytes], None] = getattr(answers, "asked", lambda index, address: None)
    return SlowPath(lookup, lambda: None, counters, resetter, asked), counters


def batched(
    lookup: Callable[[int, bytes], LookupResult | None], answers: Answers | None = None
) -> tuple[Batched, WorkerCounters]:
    """A batch reader over a lookup function, and its counters."""
    careful, counters = worker(lookup, answers)
    return Batched(Table(lookup), careful, counters), counters


@pytest.fixture(params=[worker, batched], ids=["single", "batch"])
def make(request: pytest.FixtureRequest) -> Worker:
    """Makes a worker over a lookup function, with each of the two readers."""
    found: Worker = request.param
    return found


def finding(reason: Reason, *, observed: bool = False, reject: bool = False) -> LookupResult:
    """A lookup result of generation 8192, whose epoch is 1."""
    return LookupResult(reason, observed, reject, 8192)


@pytest.mark.parametrize("reason", Reason)
def test_the_class_follows_from_the_reason(reason: Reason) -> None:
    expected = mark.Class.ALLOW if reason.allows else mark.Class.DENY
    if reason is Reason.DENIED_UNKNOWN_SOURCE:
        expected = mark.Class.UNKNOWN
    assert classify(finding(reason))[0] is expected


@pytest.mark.parametrize("reason", [reason for reason in Reason if not reason.allows])
def test_what_is_observed_passes_and_is_counted_as_would_deny(reason: Reason) -> None:
    assert classify(finding(reason, observed=True, reject=True)) == (mark.Class.OBSERVED, PacketOutcome.OBSERVED)


def test_an_unknown_source_is_never_answered() -> None:
    assert classify(finding(Reason.DENIED_UNKNOWN_SOURCE, reject=True))[0] is mark.Class.UNKNOWN


def test_a_verdict_carries_class_and_epoch_and_keeps_other_bits(make: Worker) -> None:
    packet = QueuedPacket(before=0x00AB0000 | mark.MISS)
    found, counters = make(lambda index, source: finding(Reason.ALLOWED_OFFER))
    found.handle(packet)
    assert packet.said == ["accept"], "accepted, so that the kernel reads class and epoch"
    assert packet.mark == 0x00AB0000 | 1 << mark.EPOCH_SHIFT | mark.Class.ALLOW
    assert list(counters.verdicts()) == [(Reason.ALLOWED_OFFER, PacketOutcome.PASSED, 1, 1)]


def test_the_lookup_is_by_interface_and_source(make: Worker) -> None:
    asked = []
    found, _ = make(lambda index, source: asked.append((index, source)))
    found.handle(QueuedPacket())
    assert asked == [(3, b"\x0a\0\0\x04")]


UDP_25 = bytes(IP() / UDP(dport=25))
# Whole marks of packets without a verdict: a miss, a miss that passes without a verdict, and a miss with other
# programs' bits.
QUESTIONS = [mark.MISS, mark.MISS_OPEN, 0x00AB0000 | mark.MISS]


@pytest.mark.parametrize("before", QUESTIONS)
@pytest.mark.parametrize(("payload", "event"), [(SYN, WorkerEvent.NO_SEGMENT), (UDP_25, WorkerEvent.MALFORMED)])
def test_what_has_no_verdict_goes_back_to_be_counted_and_dropped(
    make: Worker, payload: bytes, event: WorkerEvent, before: int
) -> None:
    """The chain `learn` drops packets with the mark of a miss, and counts them for their segment."""
    packet = QueuedPacket(payload, before)
    found, counters = make(lambda index, source: None)
    found.handle(packet)
    assert (packet.said, packet.mark) == (["accept"], (before & mark.KEEP) | mark.MISS)
    assert counters.events()[event] == 1


@pytest.mark.parametrize(("payload", "event"), [(SYN, WorkerEvent.NO_SEGMENT), (UDP_25, WorkerEvent.MALFORMED)])
def test_what_was_counted_as_rejected_and_has_no_verdict_now_is_not_counted_again(
    make: Worker, payload: bytes, event: WorkerEvent
) -> None:
    packet = QueuedPacket(payload, mark.AGAIN)
    found, counters = make(lambda index, source: None)
    found.handle(packet)
    assert packet.said == ["drop"]
    assert counters.events()[event] == 1


def test_a_failing_table_drops_and_is_logged_once(make: Worker, caplog: pytest.LogCaptureFixture) -> None:
    def broken(index: int, source: bytes) -> LookupResult:
        raise RuntimeError("the table is gone")

    found, counters = make(broken)
    packets = [QueuedPacket() for _ in range(3)]
    for packet in packets:
        found.handle(packet)
    assert [packet.said for packet in packets] == [["drop"]] * 3
    assert counters.events()[WorkerEvent.ERROR] == 3
    assert len(caplog.records) == 1


def test_a_reset_goes_to_the_sender_on_its_own_interface(make: Worker) -> None:
    answers = Answers()
    found, _ = make(lambda index, source: finding(Reason.DENIED_REVOKED, reject=True), answers)
    packet = QueuedPacket()
    found.handle(packet)
    assert answers.to == [(3, b"\x02\0\0\0\0\x01")]
    assert answers.tags == [b""]
    assert packet.mark & mark.CLASS == mark.Class.REFUSED


@pytest.mark.parametrize("tag", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("asks", [mark.MISS, mark.AGAIN], ids=["first", "again"])
def test_a_reset_to_a_bridged_frame_goes_out_of_its_port_with_its_tag(tag: bytes, asks: int) -> None:
    answers, asked = Answers(), list[int]()

    def lookup(index: int, source: bytes) -> LookupResult:
        asked.append(index)
        return finding(Reason.DENIED_REVOKED, reject=True)

    found, counters = batched(lookup, answers)
    datagram = bridged(SYN, tag=tag, mark_=asks)
    found.reader.answer(bytearray(datagram.ljust(SLOT)), [(len(datagram),)])
    assert (answers.to, answers.tags) == ([(3, b"\x02\0\0\0\0\x01")], [tag])
    assert set(asked) == {3}
    assert list(counters.verdicts()) == [(Reason.DENIED_REVOKED, PacketOutcome.RESET, 1, 1)]


def test_a_bridged_frame_in_forward_is_looked_up_by_its_port() -> None:
    """A kernel without br_netfilter names the port as the incoming interface, and no bridge."""
    found, counters = batched(lambda index, source: finding(Reason.ALLOWED_OFFER) if index == 3 else None)
    for names, expected in (({"port": 3, "bridge": BRIDGE}, 1), ({"port": None, "bridge": 3}, 1),
                            ({"port": None, "bridge": 0}, 0)):  # fmt: skip
        datagram = bridged(SYN, **names, hook=FORWARD)
        given = found.reader.answer(bytearray(datagram.ljust(SLOT)), [(len(datagram),)])
        assert struct.unpack_from(">I", given, 24) == (expected,)
    assert counters.events()[WorkerEvent.NO_SEGMENT] == 1


def test_a_reset_that_cannot_be_sent_is_counted_and_the_packet_still_refused(make: Worker) -> None:
    found, counters = make(lambda index, source: finding(Reason.DENIED_REVOKED, reject=True), Answers(sent=False))
    packet = QueuedPacket()
    found.handle(packet)
    assert packet.mark & mark.CLASS == mark.Class.REFUSED
    assert counters.events()[WorkerEvent.RESET_FAILED] == 1


def test_a_reset_of_a_rejected_source_is_dropped_and_is_no_reset_that_failed(make: Worker) -> None:
    """A reset gets no reset (RFC 9293, 3.10.7.1), so none is sent, and none is taken from the budget."""
    answers = Answers()
    found, counters = make(lambda index, source: finding(Reason.DENIED_REVOKED, reject=True), answers)
    for _ in range(FIRST_RESETS_PER_SECOND + 1):
        packet = QueuedPacket(RST)
        found.handle(packet)
        assert packet.mark & mark.CLASS == mark.Class.REFUSED
    assert not answers.to
    assert counters.events()[WorkerEvent.RESET_FAILED] == 0
    assert [outcome for _, outcome, _, _ in counters.verdicts()] == [PacketOutcome.DROPPED]


def test_a_source_whose_entry_is_damaged_is_denied_and_counted_each_time(make: Worker) -> None:
    """The kernel caches the denial, so that not every packet of such a source goes to a worker."""
    damaged = finding(Reason.DENIED_UNKNOWN_SOURCE, reject=True)._replace(damaged=True)
    packet = QueuedPacket()
    found, counters = make(lambda index, source: damaged)
    found.handle(packet)
    assert packet.said == ["accept"]
    assert packet.mark & mark.CLASS == mark.Class.UNKNOWN
    assert counters.events()[WorkerEvent.DAMAGED] == 1
    assert list(counters.verdicts()) == [(Reason.DENIED_UNKNOWN_SOURCE, PacketOutcome.DROPPED, 1, 1)]


# Some of these, set by other programs, look like portward's own marks in prerouting.
MARKS = [0, 0x4000, mark.MISS, mark.MISS_OPEN, mark.PROBE, mark.PASSED, 0x00AB0009]


@pytest.mark.parametrize("before", MARKS)
@pytest.mark.parametrize(
    ("found", "said"),
    [
        (LookupResult(Reason.ALLOWED_OFFER, False, False, 8192), "accept"),
        (LookupResult(Reason.DENIED_REVOKED, True, False, 8192), "accept"),
        (LookupResult(Reason.DENIED_REVOKED, False, False, 8192), "drop"),
        (LookupResult(Reason.DENIED_REVOKED, False, True, 8192), "drop"),
        (LookupResult(Reason.DENIED_UNKNOWN_SOURCE, False, False, 8192), "drop"),
        (LookupResult(Reason.ALLOWED_EXEMPT, False, False, 8192, limited=True), "drop"),
    ],
    ids=["allowed", "observed", "denied", "refused", "unknown", "limited"],
)
def test_in_forward_a_worker_accepts_or_drops_and_leaves_the_mark(
    make: Worker, found: LookupResult, said: str, before: int
) -> None:
    """In `forward` the mark belongs to other programs, no chain caches a verdict from it, and a reset would have
    the wrong source address."""
    answers, packet = Answers(), QueuedPacket(before=before, hook=FORWARD)
    worker_, _ = make(lambda index, source: found, answers)
    # The message template that the batch reader takes from a packet in prerouting must not match one in forward.
    worker_.handle(QueuedPacket(before=mark.MISS))
    before_that = len(answers.to), len(answers.sources)
    worker_.handle(packet)
    assert (packet.said, packet.mark) == ([said], before)
    assert len(answers.to) == before_that[0], "no reset"
    assert answers.sources[before_that[1] :] == [(3, b"\x0a\0\0\x04")], "the daemon is asked to cache it"


@pytest.mark.parametrize(("payload", "event"), [(SYN, WorkerEvent.NO_SEGMENT), (b"x" * 40, WorkerEvent.MALFORMED)])
def test_in_forward_what_cannot_be_looked_up_is_dropped(make: Worker, payload: bytes, event: WorkerEvent) -> None:
    packet = QueuedPacket(payload, hook=FORWARD)
    found, counters = make(lambda index, source: None)
    found.handle(packet)
    assert packet.said == ["drop"]
    assert counters.events()[event] == 1


def test_a_rejected_source_that_sends_again_is_answered_and_not_cached_again(make: Worker) -> None:
    """The kernel has counted the packet already. Caching the source once more would count it twice."""
    answers = Answers()
    found, counters = make(lambda index, source: finding(Reason.DENIED_REVOKED, reject=True), answers)
    packet = QueuedPacket(before=mark.AGAIN)
    found.handle(packet)
    assert (packet.said, answers.to) == (["drop"], [(3, b"\x02\0\0\0\0\x01")])
    assert list(counters.verdicts()) == [(Reason.DENIED_REVOKED, PacketOutcome.RESET, 1, 1)]


def test_a_packet_that_was_counted_as_rejected_never_passes(make: Worker) -> None:
    """This holds even if the policy has changed since, and the kernel is about to forget the source."""
    answers = Answers()
    found, counters = make(lambda index, source: finding(Reason.ALLOWED_OFFER), answers)
    packet = QueuedPacket(before=mark.AGAIN)
    found.handle(packet)
    assert (packet.said, answers.to, list(counters.verdicts())) == (["drop"], [], [])


class NeighbourPacket(QueuedPacket):
    """A packet of another segment."""

    indev = 4


def test_a_flood_of_new_rejected_sources_is_answered_within_the_budget_of_its_segment(
    make: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them are cached as rejected."""
    now = [1_000.0]
    monkeypatch.setattr("portward.worker.reset.time.monotonic", lambda: now[0])
    answers = Answers()
    found, counters = make(lambda index, source: finding(Reason.DENIED_REVOKED, reject=True), answers)

    def flood(kind: type[QueuedPacket], number: int) -> int:
        before = len(answers.to)
        for _ in range(number):
            packet = kind(before=mark.MISS)
            found.handle(packet)
            assert (packet.said, packet.mark & mark.CLASS) == (["accept"], mark.Class.REFUSED)
        return len(answers.to) - before

    assert flood(QueuedPacket, FIRST_RESETS_PER_SECOND + 100) == FIRST_RESETS_PER_SECOND
    assert flood(NeighbourPacket, 20) == 20
    again = QueuedPacket(before=mark.AGAIN)
    found.handle(again)
    assert (again.said, len(answers.to)) == (["drop"], FIRST_RESETS_PER_SECOND + 21), (
        "the kernel has a budget for these"
    )
    now[0] += 1
    assert flood(QueuedPacket, 20) == 20
    assert {outcome: packets for _, outcome, packets, _ in counters.verdicts()} == {
        PacketOutcome.RESET: FIRST_RESETS_PER_SECOND + 41,
        PacketOutcome.DROPPED: 100,
    }


def test_a_source_whose_limit_is_to_come_goes_back_to_be_counted_and_dropped(make: Worker) -> None:
    answers = Answers()
    found, counters = make(lambda index, source: finding(Reason.ALLOWED_EXEMPT)._replace(limited=True), answers)
    packet = QueuedPacket(before=mark.MISS)
    found.handle(packet)
    assert (packet.said, packet.mark & mark.CLASS) == (["accept"], mark.Class.ANSWER)
    assert packet.mark != mark.MISS, "an epoch says that a worker has seen it"
    assert answers.sources == [(3, b"\x0a\0\0\x04")]
    assert list(counters.verdicts()) == [(Reason.ALLOWED_EXEMPT, PacketOutcome.DEFERRED, 1, 1)]
