"""The lab with a gateway that bridges: the tenants' router is a host of its own.

    NAME-contoso ── VXLAN 1001 ─┐                 ┌── VLAN 1001 ─┐
                              NAME-gw ── up0 ── NAME-rt        up0 ── NAME-net
    NAME-fabrikam ─ VXLAN 1002 ─┘                 └── VLAN 1002 ─┘

The gateway has one bridge with VLAN filtering and no address. Each segment is a port, whose frames get a VLAN of
their own when they come in, because the tenants' addresses overlap. The uplink, `up0`, is a port of the same
bridge and carries all of them tagged. The router does all else that the gateway of `Lab` does: it has an
interface with the segment's name for each VLAN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from portward.errors import KernelError
from portward.lab import namespaces
from portward.lab.topology import CONTOSO, DEFAULT_NAME, FABRIKAM, Lab, Tenant

BRIDGE: Final = "br0"
# The router's end of the uplink.
TRUNK: Final = "trunk0"


class BridgedLab(Lab):
    """The namespaces of one such lab. The kernel needs VLANs, and bridges that filter them."""

    def __init__(self, name: str = DEFAULT_NAME, tenants: Sequence[Tenant] = (CONTOSO, FABRIKAM)) -> None:
        """Raises InputError as `Lab` does."""
        super().__init__(name, tenants)
        self.router = f"{name}-rt"

    def _uplink(self) -> None:
        super()._uplink()
        namespaces.batch(
            self.gateway,
            [
                f"link add {BRIDGE} type bridge vlan_filtering 1",
                f"link set {BRIDGE} up",
                f"link add up0 type veth peer name {TRUNK} netns {self.router}",
                f"link set up0 master {BRIDGE} up",
            ],
        )
        namespaces.batch(self.router, [f"link set {TRUNK} up"])

    def add_port(self, name: str, number: int) -> None:
        """Makes an interface of the gateway a port whose frames are of this VLAN. Raises KernelError."""
        namespaces.batch(self.gateway, [f"link set {name} master {BRIDGE}"])
        self._vlan("del", "dev", name, "vid", "1")
        self._vlan("add", "dev", name, "vid", str(number), "pvid", "untagged")

    def _join(self, tenant: Tenant) -> None:
        port, number = tenant.segment, tenant.vni
        self.add_port(port, number)
        self._vlan("add", "dev", "up0", "vid", str(number))
        namespaces.batch(
            self.router,
            [f"link add link {TRUNK} name {port} type vlan id {number}", f"link set {port} up"],
        )

    def _vlan(self, *words: str) -> None:
        done = self.run(self.gateway, "bridge", "vlan", *words)
        if done.returncode:
            raise KernelError(f"bridge vlan {' '.join(words)}: {done.stderr.strip()}")
