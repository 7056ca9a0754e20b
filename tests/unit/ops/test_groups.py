"""Verbs and interface groups: which interfaces are behind a segment, what an operator may name, and how the
answers for several interfaces become one."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, cast

import pytest

from portward.config.keys import Config, InterfaceGroup
from portward.dataplane import rtnetlink, stacking
from portward.dataplane.links import Device
from portward.dataplane.names import KernelTable, Verdict
from portward.dataplane.setdump import SetElement
from portward.dataplane.verdict_cache import Element, Source
from portward.errors import InputError
from portward.ipc.mark import Class
from portward.model import Reason
from portward.ops import host, host_state, sources, top_talkers
from portward.ops.diagnosis import recent_drops
from portward.ops.diagnosis.facts import Kernel, Machine
from portward.ops.segment_interfaces import behind, in_a_group
from unit.ops.test_host import Kernel as LoadedKernel

CONFIG = Config(
    segments=("vni*",),
    uplinks=("up0",),
    groups=(
        InterfaceGroup(name="calico", interfaces=("cali*",)),
        InterfaceGroup(name="acme", interfaces=("eth2", "eth3")),
    ),
)
NAMES = {1: "lo", 3: "cali1", 4: "cali2", 5: "eth2", 6: "vni1", 9: "up0"}
DEVICES = tuple(Device(index, name) for index, name in NAMES.items())
PATH = Path("/etc/portward/portward.toml")


@pytest.fixture(autouse=True)
def _a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with these interfaces."""
    monkeypatch.setattr(rtnetlink, "devices", lambda: DEVICES)
    here = {device.name: device.ifindex for device in DEVICES}
    monkeypatch.setattr(rtnetlink, "index_of", here.get)
    monkeypatch.setattr(sources, "index_of", here.get)


@pytest.mark.parametrize(
    ("segment", "found"),
    [
        ("calico", {"cali1": 3, "cali2": 4}),
        ("acme", {"eth2": 5}),
        ("vni1", {"vni1": 6}),
        ("vni2", {}),
        # The name of an interface of a group, in the place of a segment.
        ("cali1", {}),
    ],
)
def test_the_interfaces_behind_a_segment(segment: str, found: dict[str, int]) -> None:
    assert behind(CONFIG, segment) == found
    assert behind(CONFIG, segment, DEVICES) == found
    assert bool(in_a_group(CONFIG, segment)) is (segment == "cali1")


def test_an_operator_may_name_the_group_or_an_interface_of_it() -> None:
    address = ip_address("10.0.0.4")
    assert sources.source(CONFIG, PATH, "calico", "10.0.0.4") == ("calico", address, "")
    assert sources.source(CONFIG, PATH, "vni1", "10.0.0.4") == ("vni1", address, "")
    found = sources.source(CONFIG, PATH, "cali7", "10.0.0.4")
    assert found == ("calico", address, "cali7")
    assert found.remark().startswith("cali7 belongs to group calico: ")
    with pytest.raises(
        InputError, match=r"'kalico' is not a segment of .*: vni\*, group calico \(cali\*\), group"
    ):
        sources.source(CONFIG, PATH, "kalico", "10.0.0.4")
    with pytest.raises(InputError, match="the segment comes before it"):
        sources.source(CONFIG, PATH, "10.0.0.4", "calico")


def test_a_record_must_name_the_group() -> None:
    sources.require_segment(CONFIG, "calico")
    sources.require_segment(CONFIG, "vni1")
    sources.require_segment(CONFIG, "elsewhere")
    with pytest.raises(InputError, match="segment cali7: this interface belongs to group calico here"):
        sources.require_segment(CONFIG, "cali7")


# --- what the kernel has ---


class Cache:
    """A kernel that has cached verdicts: name of the set → keys → packets."""

    def __init__(self, found: dict[str, dict[Source, int]]) -> None:
        self._found = {set_: {source.key: n for source, n in rows.items()} for set_, rows in found.items()}

    def of(self, table: KernelTable) -> Cache:
        """The kernel's table; no interface is the port of a bridge."""
        return self if table is KernelTable.INET else Cache({})

    def sets(self, _: str) -> bool:
        """The ruleset is loaded."""
        return True

    def element(self, _: str, set_: str, key: bytes) -> SetElement | None:
        """The element with this key."""
        rows = self._found.get(set_, {})
        return SetElement(key, rows[key], 30_000) if key in rows else None

    def elements(self, _: str, set_: str) -> list[SetElement]:
        """All elements of a set."""
        return [SetElement(key, packets, 30_000) for key, packets in self._found.get(set_, {}).items()]

    def close(self) -> None:
        """Does nothing."""


def source(link: int, address: str = "10.0.0.4") -> Source:
    """A source behind an interface."""
    return Source(link, ip_address(address).packed)


@pytest.mark.parametrize(
    ("sets", "found"),
    [
        ({}, host_state.CachedState()),
        ({"deny4": {source(4): 5}},
         host_state.CachedState(verdict=Class.DENY, expires=30.0, packets=5, interface="cali2")),
        # A verdict that lets packets pass comes first, wherever it is.
        ({"deny4": {source(3): 5}, "allow4": {source(4): 7}},
         host_state.CachedState(verdict=Class.ALLOW, expires=30.0, packets=7, interface="cali2")),
        ({"allow4": {source(5): 7}}, host_state.CachedState()),
    ],
)  # fmt: skip
def test_what_is_cached_behind_any_interface_of_a_group_is_found(
    monkeypatch: pytest.MonkeyPatch, sets: dict[str, dict[Source, int]], found: host_state.CachedState
) -> None:
    monkeypatch.setattr(host, "NfNetlink", lambda: Cache(sets))
    assert host.cached(behind(CONFIG, "calico"), ip_address("10.0.0.4")) == found


def test_of_one_interface_the_answer_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "NfNetlink", lambda: Cache({"allow4": {source(4): 7}}))
    found = host.cached({"cali2": 4}, ip_address("10.0.0.4"))
    assert found == host_state.CachedState(verdict=Class.ALLOW, expires=30.0, packets=7)
    assert host.cached({}, ip_address("10.0.0.4")) is None


@pytest.mark.parametrize(
    ("opened", "found"),
    [(("cali*", "eth2"), (True, False)), (("cali1", "cali2"), (False, False)), (("c*",), (True, False))],
)
def test_a_group_is_open_if_the_loaded_ruleset_says_it_of_each_interface_that_it_can_have(
    monkeypatch: pytest.MonkeyPatch, opened: tuple[str, ...], found: tuple[bool, bool]
) -> None:
    kernel = LoadedKernel(open_segments=opened, observed_segments=("eth2",))
    monkeypatch.setattr(host, "NfNetlink", lambda: kernel)
    assert host._opens(CONFIG, ["calico"]) == found


def test_a_group_of_which_a_device_takes_one_interface_is_unclear() -> None:
    devices = (*DEVICES[:1], Device(3, "cali1", master=7), Device(4, "cali2"), Device(7, "br0", "bridge"))
    seen = host_state.Host()
    found = host.at_interfaces(seen, devices, CONFIG, ["cali1", "cali2"])
    assert found.fate is stacking.Fate.UNCLEAR
    assert [line.partition(":")[0] for line in found.stacked] == [
        "bridge br0 takes the packets of interface cali1 of group calico"
    ]
    assert host.at_interfaces(seen, devices, CONFIG, ["cali2"]) == seen
    assert host.at_interfaces(seen, devices, CONFIG, ["cali1"]).fate is stacking.Fate.STOPPED


def test_many_devices_on_a_group_are_counted() -> None:
    devices = [Device(n, f"cali{n}") for n in range(1, 21)]
    devices += [Device(100 + n, f"mv{n}", "macvlan", lower=n) for n in range(1, 21)]
    found = host.at_interfaces(host_state.Host(), devices, CONFIG, [f"cali{n}" for n in range(1, 21)])
    assert len(found.stacked) == 6
    assert found.stacked[-1] == "and 15 more devices like these"


# --- diagnose and top ---


def machine(address: str, segment: str = "calico") -> Machine:
    """A machine of an account."""
    return Machine(segment, ip_network(address), Reason.DENIED_NOT_EXEMPT)


def test_recent_drops_of_a_machine_are_those_behind_all_interfaces_of_its_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sets = {
        "deny4": {source(3): 5, source(4): 6, source(5): 7, source(6): 8, source(3, "10.0.0.7"): 1},
        "throttled4": {source(4): 2},
    }
    monkeypatch.setattr(recent_drops, "NfNetlink", lambda: Cache(sets))
    machines = [
        machine("10.0.0.4"),
        machine("10.0.0.0/29"),
        machine("10.0.0.4", "vni1"),
        machine("10.0.0.4", "cali1"),
    ]

    def owner(segment: str, address: Any) -> Any:
        return ip_network("10.0.0.4" if str(address) == "10.0.0.4" else "10.0.0.0/29")

    found, kernel = recent_drops.with_drops(
        machines, owner, lambda segment: tuple(behind(CONFIG, segment).values())
    )
    assert kernel is Kernel.ASKED
    drops = [one.drops and (one.drops.refused, one.drops.beyond_limit, one.drops.sources) for one in found]
    assert drops == [(11, 2, 1), (1, 0, 1), (8, 0, 1), None]


def test_an_unknown_source_is_found_behind_any_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_drops, "NfNetlink", lambda: Cache({"unknown4": {source(4): 1}}))
    found, _ = recent_drops.of_unknown_subscription((3, 4), ip_address("10.0.0.4"))
    assert found is not None
    assert found.nobody
    found, _ = recent_drops.of_unknown_subscription((3,), ip_address("10.0.0.4"))
    assert found is not None
    assert not found.nobody
    assert recent_drops.of_unknown_subscription((), ip_address("10.0.0.4")) == (None, Kernel.NO_INTERFACE)


class Owners:
    """A policy table in which interfaces 3 and 4 are a group's."""

    def owner(self, index: int, _: bytes) -> Any:
        """The segment behind an interface; no entry covers the source."""
        name = {3: "calico", 4: "calico", 6: "vni1"}.get(index)
        return None if name is None else (Named(name), None)


class Named:
    """A link of the table."""

    def __init__(self, name: str) -> None:
        self.name = name


def test_top_has_one_row_for_a_source_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[list[tuple[Verdict, Source, int]]] = [
        [(Class.ALLOW, source(3), 10), (Class.ALLOW, source(4), 20), (Class.DENY, source(4), 1),
         (Class.ALLOW, source(6), 5)],
        [(Class.ALLOW, source(3), 12), (Class.ALLOW, source(4), 26), (Class.DENY, source(4), 1),
         (Class.ALLOW, source(6), 5)],
    ]  # fmt: skip
    found = object.__new__(top_talkers.TopTalkers)
    found._reader, found._before, found._at = cast("Any", Owners()), {}, None
    found._tables = [cast("Any", None)]

    def current(_: object) -> Iterable[Element]:
        return [Element(verdict, one, packets, 30.0) for verdict, one, packets in readings.pop(0)]

    monkeypatch.setattr(top_talkers, "_current", current)
    found.read(100.0)
    rows = found.read(102.0)
    assert [(row.segment, row.source, row.verdict, row.rate, row.packets) for row in rows] == [
        ("calico", "10.0.0.4", "allow", 4.0, 38),
        ("vni1", "10.0.0.4", "allow", 0.0, 5),
        ("calico", "10.0.0.4", "deny", 0.0, 1),
    ]
