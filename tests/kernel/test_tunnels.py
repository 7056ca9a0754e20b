"""Tunnels that end on the gateway: no tenant can use one to send packets as if from another tenant's segment."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from uuid import uuid4

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrRouting
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from kernel.conftest import ALLOWED, Gateway, running_gateway, source_records
from kernel.wire import Seen, in_fragments, link_address, same, segment
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM, Tenant

# Tenants whose tunnel runs over IPv6, and on another UDP port.
SIX, ELSEWHERE = Tenant("six", 2006), Tenant("elsewhere", 2007)
ODD_PORT = 7777
FROM4, FROM6 = "10.0.0.4", FABRIKAM.address6
UNDER4, UNDER6 = "192.0.2.1", "2001:db8:ffff::1"
# Protocols that carry packets: IPv4, IPv6, GRE, EtherIP, IPComp, L2TP, MPLS.
PROTOCOLS = (4, 41, 47, 97, 108, 115, 137)


@pytest.fixture(scope="module", params=[True, False], ids=["conntrack", "no-conntrack"])
def neighbours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with more segments, each with an allowed source. It is tested with and without connection
    tracking, which reassembles fragments before the ruleset sees them."""
    with running_gateway(tmp_path_factory.mktemp("gateway")) as gateway:
        if not request.param:
            namespaces.run(gateway.lab.gateway, ["nft", "delete", "table", "inet", "lab"])
        _more_segments(gateway)
        yield gateway


def _more_segments(gateway: Gateway) -> None:
    lab = gateway.lab.gateway
    namespaces.batch(
        lab,
        [
            f"link add {SIX.segment} type vxlan id {SIX.vni} local {UNDER6} remote {UNDER6}99 dstport 4789",
            f"link add {ELSEWHERE.segment} type vxlan id {ELSEWHERE.vni} remote 192.0.2.99 dstport {ODD_PORT}",
            f"link set {SIX.segment} up",
            f"link set {ELSEWHERE.segment} up",
        ],
    )
    for tenant in (SIX, ELSEWHERE):
        gateway.agent.apply(*source_records(tenant, "10.0.0.4", ALLOWED, uuid4()))
        until(lambda name=tenant.segment: f"{name}:" in gateway.agent.portward("status").stdout, "followed")  # type: ignore[misc]


def counted(gateway: Gateway) -> int:
    """Packets from segments to tunnels, as the ruleset has counted them."""
    listing = namespaces.run(gateway.lab.gateway, ["nft", "list", "counter", "inet", "portward", "tunnels"]).stdout
    found = re.search(r"packets (\d+)", listing)
    assert found is not None, listing
    return int(found[1])


def inside(gateway: Gateway, neighbour: Tenant) -> Packet:
    """A packet to port 25 in a frame to the gateway's interface in the neighbour's segment."""
    frame = Ether(src="02:00:00:00:00:01", dst=link_address(gateway.lab.gateway, neighbour.segment))
    return frame / segment("10.0.0.4", "R")


def vxlan(neighbour: Tenant, frame: Packet, port: int = 4789) -> Packet:
    """A VXLAN packet, from its UDP header on, that carries the frame into the neighbour's segment."""
    return UDP(sport=33333, dport=port) / VXLAN(vni=neighbour.vni, flags="Instance") / frame


def comes_out(gateway: Gateway, send: Callable[[], None], packet: Packet) -> bool:
    """Calls `send`; gives whether the packet reaches the Internet side. An allowed packet is sent last. When it
    arrives, all packets before it have been forwarded or dropped."""
    is_it, last = same(packet), segment("10.0.0.4", "R")
    is_last = same(last)
    with closing(Seen(gateway.lab.internet)) as view:
        send()
        gateway.senders[CONTOSO].send(last)
        found = False

        def either(other: Packet) -> bool:
            nonlocal found
            found = found or is_it(other)
            return is_last(other)

        assert view.first(either) is not None, "the packet that may pass did not arrive"
        # The first packet of a neighbour waits for a worker.
        return found or view.late(is_it, gateway.lab.gateway) is not None


def underlay(gateway: Gateway, *packets: Packet) -> None:
    """Sends from the host under FABRIKAM's machine, where tunnels to the gateway begin."""
    home = gateway.lab.home(FABRIKAM)
    gateway_end = link_address(gateway.lab.gateway, f"host{FABRIKAM.vni}")
    with namespaces.inside(home):
        out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    with closing(out):
        out.bind(("host0", 0))
        for packet in packets:
            out.send(bytes(Ether(src=link_address(home, "host0"), dst=gateway_end) / packet))


def tenant(gateway: Gateway, *packets: Packet) -> None:
    """Sends from the blocked tenant's machine."""
    for packet in packets:
        gateway.senders[FABRIKAM].send(packet)


def outer4(payload: Packet, to: str = UNDER4) -> Packet:
    return IP(src=FROM4, dst=to) / payload


def outer6(payload: Packet, to: str = UNDER6) -> Packet:
    return IPv6(src=FROM6, dst=to) / payload


OUTERS: dict[str, tuple[Tenant, Callable[[Packet], list[Packet]]]] = {
    "v4": (CONTOSO, lambda frame: [outer4(vxlan(CONTOSO, frame))]),
    "v4-fragments": (CONTOSO, lambda frame: in_fragments(outer4(vxlan(CONTOSO, frame)), 32)),
    "v4-fragments-last-first": (CONTOSO, lambda frame: in_fragments(outer4(vxlan(CONTOSO, frame)), 32)[::-1]),
    "v4-options": (CONTOSO, lambda frame: [IP(src=FROM4, dst=UNDER4, options=b"\1" * 8) / vxlan(CONTOSO, frame)]),
    "v4-odd-port": (ELSEWHERE, lambda frame: [outer4(vxlan(ELSEWHERE, frame, ODD_PORT))]),
    "v6": (SIX, lambda frame: [outer6(vxlan(SIX, frame))]),
    "v6-options": (SIX, lambda frame: [outer6(IPv6ExtHdrDestOpt() / vxlan(SIX, frame))]),
    "v6-fragments": (SIX, lambda frame: fragments6(vxlan(SIX, frame))),
    "v6-fragments-last-first": (SIX, lambda frame: fragments6(vxlan(SIX, frame))[::-1]),
    "v6-one-fragment": (SIX, lambda frame: [outer6(IPv6ExtHdrFragment(id=9) / vxlan(SIX, frame))]),
    "v6-options-in-fragments": (SIX, lambda frame: fragments6(IPv6ExtHdrDestOpt() / vxlan(SIX, frame))),
    "v6-fragment-without-ports": (SIX, lambda frame: without_ports(vxlan(SIX, frame))),
    "v6-empty-routing": (
        SIX,
        lambda frame: [outer6(IPv6ExtHdrRouting(type=1, segleft=0, addresses=[UNDER6]) / vxlan(SIX, frame))],
    ),
}  # fmt: skip


def fragments6(payload: Packet) -> list[Packet]:
    """The payload in fragments about as small as IPv6 allows."""
    whole = outer6(IPv6ExtHdrFragment(id=next(_IDS)) / payload)
    return [IPv6(bytes(part)) for part in in_fragments(whole, 96)]


def without_ports(payload: Packet) -> list[Packet]:
    """Two fragments, the first of which ends behind an option, before the UDP header."""
    rest = bytes(IPv6ExtHdrDestOpt(nh=17) / Raw(bytes(outer6(payload))[40:]))
    id_ = next(_IDS)
    return [
        outer6(IPv6ExtHdrFragment(id=id_, nh=60, offset=0, m=1) / Raw(rest[:8])),
        outer6(IPv6ExtHdrFragment(id=id_, nh=60, offset=1, m=0) / Raw(rest[8:])),
    ]


_IDS = iter(range(100, 100_000))


@pytest.mark.parametrize("how", OUTERS)
def test_a_tenant_cannot_send_as_its_neighbour(neighbours: Gateway, how: str) -> None:
    victim, build = OUTERS[how]
    frame = inside(neighbours, victim)
    before = counted(neighbours)
    assert not comes_out(neighbours, lambda: tenant(neighbours, *build(frame)), frame)
    if how != "v6-fragment-without-ports":  # newer kernels drop it before it reaches the ruleset
        assert counted(neighbours) > before


@pytest.mark.parametrize("how", [how for how in OUTERS if how not in ("v6-fragment-without-ports",)])
def test_the_same_from_the_underlay_comes_out(neighbours: Gateway, how: str) -> None:
    """The packets of the test above are valid for the tunnel: from the underlay, which portward does not filter,
    they come out."""
    victim, build = OUTERS[how]
    frame = inside(neighbours, victim)
    assert comes_out(neighbours, lambda: underlay(neighbours, *build(frame)), frame)


@pytest.mark.parametrize(
    "to",
    [
        UNDER4,
        "192.0.2.5",
        "10.0.0.1",
        "198.51.100.1",
        CONTOSO.public,
        "10.0.0.255",
        "255.255.255.255",
        "224.0.0.1",
    ],
)
def test_no_address_of_the_gateway_takes_a_tunnel_from_a_segment(neighbours: Gateway, to: str) -> None:
    frame = inside(neighbours, CONTOSO)
    before = counted(neighbours)
    sent = [outer4(vxlan(CONTOSO, frame), to)]
    assert not comes_out(neighbours, lambda: tenant(neighbours, *sent), frame)
    # A VXLAN with a `local` address ignores packets to another address. The counter shows that the rule dropped
    # it.
    assert counted(neighbours) > before


@pytest.mark.parametrize("family", [4, 6])
def test_every_protocol_that_carries_packets_is_dropped(neighbours: Gateway, family: int) -> None:
    for number in PROTOCOLS:
        before = counted(neighbours)
        packet = IP(src=FROM4, dst=UNDER4, proto=number) if family == 4 else IPv6(src=FROM6, dst=UNDER6, nh=number)
        tenant(neighbours, packet / Raw(bytes(64)))
        until(lambda: counted(neighbours) == before + 1, f"protocol {number} counted")  # noqa: B023


def test_the_metrics_count_them(neighbours: Gateway) -> None:
    tenant(neighbours, outer4(vxlan(CONTOSO, inside(neighbours, CONTOSO))))
    until(
        lambda: float(neighbours.agent.metrics()['portward_screen_packets_total{rule="tunnels"}']) > 0, "counted"
    )
    until(
        lambda: "from segments to tunnels that end here: dropped" in neighbours.agent.portward("status").stdout,
        "status says so",
    )


@pytest.mark.parametrize(("family", "address"), [(4, "10.0.0.1"), (6, "2001:db8:1002::1")])
@pytest.mark.parametrize("length", [10, 3000], ids=["whole", "in fragments"])
def test_other_packets_to_the_gateway_pass(neighbours: Gateway, family: int, address: str, length: int) -> None:
    """Tenants' requests to the gateway itself, such as DNS, are not tunnel packets."""
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    before = counted(neighbours)
    with namespaces.inside(neighbours.lab.gateway):
        server = socket.socket(kind, socket.SOCK_DGRAM)
    with namespaces.inside(neighbours.lab.home(FABRIKAM)):
        client = socket.socket(kind, socket.SOCK_DGRAM)
    with server, client:
        server.bind((address, 53))
        server.settimeout(30)
        client.sendto(bytes(length), (address, 53))
        assert len(server.recv(4000)) == length
    assert counted(neighbours) == before


@pytest.mark.parametrize("encrypted", ["pass", "drop"])
def test_encrypted_tunnels_are_the_configurations_matter(
    make_gateway: Callable[..., Gateway], encrypted: str
) -> None:
    gateway = make_gateway(tunnels={"encrypted": encrypted, "ports": [5000]})
    for number, packet in enumerate(
        (
            IP(src=FROM4, dst=UNDER4, proto=50) / Raw(bytes(64)),
            IP(src=FROM4, dst=UNDER4, proto=51) / Raw(bytes(64)),
            IPv6(src=FROM6, dst=UNDER6, nh=50) / Raw(bytes(64)),
            IP(src=FROM4, dst=UNDER4) / UDP(sport=1, dport=4500) / Raw(bytes(64)),
        )
    ):
        tenant(gateway, packet)
        tenant(
            gateway, outer4(UDP(sport=1, dport=5000))
        )  # dropped by its port, so its count shows that both have been handled
        each = 1 if encrypted == "pass" else 2
        until(lambda: counted(gateway) >= (number + 1) * each, "counted")  # noqa: B023
        assert counted(gateway) == (number + 1) * each


def test_an_observed_segment_is_refused_nothing(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(mode="observe")
    frame = inside(gateway, CONTOSO)
    assert comes_out(gateway, lambda: tenant(gateway, outer4(vxlan(CONTOSO, frame))), frame)
    assert counted(gateway) == 1


def test_a_tunnel_that_comes_later_is_closed(gateway: Gateway) -> None:
    namespaces.batch(
        gateway.lab.gateway,
        ["link add vni2008 type vxlan id 2008 remote 192.0.2.98 dstport 7788", "link set vni2008 up"],
    )
    try:
        until(lambda: "7788" in listed(gateway), "the port in the ruleset")
    finally:
        namespaces.batch(gateway.lab.gateway, ["link del vni2008"])
    until(lambda: "7788" not in listed(gateway), "the port is gone from the ruleset")


def listed(gateway: Gateway) -> str:
    """The chain that has the tunnels' ports, as nft lists it."""
    argv = ["nft", "list", "chain", "inet", "portward", "from_segment"]
    return namespaces.run(gateway.lab.gateway, argv).stdout
