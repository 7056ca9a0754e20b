"""The devices that take a segment's packets, found from rtnetlink's attributes."""

from __future__ import annotations

import time

import pytest

from portward.config.keys import Config, InterfaceGroup, Queue, QueueReader, Verdicts
from portward.dataplane.links import Device
from portward.dataplane.stacking import (
    Fate,
    asked_twice,
    below,
    concerning,
    enforced,
    fate,
    known,
    past_bridges,
    ports,
    stacked,
    warnings,
)
from portward.model import Mode

CONFIG = Config(segments=("vni*",), uplinks=("up*",))
VNI = Device(1, "vni1")


def above(*devices: Device, config: Config = CONFIG) -> set[str]:
    """The names of the devices that take the packets of vni1."""
    return {one.device.name for one in stacked(devices, config.segment) if one.segment.name == "vni1"}


@pytest.mark.parametrize("kind", ["bridge", "bond", "team", "openvswitch", "batadv", "hsr"])
def test_the_master_of_a_segment_takes_its_packets(kind: str) -> None:
    assert above(VNI._replace(master=2), Device(2, "top", kind)) == {"top"}


@pytest.mark.parametrize("kind", ["vlan", "macvlan", "macvtap", "ipvlan", "ipvtap", "macsec", "xfrm"])
def test_a_device_on_a_segment_takes_its_packets(kind: str) -> None:
    assert above(VNI, Device(2, "top", kind, lower=1)) == {"top"}


def test_a_vrf_is_none() -> None:
    assert above(VNI._replace(master=2), Device(2, "blue", "vrf")) == set()


def test_one_stands_on_the_other() -> None:
    found = above(
        VNI._replace(master=2), Device(2, "bond0", "bond", master=3), Device(3, "br0", "bridge"),
        Device(4, "br0.7", "vlan", lower=3), Device(5, "other", "bridge"), Device(6, "eth9", master=5),
    )  # fmt: skip
    assert found == {"bond0", "br0", "br0.7"}


def test_a_bridge_in_a_vrf_is_one_and_the_vrf_is_not() -> None:
    assert above(VNI._replace(master=2), Device(2, "br0", "bridge", master=3), Device(3, "blue", "vrf")) == {"br0"}


def test_every_port_of_open_vswitch_is_one() -> None:
    """The flows that choose a packet's port are not visible in rtnetlink."""
    found = above(
        VNI._replace(master=2), Device(2, "ovs-system", "openvswitch"), Device(3, "br-int", "openvswitch")
    )
    assert found == {"ovs-system", "br-int"}


def test_a_device_that_is_a_segment_itself_is_enforced_and_devices_on_it_are_not() -> None:
    config = Config(segments=("vni*", "br0"), uplinks=("up0",))
    devices = (VNI._replace(master=2), Device(2, "br0", "bridge"), Device(3, "mv0", "macvlan", lower=2))
    found = stacked(devices, config.segment)
    assert {one.device.name for one in found} == {"mv0"}
    assert {one.segment.name for one in found} == {"vni1", "br0"}


def test_a_circle_ends() -> None:
    assert above(
        VNI._replace(lower=2), Device(2, "a", "macvlan", lower=1, master=3), Device(3, "b", "bridge")
    ) == {
        "a",
        "b",
    }


def test_of_observed_segments_nothing_is_stopped() -> None:
    found = stacked((VNI, Device(2, "top", "macvlan", lower=1)), CONFIG.segment)
    assert enforced(found, CONFIG) == {2}
    for config in (
        Config(segments=("vni*",), uplinks=("up0",), mode=Mode.OBSERVE),
        Config(segments=("vni*",), uplinks=("up0",), verdicts=Verdicts(observe=("vni1",))),
    ):
        assert enforced(found, config) == frozenset()
        assert "only observed" in warnings((VNI, Device(2, "top", "macvlan", lower=1)), config)[0]


def test_the_warnings_name_both_and_what_to_do() -> None:
    assert warnings((VNI, Device(2, "t\udcff", "macvlan", lower=1)), CONFIG) == [
        r"macvlan t\xff takes the packets of segment vni1: nothing that comes from it may reach a policy port, "
        r"whatever its source is, until vni1 is taken off it or t\xff is one of `segments`"
    ]


def test_an_uplink_above_a_segment_is_said_to_be_one() -> None:
    said = warnings((VNI._replace(master=2), Device(2, "up0", "bridge")), CONFIG)
    assert len(said) == 1
    assert "bridge up0 takes the packets of segment vni1 and is an uplink" in said[0]


@pytest.mark.parametrize("segments", [("vni*",), ("vni*", "br0")], ids=["bridge", "bridge is a segment"])
def test_a_bridge_from_a_segment_to_an_uplink_is_open(segments: tuple[str, ...]) -> None:
    devices = (VNI._replace(master=3), Device(2, "up0", master=3), Device(3, "br0", "bridge"))
    said = warnings(devices, Config(segments=segments, uplinks=("up0",)))
    assert "bridge br0 forwards frames between segment vni1 and uplink up0" in said[0]
    assert "PORT 25 IS OPEN THERE" in said[0]


TOP = Device(2, "top", "bridge")
UNDER = VNI._replace(master=2)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ((VNI,), Fate.FREE),
        ((VNI._replace(master=2), Device(2, "blue", "vrf")), Fate.FREE),
        ((UNDER, TOP), Fate.STOPPED),
        ((UNDER, TOP, Device(3, "top.7", "vlan", lower=2)), Fate.STOPPED),
        ((UNDER, TOP._replace(kind="openvswitch")), Fate.STOPPED),
        # A macvlan takes what is meant for its own address, a VLAN what is tagged, a batadv its own protocol.
        ((VNI, Device(2, "top", "macvlan", lower=1)), Fate.UNCLEAR),
        ((VNI, Device(2, "top", "vlan", lower=1)), Fate.UNCLEAR),
        ((UNDER, TOP._replace(kind="batadv")), Fate.UNCLEAR),
        # Frames to the uplink never meet the ruleset.
        ((UNDER, TOP, Device(3, "up0", master=2)), Fate.UNCLEAR),
        # Its packets are classified as those of another segment.
        ((UNDER, TOP._replace(name="vni9")), Fate.UNCLEAR),
        ((UNDER, TOP, Device(3, "vni9", "macvlan", lower=2)), Fate.UNCLEAR),
    ],
)
def test_what_becomes_of_a_segments_packets(devices: tuple[Device, ...], expected: Fate) -> None:
    assert fate(devices, CONFIG, "vni1") is expected
    assert bool(concerning(devices, CONFIG, {"vni1"})) is (expected is not Fate.FREE)
    assert expected is Fate.FREE or below(devices, ["vni1"]) == {"vni1"}


def test_packets_of_an_observed_segment_pass_unless_an_enforced_one_shares_the_device() -> None:
    config = Config(segments=("vni*",), uplinks=("up*",), verdicts=Verdicts(observe=("vni1",)))
    assert fate((UNDER, TOP), config, "vni1") is Fate.OBSERVED
    assert fate((UNDER, TOP, Device(3, "vni2", master=2)), config, "vni1") is Fate.STOPPED
    (line,) = concerning((UNDER, TOP, Device(3, "vni2", master=2)), config, {"vni1"})
    assert "nothing that comes from it may reach a policy port, whatever its source is" in line
    assert "only observed: they pass" in concerning((UNDER, TOP), config, {"vni1"})[0]
    everything = Config(segments=("vni*",), uplinks=("up*",), mode=Mode.OBSERVE)
    assert fate((UNDER, TOP, Device(3, "vni2", master=2)), everything, "vni1") is Fate.OBSERVED


def test_where_nothing_stands_on_a_segment_nothing_is_said() -> None:
    devices = (
        VNI,
        Device(2, "up0"),
        Device(3, "br0", "bridge"),
        Device(4, "eth1", master=3),
        Device(5, "v", "vlan", 0, 2),
    )
    assert warnings(devices, CONFIG) == []


@pytest.mark.parametrize("kind", ["bridge", "bond", "team", "batadv", "openvswitch"])
def test_a_device_without_a_port_is_not_known_yet(kind: str) -> None:
    """The first port that it gets may be a segment."""
    top, port = Device(2, "top", kind), Device(3, "eth7", master=2)
    assert known((VNI, top, port._replace(master=0)), CONFIG.segment) == {3}
    assert known((VNI, top, port), CONFIG.segment) == {2, 3}
    assert known((VNI._replace(master=2), top), CONFIG.segment) == {2}, "its packets are stopped, see `enforced`"


def test_what_stands_on_a_device_without_a_port_is_not_known_yet() -> None:
    """An example is a VLAN on a bridge. If the bridge's first port is a segment, the VLAN gets the segment's
    packets."""
    bridge, vlan = Device(2, "br0", "bridge"), Device(3, "br0.10", "vlan", lower=2)
    macvlan, port = Device(4, "top", "macvlan", lower=3), Device(5, "eth7", master=2)
    assert known((macvlan, vlan, bridge), CONFIG.segment) == set()
    assert known((macvlan, vlan, bridge, port), CONFIG.segment) == {2, 3, 4, 5}
    assert known((macvlan, vlan, bridge, VNI._replace(master=2)), CONFIG.segment) == {2, 3, 4}


def test_a_device_whose_ports_all_are_without_a_port_is_not_known_yet() -> None:
    bridge, bond = Device(2, "br0", "bridge"), Device(3, "bond0", "bond", master=2)
    assert known((bridge, bond), CONFIG.segment) == set()
    assert known((bridge, bond, Device(4, "eth7", master=2)), CONFIG.segment) == {2, 4}
    assert known((bridge, bond, Device(4, "eth7", master=3)), CONFIG.segment) == {2, 3, 4}


def test_a_vrf_without_a_port_is_known() -> None:
    assert known((VNI, Device(2, "blue", "vrf")), CONFIG.segment) == {2}


def test_ports_of_open_vswitch_are_known_with_its_first_port() -> None:
    switch = (Device(2, "ovs-system", "openvswitch"), Device(3, "br-int", "openvswitch"))
    assert known((*switch, VNI), CONFIG.segment) == set()
    assert known((*switch, Device(4, "eth7", master=2)), CONFIG.segment) == {2, 3, 4}


def test_the_other_end_of_a_pair_takes_what_the_bridge_of_a_segment_sends_into_one_end() -> None:
    bridge, near = Device(2, "br0", "bridge"), Device(3, "near", "veth", master=2, peer=4)
    far = Device(4, "far", "veth", peer=3)
    found = {one.device.name for one in stacked((VNI._replace(master=2), bridge, near, far), CONFIG.segment)}
    assert found == {"br0", "far"}
    assert stacked((VNI, bridge, near, far), CONFIG.segment) == []
    apart = (VNI._replace(master=2), bridge, near._replace(peer=0), far)
    assert {one.device.name for one in stacked(apart, CONFIG.segment)} == {"br0"}, "in another namespace"


# --- interface groups ---

GROUPED = Config(
    segments=("vni*",),
    uplinks=("up*",),
    groups=(
        InterfaceGroup(name="calico", interfaces=("cali*", "bond0")),
        InterfaceGroup(name="acme", interfaces=("eth2",)),
    ),
)


def test_a_device_above_an_interface_of_a_group_is_named_with_both() -> None:
    devices = (Device(1, "cali1"), Device(2, "mv0", "macvlan", lower=1))
    [line] = warnings(devices, GROUPED)
    assert line.startswith("macvlan mv0 takes the packets of interface cali1 of group calico: nothing that comes")
    assert concerning(devices, GROUPED, {"cali1"}) == [line]
    assert below(devices, ["cali1", "cali2"]) == {"cali1"}
    assert enforced(stacked(devices, GROUPED.segment), GROUPED) == {2}


def test_a_device_of_the_same_group_is_the_same_segment() -> None:
    """Its packets get the verdicts of the group, under its own name."""
    devices = (Device(1, "cali1", master=2), Device(2, "bond0", "bond"))
    assert concerning(devices, GROUPED, {"cali1"}) == []
    assert fate(devices, GROUPED, "cali1") is Fate.FREE
    other = (Device(1, "cali1", master=2), Device(2, "eth2", "bond"))
    assert fate(other, GROUPED, "cali1") is Fate.UNCLEAR
    assert concerning(other, GROUPED, {"cali1"}) == [
        "bond eth2, a segment itself, takes the packets of interface cali1 of group calico: those are classified "
        "as sources of acme"
    ]


def test_an_observed_group_is_observed_at_each_interface() -> None:
    config = Config(segments=(), uplinks=("up*",), groups=GROUPED.groups, verdicts=Verdicts(observe=("calico",)))
    devices = (Device(1, "cali1"), Device(2, "mv0", "macvlan", lower=1))
    assert fate(devices, config, "cali1") is Fate.OBSERVED
    assert enforced(stacked(devices, config.segment), config) == frozenset()


# --- with the table `bridge` ---

# Proxmox: the machine's own bridge, for its firewall, is connected with vmbr0 by a pair.
TAP = Device(1, "tap101i0", master=2)
OWN, INNER = Device(2, "fwbr101i0", "bridge"), Device(3, "fwln101i0", "veth", master=2, peer=4)
OUTER, VMBR = Device(4, "fwpr101p0", "veth", master=5, peer=3), Device(5, "vmbr0", "bridge")
UPLINK, VLAN = Device(6, "eno1", master=5), Device(7, "vmbr0.7", "vlan", lower=5)
PROXMOX = (TAP, OWN, INNER, OUTER, VMBR, UPLINK, VLAN)
TAPS = Config(segments=("tap*",), uplinks=("eno1", "vmbr0"))


def test_a_bridge_takes_nothing_from_its_ports() -> None:
    """Neither do the devices behind it: a frame has its verdict where it came in."""
    assert warnings(PROXMOX, TAPS, bridged=True) == []
    assert concerning(PROXMOX, TAPS, {"tap101i0"}, bridged=True) == []
    assert fate(PROXMOX, TAPS, "tap101i0", bridged=True) is Fate.FREE
    seen = past_bridges(PROXMOX)
    assert stacked(seen, TAPS.segment) == []
    assert known(seen, TAPS.segment) == {2, 3, 4, 5, 6, 7}
    assert known(past_bridges((VMBR,)), TAPS.segment) == {5}, "also a bridge without a port"


@pytest.mark.parametrize("kind", ["bond", "team", "openvswitch", "batadv"])
def test_other_masters_take_the_packets_all_the_same(kind: str) -> None:
    devices = (TAP, OWN._replace(kind=kind))
    assert {one.device.name for one in stacked(past_bridges(devices), TAPS.segment)} == {"fwbr101i0"}
    assert fate(devices, TAPS, "tap101i0", bridged=True) is not Fate.FREE


def test_a_device_on_a_segment_takes_its_packets_although_it_is_a_port() -> None:
    devices = (TAP._replace(master=0), Device(8, "tagged", "vlan", lower=1, master=5), VMBR)
    assert {one.device.name for one in stacked(past_bridges(devices), TAPS.segment)} == {"tagged"}


def test_without_the_table_a_way_by_two_bridges_to_an_uplink_is_open() -> None:
    """As Proxmox has it. A bridge that no pair connects is another matter."""
    said = warnings(PROXMOX, TAPS)
    assert any("bridge fwbr101i0 forwards frames between segment tap101i0 and uplink eno1" in one for one in said)
    apart = (TAP, OWN, INNER._replace(peer=0), OUTER._replace(peer=0), VMBR, UPLINK)
    assert not any("PORT 25 IS OPEN" in one for one in warnings(apart, TAPS))
    assert fate(PROXMOX, TAPS, "tap101i0") is Fate.UNCLEAR


def test_the_ports_are_named_with_their_bridges() -> None:
    other = Device(9, "tap100i0", master=5)
    found = ports((*PROXMOX, other, Device(10, "tap102i0")), TAPS)
    assert [(one.device.name, one.segment.name) for one in found] == [
        ("vmbr0", "tap100i0"),
        ("fwbr101i0", "tap101i0"),
    ]


@pytest.mark.parametrize(
    ("segments", "named"),
    [
        (("tap*", "fwbr*"), "bridge fwbr101i0"),
        (("tap*", "vmbr0"), "bridge vmbr0"),
        (("tap*", "vmbr0.7"), "vlan vmbr0.7"),
        (("tap*", "fwpr*"), "veth fwpr101p0"),
    ],
)
def test_a_packet_that_two_segments_would_judge_is_a_mistake(segments: tuple[str, ...], named: str) -> None:
    config = Config(segments=segments, uplinks=("eno1",))
    (line,) = asked_twice(PROXMOX, config)
    assert line.startswith(f"{named} and tap101i0, whose packets a bridge passes to it, are both segments")
    assert line in warnings(PROXMOX, config, bridged=True)
    assert concerning(PROXMOX, config, {"tap101i0"}, bridged=True) == [line]
    assert fate(PROXMOX, config, "tap101i0", bridged=True) is Fate.UNCLEAR


def test_a_bridge_that_is_a_segment_and_whose_ports_are_not_is_none() -> None:
    config = Config(segments=("vmbr0", "tap200*"), uplinks=("eno1",))
    devices = [device for device in PROXMOX if device is not VLAN]
    assert asked_twice(devices, config) == []
    assert warnings(devices, config, bridged=True) == []
    assert warnings(PROXMOX, config, bridged=True)[0].startswith("vlan vmbr0.7 takes the packets of segment vmbr0")


def test_segments_that_no_bridge_connects_are_no_mistake() -> None:
    """A VLAN on a segment, a segment itself, sends under its own name alone."""
    config = Config(segments=("tap*", "tagged"), uplinks=("eno1",))
    assert asked_twice((TAP, OWN, Device(8, "tagged", "vlan", lower=1)), config) == []


@pytest.mark.parametrize(("observe", "expected"), [((), Fate.STOPPED), (("tap*",), Fate.OBSERVED)])
def test_a_reader_that_gives_no_verdict_to_bridged_frames_is_named(
    observe: tuple[str, ...], expected: Fate
) -> None:
    config = Config(
        segments=("tap*",), uplinks=("eno1",), queue=Queue(reader=QueueReader.NETFILTERQUEUE),
        verdicts=Verdicts(observe=observe),
    )  # fmt: skip
    (line,) = warnings(PROXMOX, config, bridged=True)
    assert line.startswith("segment tap101i0 is a port of bridge fwbr101i0, and queue.reader = ")
    assert concerning(PROXMOX, config, {"tap101i0"}, bridged=True) == [line]
    assert fate(PROXMOX, config, "tap101i0", bridged=True) is expected
    assert warnings((TAP._replace(master=0), UPLINK), config, bridged=True) == []


def test_thousands_of_ports_are_examined_in_no_time() -> None:
    """The time must not grow with the square of their number. Half a minute for 20,000 would."""
    many = [Device(10 * n, f"tap{n}", master=10 * n + 1) for n in range(1, 20_001)]
    many += [Device(10 * n + 1, f"fwbr{n}", "bridge") for n in range(1, 20_001)]
    many += [Device(10 * n + 2, f"fwln{n}", "veth", master=10 * n + 1, peer=10 * n + 3) for n in range(1, 20_001)]
    many += [Device(10 * n + 3, f"fwpr{n}", "veth", master=5, peer=10 * n + 2) for n in range(1, 20_001)]
    began = time.process_time()
    assert warnings((*many, VMBR, UPLINK), TAPS, bridged=True) == []
    assert time.process_time() - began < 5
