"""A gateway, a listener on the Internet side that counts TCP packets to port 25, and allowed and denied
senders."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from scapy.packet import Packet

from kernel.conftest import ALLOWED, DENIED, Gateway, running_gateway, source_records
from kernel.wire import listening, segment
from portward.config.keys import QueueReader
from portward.dataplane.names import TABLE, KernelTable
from portward.dataplane.nfnetlink import KernelElements, NfNetlink
from portward.dataplane.verdict_cache import Element, Source, VerdictCache
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM, MAIL4, MAIL6, Tenant

_IPV6_FREEBIND: Final = 78  # linux/in6.h
BANNER: Final = b"220 mail.example\r\n"
# Rates so high that no rate limit stops a trick: the verdict must.
_RATES: Final = {"rate": 10_000_000, "burst": 1_000_000, "segment_rate": 10_000_000, "segment_burst": 1_000_000}
# `allowed` counts packets to port 25 from allowed sources. For all other sources `wire` counts packets as they
# arrive, and `reached` after reassembly of fragments; chain `whole` uses conntrack so that IPv6 is reassembled,
# too. The set `came` has the IPv6 sources of allowed packets.
_RECEIVER: Final = f"""table inet receiver {{
  counter allowed {{}}
  counter wire {{}}
  counter reached {{}}
  set four {{ type ipv4_addr; flags interval; elements = {{ 10.1.0.0/16, {CONTOSO.public} }}; }}
  set six {{ type ipv6_addr; flags interval; elements = {{ 2001:db8:{CONTOSO.vni}:e::/64, {CONTOSO.address6} }}; }}
  set came {{ type ipv6_addr; size 65536; flags dynamic; }}
  chain wire {{
    type filter hook prerouting priority -450
    ip saddr @four accept
    ip6 saddr @six accept
    ip frag-off & 0x1fff != 0 accept
    tcp dport 25 counter name wire
  }}
  chain whole {{
    type filter hook prerouting priority -300
    ct state new
  }}
  chain input {{
    type filter hook input priority 0
    tcp dport 25 ip saddr @four counter name allowed accept
    tcp dport 25 ip6 saddr @six counter name allowed add @came {{ ip6 saddr }} accept
    tcp dport 25 counter name reached
  }}
}}
"""
# The tenant's own stack does not know the connections of these raw packets, so it would reset the listener's
# answers.
_ANSWERS: Final = """table inet answers {
  counter answered {}
  chain resets { type filter hook output priority 0; tcp dport 25 tcp flags rst drop; }
  chain answers { type filter hook prerouting priority -450; tcp sport 25 counter name answered; }
}
"""
# The public addresses belong to the gateway itself. The listener repeats its answers to them for a minute. When
# the gateway no longer knows the connection, it resets such an answer, and the listener would count that reset as
# a packet of an allowed source.
_OWN_RESETS: Final = """table inet own_resets {
  chain output { type filter hook output priority 0; tcp dport 25 tcp flags rst drop; }
}
"""


class Ground:
    """A gateway on which CONTOSO's 10.1.0.0/16 is allowed. FABRIKAM's 10.2.0.0/16 and sources without an
    attachment are denied. The same holds for an IPv6 prefix of each tenant."""

    def __init__(self, gateway: Gateway, *, conntrack: bool) -> None:
        self.gateway, self.lab, self.agent = gateway, gateway.lab, gateway.agent
        self.conntrack, self.bridged = conntrack, gateway.table is KernelTable.BRIDGE
        with namespaces.inside(self.lab.gateway):
            self._netlink = NfNetlink().of(gateway.table)
        with namespaces.inside(self.lab.internet):
            self._receiver = NfNetlink()
        self._cache = VerdictCache(KernelElements(self._netlink))
        self._numbers = iter(range(1, 65_535))
        if not conntrack:
            # Without address translation nothing in the gateway needs connections.
            namespaces.run(self.lab.router, ["nft", "delete", "table", "inet", "lab"])
            # Then the agent removes the forward guard, within ten seconds. Without nft_queue each load of the
            # ruleset drops packets without a cached verdict for some milliseconds, so wait until that is over.
            until(lambda: self.agent.metrics()["portward_guard_loaded"] == 0, "the forward guard is gone")
        namespaces.load(self.lab.router, _OWN_RESETS)
        namespaces.load(self.lab.internet, _RECEIVER)
        for place, tenant in ((1, CONTOSO), (2, FABRIKAM)):
            offer = ALLOWED if tenant is CONTOSO else DENIED
            prefix4, prefix6 = f"10.{place}.0.0/16", f"2001:db8:{tenant.vni}:e::/64"
            self.agent.apply(
                *source_records(tenant, prefix4, offer, uuid4()), *source_records(tenant, prefix6, offer, uuid4())
            )
            home = self.lab.home(tenant)
            namespaces.load(home, _ANSWERS)
            namespaces.batch(home, [f"route add local {prefix4} dev lo", f"route add local {prefix6} dev lo"])
            namespaces.batch(
                self.lab.router,
                [
                    f"route add {prefix4} via {tenant.address4} dev {tenant.segment} onlink",
                    f"route add {prefix4} via {tenant.address4} dev {tenant.segment} onlink table {tenant.vni}",
                    f"route add {prefix6} via {tenant.address6} dev {tenant.segment}",
                ],
            )
        self._links = {
            tenant: int(
                namespaces.run(self.lab.gateway, ["cat", f"/sys/class/net/{tenant.segment}/ifindex"]).stdout
            )
            for tenant in (CONTOSO, FABRIKAM)
        }

    @property
    def family(self) -> str:
        """The family of portward's table that sees the tenants' packets, in nft's words."""
        return self.gateway.family

    def source(self, tenant: Tenant, family: int) -> str:
        """An address in the tenant's prefix that no test has used yet."""
        number = next(self._numbers)
        if family == 6:
            return f"2001:db8:{tenant.vni}:e::{number:x}"
        return f"10.{1 if tenant is CONTOSO else 2}.{number >> 8}.{number & 255}"

    def send(self, tenant: Tenant, *packets: Packet) -> None:
        """Sends packets, which begin with their IP header, in this order."""
        sender = self.gateway.senders[tenant]
        for packet in packets:
            sender.send(packet)

    def leaked(self) -> tuple[int, int]:
        """How many TCP packets to port 25 from denied sources have arrived at the listener: on its wire, and at
        its stack after reassembly."""
        found = self._receiver.counters("receiver")
        return found["wire"], found["reached"]

    def allowed(self) -> int:
        """How many TCP packets to port 25 from allowed sources have arrived at the listener's stack."""
        return self._receiver.counters("receiver")["allowed"]

    def quiet(self) -> int:
        """Waits until all packets that were sent before have arrived or been dropped; then gives `allowed()`."""
        self.settled()
        return self.allowed()

    def answered(self, tenant: Tenant) -> int:
        """How many packets from port 25 have arrived at a tenant so far."""
        listing = namespaces.run(self.lab.home(tenant), ["nft", "list", "counter", "inet", "answers", "answered"])
        found = re.search(r"packets (\d+)", listing.stdout)
        assert found is not None
        return int(found[1])

    def counter(self, name: str) -> int:
        """The packets of a named counter of the ruleset."""
        return self._netlink.counters(TABLE)[name]

    def held(self, tenant: Tenant, address: str) -> Element | None:
        """The cached verdict of a source; None if there is none."""
        return self._cache.get(Source(self._links[tenant], ip_address(address).packed))

    def epoch(self) -> int:
        """The epoch under which verdicts are cached now."""
        found = self._cache.epoch()
        assert found is not None
        return found

    def stack(self, name: str) -> int:
        """A counter of the gateway's own IP stack, by its name in `nstat`."""
        listing = namespaces.run(self.lab.gateway, ["nstat", "-asz", name]).stdout
        found = re.search(rf"^{name}\s+(\d+)", listing, re.MULTILINE)
        assert found is not None, f"no counter {name}: {listing}"
        return int(found[1])

    def connections(self) -> int:
        """How many connections the router tracks now."""
        return int(namespaces.run(self.lab.router, ["conntrack", "-C"]).stdout)

    def settled(self) -> None:
        """Waits until all packets that were sent before have a verdict. To know that, it sends an allowed packet
        through the same queue, from a source that only this call uses, and waits until that packet has come
        out."""
        source = self.source(CONTOSO, 6)
        key = ip_address(source).packed
        self.send(CONTOSO, segment(source, "R", sport=4999))
        until(lambda: self._receiver.element("receiver", "came", key) is not None, "the last packet came out")

    def greeting(self, tenant: Tenant, source: str, seconds: float = 30.0) -> bytes:
        """The bytes that a real client at this source receives from the listener; empty if there are none within
        `seconds`."""
        version = ip_address(source).version
        with namespaces.inside(self.lab.home(tenant)):
            client = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6)
        with client, contextlib.suppress(OSError):
            client.settimeout(seconds)
            if version == 6:  # the prefix is local by a route, so its addresses are on no interface
                client.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
            client.bind((source, 0))
            client.connect((MAIL4 if version == 4 else MAIL6, 25))
            found = client.recv(100)
            client.close()
            until(lambda: not self._talking(tenant), "both ends have closed")
            return found
        return b""

    def _talking(self, tenant: Tenant) -> bool:
        """Whether a connection of a client or the listener is still open."""
        ss = [
            "ss",
            "-Htn",
            "state",
            "connected",
            "exclude",
            "time-wait",
            "exclude",
            "syn-recv",
            "( sport = :25 or dport = :25 )",
        ]
        return any(namespaces.run(place, ss).stdout for place in (self.lab.home(tenant), self.lab.internet))

    def close(self) -> None:
        """Closes its sockets."""
        self._netlink.close()
        self._receiver.close()


@contextlib.contextmanager
def ground(
    folder: Path,
    *,
    conntrack: bool,
    reader: QueueReader = QueueReader.BATCH,
    kind: str = "routed",
    **settings: Any,
) -> Iterator[Ground]:
    """A `Ground` with its listener, within a `with`. `kind` is one of LAB_KINDS, `settings` are keys of the
    configuration."""
    queue: dict[str, Any] = {
        "queue": {**_RATES, "reader": reader},
        "verdicts": {"segment_sources": 131_072},
        **settings,
    }
    with (
        running_gateway(folder, kind=kind, **queue) as gateway,
        listening(gateway.lab, BANNER),
        contextlib.closing(Ground(gateway, conntrack=conntrack)) as found,
    ):
        yield found
