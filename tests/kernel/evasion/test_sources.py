"""Spoofed sources: addresses of other tenants, of the gateway, without an attachment, or not of a host at all."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from kernel.evasion.ground import Ground
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM, MAIL4, MAIL6

UNKNOWN = "unknown"
# Name → the source, and the counter of the packets that are stopped.
SOURCES = {
    "another-tenant's": ("10.1.77.7", UNKNOWN),
    "without-attachment": ("192.0.2.77", UNKNOWN),
    "the-gateway's-in-the-segment": ("10.0.0.1", UNKNOWN),
    "the-gateway's-on-the-uplink": ("198.51.100.1", UNKNOWN),
    "a-public-address-of-another": (CONTOSO.public, UNKNOWN),
    "the-listener's-own": (MAIL4, UNKNOWN),
    "loopback": ("127.0.0.1", UNKNOWN),
    "link-local": ("169.254.7.7", UNKNOWN),
    "multicast": ("224.0.0.1", UNKNOWN),
    "broadcast": ("255.255.255.255", UNKNOWN),
    "no-address": ("0.0.0.0", UNKNOWN),  # noqa: S104 # a source
    "reserved": ("240.0.0.1", UNKNOWN),
    "another-tenant's-6": ("2001:db8:1001:e::7777", UNKNOWN),
    "without-attachment-6": ("2001:db8:bad::7", UNKNOWN),
    "the-gateway's-6": ("2001:db8:1002::1", UNKNOWN),
    "the-listener's-own-6": (MAIL6, UNKNOWN),
    "link-local-6": ("fe80::7", UNKNOWN),
    "6to4": ("2002:a01:707::1", UNKNOWN),
    "no-address-6": ("::", UNKNOWN),
    "loopback-6": ("::1", "Ip6InHdrErrors"),
    "multicast-6": ("ff0e::1", "Ip6InHdrErrors"),
    "ipv4-mapped": ("::ffff:10.1.77.7", UNKNOWN),
    "ipv4-compatible": ("::10.1.77.7", UNKNOWN),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("flags", ["S", "A"])
def test_a_source_that_is_not_its_own_carries_nothing_out(field: Ground, name: str, flags: str) -> None:
    source, stack = SOURCES[name]
    reason = UNKNOWN if field.bridged else stack  # a bridge asks no IP stack
    header = IPv6(src=source, dst=MAIL6) if ":" in source else IP(src=source, dst=MAIL4)

    def stopped() -> int:
        return field.counter(reason) if reason == UNKNOWN else field.stack(reason)

    before, allowed = stopped(), field.quiet()
    field.send(FABRIKAM, header / TCP(sport=4000, dport=25, flags=flags))
    until(lambda: stopped() > before, f"stopped by {reason}")
    field.settled()
    assert field.leaked() == (0, 0)
    assert field.allowed() == allowed + 1, "what was sent last, and nothing else"


def test_the_same_source_from_where_it_belongs_comes_out(field: Ground) -> None:
    for source, to, header in (("10.1.77.7", MAIL4, IP), ("2001:db8:1001:e::7777", MAIL6, IPv6)):
        allowed = field.quiet()
        field.send(CONTOSO, header(src=source, dst=to) / TCP(sport=4000, dport=25, flags="S"))
        until(lambda allowed=allowed: field.allowed() > allowed, "arrived")  # type: ignore[misc]
