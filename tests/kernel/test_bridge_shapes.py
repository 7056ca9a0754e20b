"""The places where a hypervisor has its guests' interfaces: taps in a bridge, two bridges in a row, an interface
that moves between a bridge and the routing, and a bridge whose frames are routed on this host."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator
from datetime import date
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet

from kernel.conftest import ALLOWED, DENIED, Gateway, br_netfilter, require_bridges, running_gateway
from kernel.wire import Seen, Sender, link_address, meanwhile, same, seen, segment
from portward.dataplane.names import TABLE, KernelTable
from portward.dataplane.nfnetlink import NfNetlink
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.bridged import BridgedLab
from portward.lab.topology import CONTOSO, FABRIKAM
from portward.model import Attachment, Subscription

MakeGateway = Callable[..., Gateway]
_SETTINGS: dict[str, Any] = {"segments": ["vni*", "tap*"]}
# linux/if_tun.h
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


class Tap:
    """A guest's interface, as a hypervisor opens it: what is written to it comes into the host."""

    def __init__(self, namespace: str, name: str) -> None:
        self.name = name
        with namespaces.inside(namespace):
            self._device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(self._device, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
        namespaces.batch(namespace, [f"link set {name} up"])

    def send(self, frame: Packet) -> None:
        """Sends a frame as the guest does."""
        os.write(self._device, bytes(frame))

    def hears(self, wanted: Callable[[Packet], bool], seconds: float = 20.0) -> bool:
        """Whether such a frame comes to the guest."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if wanted(Ether(os.read(self._device, 65_535))):
                    return True
            except BlockingIOError:
                time.sleep(0.005)  # pause: of a poll
        return False

    def close(self) -> None:
        """Ends the guest: the interface is gone."""
        os.close(self._device)


def attach(gateway: Gateway, interface: str, address: str, offer: str) -> None:
    """Attaches an address behind an interface to a new subscription."""
    id_ = uuid4()
    gateway.agent.apply(
        Subscription(id=id_, name=str(id_)[:8], offer=offer, created=date(2022, 6, 30)),
        Attachment(segment=interface, address=ip_network(address), subscription=id_),
    )


def counted(gateway: Gateway, table: KernelTable, name: str) -> int:
    """The packets of a named counter of a table."""
    with namespaces.inside(gateway.lab.gateway), contextlib.closing(NfNetlink()) as netlink:
        return netlink.of(table).counters(TABLE)[name]


# --- taps ---


def single(lab: BridgedLab, tap: str) -> None:
    """The tap is a port of the bridge that has the uplink."""
    lab.add_port(tap, CONTOSO.vni)


def double(lab: BridgedLab, tap: str) -> None:
    """As Proxmox does it for a guest with a firewall: the tap is in a bridge of its own, and a pair of interfaces
    leads from there to the bridge that has the uplink."""
    namespaces.batch(
        lab.gateway,
        [
            "link add fwbr9 type bridge",
            "link add fwln9 type veth peer name fwpr9",
            f"link set {tap} master fwbr9",
            "link set fwln9 master fwbr9",
            *(f"link set {name} up" for name in ("fwbr9", "fwln9", "fwpr9")),
        ],
    )
    lab.add_port("fwpr9", CONTOSO.vni)


SHAPES = {"single": single, "double": double}


@pytest.fixture(params=SHAPES)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Gateway, Tap]]:
    """A gateway that bridges, with a guest on a tap."""
    with running_gateway(tmp_path, kind="bridged", **_SETTINGS) as gateway:
        guest = Tap(gateway.lab.gateway, "tap9i0")
        try:
            assert isinstance(gateway.lab, BridgedLab)
            SHAPES[request.param](gateway.lab, guest.name)
            yield gateway, guest
        finally:
            guest.close()


def gets_out(gateway: Gateway, guest: Tap, packet: Packet) -> bool:
    """Whether a guest's packet reaches the Internet side. Another one, to another port, follows it again and
    again, until it arrives: a bridge forwards nothing through a port that was added a moment ago."""
    header = Ether(src="02:00:00:00:09:01", dst=link_address(*gateway.lab.hop(CONTOSO)))
    marker = segment("2001:db8:1001::99", port=587)
    is_it, is_marker = same(packet), same(marker)
    with seen(gateway.lab.internet) as view:

        def marked() -> bool:
            guest.send(header / marker)
            return view.first(is_marker, seconds=0.5) is not None

        until(marked, "the packet to port 587")
        guest.send(header / packet)
        guest.send(header / segment("2001:db8:1001::99", port=588))
        found = False

        def either(other: Packet) -> bool:
            nonlocal found
            found = found or is_it(other)
            return TCP in other and other[TCP].dport == 588

        assert view.first(either) is not None, "the last packet did not arrive"
        return found or view.late(is_it, gateway.lab.gateway) is not None


@pytest.mark.parametrize("on", [False, True], ids=["alone", "br_netfilter"])
def test_a_guest_on_a_tap_gets_the_verdict_of_its_tap(site: tuple[Gateway, Tap], on: bool) -> None:
    gateway, guest = site
    br_netfilter(gateway.lab, on=on)
    for family, of in ((4, "10.0.0.{}"), (6, "2001:db8:1001::{}")):
        good, bad = of.format(71), of.format(72)
        attach(gateway, guest.name, good, ALLOWED)
        attach(gateway, guest.name, bad, DENIED)
        before = counted(gateway, KernelTable.BRIDGE, "missed")
        assert gets_out(gateway, guest, segment(good))
        assert not gets_out(gateway, guest, segment(bad))
        assert counted(gateway, KernelTable.BRIDGE, "missed") == before + 2, "each is asked about once"
        assert gets_out(gateway, guest, segment(good)), "by its cached verdict"
        assert not gets_out(gateway, guest, segment(bad)), f"by its cached verdict, {family}"
    for name in ("unknown_interface", "stacked", "missed"):
        assert counted(gateway, KernelTable.INET, name) == 0
    said = gateway.agent.portward("status").stdout
    assert "STACKED" not in said
    assert "OPEN" not in said
    checked = gateway.agent.portward("check")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "WARNING" not in checked.stdout


def test_a_guest_that_is_refused_gets_a_reset(tmp_path: Path) -> None:
    settings: dict[str, Any] = _SETTINGS | {"verdicts": {"refuse_with": "reject"}}
    with (
        running_gateway(tmp_path, kind="bridged", **settings) as gateway,
        contextlib.closing(Tap(gateway.lab.gateway, "tap9i0")) as guest,
    ):
        assert isinstance(gateway.lab, BridgedLab)
        double(gateway.lab, guest.name)
        attach(gateway, guest.name, "10.0.0.73", DENIED)
        assert not gets_out(gateway, guest, segment("10.0.0.73"))
        for sport in (4401, 4402):
            asked = segment("10.0.0.73", sport=sport)
            guest.send(Ether(src="02:00:00:00:09:01", dst=link_address(*gateway.lab.hop(CONTOSO))) / asked)
            assert guest.hears(
                lambda other, asked=asked: TCP in other and other[TCP].ack == asked[TCP].seq + 1  # type: ignore[misc]
            )


def test_a_guest_cannot_send_under_the_address_of_another(site: tuple[Gateway, Tap]) -> None:
    """Both are in one VLAN of one bridge."""
    gateway, guest = site
    attach(gateway, guest.name, "10.0.0.74", ALLOWED)
    assert gets_out(gateway, guest, segment("10.0.0.74"))
    other = Tap(gateway.lab.gateway, "tap10i0")
    try:
        assert isinstance(gateway.lab, BridgedLab)
        gateway.lab.add_port(other.name, CONTOSO.vni)
        assert not gets_out(gateway, other, segment("10.0.0.74"))
        assert gets_out(gateway, guest, segment("10.0.0.74"))
    finally:
        other.close()


# --- between a bridge and the routing ---


@pytest.fixture
def site9(tmp_path: Path) -> Iterator[Gateway]:
    """A gateway that routes, with an empty bridge `br9` that is the tenant's next hop as soon as its interface is
    a port of it."""
    require_bridges()
    with running_gateway(tmp_path, segments=["vni*"]) as gateway:
        lab = gateway.lab.gateway
        address = link_address(lab, FABRIKAM.segment)
        namespaces.batch(lab, [f"link add br9 address {address} type bridge", "link set br9 up"])
        namespaces.sysctl(lab, "net.ipv4.conf.br9.rp_filter=0")
        attach(gateway, FABRIKAM.segment, "10.0.0.81", ALLOWED)
        attach(gateway, FABRIKAM.segment, "10.0.0.82", DENIED)
        yield gateway


def bridge(gateway: Gateway) -> None:
    namespaces.batch(gateway.lab.gateway, [f"link set {FABRIKAM.segment} master br9"])


def unbridge(gateway: Gateway) -> None:
    namespaces.batch(gateway.lab.gateway, [f"link set {FABRIKAM.segment} nomaster"])


def test_an_interface_that_moves_in_and_out_of_a_bridge_is_judged_all_the_time(site9: Gateway) -> None:
    gateway = site9
    flood = Sender(gateway.lab, FABRIKAM)
    leaked: list[Packet] = []

    def denied(other: Packet) -> bool:
        if TCP in other and other[TCP].dport == 25 and other[TCP].sport == 4999:
            leaked.append(other)
        return False

    try:
        with (
            seen(gateway.lab.internet) as view,
            meanwhile(lambda: flood.send(segment("10.0.0.82", "S", sport=4999))),
        ):
            for _ in range(10):
                for move, table in ((bridge, KernelTable.BRIDGE), (unbridge, KernelTable.INET)):
                    move(gateway)
                    until(lambda: gateway.passes(FABRIKAM, "10.0.0.81"), "the allowed source gets out")
                    held = gateway.nft("list", "set", *str(table).split(), "deny4")
                    until(lambda held=held: "10.0.0.82" in held, f"denied by {table}")  # type: ignore[misc]
                    view.first(denied, seconds=0.05)
    finally:
        flood.close()
    assert not leaked


def test_a_frame_that_another_programs_rule_takes_out_of_the_bridge_is_judged_by_the_other_table(
    site9: Gateway,
) -> None:
    """A rule of ebtables in its table `broute` gives a frame of a port to the routing, under the port's name."""
    gateway = site9
    bridge(gateway)
    rule = ["ebtables-legacy", "-t", "broute", "-A", "BROUTING", "-p", "IPv4", "-j", "DROP"]
    try:
        done = namespaces.run(gateway.lab.gateway, rule)
    except FileNotFoundError:
        pytest.skip("no ebtables here")
    if done.returncode:
        pytest.skip(f"no broute here: {done.stderr.strip()}")
    before = counted(gateway, KernelTable.INET, "missed"), counted(gateway, KernelTable.BRIDGE, "missed")
    assert gateway.passes(FABRIKAM, "10.0.0.81")
    assert not gateway.passes(FABRIKAM, "10.0.0.82")
    assert counted(gateway, KernelTable.INET, "missed") == before[0] + 2
    assert counted(gateway, KernelTable.BRIDGE, "missed") == before[1]


def test_no_tunnel_of_the_host_takes_a_packet_of_a_bridged_tenant(site9: Gateway) -> None:
    """The host has an address in the bridge, and tunnels that end on it."""
    gateway = site9
    lab = gateway.lab.gateway
    namespaces.batch(lab, [f"addr flush dev {FABRIKAM.segment}", "addr add 10.0.0.1/24 dev br9"])
    bridge(gateway)
    hidden = segment("10.0.0.4", "R")
    inner = Ether(src="02:00:00:00:00:01", dst=link_address(lab, CONTOSO.segment)) / hidden
    outer = IP(src="10.0.0.4", dst="10.0.0.1") / UDP(sport=33_333, dport=4789)
    before = counted(gateway, KernelTable.BRIDGE, "tunnels")
    with contextlib.closing(Seen(gateway.lab.internet)) as view:
        gateway.senders[FABRIKAM].send(outer / VXLAN(vni=CONTOSO.vni, flags="Instance") / inner)
        until(lambda: counted(gateway, KernelTable.BRIDGE, "tunnels") == before + 1, "dropped and counted")
        assert view.first(same(hidden), seconds=0.3) is None


# --- what check says ---


def test_a_bridge_that_is_a_segment_like_its_port_is_refused(site9: Gateway) -> None:
    """Its packets would be asked about twice."""
    gateway = site9
    bridge(gateway)
    gateway.agent.configure(segments=["vni*", "br9"])
    done = gateway.agent.portward("check")
    assert done.returncode == 1
    assert "br9" in done.stderr
    assert gateway.agent.portward("check", "--without-store").returncode == 0, "no start waits for that"


def test_netfilterqueue_is_refused_with_a_bridged_segment(site9: Gateway) -> None:
    gateway = site9
    bridge(gateway)
    gateway.agent.configure(queue={"reader": "netfilterqueue"})
    done = gateway.agent.portward("check")
    assert done.returncode == 1
    assert "netfilterqueue" in done.stderr
