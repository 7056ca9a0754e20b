"""Evasion that needs a second party or an event: a peer that connects from port 25, rules and marks of other
programs, settings of the host, an interface that is made again, and a change of policy while packets are on their
way."""

from __future__ import annotations

import itertools
import re
import socket
import struct
import time
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from uuid import uuid4

import pytest
from scapy.layers.inet import IP, TCP, IPOption_LSRR, IPOption_SSRR
from scapy.layers.inet6 import IPv6, IPv6ExtHdrSegmentRouting
from scapy.packet import Packet, Raw

from kernel.conftest import ALLOWED, DENIED, LAB_KINDS, source_records
from kernel.evasion.ground import BANNER, Ground, ground
from kernel.wire import link_address, meanwhile, seen
from portward.ipc.mark import EPOCH_SHIFT, Class
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.bridged import BridgedLab
from portward.lab.topology import CONTOSO, FABRIKAM, MAIL4, MAIL6, Tenant

_MPTCP = 262  # linux/in.h: IPPROTO_MPTCP
_OWN_BITS = 1 << 16
# Seconds that a client waits, by whether it may send: for a greeting that must come, or for one that must not.
_PATIENCE_S = {True: 30.0, False: 0.7}
_NEXT_HOP = "198.51.100.2"  # the Internet side, where the listener is too


def syn(source: str, to: str, flags: str = "S", sport: int = 4000) -> Packet:
    """A packet to port 25."""
    header: Packet = IPv6(src=source, dst=to) if ":" in source else IP(src=source, dst=to)
    return header / TCP(sport=sport, dport=25, flags=flags, seq=1)


# --- peers that connect from port 25 ---


@pytest.mark.parametrize("flags", ["S", "SA", "A", "PA", "F", "R"])
def test_who_answers_a_peer_that_connects_from_port_25_sends_to_port_25(field: Ground, flags: str) -> None:
    """Split handshake and simultaneous open: the peer's SYN comes from port 25, so the answer goes to port 25 and
    needs a verdict."""
    source = field.source(FABRIKAM, 6)
    with namespaces.inside(field.lab.internet):
        peer = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_TCP)
    with peer:
        segment = bytes(IPv6(src=MAIL6, dst=source) / TCP(sport=25, dport=4000, flags="S", seq=9))[40:]
        answered = field.answered(FABRIKAM)
        peer.sendto(segment, (source, 0))
        until(lambda: field.answered(FABRIKAM) > answered, "the peer's packet came in")
    field.send(FABRIKAM, syn(source, MAIL6, flags))
    until(lambda: field.held(FABRIKAM, source) is not None, "it has a verdict")
    field.settled()
    assert field.leaked() == (0, 0)


@pytest.mark.parametrize(("tenant", "greeted"), [(CONTOSO, True), (FABRIKAM, False)], ids=["allowed", "denied"])
def test_a_real_peer_that_connects_from_port_25(field: Ground, tenant: Tenant, greeted: bool) -> None:
    """The tenant's own stack accepts the connection. Its answer to the peer goes to port 25, so it needs a
    verdict."""
    with namespaces.inside(field.lab.home(tenant)):
        server = socket.create_server((tenant.address6, 4001), family=socket.AF_INET6)
    records = source_records(tenant, f"{tenant.address6}/128", ALLOWED if greeted else DENIED, uuid4())
    field.agent.apply(*records)
    with server, namespaces.inside(field.lab.internet):
        peer = socket.socket(socket.AF_INET6)
        with peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            peer.settimeout(_PATIENCE_S[greeted])
            peer.bind(("2001:db8:ffff::2", 25))
            connected = True
            try:
                peer.connect((tenant.address6, 4001))
            except OSError:
                connected = False
    assert connected is greeted


# --- clients as they are written ---


def client(kind: str, source: str, *, greeted: bool) -> socket.socket:
    """A real client's socket."""
    family = socket.AF_INET if ip_address(source).version == 4 else socket.AF_INET6
    found = socket.socket(family, socket.SOCK_STREAM, _MPTCP if kind == "mptcp" else 0)
    found.settimeout(_PATIENCE_S[greeted])
    if kind == "from-port-25":
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind((source, 25 if kind == "from-port-25" else 0))
    return found


@pytest.mark.parametrize("kind", ["plain", "mptcp", "fast-open", "from-port-25"])
@pytest.mark.parametrize(("tenant", "greeting"), [(CONTOSO, BANNER), (FABRIKAM, b"")], ids=["allowed", "denied"])
def test_a_real_client_is_greeted_only_where_it_may_send(
    field: Ground, tenant: Tenant, greeting: bytes, kind: str
) -> None:
    source, found = field.source(tenant, 4), b""
    with namespaces.inside(field.lab.home(tenant)):
        if kind == "fast-open":
            namespaces.sysctl(field.lab.home(tenant), "net.ipv4.tcp_fastopen=5")  # data without a cookie too
        one = client(kind, source, greeted=bool(greeting))
    with one, suppress(OSError):
        if kind == "fast-open":
            one.sendto(b"EHLO spam.example\r\n", socket.MSG_FASTOPEN, (MAIL4, 25))
        else:
            one.connect((MAIL4, 25))
        found = one.recv(100)
    assert found == greeting
    assert field.leaked() == (0, 0)


# --- settings of the host ---


def goes_nowhere(field: Ground, packet: Packet) -> None:
    """Checks that the gateway stops a denied packet that names an internal address first and a route onwards. The
    same packet to another port does go on, which shows that the host follows such routes."""
    before = field.counter("headers")
    field.send(FABRIKAM, packet)
    until(lambda: field.counter("headers") > before, "counted")
    field.settled()
    assert field.leaked() == (0, 0)
    packet[TCP].dport = 587
    with seen(field.lab.internet) as view:

        def arrives() -> bool:
            field.send(FABRIKAM, packet)
            return view.first(lambda other: TCP in other and other[TCP].dport == 587, seconds=1.0) is not None

        # Sent again if it gets lost, for example while the gateway looks up the next hop's link address.
        until(arrives, "the packet to another port")


@pytest.mark.parametrize("option", [IPOption_LSRR, IPOption_SSRR])
def test_a_source_route_by_way_of_an_internal_address_goes_nowhere(field: Ground, option: type[Packet]) -> None:
    """The destination is the router's own internal address. The option names the next hop."""
    namespaces.sysctl(
        field.lab.router,
        "net.ipv4.conf.all.accept_source_route=1",
        *(f"net.ipv4.conf.{tenant.segment}.accept_source_route=1" for tenant in (CONTOSO, FABRIKAM)),
    )
    packet = IP(src=field.source(FABRIKAM, 4), dst="10.0.0.1", options=option(routers=[_NEXT_HOP])) / TCP(
        sport=4000, dport=25
    )
    goes_nowhere(field, packet)


def test_segment_routing_by_way_of_an_internal_address_goes_nowhere(field: Ground) -> None:
    namespaces.sysctl(
        field.lab.router,
        "net.ipv6.conf.all.seg6_enabled=1",
        *(f"net.ipv6.conf.{tenant.segment}.seg6_enabled=1" for tenant in (CONTOSO, FABRIKAM)),
    )
    namespaces.batch(field.lab.router, ["addr replace fd00::1/128 dev lo"])
    packet = (
        IPv6(src=field.source(FABRIKAM, 6), dst="fd00::1")
        / IPv6ExtHdrSegmentRouting(addresses=[MAIL6, "fd00::1"], segleft=1, lastentry=1)
        / TCP(sport=4000, dport=25)
    )
    goes_nowhere(field, packet)


# --- rules and marks of other programs ---


# Sets the bits of the mark that portward uses to another value for each packet. FAMILY is that of portward's
# table.
_MARKING = """table FAMILY foreign
delete table FAMILY foreign
table FAMILY foreign {
  counter left {}
  chain before {
    type filter hook prerouting priority -310
    iifname "vni*" tcp dport 25 meta mark set numgen inc mod 65536
  }
  chain after {
    type filter hook prerouting priority -290
    iifname "vni*" tcp dport 25 meta mark & 0xffff != 0 counter name left
  }
}
"""


@pytest.mark.parametrize("kind", LAB_KINDS)
@pytest.mark.parametrize("to", [MAIL4, "10.9.0.1"], ids=["internet", "internal"])
def test_no_value_that_others_leave_in_our_bits_is_a_verdict(tmp_path: Path, to: str, kind: str) -> None:
    """Tries all 65,536 values, each on a packet of a source without a cached verdict."""
    with ground(tmp_path, conntrack=False, kind=kind) as field:
        namespaces.load(field.lab.gateway, _MARKING.replace("FAMILY", field.family))
        namespaces.batch(field.lab.router, ["route replace 10.9.0.0/16 via 198.51.100.2"])
        counted = "missed" if to == MAIL4 else "internal"
        before = field.counter(counted)
        with namespaces.inside(field.lab.home(FABRIKAM)):
            out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        with out:
            out.bind(("eth0", 0))
            frame = bytes(field.gateway.senders[FABRIKAM].frame / syn("10.2.0.0", to))
            for value in range(_OWN_BITS):
                out.send(with_source_end(frame, value))
                if value % 256 == 255:  # the queue holds 4,096
                    until(lambda value=value: field.counter(counted) - before > value - 1024, "taken in")  # type: ignore[misc]
        until(lambda: field.counter(counted) - before >= _OWN_BITS, "all of them were looked at")
        field.settled()
        # Packets to an internal destination pass. The route above leads them to the listener.
        assert field.leaked() == (0 if to == MAIL4 else _OWN_BITS, 0)
        listing = namespaces.run(
            field.lab.gateway, ["nft", "list", "counter", field.family, "foreign", "left"]
        ).stdout
        assert "packets 0 " in listing, "none left with our bits"
        assert "10.2." not in field.gateway.listing("allow4")


def with_source_end(frame: bytes, value: int) -> bytes:
    """The frame with `value` as the last 16 bits of its IPv4 source, and with the right checksum."""
    header = bytearray(frame[14:34])
    header[10:12], header[14:16] = bytes(2), struct.pack(">H", value)
    total = sum(struct.unpack(">10H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    header[10:12] = struct.pack(">H", ~total & 0xFFFF)
    return frame[:14] + bytes(header) + frame[34:]


def test_a_later_fragment_that_others_have_marked_teaches_nothing(tmp_path: Path) -> None:
    """The data of a later fragment looks like port 25 to nft, both before the queue and behind it. Behind the
    queue a mark counts as a verdict, and the kernel must not cache a forged one."""
    with ground(tmp_path, conntrack=False) as field:
        forged = field.epoch() << EPOCH_SHIFT | Class.ALLOW
        namespaces.load(
            field.lab.gateway,
            f"""table inet foreign {{
              chain before {{
                type filter hook prerouting priority -500
                iifname "vni*" meta mark set {forged:#x} notrack
              }}
            }}""",
        )
        source = field.source(FABRIKAM, 4)
        fragment = IP(src=source, dst=MAIL4, proto=6, frag=100, id=7) / Raw(b"\x0f\xa0\x00\x19 later data")
        with seen(field.lab.internet) as view:
            field.send(FABRIKAM, fragment)
            assert view.first(lambda packet: b"later data" in bytes(packet)) is not None
        assert field.held(FABRIKAM, source) is None
        field.send(FABRIKAM, syn(source, MAIL4))
        until(lambda: field.held(FABRIKAM, source) is not None, "it has a verdict")
        assert field.leaked() == (0, 0)


_OTHERS = {
    "not-tracked": "chain c { type filter hook prerouting priority raw - 10; notrack; }",
    "accepted-before": "chain c { type filter hook prerouting priority raw - 10; accept; }",
    "accepted-between": "chain c { type filter hook prerouting priority raw; accept; }",
    "accepted-behind": "chain c { type filter hook prerouting priority raw + 10; accept; }",
    "accepted-in-forward": "chain c { type filter hook forward priority filter; tcp dport 25 accept; }",
}


@pytest.mark.parametrize("name", _OTHERS)
def test_rules_of_others_let_nothing_out(field: Ground, name: str) -> None:
    rules = _OTHERS[name]
    if field.bridged:
        if "notrack" in rules:
            pytest.skip("a bridge has no such rule")
        rules = re.sub(
            r"raw(?: ([+-]) 10)?", lambda found: str(int(f"{found[1]}10") - 300) if found[1] else "-300", rules
        )
    try:
        namespaces.load(field.lab.gateway, f"table {field.family} others {{\n{rules}\n}}")
        for family, to in ((4, MAIL4), (6, MAIL6)):
            source = field.source(FABRIKAM, family)
            field.send(FABRIKAM, *(syn(source, to, flags) for flags in ("S", "A", "PA")))
            until(lambda source=source: field.held(FABRIKAM, source) is not None, "it has a verdict")  # type: ignore[misc]
            field.settled()
        assert field.leaked() == (0, 0)
    finally:
        namespaces.run(field.lab.gateway, ["nft", "delete", "table", field.family, "others"])


# --- while it happens ---


@pytest.mark.parametrize("kind", LAB_KINDS)
@pytest.mark.parametrize("family", [4, 6])
def test_packets_on_their_way_while_the_policy_changes(tmp_path: Path, family: int, kind: str) -> None:
    """A source sends without a pause while it is allowed and denied in turn. Once a denial is in force, no packet
    of it comes out."""
    with ground(tmp_path, conntrack=False, kind=kind) as field:
        source, id_ = field.source(CONTOSO, family), uuid4()
        to = MAIL4 if family == 4 else MAIL6
        packets = itertools.cycle(
            [syn(source, to, flags, sport=4000 + port) for port in range(8) for flags in "SA"]
        )

        def pour() -> None:
            field.send(CONTOSO, next(packets))
            time.sleep(0.0002)  # pause: the pace of the sender

        with meanwhile(pour):
            for _ in range(3):
                field.agent.apply(*source_records(CONTOSO, source, ALLOWED, id_))
                before = field.allowed()
                until(lambda before=before: field.allowed() > before + 20, "comes out")  # type: ignore[misc]
                field.agent.apply(*source_records(CONTOSO, source, DENIED, id_))
                before = field.quiet()  # packets that had passed the gateway before the denial have arrived
                time.sleep(0.15)  # pause: denied packets are sent
                assert field.allowed() == before


@pytest.mark.parametrize("kind", LAB_KINDS)
def test_an_interface_made_again_with_the_same_index_has_no_cached_verdicts_of_the_tenant_before(
    tmp_path: Path, kind: str
) -> None:
    """An allowed tenant's interface is deleted. Another interface gets its index, with another name."""
    with ground(tmp_path, conntrack=False, kind=kind) as field:
        lab, segment = field.lab, CONTOSO.segment
        source = field.source(CONTOSO, 6)
        before = field.allowed()
        field.send(CONTOSO, syn(source, MAIL6))
        until(lambda: field.allowed() > before, "its allow is cached")
        index = namespaces.run(lab.gateway, ["cat", f"/sys/class/net/{segment}/ifindex"]).stdout.strip()
        # Behind the new name the same address has no attachment, so it is an unknown source.
        namespaces.batch(lab.gateway, [f"link del {segment}"])
        under = "192.0.2.1"
        namespaces.batch(
            lab.gateway,
            [
                f"link add vni1009 index {index} type vxlan id 1001 local {under} remote 192.0.2.2 dstport 4789",
                "link set vni1009 up",
            ],
        )
        frame = field.gateway.senders[CONTOSO].frame
        if isinstance(lab, BridgedLab):
            lab.add_port("vni1009", CONTOSO.vni)
        else:
            frame.dst = link_address(lab.gateway, "vni1009")
        unknown, allowed = field.counter("unknown"), field.allowed()

        def counted() -> bool:
            # Until the agent has seen the new interface its packets are dropped, too, but under other counters.
            field.send(CONTOSO, *(syn(source, MAIL6, flags) for flags in ("S", "A", "PA")))
            return field.counter("unknown") > unknown

        until(counted, "its source is unknown")
        time.sleep(0.2)  # pause: a packet would come out by now
        assert field.allowed() == allowed
