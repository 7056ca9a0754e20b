"""Packet accounting adds up the counters of elements. Each packet counts once, whatever is read, deleted or
restarted in between."""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from portward.dataplane.accounting import (
    GRACE_S,
    ExpiringKeys,
    LimitedPackets,
    PacketAccounting,
    SourceOwner,
)
from portward.dataplane.deletions import Deletions
from portward.dataplane.setdump import DeletedElement, SetRow
from portward.dataplane.verdict_cache import Source
from portward.ipc import mark

SOURCE = Source(3, b"\x0a\0\0\x04")
KEY = SOURCE.key


def owner(source: Source) -> SourceOwner | None:
    """The owner of a source: one customer for all sources behind interface 3."""
    return SourceOwner("vni1001", "contoso") if source.link == 3 else None


class World:
    """Packet accounting, and the sets that it reads."""

    def __init__(self) -> None:
        self.deletions = Deletions()
        self.counts = PacketAccounting(owner, self.deletions)
        self.sets: dict[str, list[SetRow]] = {}
        self.meanwhile: Callable[[], None] = lambda: None

    def rows(self, set_: str) -> list[SetRow]:
        """Returns the rows of a set, and then runs what the test wants to happen after the reading."""
        found = list(self.sets.get(set_, []))
        if set_ == "deny4":
            self.meanwhile()
        return found

    def read(self, packets: int | None, now: float, expires: float = 60.0) -> ExpiringKeys | None:
        """A reading in which the customer's element has counted `packets`; None if there is no element."""
        self.sets["deny4"] = [] if packets is None else [(KEY, packets, round(expires * 1000))]
        return self.counts.take_all(self.rows, now, pause=1.0)

    def delete(self, packets: int | None, key: bytes = KEY) -> None:
        """The kernel thread deletes the element."""
        with self.deletions.transaction() as gone:
            gone.append(DeletedElement("deny4", key, packets))

    @property
    def total(self) -> int:
        """The packets counted for the customer."""
        assert self.counts.segments["vni1001", "deny"] == self.counts.subscriptions["contoso", "deny"]
        return self.counts.segments["vni1001", "deny"]


@pytest.fixture
def world() -> World:
    return World()


def test_a_rise_is_added_once(world: World) -> None:
    for packets, now in ((5, 0), (5, 5), (8, 10)):
        world.read(packets, now, expires=60 - now)
    assert world.total == 8


def test_an_element_that_counts_less_is_a_new_one(world: World) -> None:
    world.read(5, 0)
    world.read(2, 5)
    assert world.total == 7


def test_an_element_that_a_reading_gives_twice_is_counted_once(world: World) -> None:
    """A dump goes on by position, so an element that the kernel has moved meanwhile comes again."""
    world.read(5, 0)
    world.sets["deny4"] = [(KEY, 8, 59_000), (KEY, 9, 59_000)]
    world.counts.take_all(world.rows, 1, pause=1.0)
    assert world.total == 9


def test_an_element_that_outlived_its_time_is_a_new_one(world: World) -> None:
    world.read(5, 0, expires=3)
    world.read(9, 10, expires=58)
    assert world.total == 14


def test_what_a_deleted_element_had_counted_is_added_up_to_its_end(world: World) -> None:
    world.read(5, 0)
    world.delete(7)
    world.read(1, 2)
    assert world.total == 8


def test_an_element_that_no_reading_saw_is_counted_when_it_is_deleted(world: World) -> None:
    world.delete(7)
    world.read(None, 1)
    assert world.total == 7


def test_an_element_that_is_deleted_twice_within_a_second_is_counted_twice(world: World) -> None:
    world.read(5, 0)
    world.delete(6)
    world.delete(4)
    world.read(9, 1)
    assert world.total == 6 + 4 + 9


def test_what_is_deleted_during_a_reading_is_counted_once(world: World) -> None:
    """The row may belong to the old element, as here, or to one that was added right after the deletion."""
    world.read(3, 0)
    world.meanwhile = lambda: world.delete(6)
    world.read(5, 1)
    world.meanwhile = lambda: None
    world.read(2, 2)
    assert world.total == 8


def test_a_flush_that_the_kernel_did_not_report_leaves_no_reading_behind(world: World) -> None:
    world.read(5, 0)
    world.delete(None, key=b"")
    world.read(9, 1)
    assert world.total == 14


def test_a_long_reading_that_misses_an_element_does_not_count_it_again(world: World) -> None:
    others = [(Source(3, struct.pack(">I", number)).key, 0, 60_000) for number in range(100)]
    world.sets["deny4"] = [(KEY, 5, 60_000), *others]
    world.counts.take_all(world.rows, 0, 1)
    world.sets["deny4"] = others
    world.counts.take_all(world.rows, 1, 1)
    world.sets["deny4"] = [(KEY, 6, 58_000), *others]
    world.counts.take_all(world.rows, 2, 1)
    assert world.total == 6


def test_what_is_about_to_expire_is_named(world: World) -> None:
    assert world.read(5, 0, expires=2.4) == {"deny4": [KEY]}
    assert world.read(5, 0, expires=2.6) == {}


def test_nothing_is_counted_while_the_kernel_thread_is_at_a_deletion(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portward.dataplane.deletions._TRANSACTION_TIMEOUT_S", 0.01)
    with world.deletions.transaction():
        assert world.read(5, 0) is None
    assert world.read(5, 1) is not None
    assert world.total == 5


def test_a_transaction_that_fails_has_deleted_nothing(world: World) -> None:
    world.read(5, 0)
    with pytest.raises(ZeroDivisionError), world.deletions.transaction() as gone:
        gone.append(DeletedElement("deny4", KEY, 9 // 0))
    world.read(6, 1)
    assert world.total == 6


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=30))
def test_whatever_is_read_and_deleted_each_packet_is_counted_once(steps: list[tuple[int, bool]]) -> None:
    world, packets, total = World(), 0, 0
    for number, (rise, deleted) in enumerate(steps):
        packets, total = packets + rise, total + rise
        if deleted:
            world.delete(packets)
            packets = 0
        world.read(packets, number)
    assert world.total == total


@pytest.mark.parametrize(
    ("set_", "key", "verdict"),
    [
        ("allow4", KEY, "allow"),
        ("observed6", Source(3, bytes(16)).key, "would_deny"),
        ("refused4", KEY, "reject"),
        ("rated4", KEY, "rated"),
        ("throttled4", KEY, "throttled"),
        ("uncached4", KEY + struct.pack("=I", 0xAB000009), "allow"),
        ("uncached6", Source(3, bytes(16)).key + struct.pack("=I", 9 << 3 | mark.Class.ANSWER), "deferred"),
    ],
)
def test_each_set_has_its_verdict(world: World, set_: str, key: bytes, verdict: str) -> None:
    world.sets[set_] = [(key, 4, 60_000)]
    world.read(None, 0)
    assert world.counts.segments == {("vni1001", verdict): 4}
    assert world.counts.subscriptions == {("contoso", verdict): 4}


@pytest.mark.parametrize(
    ("set_", "key", "verdict"),
    [
        ("unknown_segments", b"", "unknown"),
        ("unjudged_drops", b"", "unjudged"),
        ("unjudged_passes", b"", "unjudged_passed"),
        ("uncached_segments", struct.pack("=I", 9 << 3 | mark.Class.DENY), "deny"),
    ],
)
def test_what_is_counted_by_segment_alone_has_no_subscription(
    world: World, set_: str, key: bytes, verdict: str
) -> None:
    world.sets[set_] = [(struct.pack("=I", 3) + key, 4, 60_000)]
    world.read(None, 0)
    assert world.counts.segments == {("vni1001", verdict): 4}
    assert world.counts.subscriptions == {("", verdict): 4}


def test_what_an_interface_sent_that_is_gone_by_now_is_counted_under_its_name() -> None:
    there = [True]
    deletions = Deletions()
    counts = PacketAccounting(lambda source: owner(source) if there[0] else None, deletions)
    counts.take_all(lambda set_: [(KEY, 5, 60_000)] if set_ == "deny4" else [], 0, 1)
    there[0] = False
    with deletions.transaction() as gone:
        gone.append(DeletedElement("deny4", KEY, 7))
    counts.take_all(lambda set_: [], 1, 1)
    assert counts.segments["vni1001", "deny"] == 7


# --- restarts ---


def restarted(world: World, kernel: str = "this") -> World:
    """The accounting of the next agent, on the same elements in the kernel."""
    after = World()
    after.counts.restore(world.counts.saved("this"), kernel, 0)
    return after


def test_after_a_restart_what_was_counted_is_not_counted_again(world: World) -> None:
    world.read(500, 0)
    after = restarted(world)
    after.read(500, 1)
    assert after.total == 500


def test_what_came_while_no_agent_ran_is_counted_once(world: World) -> None:
    world.read(500, 0)
    after = restarted(world)
    after.read(520, 1)
    assert after.total == 520


def test_in_another_kernel_the_elements_are_others(world: World) -> None:
    world.read(500, 0)
    after = restarted(world, kernel="another boot")
    after.read(600, 1)
    assert after.total == 1_100


def test_where_the_ruleset_was_gone_the_elements_are_others(world: World) -> None:
    world.read(500, 0)
    after = restarted(world)
    after.counts.discard_readings()
    after.read(600, 1)
    assert after.total == 1_100


def test_what_is_no_state_of_ours_is_refused(world: World) -> None:
    with pytest.raises(msgspec.MsgspecError):
        world.counts.restore(b"\x93\x01\x02\x03", "this", 0)


# --- what is gone ---


def test_numbers_of_who_is_gone_go_after_the_grace_period(world: World) -> None:
    world.read(5, 0)
    world.counts.prune(GRACE_S - 1, lambda name: False, lambda name: False)
    assert world.total == 5
    world.counts.prune(GRACE_S + 1, lambda name: True, lambda name: False)
    assert dict(world.counts.subscriptions) == {}
    assert world.counts.segments["vni1001", "deny"] == 5, "the interface is still there"
    world.counts.prune(GRACE_S + 1, lambda name: False, lambda name: False)
    assert dict(world.counts.segments) == {}


def test_interfaces_that_are_gone_leave_nothing(world: World) -> None:
    """Each new interface has another index, so old ones would pile up."""
    counts = PacketAccounting(lambda source: SourceOwner("vni1001", "contoso"), world.deletions)
    for index in range(1, 100):
        world.sets["deny4"] = [(Source(index, SOURCE.address).key, 1, 1_000)]
        counts.take_all(world.rows, 2.0 * index, pause=1.0)
    counts.prune(200, lambda name: True, lambda name: True)
    assert list(counts._segment_names) == [99], "of its element something may still be to count"


def test_what_was_deleted_last_is_known_to_the_next_agent(world: World) -> None:
    """It knows the count of the deleted element, and that an element with the same key is a new one."""
    world.read(5, 0)
    world.delete(8)
    world.counts.take_deleted()
    assert world.total == 8
    after = World()
    after.counts.restore(world.counts.saved("this"), "this", 1)
    after.read(6, 1)
    assert after.total == 8 + 6


def test_numbers_of_who_is_there_stay_however_long_nothing_was_counted(world: World) -> None:
    world.read(5, 0)
    world.counts.prune(100 * GRACE_S, lambda name: True, lambda name: True)
    assert world.total == 5


# --- packets over a miss limit ---


def test_packets_over_a_limit_are_summed_by_segment_and_no_sum_falls() -> None:
    limited = LimitedPackets()
    names = {3: "calico", 4: "calico", 5: "vni1"}
    limited.take({3: 7, 4: 5, 5: 2}, names)
    assert limited.segments == {"calico": 12, "vni1": 2}
    limited.take({3: 9, 4: 5, 5: 2}, names)
    assert limited.segments == {"calico": 14, "vni1": 2}
    # The count of one interface has ended, that of another has begun anew, and that of a third with it.
    limited.take({4: 1, 6: 3}, {4: "calico", 6: "calico"})
    assert limited.segments == {"calico": 18}, "a segment without a count is left out, as the kernel leaves it out"


def test_packets_of_an_interface_that_is_gone_stay_with_its_segment() -> None:
    limited = LimitedPackets()
    limited.take({3: 7}, {3: "calico"})
    limited.take({3: 7}, {})
    assert limited.segments == {"calico": 7}
    limited.take({3: 7, 8: 1}, {})
    assert limited.segments == {"calico": 7, "8": 1}, "one that was never known has its index"


def test_an_interface_with_another_owner_counts_for_that_one_from_then_on() -> None:
    limited = LimitedPackets()
    limited.take({3: 7}, {3: "calico"})
    limited.take({3: 9}, {3: "acme"})
    assert limited.segments["acme"] == 2
