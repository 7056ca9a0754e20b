"""Packets through a real gateway: which sources pass, which do not, and which verdicts the kernel caches."""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from scapy.layers.inet import IP, TCP, UDP, fragment
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    PadN,
)
from scapy.packet import Packet, Raw

from kernel.conftest import ALLOWED, DENIED, LAB_KINDS, Gateway, running_gateway
from kernel.wire import same, seen, segment
from portward.config.keys import QueueReader
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM, MAIL4, MAIL6, Tenant
from portward.model import Mode

FLAGS = ["S", "SA", "A", "", "F", "R", "SF", "SEC", "SPU", "PA", "FPU", "SR", "SFRPAUEC"]


@pytest.fixture(scope="module", params=LAB_KINDS)
def lab_kind(request: pytest.FixtureRequest) -> str:
    """Each test once with a gateway that routes, and once with one that bridges."""
    return str(request.param)


@pytest.fixture(scope="module", params=QueueReader)
def gateway(
    request: pytest.FixtureRequest, lab_kind: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway for the tests of this module that need no settings of their own, once with each reader."""
    with running_gateway(
        tmp_path_factory.mktemp("gateway"), kind=lab_kind, queue={"reader": request.param}
    ) as found:
        yield found


@pytest.mark.parametrize("flags", FLAGS)
def test_no_flags_carry_a_denied_source_through(gateway: Gateway, flags: str) -> None:
    assert not gateway.passes(FABRIKAM, "10.0.0.4", flags)


@pytest.mark.parametrize("flags", FLAGS)
def test_every_flag_of_an_allowed_source_goes_through(gateway: Gateway, flags: str) -> None:
    assert gateway.passes(CONTOSO, "10.0.0.4", flags)


def test_the_same_address_gets_the_verdict_of_its_segment(gateway: Gateway) -> None:
    gateway.source(FABRIKAM, "10.0.0.7", ALLOWED)
    gateway.source(CONTOSO, "10.0.0.7", DENIED)
    assert gateway.passes(FABRIKAM, "10.0.0.7")
    assert not gateway.passes(CONTOSO, "10.0.0.7")


def test_other_ports_are_never_touched(gateway: Gateway) -> None:
    for port in (24, 26, 443, 465, 587):
        assert gateway.passes(FABRIKAM, "10.0.0.4", port=port)


def test_an_unknown_source_is_denied_and_counted(gateway: Gateway) -> None:
    before = gateway.agent.metrics().get('portward_screen_packets_total{rule="unknown"}', 0)
    # No other test of this module attaches these addresses.
    assert not gateway.passes(CONTOSO, "192.168.77.1")
    assert not gateway.passes(CONTOSO, "2001:db8:9999::1")
    until(
        lambda: gateway.agent.metrics()['portward_screen_packets_total{rule="unknown"}'] >= before + 2,
        "two packets of unknown sources counted",
    )


def test_ipv6_sources_get_verdicts_like_ipv4(gateway: Gateway) -> None:
    gateway.source(CONTOSO, "2001:db8:1001::a", ALLOWED)
    gateway.source(CONTOSO, "2001:db8:1001::d", DENIED)
    assert gateway.passes(CONTOSO, "2001:db8:1001::a")
    assert not gateway.passes(CONTOSO, "2001:db8:1001::d")


def test_the_most_specific_prefix_decides(gateway: Gateway) -> None:
    gateway.source(CONTOSO, "10.0.0.64/27", ALLOWED)
    gateway.source(CONTOSO, "10.0.0.70", DENIED)
    gateway.source(CONTOSO, "2001:db8:1001:1::/64", DENIED)
    gateway.source(CONTOSO, "2001:db8:1001:1::7", ALLOWED)
    assert gateway.passes(CONTOSO, "10.0.0.65")
    assert not gateway.passes(CONTOSO, "10.0.0.70")
    assert not gateway.passes(CONTOSO, "2001:db8:1001:1::8")
    assert gateway.passes(CONTOSO, "2001:db8:1001:1::7")


def test_a_prefix_that_changes_is_forgotten_host_by_host(gateway: Gateway) -> None:
    gateway.source(CONTOSO, "10.0.0.96/27", ALLOWED)
    assert gateway.passes(CONTOSO, "10.0.0.97")
    assert gateway.passes(CONTOSO, "10.0.0.98")
    gateway.source(CONTOSO, "10.0.0.96/27", DENIED)
    assert not gateway.passes(CONTOSO, "10.0.0.97")
    gateway.source(CONTOSO, "10.0.0.98", ALLOWED)
    assert gateway.passes(CONTOSO, "10.0.0.98")


def test_internal_destinations_pass_without_a_verdict(gateway: Gateway) -> None:
    namespaces.batch(gateway.lab.router, ["route replace 10.9.0.0/16 via 198.51.100.2"])
    before = gateway.counted("internal")
    assert gateway.passes(FABRIKAM, "10.0.0.4", to="10.9.0.1")
    assert gateway.passes(FABRIKAM, "10.0.0.4", to="10.9.0.1"), "also once the source is known to be denied"
    assert gateway.counted("internal") == before + 2
    until(
        lambda: gateway.agent.metrics()['portward_screen_packets_total{rule="internal"}'] == before + 2,
        "the metric agrees with the kernel",
    )


def test_destinations_beside_the_internal_ones_get_verdicts(gateway: Gateway) -> None:
    """172.32.0.1 has the same first octet as 172.16.0.0/12, but is on the Internet."""
    assert not gateway.passes(FABRIKAM, "10.0.0.4", to="172.32.0.1")
    assert not gateway.passes(FABRIKAM, "10.0.0.4", to="172.32.0.1"), "also once the source is known"
    assert gateway.passes(CONTOSO, "10.0.0.4", to="172.32.0.1")


def headerless_fragments() -> list[Packet]:
    """IPv6 first fragments that end before the TCP header (RFC 7112), from a denied source."""
    source, destination = "2001:db8:1002::bad", MAIL6
    base = IPv6(src=source, dst=destination)
    tcp = TCP(sport=4000, dport=25, flags="S")
    options = IPv6ExtHdrDestOpt(nh=6, options=[PadN(optdata=b"\0" * 4)])
    first = IPv6ExtHdrFragment(nh=60, offset=0, m=1, id=7)
    return [
        base / first / options,
        base / first / Raw(bytes(options)[:4]),
        base / IPv6ExtHdrHopByHop(options=[PadN(optdata=b"\0" * 4)]) / first / options,
        base / IPv6ExtHdrFragment(nh=44, offset=0, m=1, id=8) / IPv6ExtHdrFragment(nh=6, offset=0, m=1, id=9),
        base / IPv6ExtHdrFragment(nh=6, offset=0, m=1, id=10),
        base / IPv6ExtHdrFragment(nh=6, offset=0, m=1, id=11) / Raw(bytes(tcp)[:2]),
    ]


@pytest.mark.parametrize("number", range(6))
def test_a_first_fragment_without_a_tcp_header_goes_no_further(gateway: Gateway, number: int) -> None:
    gateway.source(FABRIKAM, "2001:db8:1002::bad", DENIED)
    marker = segment("2001:db8:1002::bad", port=587)
    with seen(gateway.lab.internet) as view:
        gateway.senders[FABRIKAM].send(headerless_fragments()[number])
        gateway.senders[FABRIKAM].send(marker)
        leaked = []

        def watch(packet: Packet) -> bool:
            if IPv6 in packet and packet[IPv6].nh in (0, 44, 60) and packet[IPv6].src == "2001:db8:1002::bad":
                leaked.append(packet)
            return same(marker)(packet)

        assert view.first(watch) is not None
        assert not leaked


def test_fragments_of_other_protocols_pass(gateway: Gateway) -> None:
    packet = (
        IPv6(src="2001:db8:1002::bad", dst=MAIL6)
        / IPv6ExtHdrFragment(nh=17, offset=0, m=0, id=99)
        / UDP(sport=1, dport=53)
        / Raw(b"q" * 16)
    )
    with seen(gateway.lab.internet) as view:
        gateway.senders[FABRIKAM].send(packet)
        assert view.first(lambda other: IPv6 in other and b"q" * 16 in bytes(other)) is not None


def test_a_later_fragment_of_another_port_passes_whatever_its_data_looks_like(make_gateway) -> None:  # type: ignore[no-untyped-def]
    """A later fragment has no port, so its data must not be read as one. Here the data looks like ports 4000 and
    25."""
    gateway = make_gateway()
    gateway.source(FABRIKAM, "10.0.0.77", DENIED)
    data = b"\x0f\xa0\x00\x19 a later fragment"
    # Connection tracking would hold the fragment until the first one comes.
    namespaces.run(gateway.lab.router, ["nft", "delete", "table", "inet", "lab"])
    with seen(gateway.lab.internet) as view:
        gateway.senders[FABRIKAM].send(IP(src="10.0.0.77", dst=MAIL4, proto=6, frag=3, id=4711) / Raw(data))
        assert view.first(lambda packet: data in bytes(packet)) is not None


def test_ipv4_fragments_carry_nothing_through(gateway: Gateway) -> None:
    whole = segment("10.0.0.4", "PA") / Raw(b"DATA" * 20)
    with seen(gateway.lab.internet) as view:
        for piece in fragment(whole, fragsize=8):  # type: ignore[no-untyped-call] # scapy's
            gateway.senders[FABRIKAM].send(piece)
        marker = segment("10.0.0.4", port=587)
        gateway.senders[FABRIKAM].send(marker)
        payload = []

        def watch(packet: Packet) -> bool:
            if IP in packet and b"DATADATA" in bytes(packet):
                payload.append(packet)
            return same(marker)(packet)

        assert view.first(watch) is not None
        assert not any(TCP in packet and packet[TCP].dport == 25 for packet in payload)


def foreign_marks(gateway: Gateway, mark: int) -> None:
    """Loads another program's chains: one before portward's marks all packets from the segments, and one behind it
    counts those that kept the mark."""
    namespaces.load(
        gateway.lab.gateway,
        f"""table {gateway.family} foreign
        delete table {gateway.family} foreign
        table {gateway.family} foreign {{
          counter kept {{}}
          chain before {{
            type filter hook prerouting priority -310
            iifname "vni*" meta mark set {mark:#x}
          }}
          chain after {{
            type filter hook prerouting priority -290
            iifname "vni*" meta mark {mark & 0xFFFF0000:#x} tcp dport 25 counter name kept
          }}
        }}
        """,
    )


@pytest.mark.parametrize("reader", QueueReader)
@pytest.mark.parametrize("own", [0x0001, 0x0007, 0xFFFC, 0xFFFF, 0x0006])
def test_marks_of_others_are_kept_and_never_obeyed(make_gateway, own: int, reader: QueueReader) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(queue={"reader": reader})
    epoch = gateway.listing("epoch").split("elements = { ")[1].split(" ")[0]
    foreign_marks(gateway, 0x00AB0000 | (own if own > 0xF000 else own | int(epoch, 16)))
    assert not gateway.passes(FABRIKAM, "10.0.0.4")
    assert not gateway.passes(FABRIKAM, "10.0.0.4"), "by its cached verdict"
    assert not gateway.passes(FABRIKAM, "10.0.0.99"), "an unknown source"
    assert gateway.passes(CONTOSO, "10.0.0.4")
    assert gateway.passes(CONTOSO, "10.0.0.4"), "by its cached verdict"
    listing = gateway.nft("list", "counter", gateway.family, "foreign", "kept")
    assert "packets 2 " in listing, "both packets left with the others' bits, and with none of ours"


def test_a_marked_packet_to_an_internal_destination_teaches_nothing(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway()
    namespaces.batch(gateway.lab.router, ["route replace 10.9.0.0/16 via 198.51.100.2"])
    foreign_marks(gateway, 0x00000001)
    assert gateway.passes(FABRIKAM, "10.0.0.4", to="10.9.0.1")
    assert not gateway.passes(FABRIKAM, "10.0.0.4")


@pytest.mark.parametrize("source", ["10.0.0.61", "2001:db8:1002::61"])
def test_port_25_of_another_protocol_passes_also_for_a_source_with_a_cached_deny(
    gateway: Gateway, source: str
) -> None:
    gateway.source(FABRIKAM, source, DENIED)
    assert not gateway.passes(FABRIKAM, source)
    assert "has cached 'deny'" in gateway.agent.explain(FABRIKAM.segment, source)["kernel"]
    before = denied(gateway, source)
    header = IPv6(src=source, dst=MAIL6) if ":" in source else IP(src=source, dst=MAIL4)
    with seen(gateway.lab.internet) as view:
        gateway.senders[FABRIKAM].send(header / UDP(sport=4000, dport=25) / Raw(b"not mail"))
        assert view.first(lambda packet: UDP in packet and packet[UDP].dport == 25) is not None
    # For IPv6 the ruleset tests the protocol after the set of denied sources, and that set counts each match.
    assert denied(gateway, source) == before + (":" in source)
    assert not gateway.passes(FABRIKAM, source)


def test_where_the_way_to_the_queue_is_gone_nothing_opens(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway()
    process = gateway.agent.process
    process.send_signal(signal.SIGSTOP)  # otherwise the agent would restore the rule within milliseconds
    try:
        namespaces.load(gateway.lab.gateway, f"flush chain {gateway.table} to_workers")
        assert not gateway.passes(FABRIKAM, "10.0.0.4")
        assert not gateway.passes(CONTOSO, "10.0.0.4"), "its packets get no verdict"
    finally:
        process.send_signal(signal.SIGCONT)
    name = 'portward_screen_packets_total{rule="unjudged"}'
    until(lambda: gateway.agent.metrics()[name] == 2, "both packets counted as unjudged")
    until(lambda: gateway.passes(CONTOSO, "10.0.0.4"), "the way to the queue is back")


def test_a_rule_of_others_in_the_raw_table_takes_nothing_past_the_queue(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway()
    namespaces.run(gateway.lab.gateway, ["iptables", "-t", "raw", "-I", "PREROUTING", "1", "-j", "ACCEPT"])
    assert not gateway.passes(FABRIKAM, "10.0.0.4")
    assert gateway.passes(CONTOSO, "10.0.0.4")


@pytest.mark.parametrize("reader", QueueReader)
def test_a_reset_reaches_the_right_tenant(make_gateway, reader: QueueReader) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(verdicts={"refuse_with": "reject"}, queue={"reader": reader})
    gateway.source(CONTOSO, "10.0.0.8", DENIED)
    gateway.source(FABRIKAM, "10.0.0.8", DENIED)
    for tenant, other in ((CONTOSO, FABRIKAM), (FABRIKAM, CONTOSO)):
        packet = segment("10.0.0.8", sport=4242)
        with seen(gateway.lab.home(tenant)) as mine, seen(gateway.lab.home(other)) as others:
            gateway.senders[tenant].send(packet)
            reset = mine.first(lambda reply: TCP in reply and reply[TCP].dport == 4242)
            assert reset is not None
            assert reset[TCP].flags == "RA"
            assert reset[TCP].ack == packet[TCP].seq + 1
            assert ip_address(reset[IP].dst) == ip_address("10.0.0.8")
            assert others.first(lambda reply: TCP in reply and reply[TCP].dport == 4242, seconds=0.2) is None


def test_an_unknown_source_gets_no_reset(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(verdicts={"refuse_with": "reject"})
    with seen(gateway.lab.home(FABRIKAM)) as view:
        gateway.senders[FABRIKAM].send(segment("10.0.0.99", sport=4243))
        assert view.first(lambda reply: TCP in reply and reply[TCP].dport == 4243, seconds=0.5) is None


def flood_until_limited(gateway: Gateway, tenants: list[Tenant], metric: str) -> None:
    """Sends packets from unknown sources until `metric` counts 100 of them as limited. This may take more than the
    first 200 packets, because a busy machine sends them so slowly that most are within the limit."""
    sources = itertools.product(range(256), range(250))

    def limited() -> bool:
        for _ in range(200 // len(tenants)):
            for tenant in tenants:
                gateway.senders[tenant].send(segment("10.7.{}.{}".format(*next(sources))))
        return gateway.agent.metrics().get(metric, 0) >= 100

    until(limited, "the flood counted as limited")


def test_one_segment_over_its_rate_does_not_use_up_the_others(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(queue={"segment_rate": 20, "segment_burst": 20})
    flood_until_limited(gateway, [FABRIKAM], 'portward_limited_packets_total{segment="vni1002"}')
    assert gateway.passes(CONTOSO, "10.0.0.4")
    other = 'portward_limited_packets_total{segment="vni1001"}'
    assert gateway.agent.metrics().get(other, 0) == 0  # once: of the same refresh or a later one


def test_all_segments_together_have_a_rate_too(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(queue={"rate": 20, "burst": 20, "segment_committed": 1})
    flood_until_limited(gateway, [CONTOSO, FABRIKAM], 'portward_screen_packets_total{rule="limited_all"}')
    other = 'portward_screen_packets_total{rule="limited"}'
    assert gateway.agent.metrics()[other] == 0  # once: of the same refresh or a later one


def test_a_limit_that_others_have_used_up_leaves_each_segment_its_committed_rate(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(queue={"rate": 1, "burst": 1, "segment_committed": 20})
    flood_until_limited(gateway, [FABRIKAM], 'portward_screen_packets_total{rule="limited_all"}')
    assert gateway.passes(CONTOSO, "10.0.0.4")


def denied(gateway: Gateway, source: str) -> int:
    """The packets that the kernel has counted for a source with a cached denial."""
    listing = gateway.listing("deny6" if ":" in source else "deny4")
    found = re.search(rf" {source} [^,]*counter packets (\d+) ", listing)
    assert found is not None, listing
    return int(found[1])


def cached(gateway: Gateway, set_: str) -> int:
    """How many sources a set holds. A listing may miss some while the kernel resizes the set's hash table, so this
    waits for three equal listings in a row."""
    counts: list[int] = []

    def agree() -> bool:
        counts.append(gateway.listing(set_).count("expires"))
        return len(counts) >= 3 and len(set(counts[-3:])) == 1

    until(agree, "listings that agree")
    return counts[-1]


@pytest.mark.parametrize(("offer", "set_"), [(ALLOWED, "allow"), (DENIED, "deny")])
@pytest.mark.parametrize("family", [4, 6])
def test_a_segment_fills_no_more_than_its_share_of_a_set(make_gateway, offer: str, set_: str, family: int) -> None:  # type: ignore[no-untyped-def]
    """Verdicts beyond the share take effect without being cached, and other segments' verdicts are still
    cached."""
    gateway = make_gateway(verdicts={"segment_sources": 16, "allow_seconds": 600, "deny_seconds": 600})
    prefix = "10.0.5." if family == 4 else "2001:db8:5::"
    gateway.source(CONTOSO, f"{prefix}0/24" if family == 4 else f"{prefix}/64", offer)
    gateway.source(FABRIKAM, "10.0.0.9", offer)
    for number in range(1, 60):
        gateway.senders[CONTOSO].send(segment(f"{prefix}{number}"))
    assert gateway.passes(CONTOSO, f"{prefix}60") is (offer == ALLOWED)
    assert 10 <= cached(gateway, f"{set_}{family}") <= 20
    before = cached(gateway, f"{set_}4")
    assert gateway.passes(FABRIKAM, "10.0.0.9") is (offer == ALLOWED)
    assert cached(gateway, f"{set_}4") == before + 1
    until(
        lambda: gateway.agent.metrics()['portward_screen_packets_total{rule="unlearned"}'] >= 40,
        "the verdicts beyond the share counted",
    )


def test_a_change_while_a_set_is_full_forgets_only_what_has_changed(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(verdicts={"sources": 16, "allow_seconds": 600})
    gateway.source(CONTOSO, "10.0.5.0/24", ALLOWED)
    gateway.source(CONTOSO, "10.0.5.1", ALLOWED)
    for number in range(1, 31):
        assert gateway.passes(CONTOSO, f"10.0.5.{number}")
    assert cached(gateway, "allow4") == 16
    gateway.source(CONTOSO, "10.0.5.1", DENIED)
    assert cached(gateway, "allow4") == 15
    assert not gateway.passes(CONTOSO, "10.0.5.1")


def test_a_full_set_loses_no_verdict_and_keeps_no_old_one(make_gateway) -> None:  # type: ignore[no-untyped-def]
    """A source that does not fit into the set is looked up for each packet. A change of policy acts on it, too."""
    gateway = make_gateway(verdicts={"sources": 16})
    gateway.source(CONTOSO, "10.0.5.0/24", ALLOWED)
    gateway.source(CONTOSO, "10.0.6.7", ALLOWED)
    sources = [f"10.0.5.{number}" for number in range(1, 31)]
    assert all(gateway.passes(CONTOSO, source) for source in sources)
    assert all(gateway.passes(CONTOSO, source) for source in sources)
    gateway.source(CONTOSO, "10.0.6.7", DENIED)
    assert not gateway.passes(CONTOSO, "10.0.6.7")
    assert all(gateway.passes(CONTOSO, source) for source in sources)
    gateway.source(CONTOSO, "10.0.5.0/24", DENIED)
    assert not any(gateway.passes(CONTOSO, source) for source in sources)


def would_deny(gateway: Gateway, segment_: str) -> float:
    """The packets of a segment that passed only because of observe mode."""
    return gateway.agent.metrics().get(f'portward_packets_total{{segment="{segment_}",verdict="would_deny"}}', 0)


def test_observing_all_lets_everything_pass_and_counts_it(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(mode="observe")
    assert gateway.passes(FABRIKAM, "10.0.0.4")
    assert gateway.passes(FABRIKAM, "10.0.0.4")
    assert gateway.passes(CONTOSO, "10.0.0.99"), "also an unknown source"
    until(lambda: would_deny(gateway, "vni1002") == 2, "two packets counted as would_deny")
    gateway.agent.stop()
    assert gateway.passes(FABRIKAM, "10.0.0.55"), "also while no agent runs"


def test_observing_one_segment_leaves_the_other_enforced(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(verdicts={"observe": ["vni1002"]})
    assert gateway.passes(FABRIKAM, "10.0.0.4")
    assert not gateway.passes(CONTOSO, "10.0.0.99")
    until(lambda: would_deny(gateway, "vni1002") == 1, "counted as would_deny")
    gateway.agent.stop()
    gateway.agent.start()
    assert gateway.passes(FABRIKAM, "10.0.0.4"), "the mode lies in the configuration"


@pytest.mark.parametrize("reader", QueueReader)
def test_an_observed_segment_loses_no_packet_without_a_verdict(make_gateway, reader: QueueReader) -> None:  # type: ignore[no-untyped-def]
    """The kernel reads more extension headers than the worker, which cannot classify the packet then."""
    gateway = make_gateway(verdicts={"observe": ["vni1002"]}, queue={"reader": reader})
    gateway.source(CONTOSO, "2001:db8:1001::63", ALLOWED)
    gateway.source(FABRIKAM, "2001:db8:1002::63", DENIED)
    with seen(gateway.lab.internet) as view:
        for tenant, source in ((CONTOSO, "2001:db8:1001::63"), (FABRIKAM, "2001:db8:1002::63")):
            packet = IPv6(src=source, dst=MAIL6)
            for _ in range(20):
                packet /= IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 4)])
            gateway.senders[tenant].send(packet / TCP(sport=4000, dport=25, flags="S"))
        first = view.first(lambda packet: IPv6 in packet and packet[IPv6].dst == MAIL6 and packet[IPv6].nh == 60)
    assert first is not None
    assert first[IPv6].src == "2001:db8:1002::63", "the enforced segment's packet was sent before it"


def test_observing_one_subscription(gateway: Gateway) -> None:
    gateway.source(CONTOSO, "10.0.0.40", DENIED, Mode.OBSERVE)
    gateway.source(CONTOSO, "10.0.0.41", DENIED)
    assert gateway.passes(CONTOSO, "10.0.0.40")
    assert not gateway.passes(CONTOSO, "10.0.0.41")


def test_without_an_agent_known_verdicts_stay_and_unknown_sources_drop(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway()
    gateway.source(CONTOSO, "10.0.0.9", ALLOWED)
    assert gateway.passes(CONTOSO, "10.0.0.4")
    assert not gateway.passes(FABRIKAM, "10.0.0.4")
    gateway.agent.stop()
    assert gateway.passes(CONTOSO, "10.0.0.4")
    assert not gateway.passes(FABRIKAM, "10.0.0.4")
    assert not gateway.passes(CONTOSO, "10.0.0.9"), "allowed, but no worker can say so"


def test_on_agent_down_open_lets_unknown_sources_pass(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(on_agent_down="open")
    assert not gateway.passes(FABRIKAM, "10.0.0.4")
    gateway.agent.stop()
    assert not gateway.passes(FABRIKAM, "10.0.0.4"), "a cached verdict stays"
    assert gateway.passes(CONTOSO, "10.0.0.9")
