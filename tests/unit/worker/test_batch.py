"""Batches: the fast path and the slow path give the same verdicts, no view of the table outlives its batch, and
each packet gets a verdict.

`test_slow_path.py` tests all forms of single packets with both readers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from portward.ipc import mark
from portward.ipc.counters import WorkerCounters, WorkerEvent
from portward.ipc.mark import PacketOutcome
from portward.model import Reason
from portward.table.reader import Reader
from portward.table.writer import Writer
from portward.worker import batch
from portward.worker.batch import BatchReader
from portward.worker.messages import MessageTemplate, template_of
from portward.worker.nfqueue import SLOT
from portward.worker.slow_path import SlowPath
from unit.table.test_table import AZURE, ENFORCE, NOW, STORE, attachment, subscription
from unit.worker.test_messages import (
    BETWEEN,
    OTHERS,
    TAGS,
    bridged,
    bridged_attributes,
    message,
    message_of,
)
from unit.worker.test_slow_path import Answers

ALLOWED, DENIED = subscription(1), subscription(2, "pay-as-you-go")
RECORDS = (
    ALLOWED,
    DENIED,
    attachment("10.0.0.0/16", 1),
    attachment("10.0.0.4", 2),
    attachment("2001:db8::/64", 1),
)


class Watched(Reader):
    """A reader that records its lookups, and whether a view is open."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked: list[bytes] = []
        self.views = 0
        self.viewing = False

    @contextmanager
    def view(self) -> Iterator[int]:
        with super().view() as snapshot:
            self.views += 1
            self.viewing = True
            yield snapshot
        self.viewing = False

    def lookup(self, index: int, source: bytes) -> Any:
        self.asked.append(source)
        return super().lookup(index, source)


class Bench:
    """A batch reader over a real table, with segment vni1 behind interface 3."""

    def __init__(self, folder: Path) -> None:
        self.writer = Writer(folder, AZURE, ENFORCE)
        self.writer.replace(RECORDS, revision=1, store=STORE, now=NOW)
        self.writer.put_links({3: ("vni1", False)}, touched=frozenset(), now=NOW)
        opened = self.writer.reader()
        self.reader = Watched(opened._environment, opened._parts)
        self.counters = WorkerCounters(WorkerCounters.create())
        answers: Any = Answers()  # only `send` is used
        self.asked: list[tuple[int, bytes]] = []
        ask = lambda index, address: self.asked.append((index, address))  # noqa: E731 # short
        self.careful = SlowPath(self.reader.lookup, self.reader.head, self.counters, answers, ask)
        self.batch = BatchReader(0, self.reader, self.careful, self.counters)

    def answer(self, *datagrams: bytes) -> list[tuple[int, int, int]]:
        """Verdict, id and mark of each packet of a batch."""
        buffer = bytearray(b"".join(datagram[:SLOT].ljust(SLOT, b"\xee") for datagram in datagrams))
        given_ = self.batch.answer(buffer, [(min(SLOT, len(datagram)),) for datagram in datagrams])
        assert not self.reader.viewing, "no view outlives its batch"
        return [struct.unpack_from(">II4xI", given_, start + 24) for start in range(0, len(given_), 40)]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """See `Bench`."""
    found = Bench(tmp_path / "table")
    yield found
    found.writer.close()


def syn(source: str, flags: str = "S") -> bytes:
    """A segment to port 25."""
    layer = IPv6(src=source, dst="2001:db8:25::25") if ":" in source else IP(src=source, dst="203.0.113.25")
    return bytes(layer / TCP(dport=25, flags=flags))


def classes(answers: Sequence[tuple[int, int, int]]) -> list[mark.Class]:
    """The class of each answer."""
    return [mark.Class(mark_ & mark.CLASS) for _, _, mark_ in answers]


def test_each_packet_of_a_batch_gets_the_verdict_of_its_source(bench: Bench) -> None:
    sources = ["10.0.0.3", "10.0.0.4", "10.0.0.5", "10.1.0.0", "2001:db8::1", "2001:db8:1::"] * 8
    answers = bench.answer(*(message(syn(source), id_=number) for number, source in enumerate(sources)))
    assert [id_ for _, id_, _ in answers] == list(range(len(sources)))
    allow, deny, unknown = mark.Class.ALLOW, mark.Class.DENY, mark.Class.UNKNOWN
    assert classes(answers) == [allow, deny, allow, unknown, allow, unknown] * 8
    assert {mark_ & mark.KEEP for _, _, mark_ in answers} == {0x00AB0000}
    assert bench.reader.views == 1
    assert sum(packets for *_, packets, _ in bench.counters.verdicts()) == len(sources)


def test_a_plain_segment_takes_the_short_way(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the batch reader would be slower than the other one, and all other tests here would still pass."""
    monkeypatch.setattr(bench.careful, "handle", lambda *_: pytest.fail("the careful way"))
    for between in BETWEEN.values():
        assert len(bench.answer(message(syn("10.0.0.4"), between=between), message(syn("2001:db8::1")))) == 2


@pytest.mark.parametrize("tag", TAGS.values(), ids=TAGS)
def test_a_bridged_frame_takes_the_short_way(bench: Bench, monkeypatch: pytest.MonkeyPatch, tag: bytes) -> None:
    monkeypatch.setattr(bench.careful, "handle", lambda *_: pytest.fail("the careful way"))
    allow, deny, unknown = mark.Class.ALLOW, mark.Class.DENY, mark.Class.UNKNOWN
    for between in BETWEEN.values():
        answers = bench.answer(
            *(bridged(syn(source), id_=number, tag=tag, between=between, bridge=60 + number)
              for number, source in enumerate(["10.0.0.4", "2001:db8::1", "10.1.0.0", "10.0.0.5"]))
        )  # fmt: skip
        assert [(verdict, id_) for verdict, id_, _ in answers] == [(1, 0), (1, 1), (1, 2), (1, 3)]
        assert classes(answers) == [deny, allow, unknown, allow]
        assert {mark_ & mark.KEEP for _, _, mark_ in answers} == {0x00AB0000}


def test_a_bridged_frame_gets_the_verdict_of_its_port_and_a_routed_packet_that_of_the_bridge(bench: Bench) -> None:
    """Port and bridge are two segments here, in which a source has two verdicts."""
    bench.writer.put_links({3: ("vni1", False), 50: ("vni2", False)}, touched=frozenset(), now=NOW)
    frame, untagged = bridged(syn("10.0.0.5"), tag=TAGS["802.1Q"]), bridged(syn("10.0.0.5"))
    routed = message(syn("10.0.0.5"), index=50)
    port_too = message_of(2, bridged_attributes(syn("10.0.0.5")))
    back = bridged(syn("10.0.0.5"), port=50, bridge=3)
    allow, unknown = mark.Class.ALLOW, mark.Class.UNKNOWN
    for _ in range(2):
        answers = bench.answer(frame, routed, untagged, port_too, back, frame, routed)
        assert classes(answers) == [allow, unknown, allow, unknown, unknown, allow, unknown]


def test_a_bridged_frame_without_a_port_gets_no_verdict(bench: Bench) -> None:
    """The bridge is a segment here, in which the source is allowed."""
    bench.writer.put_links({50: ("vni1", False)}, touched=frozenset(), now=NOW)
    (answer,) = bench.answer(bridged(syn("10.0.0.5"), port=0))
    assert answer == (1, 7, 0x00AB0000 | mark.MISS), "the chain `learn` drops it"
    assert bench.counters.events()[WorkerEvent.NO_SEGMENT] == 1


def test_a_bridged_frame_with_two_tags_gets_no_verdict(bench: Bench) -> None:
    inner = b"\x45\x00\x08\x00" + syn("10.0.0.5")
    (answer,) = bench.answer(bridged(inner, tag=TAGS["802.1ad"], protocol=0x8100))
    assert answer == (1, 7, 0x00AB0000 | mark.MISS), "the chain `learn` drops it"
    assert bench.counters.events()[WorkerEvent.MALFORMED] == 1


def test_no_template_is_made_twice(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kinds of messages that a host can have in numbers keep their templates."""
    made: list[bytes] = []

    def counted(datagram: bytes) -> MessageTemplate | None:
        made.append(datagram)
        return template_of(datagram)

    monkeypatch.setattr(batch, "template_of", counted)
    address, unverified, cut = BETWEEN["address"], BETWEEN["checksum"], ((13, b"\0\0\5\xdc"),)
    kinds = []
    for between in (address, unverified, (*address, *cut), (*address, *cut, unverified[-1])):
        for source in ("10.0.0.5", "2001:db8::1"):
            tags = TAGS["untagged"], TAGS["802.1Q"], TAGS["802.1ad"]
            kinds += [bridged(syn(source), tag=tag, between=between) for tag in tags]
            kinds.append(message(syn(source), between=between))
    for _ in range(3):
        assert len(bench.answer(*kinds)) == 32
    assert len(made) == 24


def test_a_source_is_looked_up_once_and_so_are_those_around_it(bench: Bench) -> None:
    bench.answer(*(message(syn(f"10.0.0.{number}")) for number in range(5, 60)))
    bench.answer(*(message(syn(f"10.0.9.{number}")) for number in range(60)))
    assert bench.reader.asked == [ip_address("10.0.0.5").packed]


def test_what_is_known_is_bounded_and_is_not_kept_for_ever(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_MAX_RANGES", 3)
    monkeypatch.setattr(batch, "_MAX_MISSES_WHILE_FULL", 2)
    # Four ranges: before the prefix, below the host, the host, and behind it. The cache has room for two of them,
    # and for the empty one.
    low, below, host, behind = "9.0.0.1", "10.0.0.3", "10.0.0.4", "10.0.0.5"
    for source, asked in ((low, 1), (below, 2), (low, 2), (below, 2), (host, 3), (host, 4), (host, 4), (low, 5)):
        bench.answer(message(syn(source)))
        assert len(bench.reader.asked) == asked, f"at {source}"
    assert classes(bench.answer(*(message(syn(source)) for source in (low, below, host, behind)))) == [
        mark.Class.UNKNOWN,
        mark.Class.ALLOW,
        mark.Class.DENY,
        mark.Class.ALLOW,
    ]


def test_a_change_is_seen_by_the_next_batch_and_so_is_its_epoch(bench: Bench) -> None:
    (before,) = bench.answer(message(syn("10.0.0.4")))
    offer = subscription(2)
    committed = bench.writer.apply([offer], [], revision=2, now=NOW)
    (after,) = bench.answer(message(syn("10.0.0.4")))
    assert classes([before, after]) == [mark.Class.DENY, mark.Class.ALLOW]
    assert (after[2] & mark.EPOCH) >> mark.EPOCH_SHIFT == mark.epoch_of(committed.generation)
    assert (before[2] & mark.EPOCH) != (after[2] & mark.EPOCH)


def test_a_batch_is_classified_by_one_policy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change during a batch does not affect its verdicts, so each verdict agrees with its epoch."""
    lookup = bench.reader.lookup

    def changing(index: int, source: bytes) -> Any:
        if not bench.reader.asked:
            bench.writer.apply([subscription(1, "pay-as-you-go"), subscription(2)], [], revision=2, now=NOW)
        return lookup(index, source)

    monkeypatch.setattr(bench.reader, "lookup", changing)
    answers = bench.answer(message(syn("10.0.0.5")), message(syn("10.0.0.4")))
    assert classes(answers) == [mark.Class.ALLOW, mark.Class.DENY]
    assert len({mark_ & mark.EPOCH for _, _, mark_ in answers}) == 1
    assert classes(bench.answer(message(syn("10.0.0.5")), message(syn("10.0.0.4")))) == [
        mark.Class.DENY,
        mark.Class.ALLOW,
    ]


def test_attempts_are_counted_apart(bench: Bench) -> None:
    bench.answer(*(message(syn("10.0.0.5", flags)) for flags in ("S", "A", "SEC", "SA", "R", "SP")))
    assert list(bench.counters.verdicts()) == [(Reason.ALLOWED_OFFER, PacketOutcome.PASSED, 6, 3)]


def test_a_query_of_the_self_check_is_answered_with_the_epoch(bench: Bench) -> None:
    (answer,) = bench.answer(message(syn("127.80.87.25"), mark_=mark.PROBE))
    head = bench.writer.head()
    assert head is not None
    assert answer == (1, 7, mark.stamp(0, mark.Class.ANSWER, mark.epoch_of(head.generation)))
    assert bench.counters.events()[WorkerEvent.PROBED] == 1


def test_without_a_table_each_packet_is_dropped_and_counted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Any:
        raise MemoryError

    monkeypatch.setattr(bench.reader, "_begin", broken)
    answers = bench.answer(*(message(syn("10.0.0.5"), id_=number) for number in range(5)))
    assert [(verdict, id_) for verdict, id_, _ in answers] == [(0, number) for number in range(5)]
    assert bench.counters.events()[WorkerEvent.ERROR] == 5
    assert len(caplog.records) == 1


def test_a_look_up_that_fails_costs_only_its_own_packet(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    lookup = bench.reader.lookup

    def failing(index: int, source: bytes) -> Any:
        if source == ip_address("10.0.0.4").packed:
            raise RuntimeError("this page cannot be read")
        return lookup(index, source)

    monkeypatch.setattr(bench.reader, "lookup", failing)
    bench.careful._lookup = failing
    sources = ["10.0.0.5", "10.0.0.4", "10.0.0.5"]
    answers = bench.answer(*(message(syn(source), id_=number) for number, source in enumerate(sources)))
    assert [(verdict, id_) for verdict, id_, _ in answers] == [(1, 0), (0, 1), (1, 2)]
    assert bench.counters.events()[WorkerEvent.ERROR] == 1


def test_verdicts_are_given_even_if_they_cannot_be_counted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(bench.counters, "add", broken)
    for _ in range(2):
        assert classes(bench.answer(message(syn("10.0.0.5")))) == [mark.Class.ALLOW]
    assert len(caplog.records) == 1


def test_a_refusal_of_the_kernel_stops_nothing_and_is_logged_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    vanished = struct.pack("=IHHIIi", 36, 2, 0, 0, 0, -2) + bytes(16)
    strange = struct.pack("=IHHIIi", 36, 2, 0, 0, 0, -22) + bytes(16)
    assert len(bench.answer(vanished, message(syn("10.0.0.5")), strange, strange, message(syn("10.0.0.5")))) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "the kernel refused a message of the worker: Invalid argument"
    ]


def test_a_message_without_an_id_is_counted_and_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    assert not bench.answer(OTHERS["no packet header"])
    assert bench.counters.events()[WorkerEvent.ERROR] == 1
    assert len(caplog.records) == 1


def test_a_message_that_is_longer_than_its_slot_gets_a_verdict(bench: Bench) -> None:
    long = message(syn("10.0.0.5") + bytes(2 * SLOT))
    assert classes(bench.answer(long)) == [mark.Class.ALLOW]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_batch_gives_each_packet_the_verdict_that_it_would_get_alone(bench: Bench, data: st.DataObject) -> None:
    """The fast path is compared with the slow path, for packets of all kinds, some with a changed byte."""
    sources = [
        "10.0.0.4",
        "10.0.0.5",
        "10.0.255.255",
        "10.1.0.0",
        "9.255.255.255",
        "2001:db8::1",
        "2001:db7::",
        "::a00:4",
    ]
    datagrams = []
    for number in range(data.draw(st.integers(1, 12))):
        payload = syn(data.draw(st.sampled_from(sources)), data.draw(st.sampled_from(["S", "A", "SR"])))
        index = data.draw(st.sampled_from([3, 3, 3, 4]))
        more: dict[str, Any] = {
            "id_": number,
            "mark_": data.draw(st.sampled_from([0x00AB0000 | mark.MISS, mark.MISS_OPEN, mark.PROBE, 0, 5])),
            "between": data.draw(st.sampled_from(list(BETWEEN.values()))),
        }
        frame = bridged_attributes(payload, port=index, bridge=data.draw(st.sampled_from([3, 50])),
                                   tag=data.draw(st.sampled_from(list(TAGS.values()))), **more)  # fmt: skip
        swapped = data.draw(st.permutations(frame))
        whole = [
            message(payload, index=index, **more),
            message_of(7, frame),
            message_of(7, [frame[0], *(one for one in swapped if one is not frame[0])]),
            message_of(10 if len(payload) == 60 else 2, frame),
        ]
        datagram = bytearray(data.draw(st.sampled_from(whole)))
        if data.draw(st.booleans()):
            # A byte behind the header with the id.
            datagram[data.draw(st.integers(32, len(datagram) - 1))] = data.draw(st.integers(0, 255))
        datagrams.append(bytes(datagram))
    together = bench.answer(*datagrams)
    alone = []
    for one in datagrams:
        bench.batch._answer_slowly(bytearray(one))
        said = bench.batch._verdicts.take().tobytes()
        alone += [struct.unpack_from(">II4xI", said, start + 24) for start in range(0, len(said), 40)]
    assert together == alone
