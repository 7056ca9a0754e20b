"""Frames through a gateway that bridges: with a VLAN tag, of other kinds than IP packets, and while portward's
table changes. The modules with a fixture `lab_kind` test the behaviour that a bridge and a router share."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import LLC, SNAP, Dot1AD, Dot1Q, Dot3, Ether
from scapy.layers.ppp import PPP, PPPoE
from scapy.packet import Packet, Raw

from kernel.conftest import ALLOWED, DENIED, Gateway, br_netfilter
from kernel.wire import seen, segment
from portward.base import resources
from portward.dataplane.names import KernelTable
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.bridged import TRUNK
from portward.lab.topology import CONTOSO, FABRIKAM, MAIL4, MAIL6, Tenant

MakeGateway = Callable[..., Gateway]
_tokens = (f"token-{number:06}".encode() for number in itertools.count())


@pytest.fixture(scope="module")
def lab_kind() -> str:
    """All gateways of this module bridge."""
    return "bridged"


def carried(gateway: Gateway, tenant: Tenant, frame: Packet, token: bytes) -> bool:
    """Sends a frame from a tenant's machine; gives whether the token in it arrives at the router. An untagged
    packet to another port follows it."""
    marker = segment(tenant.address6, port=587)
    with seen(gateway.lab.router, TRUNK) as view:
        gateway.senders[tenant].send_frame(frame)
        gateway.senders[tenant].send(marker)
        found = False

        def either(other: Packet) -> bool:
            nonlocal found
            found = found or token in bytes(other)
            return TCP in other and other[TCP].seq == marker[TCP].seq

        assert view.first(either) is not None, "the packet to port 587 did not arrive"
        return found or view.late(lambda other: token in bytes(other), gateway.lab.gateway) is not None


def packet(source: str, token: bytes, flags: str = "S") -> Packet:
    """A packet to port 25 with data."""
    header = IPv6(src=source, dst=MAIL6) if ":" in source else IP(src=source, dst=MAIL4)
    return header / TCP(sport=4000, dport=25, flags=flags, seq=1) / Raw(token)


# --- packets with a tag ---

TAGS: dict[str, Callable[[Tenant], Packet]] = {
    "802.1Q": lambda tenant: Dot1Q(vlan=tenant.vni),
    "802.1ad": lambda tenant: Dot1AD(vlan=tenant.vni),
    "priority": lambda tenant: Dot1Q(vlan=0, prio=5),
}


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("family", [4, 6])
def test_a_packet_behind_one_tag_gets_the_verdict_of_its_source(gateway: Gateway, tag: str, family: int) -> None:
    for tenant, offer in ((CONTOSO, ALLOWED), (FABRIKAM, DENIED)):
        source = "10.0.0.31" if family == 4 else f"2001:db8:{tenant.vni}::31"
        gateway.source(tenant, source, offer)
        for flags in ("S", "PA"):
            token = next(_tokens)
            frame = gateway.senders[tenant].frame / TAGS[tag](tenant) / packet(source, token, flags)
            assert carried(gateway, tenant, frame, token) is (offer == ALLOWED)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("tagged", [False, True], ids=["untagged", "tagged"])
def test_a_reset_reaches_the_tenant_under_its_own_tag(
    make_gateway: MakeGateway, tagged: bool, family: int
) -> None:
    gateway = make_gateway(verdicts={"refuse_with": "reject"})
    source = "10.0.0.32" if family == 4 else "2001:db8:1002::32"
    gateway.source(FABRIKAM, source, DENIED)
    home, heard = gateway.lab.home(FABRIKAM), "eth0"
    if tagged:
        heard = "tagged0"
        namespaces.batch(
            home, [f"link add link eth0 name {heard} type vlan id {FABRIKAM.vni}", f"link set {heard} up"]
        )
    sender = gateway.senders[FABRIKAM]
    for sport in (4301, 4302):  # of a worker, and of a cached verdict
        asked = segment(source, sport=sport)
        with seen(home, heard) as view:
            sender.send_frame(sender.frame / Dot1Q(vlan=FABRIKAM.vni) / asked if tagged else sender.frame / asked)
            reset = view.first(lambda other, sport=sport: TCP in other and other[TCP].dport == sport)  # type: ignore[misc]
        assert reset is not None
        assert (str(reset[TCP].flags), reset[TCP].ack) == ("RA", asked[TCP].seq + 1)
        assert reset[Ether].src == sender.frame.dst, "in the name of the next hop"


# --- frames of other kinds ---


def whole(build: Callable[[Packet], Packet]) -> Callable[[Ether, bytes], Packet]:
    """A frame of `build`, behind the tenant's own header, around a packet of a denied source."""
    return lambda header, token: header / build(packet("10.0.0.4", token))


def changed(at: int, *values: int, six: bool = False) -> Callable[[Ether, bytes], Packet]:
    """A packet with these bytes at this place of its IP header."""

    def build(header: Ether, token: bytes) -> Packet:
        data = bytearray(bytes(packet(FABRIKAM.address6 if six else "10.0.0.4", token)))
        data[at : at + len(values)] = bytes(values)
        return Ether(src=header.src, dst=header.dst, type=0x86DD if six else 0x0800) / Raw(bytes(data))

    return build


UNKNOWN: dict[str, Callable[[Ether, bytes], Packet]] = {
    "802.1Q-in-802.1Q": whole(lambda inner: Dot1Q(vlan=FABRIKAM.vni) / Dot1Q(vlan=8) / inner),
    "802.1Q-in-802.1ad": whole(lambda inner: Dot1AD(vlan=7) / Dot1Q(vlan=8) / inner),
    "pppoe": lambda header, token: (
        Ether(src=header.src, dst=header.dst, type=0x8864) / PPPoE(sessionid=7) / PPP() / packet("10.0.0.4", token)
    ),
    "snap": lambda header, token: (
        Dot3(src=header.src, dst=header.dst) / LLC() / SNAP(code=0x0800) / packet("10.0.0.4", token)
    ),
    "mpls": lambda header, token: (
        Ether(src=header.src, dst=header.dst, type=0x8847) / Raw(b"\0\1\1\x40" + bytes(packet("10.0.0.4", token)))
    ),
    "another-ethertype": lambda header, token: Ether(src=header.src, dst=header.dst, type=0x88B5) / Raw(token),
    "version": changed(0, 0x65),
    "header-length": changed(0, 0x44),
    "total-length": changed(2, 0x7F, 0xFF),
    "version-6": changed(0, 0x40, six=True),
    "payload-length-6": changed(4, 0x7F, 0xFF, six=True),
    "cut-chain-6": lambda header, token: (
        header / IPv6(src=FABRIKAM.address6, dst=MAIL6) / IPv6ExtHdrDestOpt(nh=60, len=200) / Raw(token)
    ),
}
ADDRESS_FRAMES: dict[str, Callable[[Ether, bytes], Packet]] = {
    "arp": lambda header, token: Ether(src=header.src, dst=header.dst, type=0x0806) / Raw(_arp(1) + token),
    "rarp": lambda header, token: (
        Ether(src=header.src, dst="ff:ff:ff:ff:ff:ff", type=0x8035) / Raw(_arp(3) + token)
    ),
}


def _arp(operation: int) -> bytes:
    return bytes((0, 1, 8, 0, 6, 4, 0, operation)) + bytes(20)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_no_rule_can_look_into_is_dropped_and_counted(gateway: Gateway, kind: str) -> None:
    token, before = next(_tokens), gateway.counted("unknown_frames")
    assert not carried(gateway, FABRIKAM, UNKNOWN[kind](gateway.senders[FABRIKAM].frame, token), token)
    assert gateway.counted("unknown_frames") == before + 1
    name = 'portward_screen_packets_total{rule="unknown_frames"}'
    until(lambda: gateway.agent.metrics()[name] == before + 1, "the metric agrees with the kernel")


@pytest.mark.parametrize("kind", ADDRESS_FRAMES)
def test_address_resolution_passes(gateway: Gateway, kind: str) -> None:
    token, before = next(_tokens), gateway.counted("unknown_frames")
    assert carried(gateway, FABRIKAM, ADDRESS_FRAMES[kind](gateway.senders[FABRIKAM].frame, token), token)
    assert gateway.counted("unknown_frames") == before


def test_they_pass_where_the_operator_wants_that(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(bridge={"unknown_frames": "pass"})
    for kind, build in UNKNOWN.items():
        token = next(_tokens)
        assert carried(gateway, FABRIKAM, build(gateway.senders[FABRIKAM].frame, token), token), kind
    assert not gateway.passes(FABRIKAM, "10.0.0.4"), "a packet in its right form gets its verdict"
    gateway.agent.configure(bridge={"unknown_frames": "drop"})
    gateway.agent.reload()
    token = next(_tokens)
    frame = UNKNOWN["pppoe"](gateway.senders[FABRIKAM].frame, token)
    assert not carried(gateway, FABRIKAM, frame, token), "a reload changes it"


def test_an_observed_segment_loses_no_frame(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(verdicts={"observe": ["vni1002"]})
    for kind, build in UNKNOWN.items():
        token = next(_tokens)
        assert carried(gateway, FABRIKAM, build(gateway.senders[FABRIKAM].frame, token), token), kind
    token = next(_tokens)
    frame = UNKNOWN["pppoe"](gateway.senders[CONTOSO].frame, token)
    assert not carried(gateway, CONTOSO, frame, token), "the other segment is enforced"


# --- the table itself ---


def test_each_packet_is_asked_about_once(gateway: Gateway) -> None:
    """Also where br_netfilter shows it to the tables of IP, under the bridge's name."""
    for on in (False, True):
        br_netfilter(gateway.lab, on=on)
        for tenant, source, offer in ((CONTOSO, "10.0.0.51", ALLOWED), (FABRIKAM, "10.0.0.52", DENIED)):
            gateway.source(tenant, source, offer)
            before = gateway.counted("missed"), routed(gateway, "missed")
            assert gateway.passes(tenant, source) is (offer == ALLOWED)
            assert (gateway.counted("missed"), routed(gateway, "missed")) == (before[0] + 1, before[1])
            assert gateway.passes(tenant, source) is (offer == ALLOWED), "by its cached verdict"
            assert gateway.counted("missed") == before[0] + 1
    assert routed(gateway, "unknown_interface") == 0


def routed(gateway: Gateway, name: str) -> int:
    """The packets of a named counter of the table `inet`."""
    listing = gateway.nft("--json", "list", "counter", *str(KernelTable.INET).split(), name)
    (found,) = [one["counter"] for one in json.loads(listing)["nftables"] if "counter" in one]
    return int(found["packets"])


def test_verbs_say_what_the_bridges_table_does(gateway: Gateway) -> None:
    gateway.source(FABRIKAM, "10.0.0.61", DENIED)
    assert not gateway.passes(FABRIKAM, "10.0.0.61")
    assert "has cached 'deny'" in gateway.agent.explain(FABRIKAM.segment, "10.0.0.61")["kernel"]
    status = gateway.agent.portward("status")
    assert "STACKED" not in status.stdout
    assert "OPEN" not in status.stdout
    assert json.loads(gateway.agent.portward("status", "--json").stdout)["bridged"] is True  # once: read now
    checked = gateway.agent.portward("check")
    assert (checked.returncode, checked.stderr) == (0, "")
    shown = gateway.agent.portward("rules", "show").stdout
    assert "table inet portward" in shown
    assert "table bridge portward" in shown


@pytest.mark.parametrize(
    "how", ["delete table {}", "flush table {}", "flush chain {} screen", "flush chain {} learn"]
)
def test_what_another_program_takes_away_comes_back(gateway: Gateway, how: str) -> None:
    repairs = gateway.agent.metrics()["portward_ruleset_repairs_total"]
    assert gateway.passes(CONTOSO, "10.0.0.4")
    gateway.nft(how.format(gateway.table))
    until(lambda: gateway.agent.metrics()["portward_ruleset_repairs_total"] > repairs, "repaired")
    assert not gateway.passes(FABRIKAM, "10.0.0.4")
    assert gateway.passes(CONTOSO, "10.0.0.4")


def test_without_an_agent_both_tables_stay(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    gateway.source(CONTOSO, "10.0.0.9", ALLOWED)
    assert gateway.passes(CONTOSO, "10.0.0.4")
    assert not gateway.passes(FABRIKAM, "10.0.0.4")
    gateway.agent.stop(signal.SIGKILL)
    assert gateway.passes(CONTOSO, "10.0.0.4")
    assert not gateway.passes(FABRIKAM, "10.0.0.4")
    assert not gateway.passes(CONTOSO, "10.0.0.9"), "allowed, but no worker can say so"
    gateway.agent.start()
    assert gateway.passes(CONTOSO, "10.0.0.9")


def test_remove_opens_and_baseline_closes_the_bridge(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    gateway.agent.stop()
    done = gateway.agent.portward("rules", "remove", "--force")
    assert done.returncode == 0, done.stderr
    assert "portward" not in gateway.nft("list", "tables")
    assert gateway.passes(FABRIKAM, "10.0.0.4"), "nothing is left"
    done = gateway.agent.portward("rules", "baseline")
    assert done.returncode == 0, done.stderr
    for tenant in (CONTOSO, FABRIKAM):
        assert not gateway.passes(tenant, "10.0.0.4"), "nobody is known before the agent starts"
    gateway.agent.start()
    assert gateway.passes(CONTOSO, "10.0.0.4")
    assert not gateway.passes(FABRIKAM, "10.0.0.4")


def test_the_closed_table_closes_the_bridge(make_gateway: MakeGateway) -> None:
    """It is loaded where no configuration can be read. The agent takes it away."""
    gateway = make_gateway()
    gateway.agent.stop()
    gateway.agent.portward("rules", "remove", "--force")
    closed = namespaces.run(gateway.lab.gateway, ["nft", "-f", str(closed_file())])
    assert closed.returncode == 0, closed.stderr
    for tenant in (CONTOSO, FABRIKAM):
        assert not gateway.passes(tenant, "10.0.0.4")
    gateway.agent.start()
    until(lambda: "portward_closed" not in gateway.nft("list", "tables"), "the agent opens it")
    assert gateway.passes(CONTOSO, "10.0.0.4")


def closed_file() -> Path:
    """The rules that close port 25 in all bridges."""
    return resources.rules("nftables", "closed-bridge.nft")
