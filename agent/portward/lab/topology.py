"""A gateway in network namespaces, with tenants whose addresses overlap and an Internet side.

    NAME-contoso ── VXLAN 1001 ──┐                    ┌── 203.0.113.25, 2001:db8:25::25
      10.0.0.4, 2001:db8:1001::4 │                    │
                               NAME-gw ── up0 ──── NAME-net
    NAME-fabrikam ─ VXLAN 1002 ──┘
      10.0.0.4, 2001:db8:1002::4

Each tenant's namespace is both its machine and the host of that machine: the VXLAN runs over a veth pair to the
gateway. The gateway translates the IPv4 sources of each segment to a public address of its own, because 10.0.0.4
exists twice. Answers find their segment by a mark in bits 16 and up, which is set after portward has cleared its
own bits. IPv6 is routed. All addresses of the Internet side are for documentation (RFC 5737, RFC 3849).
"""

from __future__ import annotations

import ipaddress
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from portward.errors import InputError
from portward.lab import namespaces

DEFAULT_NAME: Final = "pw-lab"
MAIL4: Final = "203.0.113.25"
MAIL6: Final = "2001:db8:25::25"
_UPLINK: Final = "198.51.100"
_UPLINK6: Final = "2001:db8:ffff"
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True)
class Tenant:
    """A customer's machine, with an IPv4 and an IPv6 address in the segment `vni<vni>`."""

    name: str
    vni: int
    address4: str = "10.0.0.4"

    @property
    def segment(self) -> str:
        """The interface on the gateway."""
        return f"vni{self.vni}"

    @property
    def address6(self) -> str:
        """Its IPv6 address."""
        return f"2001:db8:{self.vni}::4"

    @property
    def public(self) -> str:
        """The IPv4 address that the Internet side sees."""
        return f"{_UPLINK}.{100 + self.vni % 100}"


CONTOSO: Final = Tenant("contoso", 1001)
FABRIKAM: Final = Tenant("fabrikam", 1002)


class Lab:
    """The namespaces of one lab. Several labs can exist side by side under different names."""

    def __init__(self, name: str = DEFAULT_NAME, tenants: Sequence[Tenant] = (CONTOSO, FABRIKAM)) -> None:
        """Raises InputError if `name` cannot be part of the names of namespaces and folders."""
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{name!r} is no name for a lab: up to 32 lower-case letters, digits and '-', a letter first"
            )
        self.name, self.tenants = name, tuple(tenants)
        self.gateway, self.internet = f"{name}-gw", f"{name}-net"
        # The namespace that routes the tenants' packets, and translates their sources.
        self.router = self.gateway

    def home(self, tenant: Tenant) -> str:
        """The namespace of a tenant's machine."""
        return f"{self.name}-{tenant.name}"

    def hop(self, tenant: Tenant) -> tuple[str, str]:
        """The next hop of a tenant's packets: its namespace, and the interface there."""
        return self.router, tenant.segment

    def up(self) -> None:
        """Makes all namespaces, after removing a lab with the same name. Leaves nothing after a failure. Raises
        KernelError."""
        namespaces.require_root()
        self.down()
        try:
            for name in dict.fromkeys((self.gateway, self.router, self.internet)):
                namespaces.make(name)
            self._forward()
            self._uplink()
            for place, tenant in enumerate(self.tenants):
                self._segment(tenant, place)
            namespaces.load(self.router, "\n".join(self._translation()))
        except BaseException:
            self.down()
            raise

    def standing(self) -> list[str]:
        """The namespaces of this lab that exist now. Never those of another lab, even if its name begins alike."""
        own = {self.gateway, self.router, self.internet, *map(self.home, self.tenants)}
        return [name for name in namespaces.names(f"{self.name}-") if name in own]

    def down(self) -> list[str]:
        """Removes all namespaces of this lab, kills the processes in them, and returns their names. Idempotent."""
        found = self.standing()
        for name in found:
            namespaces.remove(name)
        return found

    def __enter__(self) -> Lab:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def run(self, namespace: str, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """See `namespaces.run`."""
        return namespaces.run(namespace, argv, **options)

    @contextmanager
    def as_tenant(self, tenant: Tenant) -> Iterator[None]:
        """Within this context, sockets that this thread opens are on the tenant's machine."""
        with namespaces.inside(self.home(tenant)):
            yield

    def _forward(self) -> None:
        namespaces.sysctl(
            self.router,
            "net.ipv4.ip_forward=1",
            "net.ipv6.conf.all.forwarding=1",
            # Tenants overlap, so the route back to a source is not the one in the main table.
            "net.ipv4.conf.all.rp_filter=0",
            "net.ipv4.conf.default.rp_filter=0",
        )

    def _uplink(self) -> None:
        namespaces.ip(
            "-n",
            self.router,
            "link",
            "add",
            "up0",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self.internet,
        )
        namespaces.batch(
            self.router,
            [
                f"addr add {_UPLINK}.1/24 dev up0",
                f"addr add {_UPLINK6}::1/64 dev up0 nodad",
                "link set up0 up",
                *(f"addr add {tenant.public}/32 dev up0" for tenant in self.tenants),
                f"route add default via {_UPLINK}.2",
                f"route add ::/0 via {_UPLINK6}::2",
            ],
        )
        namespaces.batch(
            self.internet,
            [
                f"addr add {_UPLINK}.2/24 dev eth0",
                f"addr add {_UPLINK6}::2/64 dev eth0 nodad",
                f"addr add {MAIL4}/32 dev lo",
                f"addr add {MAIL6}/128 dev lo",
                "link set eth0 up",
                f"route add default via {_UPLINK}.1",
                f"route add ::/0 via {_UPLINK6}::1",
            ],
        )

    def _segment(self, tenant: Tenant, place: int) -> None:
        home, under = self.home(tenant), f"192.0.2.{4 * place}"
        gateway, host = (str(ipaddress.ip_address(under) + offset) for offset in (1, 2))
        namespaces.make(home)
        namespaces.ip(
            "-n", self.gateway, "link", "add", f"host{tenant.vni}", "type", "veth",
            "peer", "name", "host0", "netns", home,
        )  # fmt: skip
        namespaces.batch(
            self.gateway,
            [
                f"addr add {gateway}/30 dev host{tenant.vni}",
                f"link set host{tenant.vni} up",
                *_vxlan(tenant.segment, tenant.vni, gateway, host),
            ],
        )
        self._join(tenant)
        namespaces.batch(
            self.router,
            [
                f"addr add 10.0.0.1/24 dev {tenant.segment}",
                f"addr add 2001:db8:{tenant.vni}::1/64 dev {tenant.segment} nodad",
                f"route add 10.0.0.0/24 dev {tenant.segment} table {tenant.vni}",
                f"rule add fwmark {_mark(tenant)} lookup {tenant.vni}",
            ],
        )
        namespaces.batch(
            home,
            [
                f"addr add {host}/30 dev host0",
                "link set host0 up",
                *_vxlan("eth0", tenant.vni, host, gateway),
                f"addr add {tenant.address4}/24 dev eth0",
                f"addr add {tenant.address6}/64 dev eth0 nodad",
                "route add default via 10.0.0.1",
                f"route add ::/0 via 2001:db8:{tenant.vni}::1",
            ],
        )

    def _join(self, tenant: Tenant) -> None:
        """Connects a segment's interface on the gateway with the router. Here they are one."""

    def _translation(self) -> Iterator[str]:
        """A ruleset with a conntrack zone for each segment, so that equal connections of two segments stay apart,
        and with marks that route the answers."""
        yield "table inet lab {"
        yield "  chain zones { type filter hook prerouting priority -250; policy accept;"
        for tenant in self.tenants:
            yield f'    iifname "{tenant.segment}" ct original zone set {tenant.vni}'
        yield "  }"
        # mangle − 1: conntrack has found the connection of an answer, and portward has cleared its bits.
        yield "  chain back { type filter hook prerouting priority -151; policy accept;"
        for tenant in self.tenants:
            yield f'    iifname "{tenant.segment}" ct mark set {_mark(tenant)}'
            yield f'    iifname "up0" ct mark {_mark(tenant)} meta mark set {_mark(tenant)}'
        yield "  }"
        yield "  chain translate { type nat hook postrouting priority 100; policy accept;"
        for tenant in self.tenants:
            yield f'    oifname "up0" ct mark {_mark(tenant)} meta nfproto ipv4 snat ip to {tenant.public}'
        yield "  }"
        yield "}"


def _mark(tenant: Tenant) -> str:
    """The mark of a tenant's connections, in bits 16 and up, because the lower ones are portward's."""
    return f"{tenant.vni << 16:#x}"


def _vxlan(name: str, vni: int, local: str, remote: str) -> list[str]:
    return [
        f"link add {name} type vxlan id {vni} local {local} remote {remote} dstport 4789",
        f"link set {name} up",
    ]
