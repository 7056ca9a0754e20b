"""Address translation by other programs: no packet of a blocked tenant reaches port 25 by it, and an allowed
tenant's packets do."""

from __future__ import annotations

import itertools
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from kernel.conftest import ALLOWED, DENIED, Gateway
from kernel.test_rates import customer
from kernel.wire import same, seen, segment
from portward.dataplane.names import TABLE
from portward.dataplane.nfnetlink import NfNetlink
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM, MAIL4, MAIL6, Tenant

MakeGateway = Callable[..., Gateway]

VIP4, VIP6, OTHER_PORT = "10.96.0.25", "fd00:96::25", 2525
_NOTRACK = f'iifname "vni*" tcp dport {{ 25, {OTHER_PORT} }} ip daddr {{ {VIP4}, {MAIL4} }} notrack'


def table(family: str, hook: str, *rules: str, kind: str = "filter") -> str:
    """The text of another program's table with one chain."""
    lines = "\n    ".join(rules)
    return f"table {family} other {{\n  chain c {{\n    type {kind} hook {hook};\n    {lines}\n  }}\n}}\n"


_DNAT = "prerouting priority dstnat"
# Name → the rules that translate, and the address and port that the tenant sends to.
TRICKS: dict[str, tuple[str, str, int]] = {
    "an-internal-address": (table("ip", _DNAT, f"ip daddr {VIP4} dnat to {MAIL4}", kind="nat"), VIP4, 25),
    "an-internal-address-and-port": (
        table("ip", _DNAT, f"ip daddr {VIP4} tcp dport {OTHER_PORT} dnat to {MAIL4}:25", kind="nat"),
        VIP4,
        OTHER_PORT,
    ),
    "another-port": (
        table("inet", _DNAT, f"tcp dport {OTHER_PORT} dnat ip to {MAIL4}:25", kind="nat"),
        MAIL4,
        OTHER_PORT,
    ),
    "an-internal-address-of-ipv6": (
        table("ip6", _DNAT, f"ip6 daddr {VIP6} tcp dport 25 dnat to [{MAIL6}]:25", kind="nat"),
        VIP6,
        25,
    ),
    "another-port-of-ipv6": (
        table("inet", _DNAT, f"tcp dport {OTHER_PORT} dnat ip6 to [{MAIL6}]:25", kind="nat"),
        MAIL6,
        OTHER_PORT,
    ),
    "a-port-without-state": (
        table("inet", "prerouting priority raw + 10", _NOTRACK, f"tcp dport {OTHER_PORT} tcp dport set 25"),
        MAIL4,
        OTHER_PORT,
    ),
    "an-address-without-state": (
        table("inet", "prerouting priority raw + 10", _NOTRACK, f"ip daddr {VIP4} ip daddr set {MAIL4}"),
        VIP4,
        25,
    ),
    "a-port-in-forward": (
        table("inet", "forward priority filter", f"tcp dport {OTHER_PORT} tcp dport set 25"),
        MAIL6,
        OTHER_PORT,
    ),
    "an-address-in-forward": (
        table("inet", "forward priority 400", f"ip6 daddr {VIP6} ip6 daddr set {MAIL6}"),
        VIP6,
        25,
    ),
}  # fmt: skip
_numbers, _ports = itertools.count(10), itertools.count(4000)


@contextmanager
def others(gateway: Gateway, text: str) -> Iterator[None]:
    """Loads the rules of another program for the time of a `with`, and adds routes for the internal addresses that
    they translate."""
    namespaces.batch(
        gateway.lab.gateway,
        ["route replace 10.96.0.0/16 via 198.51.100.2", "route replace fd00:96::/64 via 2001:db8:ffff::2"],
    )
    namespaces.load(gateway.lab.gateway, text)
    try:
        yield
    finally:
        namespaces.run(gateway.lab.gateway, ["nft", "delete", "table", text.split()[1], "other"])


def source_of(tenant: Tenant, to: str, number: int) -> str:
    """An address in a tenant's segment, of the family of `to`."""
    return f"2001:db8:{tenant.vni}::{number:x}" if ":" in to else f"10.0.7.{number}"


def comes_out(gateway: Gateway, tenant: Tenant, source: str, to: str, port: int, flags: str = "S") -> bool:
    """Whether a packet from `source` to `to` reaches the Internet's side as one to port 25."""
    packet = segment(source, flags, port=port, to=to, sport=next(_ports))
    with seen(gateway.lab.internet) as view:
        gateway.senders[tenant].send(packet)
        marker = segment(tenant.address6, "S", port=587)
        gateway.senders[tenant].send(marker)
        found = False
        is_it, is_marker = same(packet), same(marker)

        def either(other: Any) -> bool:
            nonlocal found
            found = found or (is_it(other) and other["TCP"].dport == 25)
            return is_marker(other)

        assert view.first(either) is not None, "the packet to port 587 did not arrive"
        late = None if found else view.late(is_it, gateway.lab.gateway)
        return found or (late is not None and late["TCP"].dport == 25)


@pytest.mark.parametrize("name", TRICKS)
def test_what_others_translate_comes_out_of_those_who_may_send_only(gateway: Gateway, name: str) -> None:
    text, to, port = TRICKS[name]
    number = next(_numbers)
    for tenant, offer in ((CONTOSO, ALLOWED), (FABRIKAM, DENIED)):
        gateway.source(tenant, source_of(tenant, to, number), offer)
    with others(gateway, text):
        for flags in ("S", "S", "A", "PA"):  # first by a worker's verdict, then by the cached one
            assert comes_out(gateway, CONTOSO, source_of(CONTOSO, to, number), to, port, flags)
            assert not comes_out(gateway, FABRIKAM, source_of(FABRIKAM, to, number), to, port, flags)
        unknown = source_of(FABRIKAM, to, number + 100)
        assert not comes_out(gateway, FABRIKAM, unknown, to, port), "an unknown source"


def test_a_rule_of_iptables_does_not_translate_for_a_denied_source(gateway: Gateway) -> None:
    number = next(_numbers)
    for tenant, offer in ((CONTOSO, ALLOWED), (FABRIKAM, DENIED)):
        gateway.source(tenant, source_of(tenant, VIP4, number), offer)
    rule = ["PREROUTING", "-i", "vni+", "-p", "tcp", "-d", VIP4, "-j", "DNAT", "--to-destination", f"{MAIL4}:25"]
    gateway.lab.run(gateway.lab.gateway, "iptables-nft", "-t", "nat", "-A", *rule)
    try:
        for _ in range(2):
            assert comes_out(gateway, CONTOSO, source_of(CONTOSO, VIP4, number), VIP4, 25)
            assert not comes_out(gateway, FABRIKAM, source_of(FABRIKAM, VIP4, number), VIP4, 25)
    finally:
        gateway.lab.run(gateway.lab.gateway, "iptables-nft", "-t", "nat", "-D", *rule)


def test_the_guard_caches_what_a_worker_said_of_a_source(gateway: Gateway) -> None:
    """The source's first packet is a translated one. Chain `screen` does not see it as one to port 25, so no mark
    brings the verdict into the cache; the agent has to."""
    number = next(_numbers)
    text, to, port = TRICKS["an-internal-address"]
    with others(gateway, text):
        for tenant, offer, cached in ((CONTOSO, ALLOWED, "allow4"), (FABRIKAM, DENIED, "deny4")):
            source = source_of(tenant, to, number)
            gateway.source(tenant, source, offer)
            comes_out(gateway, tenant, source, to, port)
            until(lambda cached=cached, source=source: source in gateway.listing(cached), "cached")  # type: ignore[misc]
            asked = gateway.counted("missed")
            assert comes_out(gateway, tenant, source, to, port) is (tenant is CONTOSO)
            assert gateway.counted("missed") == asked


def test_a_change_of_policy_ends_what_the_guard_has_cached(gateway: Gateway) -> None:
    source = source_of(CONTOSO, VIP4, next(_numbers))
    gateway.source(CONTOSO, source, ALLOWED)
    with others(gateway, TRICKS["an-internal-address"][0]):
        assert comes_out(gateway, CONTOSO, source, VIP4, 25)
        until(lambda: source in gateway.listing("allow4"), "cached")
        gateway.source(CONTOSO, source, DENIED)
        assert not comes_out(gateway, CONTOSO, source, VIP4, 25)


def test_a_limit_is_drawn_on_once_for_each_connection_translated_or_not(gateway: Gateway) -> None:
    source = "10.0.8.1"
    gateway.agent.apply(*customer(FABRIKAM, source)[1])
    with others(gateway, TRICKS["an-internal-address"][0]):
        until(lambda: _limited(gateway, source), "the limit is in the kernel")
        found = [comes_out(gateway, FABRIKAM, source, to, 25) for to in (MAIL4, VIP4) * 4]
    assert found == [True] * 4 + [False] * 4, "four at once are in the limit"


def _limited(gateway: Gateway, source: str) -> bool:
    comes_out(gateway, FABRIKAM, source, VIP4, 25, "A")
    return "lets its subscription" in str(gateway.agent.explain(FABRIKAM.segment, source)["kernel"])


def test_marks_of_kube_proxy_live_on(gateway: Gateway) -> None:
    """kube-proxy marks packets in its NAT chains, and masquerades by that mark. Its bits are in portward's half of
    the mark."""
    number = next(_numbers)
    gateway.source(CONTOSO, source_of(CONTOSO, VIP4, number), ALLOWED)
    text = f"""table ip other {{
      counter marked {{ }}
      chain c {{ type nat hook {_DNAT}; ip daddr {VIP4} meta mark set meta mark | 0x4000 dnat to {MAIL4}; }}
      chain p {{
        type filter hook postrouting priority srcnat - 1;
        meta mark & 0x4000 == 0x4000 counter name marked;
      }}
    }}
    """
    with others(gateway, text):
        for passed in (1, 2):  # first by a worker's verdict, then by the cached one
            assert comes_out(gateway, CONTOSO, source_of(CONTOSO, VIP4, number), VIP4, 25)
            output = namespaces.run(
                gateway.lab.gateway, ["nft", "list", "counter", "ip", "other", "marked"]
            ).stdout
            assert f"packets {passed} " in output


# --- settings ---


def test_what_is_observed_passes_translated_too(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(verdicts={"observe": [FABRIKAM.segment]})
    with others(gateway, TRICKS["an-internal-address"][0]):
        for source in ("10.0.0.4", "10.0.9.9"):  # denied, and unknown
            for _ in range(2):
                assert comes_out(gateway, FABRIKAM, source, VIP4, 25)
        assert not comes_out(gateway, CONTOSO, "10.0.9.9", VIP4, 25), "the other segment is not"


@pytest.mark.parametrize(("setting", "passes"), [("open", True), ("closed", False)])
def test_without_an_agent_unknown_sources_fare_as_configured(
    make_gateway: MakeGateway, setting: str, passes: bool
) -> None:
    gateway = make_gateway(on_agent_down=setting)
    with others(gateway, TRICKS["an-internal-address"][0]):
        assert comes_out(gateway, CONTOSO, "10.0.0.4", VIP4, 25)
        until(lambda: "10.0.0.4" in gateway.listing("allow4"), "cached")
        gateway.agent.stop(signal.SIGKILL)
        until(lambda: not _listener(gateway), "the queue has no listener")
        assert comes_out(gateway, CONTOSO, "10.0.0.4", VIP4, 25), "cached"
        assert comes_out(gateway, FABRIKAM, "10.0.9.9", VIP4, 25) is passes


def _listener(gateway: Gateway) -> str:
    return namespaces.run(gateway.lab.gateway, ["cat", "/proc/net/netfilter/nfnetlink_queue"]).stdout


def test_sources_beyond_the_share_of_their_segment_pass(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(verdicts={"segment_sources": 16})
    gateway.source(CONTOSO, "10.0.9.0/24", ALLOWED)
    with others(gateway, TRICKS["an-internal-address"][0]):
        for number in range(1, 41):
            for to in (MAIL4, VIP4):
                assert comes_out(gateway, CONTOSO, f"10.0.9.{number}", to, 25)
    assert gateway.counted("unlearned") > 0


def test_a_refused_packet_that_others_translated_is_dropped_in_silence(make_gateway: MakeGateway) -> None:
    """A reset would come from an address to which the tenant never sent a packet."""
    gateway = make_gateway(verdicts={"refuse_with": "reject"})
    with others(gateway, TRICKS["an-internal-address"][0]), seen(gateway.lab.home(FABRIKAM)) as view:
        assert not comes_out(gateway, FABRIKAM, "10.0.0.4", VIP4, 25)
        until(lambda: gateway.agent.metrics().get(_REFUSED, 0) > 0, "a worker has said so")
        # Resets from port 587 answer the marker packets, because no server listens there.
        resets = [packet for packet in view.packets() if "TCP" in packet and "R" in packet["TCP"].flags]
        assert all(packet["TCP"].sport == 587 for packet in resets)
        assert resets, "a reset would have been seen"


_REFUSED = 'portward_judged_packets_total{outcome="dropped",reason="denied-not-exempt"}'


# --- when the guard is loaded ---


def test_the_guard_comes_with_the_first_translation_and_goes_with_the_last(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    gateway = make_gateway()
    loaded = "portward_guard_loaded"
    until(lambda: gateway.agent.metrics()[loaded] == 1, "the lab translates sources")
    status = gateway.agent.portward("status").stdout
    assert "guard     loaded" in status
    assert "table inet lab, chain translate, translates addresses" in status
    namespaces.run(gateway.lab.gateway, ["nft", "delete", "table", "inet", "lab"])
    until(lambda: gateway.agent.metrics()[loaded] == 0, "no program translates any more")
    assert "hook forward" not in gateway.agent.portward("rules", "show").stdout
    assert "hook forward" not in gateway.agent.portward("rules", "show", "--wanted").stdout
    until(lambda: "not loaded" in gateway.agent.portward("status").stdout, "status says so")
    text, to, port = TRICKS["a-port-in-forward"]
    with others(gateway, text):
        until(lambda: gateway.agent.metrics()[loaded] == 1, "a rule writes ports")
        assert "hook forward" in gateway.agent.portward("rules", "show", "--wanted").stdout
        assert comes_out(gateway, CONTOSO, CONTOSO.address6, to, port) is False, "an unknown source"
        output = gateway.agent.portward("check", "--without-store").stdout
        assert "a rule in table inet other, chain c, writes ports" in output
    repairs = gateway.agent.metrics()["portward_ruleset_repairs_total"]
    until(lambda: gateway.agent.metrics()[loaded] == 0, "and goes")
    assert repairs == 0, "no program has changed portward's own rules"


def test_legacy_iptables_is_seen_without_a_notice(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    namespaces.run(gateway.lab.gateway, ["nft", "delete", "table", "inet", "lab"])
    until(lambda: gateway.agent.metrics()["portward_guard_loaded"] == 0, "no program translates any more")
    rule = ["PREROUTING", "-p", "tcp", "-d", VIP4, "-j", "DNAT", "--to-destination", f"{MAIL4}:25"]
    done = namespaces.run(gateway.lab.gateway, ["iptables-legacy", "-t", "nat", "-A", *rule])
    assert done.returncode == 0, done.stderr
    until(lambda: gateway.agent.metrics()["portward_guard_loaded"] == 1, "it is seen")
    until(lambda: "legacy iptables has a table nat" in gateway.agent.portward("status").stdout, "status says so")


def test_the_guard_counts_no_packet_a_second_time(gateway: Gateway) -> None:
    """The test of limits above shows the same for connections."""
    source = source_of(CONTOSO, VIP4, next(_numbers))
    gateway.source(CONTOSO, source, ALLOWED)
    assert comes_out(gateway, CONTOSO, source, MAIL4, 25)
    before = packets(gateway, source)
    for _ in range(5):
        assert comes_out(gateway, CONTOSO, source, MAIL4, 25)
    assert packets(gateway, source) == before + 5


def packets(gateway: Gateway, source: str) -> int:
    """The packets that the kernel has counted for a cached allow of a source of CONTOSO."""
    with namespaces.inside(gateway.lab.gateway):
        netlink, index = NfNetlink(), socket.if_nametoindex(CONTOSO.segment)
    with closing(netlink):
        found = netlink.element(TABLE, "allow4", struct.pack("=I", index) + ip_address(source).packed)
    assert found is not None
    return found.packets


def test_a_gateway_that_boots_has_the_guard(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    gateway.agent.stop(signal.SIGKILL)
    namespaces.run(gateway.lab.gateway, ["nft", "flush", "ruleset"])
    until(lambda: not _listener(gateway), "the queue has no listener")
    assert gateway.agent.portward("rules", "baseline").returncode == 0
    text, to, port = TRICKS["another-port-of-ipv6"]
    with others(gateway, text):
        assert gateway.passes(FABRIKAM, FABRIKAM.address6, to=to, port=587), "what is not translated passes"
        assert not comes_out(gateway, FABRIKAM, FABRIKAM.address6, to, port)


def test_the_guard_refuses_what_comes_from_an_unsettled_interface(gateway: Gateway) -> None:
    """The policy table still has another segment for the interface, so a worker's verdict for it must not
    count."""
    text, to, port = TRICKS["an-internal-address"]
    source = source_of(CONTOSO, to, next(_numbers))
    gateway.source(CONTOSO, source, ALLOWED)
    with namespaces.inside(gateway.lab.gateway):
        index = socket.if_nametoindex(CONTOSO.segment)
    element = f'element inet {TABLE} unsettled {{ "{index:016d}" }}\n'
    with others(gateway, text):
        until(lambda: gateway.agent.metrics()["portward_guard_loaded"] == 1, "the guard is loaded")
        namespaces.load(gateway.lab.gateway, f"add {element}")
        try:
            assert not comes_out(gateway, CONTOSO, source, to, port)
        finally:
            namespaces.load(gateway.lab.gateway, f"delete {element}")
        assert comes_out(gateway, CONTOSO, source, to, port)
