"""The interfaces of a network namespace, and which of them stands on which. Pure; `rtnetlink` reads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

VRF: Final = "vrf"


class Device(NamedTuple):
    """An interface and its relation to other interfaces.

    `kind` is the driver's name in rtnetlink (`bridge`, `vxlan`), empty for hardware. `master` is the index of the
    bridge, bond or VRF of which it is a port. `lower` is the index of the interface on which it stands (a VLAN, a
    macvlan). `peer` is the index of the other end of its pair (a veth). Each of the three is 0 if there is none in
    this namespace. `ports` are the UDP ports at which it receives tunnelled packets.
    """

    ifindex: int
    name: str
    kind: str = ""
    master: int = 0
    lower: int = 0
    ports: frozenset[int] = frozenset()
    peer: int = 0


class Links(NamedTuple):
    """All interfaces of the namespace. `names` is index → name. `touched` are the indexes that another interface,
    or the same one under another name, had since the last report. `devices` are the same interfaces with their
    relations."""

    names: dict[int, str]
    touched: frozenset[int]
    devices: tuple[Device, ...] = ()

    def masters(self) -> dict[int, int]:
        """Index of an interface → index of its VRF, for each port of a VRF."""
        vrfs = {device.ifindex for device in self.devices if device.kind == VRF}
        return {device.ifindex: device.master for device in self.devices if device.master in vrfs}


def only_ports(links: Links, segments: Iterable[int]) -> dict[int, int]:
    """Index of a VRF → index of its port, for each VRF that has exactly one of these segments as a port. A packet
    that was queued in hook forward names only the VRF, so with two segments in one VRF its segment is unknown."""
    masters, ports = links.masters(), dict[int, list[int]]()
    for index in segments:
        if index in masters:
            ports.setdefault(masters[index], []).append(index)
    return {master: found[0] for master, found in ports.items() if len(found) == 1}
