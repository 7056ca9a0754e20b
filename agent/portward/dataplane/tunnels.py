"""Tunnels that end on this host: at which UDP ports it takes packets in that carry other packets.

Whoever can send to such a port puts a packet of its choice on the interface of its choice. So the ruleset drops
what comes from segments to these ports (`chain tunnels`). Devices say their port in rtnetlink; FOU, L2TP and
WireGuard say theirs in generic netlink. A tunnel whose socket a program holds, or whose device was moved to
another network namespace, cannot be found: `[tunnels] ports` names those."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from portward.base.netlink import attribute, attributes_of
from portward.dataplane.conversation import Conversation
from portward.dataplane.links import Device

# What IANA and Linux give a tunnel that names no port: VXLAN, GENEVE, VXLAN on Linux.
DEFAULT_PORTS: Final = frozenset((4789, 6081, 8472))
# IP protocols that carry packets: IPv4, IPv6, GRE, EtherIP, IPComp, L2TP, MPLS. All without a proof of the sender.
PROTOCOLS: Final = frozenset((4, 41, 47, 97, 108, 115, 137))
# ESP and AH, and the port of ESP in UDP (RFC 3948).
ENCRYPTED_PROTOCOLS: Final = frozenset((50, 51))
ENCRYPTED_PORTS: Final = frozenset((4500,))

# Of each kind of device the attributes that hold its ports, in network order (linux/if_link.h).
_PORT_ATTRIBUTES: Final = {"vxlan": (15,), "geneve": (5,), "bareudp": (1,), "amt": (2, 3)}
# Its sockets are a program's, at the protocol's own ports (3GPP TS 29.281, 29.060).
_PORTS: Final = {"gtp": frozenset((2152, 3386))}
_WITHOUT_PORT: Final = frozenset((
    "gre", "gretap", "erspan", "ip6gre", "ip6gretap", "ip6erspan",
    "ipip", "sit", "ip6tnl", "wireguard", "vti", "vti6",
))  # fmt: skip
_NETLINK_GENERIC: Final = 16
_CONTROL, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 16, 3, 1, 2
_GENERIC: Final = struct.Struct("=BBH")  # struct genlmsghdr: command, version, reserved
_BIG: Final = struct.Struct(">H")
_HOST: Final = struct.Struct("=H")
_INDEX: Final = struct.Struct("=I")
# Command, attribute of the port (linux/fou.h, linux/l2tp.h, linux/wireguard.h).
_FOU: Final = 3, 1
_L2TP: Final = 4, 26
_WIREGUARD: Final = 0, 6
_WIREGUARD_INDEX: Final = 1


class Ports(NamedTuple):
    """UDP ports at which tunnels end here: those of protocols that prove who sends (WireGuard), and of all
    others."""

    open: frozenset[int] = frozenset()
    encrypted: frozenset[int] = frozenset()


def ports_of(kind: str, data: Mapping[int, bytes]) -> frozenset[int]:
    """The UDP ports of a device of this kind, from the attributes of its kind (IFLA_INFO_DATA)."""
    values = (data.get(number, b"") for number in _PORT_ATTRIBUTES.get(kind, ()))
    found = frozenset(_BIG.unpack(value)[0] for value in values if len(value) == _BIG.size)
    return (found | _PORTS.get(kind, frozenset())) - {0}


def ending_here(devices: Iterable[Device]) -> list[Device]:
    """The devices at which tunnels end."""
    return [device for device in devices if device.ports or device.kind in _WITHOUT_PORT]


def of_devices(devices: Iterable[Device]) -> frozenset[int]:
    """The ports of these devices."""
    return frozenset(port for device in devices for port in device.ports)


def find(devices: Iterable[Device]) -> Ports:
    """The ports of these devices, and those that the kernel's FOU, L2TP and WireGuard have now in this thread's
    network namespace. Raises OSError if the kernel does not answer; L2TP and WireGuard take CAP_NET_ADMIN."""
    devices = list(devices)
    found = of_devices(devices)
    with Conversation(_NETLINK_GENERIC) as kernel:
        # All families at once: asked for one by its name, the kernel would load its module.
        families = _families(kernel)
        for name, command, number, order in (("fou", *_FOU, _BIG), ("l2tp", *_L2TP, _HOST)):
            if name in families:
                found |= frozenset(_numbers(kernel, families[name], command, b"", number, order))
        encrypted: frozenset[int] = frozenset()
        if "wireguard" in families:
            for device in devices:
                if device.kind == "wireguard":
                    which = attribute(_WIREGUARD_INDEX, _INDEX.pack(device.ifindex))
                    command, number = _WIREGUARD
                    encrypted |= frozenset(_numbers(kernel, families["wireguard"], command, which, number, _HOST))
    return Ports(found, encrypted)


def _families(kernel: Conversation) -> dict[str, int]:
    """The families of generic netlink that are loaded: name → message type."""
    found = {}
    for _, body in kernel.dump(_CONTROL, _GENERIC.pack(_GET_FAMILY, 1, 0)):
        values = dict(attributes_of(body, _GENERIC.size))
        name = values.get(_FAMILY_NAME, b"").rstrip(b"\0").decode(errors="replace")
        found[name] = int(_HOST.unpack_from(values[_FAMILY_ID])[0])
    return found


def _numbers(
    kernel: Conversation, family: int, command: int, which: bytes, number: int, order: struct.Struct
) -> Iterator[int]:
    """The ports that a dump gives in the attribute `number`."""
    for _, body in kernel.dump(family, _GENERIC.pack(command, 1, 0) + which):
        value = dict(attributes_of(body, _GENERIC.size)).get(number, b"")
        if len(value) == order.size and (port := int(order.unpack(value)[0])):
            yield port
