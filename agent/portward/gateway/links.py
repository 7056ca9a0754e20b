"""The interfaces of a network namespace."""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

from portward.interfaces import encoded


class Device(NamedTuple):
    """An interface and how it stands to others.

    `kind` is the driver's name in rtnetlink (`bridge`, `vxlan`), empty for hardware. `master` is the index of the
    bridge, bond or VRF that it is a port of, `lower` the index of the interface that it stands on (a VLAN's, a
    macvlan's); both 0 if there is none in this namespace. `ports` are the UDP ports at which it takes tunnelled
    packets.
    """

    ifindex: int
    name: str
    kind: str = ""
    master: int = 0
    lower: int = 0
    ports: frozenset[int] = frozenset()


class Links(NamedTuple):
    """All interfaces of the namespace (index → name), and the indexes that meanwhile were somebody else's.
    `devices` are the same interfaces with what stands on what."""

    names: dict[int, str]
    touched: frozenset[int]
    devices: tuple[Device, ...] = ()


def index_of(name: str) -> int | None:
    """The index of an interface; None if there is none of this name now."""
    try:
        # Python's own way of decoding file names may differ from ours (LC_ALL of another charset).
        return socket.if_nametoindex(os.fsdecode(encoded(name)))
    except (OSError, ValueError):
        return None
