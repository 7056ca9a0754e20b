"""Tunnels that end on this host: protocols, and UDP ports at which the host receives packets inside packets. Pure.

A sender that can reach such a port can put a packet of its choice on the interface of its choice. So the ruleset
drops what segments send to these ports (`chain tunnels`). rtnetlink names the ports of devices; `genetlink` reads
those of FOU, L2TP and WireGuard. portward cannot find a tunnel if a program holds its socket, or if its device was
moved to another network namespace: `[tunnels] ports` names those.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from portward.dataplane.links import Device

# The ports of tunnels that name none: VXLAN (IANA), GENEVE (IANA), VXLAN (Linux).
DEFAULT_PORTS: Final = frozenset((4789, 6081, 8472))
# IP protocols that carry packets without a proof of the sender: IPv4, IPv6, GRE, EtherIP, IPComp, L2TP, MPLS.
PROTOCOLS: Final = frozenset((4, 41, 47, 97, 108, 115, 137))
# ESP and AH, and the port of ESP in UDP (RFC 3948).
ENCRYPTED_PROTOCOLS: Final = frozenset((50, 51))
ENCRYPTED_PORTS: Final = frozenset((4500,))

# Kind of device → the attributes that hold its ports, in network order (linux/if_link.h): IFLA_VXLAN_PORT,
# IFLA_GENEVE_PORT, IFLA_BAREUDP_PORT, IFLA_AMT_RELAY_PORT and IFLA_AMT_GATEWAY_PORT.
_PORT_ATTRIBUTES: Final = {"vxlan": (15,), "geneve": (5,), "bareudp": (1,), "amt": (2, 3)}
# A program opens the sockets of GTP, at the ports of the protocol (3GPP TS 29.281, 29.060).
_FIXED_PORTS: Final = {"gtp": frozenset((2152, 3386))}
_KINDS_WITHOUT_PORT: Final = frozenset((
    "gre", "gretap", "erspan", "ip6gre", "ip6gretap", "ip6erspan",
    "ipip", "sit", "ip6tnl", "wireguard", "vti", "vti6",
))  # fmt: skip
_PORT: Final = struct.Struct(">H")


class Ports(NamedTuple):
    """UDP ports at which tunnels end on this host. `encrypted`: of protocols that prove the sender (WireGuard).
    `open`: of all others."""

    open: frozenset[int] = frozenset()
    encrypted: frozenset[int] = frozenset()


def ports_of(kind: str, data: Mapping[int, bytes]) -> frozenset[int]:
    """The UDP ports of a device of this kind. `data` are the attributes in its IFLA_INFO_DATA."""
    values = (data.get(number, b"") for number in _PORT_ATTRIBUTES.get(kind, ()))
    found = frozenset(_PORT.unpack(value)[0] for value in values if len(value) == _PORT.size)
    return (found | _FIXED_PORTS.get(kind, frozenset())) - {0}


def ending_here(devices: Iterable[Device]) -> list[Device]:
    """The devices at which tunnels end."""
    return [device for device in devices if device.ports or device.kind in _KINDS_WITHOUT_PORT]


def of_devices(devices: Iterable[Device]) -> frozenset[int]:
    """The ports of these devices."""
    return frozenset(port for device in devices for port in device.ports)
