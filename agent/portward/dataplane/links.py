"""The interfaces of a network namespace."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from typing import Final, NamedTuple

from portward.base.interfaces import encoded

VRF: Final = "vrf"


class Device(NamedTuple):
    """An interface and how it stands to others.

    `kind` is the driver's name in rtnetlink (`bridge`, `vxlan`), empty for hardware. `master` is the index of the
    bridge, bond or VRF that it is a port of, `lower` the index of the interface that it stands on (a VLAN's, a
    macvlan's), `peer` that of the other end of its pair (a veth's); each 0 if there is none in this namespace.
    `ports` are the UDP ports at which it takes tunnelled packets.
    """

    ifindex: int
    name: str
    kind: str = ""
    master: int = 0
    lower: int = 0
    ports: frozenset[int] = frozenset()
    peer: int = 0


class Links(NamedTuple):
    """All interfaces of the namespace (index → name), and the indexes that meanwhile were somebody else's.
    `devices` are the same interfaces with what stands on what."""

    names: dict[int, str]
    touched: frozenset[int]
    devices: tuple[Device, ...] = ()

    def masters(self) -> dict[int, int]:
        """The VRFs that interfaces are ports of: index of the port → index of its VRF."""
        vrfs = {device.ifindex for device in self.devices if device.kind == VRF}
        return {device.ifindex: device.master for device in self.devices if device.master in vrfs}


def only_ports(links: Links, segments: Iterable[int]) -> dict[int, int]:
    """The VRFs that have exactly one of these segments as a port: VRF → port (indexes). In hook forward a queued
    packet names only the VRF, so with two segments in one VRF it is not known whose it is."""
    masters, ports = links.masters(), dict[int, list[int]]()
    for index in segments:
        if index in masters:
            ports.setdefault(masters[index], []).append(index)
    return {master: found[0] for master, found in ports.items() if len(found) == 1}


def index_of(name: str) -> int | None:
    """The index of an interface; None if there is none of this name now."""
    try:
        # Python's own way of decoding file names may differ from ours (LC_ALL of another charset).
        return socket.if_nametoindex(os.fsdecode(encoded(name)))
    except (OSError, ValueError):
        return None
