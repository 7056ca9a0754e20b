"""A gateway with interface groups, on a fake kernel: one policy behind many interfaces that come and go, and sums
by group."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace

from portward.cli import status_text
from portward.config.keys import Config, InterfaceGroup, Verdicts
from portward.daemon import metrics, status
from portward.daemon.composition import missing
from portward.dataplane.links import Links
from portward.dataplane.names import MISS_LIMITED_SEGMENTS, VERDICT_SETS
from portward.dataplane.verdict_cache import Source
from portward.ipc.mark import Class
from portward.policy import presets
from portward.table.invariants import Walk
from unit.daemon.test_core import MAY, MAY_NOT, Ground, attachment, subscription

LINKS = Links({3: "cali1", 4: "cali2", 5: "eth2", 6: "vni1", 9: "up0"}, frozenset())
GROUPS = (
    InterfaceGroup(name="calico", interfaces=("cali*",)),
    InterfaceGroup(name="acme", interfaces=("eth2", "eth3")),
    InterfaceGroup(name="later", interfaces=("tap*",)),
)
RECORDS = (
    subscription(MAY, "enterprise-agreement"),
    subscription(MAY_NOT, "pay-as-you-go"),
    attachment("calico", "10.0.0.4/32", MAY),
    attachment("acme", "10.0.0.4/32", MAY_NOT),
    attachment("cali1", "10.0.0.9/32", MAY),
    attachment("vni1", "10.0.0.4/32", MAY),
)


def source(link: int, address: str = "10.0.0.4") -> Source:
    """A source behind an interface."""
    return Source(link, ip_address(address).packed)


class GroupGround(Ground):
    """A core with groups."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("unit.daemon.test_core.LINKS", LINKS)
        monkeypatch.setattr("unit.daemon.test_core.RECORDS", RECORDS)
        super().__init__(folder, monkeypatch)
        self.core.close()
        self.config = Config(
            segments=("vni*",), uplinks=("up0",), groups=GROUPS, store=self.config.store, table=self.config.table
        )
        self.core = self.made()

    def answer(self, found: Source) -> str | None:
        """The reason that a worker finds for a source; None if it knows no segment."""
        result = self.core._writer.reader().lookup(found.link, found.address)
        return None if result is None else result.reason.value

    def allows(self, found: Source) -> bool:
        """Whether a worker finds that a source may send."""
        return (self.answer(found) or "").startswith("allowed-")

    def allow(self, *sources: Source) -> None:
        """The kernel caches that these sources may send."""
        for one in sources:
            self.kernel.learn(VERDICT_SETS[Class.ALLOW] + one.family, one.key)

    def reload(self, **fields: Any) -> None:
        """Puts a configuration in force with these keys."""
        alone = Config(segments=("vni*",), uplinks=("up0",), store=self.config.store, table=self.config.table)
        self.config = replace(alone, **fields)
        self.core.intake.reload(self.config, presets.load("azure-2020"))


@pytest.fixture
def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GroupGround]:
    """A gateway that enforces."""
    found = GroupGround(tmp_path, monkeypatch)
    found.start()
    yield found
    found.core.close()


def test_an_address_is_the_same_source_behind_each_interface_of_a_group(ground: GroupGround) -> None:
    assert ground.core.intake.segments() == {3: "calico", 4: "calico", 5: "acme", 6: "vni1"}
    assert ground.core.intake.by_segment() == {"calico": (3, 4), "acme": (5,), "later": (), "vni1": (6,)}
    assert [ground.allows(source(link)) for link in (3, 4, 5, 6)] == [True, True, False, True]
    assert ground.answer(source(9)) is None


def test_an_attachment_to_an_interface_of_a_group_counts_for_nothing(ground: GroupGround) -> None:
    assert ground.answer(source(3, "10.0.0.9")) == "denied-unknown-source"


def test_a_revocation_forgets_the_source_behind_each_interface(ground: GroupGround) -> None:
    ground.allow(source(3), source(4), source(6))
    ground.put(attachment("calico", "10.0.0.4/32", MAY_NOT))
    assert ground.core.intake.sync()
    assert ground.cached().keys() == {source(6)}
    assert ground.in_step()


def test_a_revocation_reaches_an_interface_that_came_after_the_start(ground: GroupGround) -> None:
    ground.core.intake.links_changed(LINKS._replace(names={**LINKS.names, 7: "cali3"}), 1)
    assert ground.allows(source(7))
    ground.allow(source(3), source(7))
    ground.put(attachment("calico", "10.0.0.0/24", MAY_NOT), attachment("calico", "10.0.0.4/32", MAY_NOT))
    assert ground.core.intake.sync()
    assert ground.cached() == {}


MOVES = {
    "gone": ({4: "cali2"}, {3}, {source(4)}),
    "renamed within its group": ({3: "cali7", 4: "cali2"}, {3}, {source(4)}),
    "to another group": ({3: "eth3", 4: "cali2"}, {3}, {source(4)}),
    "to a segment": ({3: "vni7", 4: "cali2"}, {3}, {source(4)}),
    "to no segment": ({3: "wan0", 4: "cali2"}, {3}, {source(4)}),
    "made anew with its index": ({3: "cali1", 4: "cali2"}, {3}, {source(4)}),
    "another one more": ({3: "cali1", 4: "cali2", 7: "cali3"}, set(), {source(3), source(4)}),
}


@pytest.mark.parametrize("name", MOVES)
def test_an_interface_takes_its_cached_verdicts_with_it_and_no_others(ground: GroupGround, name: str) -> None:
    names, touched, left = MOVES[name]
    ground.allow(source(3), source(4))
    ground.core.intake.links_changed(Links({**names, 5: "eth2", 6: "vni1", 9: "up0"}, frozenset(touched)), 1)
    assert ground.cached().keys() == left
    assert ground.in_step()


def test_a_reload_that_makes_an_interface_part_of_a_group_forgets_what_is_cached_behind_it(
    ground: GroupGround,
) -> None:
    ground.reload(segments=("vni*", "cali*"))
    ground.allow(source(3), source(6))
    assert ground.answer(source(3)) == "denied-unknown-source", "its own segment has another source"
    ground.reload(groups=GROUPS)
    assert ground.allows(source(3))
    assert ground.cached().keys() == {source(6)}


def test_a_group_that_is_observed_is_so_behind_each_interface(ground: GroupGround) -> None:
    ground.reload(groups=GROUPS, verdicts=Verdicts(observe=("acme",)))
    links = ground.core._writer.reader().links()
    assert {index: link.observed for index, link in links.items()} == {3: False, 4: False, 5: True, 6: False}


def test_a_group_without_an_interface_is_named_at_the_start() -> None:
    config = Config(segments=("vni*",), uplinks=("up0",), groups=GROUPS)
    assert missing(config, LINKS) == ["groups: no interface of group 'later' (tap*) is there now"]


# --- counts ---


def test_packets_over_a_miss_limit_are_counted_by_the_group(ground: GroupGround) -> None:
    for link, packets in ((3, 7), (4, 5), (6, 2)):
        ground.kernel.learn(MISS_LIMITED_SEGMENTS, link.to_bytes(4, "little"), packets)
    assert ground.core.limited() == {"calico": 12, "vni1": 2}
    ground.core.intake.links_changed(Links({4: "cali2", 6: "vni1"}, frozenset({3})), 1)
    assert ground.core.limited() == {"calico": 12, "vni1": 2}, "also those of an interface that is gone"


def test_packets_are_counted_by_the_group(ground: GroupGround) -> None:
    for link, packets in ((3, 7), (4, 5), (6, 2)):
        ground.kernel.learn("allow4", source(link).key, packets)
    ground.core.count(1.0)
    sums = ground.core.counting.counts
    assert dict(sums.segments) == {("calico", "allow"): 12, ("vni1", "allow"): 2}
    assert dict(sums.subscriptions) == {(str(MAY), "allow"): 14}


def reading(ground: GroupGround) -> metrics.Reading:
    """The sources of metrics and status."""
    none = cast("Any", None)
    return metrics.Reading(ground.core, (), none, none, none)


def number(ground: GroupGround, name: str) -> Any:
    """The value of a metric."""
    [metric] = [one for one in metrics.METRICS if one.family.name == name]
    return metric.read(reading(ground))


def test_a_group_is_one_segment_and_has_a_number_of_interfaces(ground: GroupGround) -> None:
    assert number(ground, "segments") == 3
    assert number(ground, "group_interfaces") == {("calico",): 2, ("acme",): 1, ("later",): 0}


def test_the_status_has_one_row_for_a_group(ground: GroupGround) -> None:
    ground.kernel.learn("allow4", source(3).key, 7)
    ground.core.count(1.0)
    found = status._traffic(reading(ground), {"screen_packets": {}, "remembered_sources": {}})
    assert [tuple(row.values()) for row in found["segments"]] == [
        ("acme", None, 1, False, 0),
        ("calico", None, 2, False, 7),
        ("later", None, 0, False, 0),
        ("vni1", 6, 1, False, 0),
    ]
    lines = list(status_text._segments(found))
    assert lines[0].startswith("segment   acme (1 interface): no packet")
    assert lines[1] == "segment   calico (2 interfaces): 7 packets to the policy ports"
    assert lines[2] == "segment   later: this group has NO INTERFACE here now"
    assert lines[3].startswith("segment   vni1: no packet")


def test_the_table_stays_whole(ground: GroupGround) -> None:
    ground.core.intake.links_changed(LINKS._replace(names={3: "eth3", 4: "cali2"}, touched=frozenset({3})), 1)
    writer = ground.core._writer
    with writer._environment.begin() as transaction:
        assert list(Walk(transaction, writer._parts, ground.core.clock.now()).findings()) == []
