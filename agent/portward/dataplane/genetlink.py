"""Reads over generic netlink at which UDP ports FOU, L2TP and WireGuard receive packets."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final

from portward.base.netlink import attribute, attributes_of
from portward.dataplane.dumpsocket import DumpSocket
from portward.dataplane.links import Device
from portward.dataplane.tunnels import Ports, of_devices

_NETLINK_GENERIC: Final = 16
# linux/genetlink.h: the family that lists the families.
_GENL_ID_CTRL, _CTRL_CMD_GETFAMILY = 16, 3
_CTRL_ATTR_FAMILY_ID, _CTRL_ATTR_FAMILY_NAME = 1, 2
# struct genlmsghdr: command, version, reserved.
_GENERIC: Final = struct.Struct("=BBH")
_VERSION: Final = 1
_NETWORK_ORDER: Final = struct.Struct(">H")
_HOST_ORDER: Final = struct.Struct("=H")
_INDEX: Final = struct.Struct("=I")
# Command and attribute of the port: FOU_CMD_GET, FOU_ATTR_PORT; L2TP_CMD_TUNNEL_GET, L2TP_ATTR_UDP_SPORT;
# WG_CMD_GET_DEVICE, WGDEVICE_A_LISTEN_PORT (linux/fou.h, linux/l2tp.h, linux/wireguard.h).
_FOU: Final = 3, 1
_L2TP: Final = 4, 26
_WIREGUARD: Final = 0, 6
_WGDEVICE_A_IFINDEX: Final = 1


def tunnel_ports(devices: Iterable[Device]) -> Ports:
    """The ports of these devices, and those of the kernel's FOU, L2TP and WireGuard in this thread's network
    namespace now. Raises OSError if the kernel does not answer; L2TP and WireGuard need CAP_NET_ADMIN."""
    devices = list(devices)
    found = of_devices(devices)
    with DumpSocket(_NETLINK_GENERIC) as kernel:
        # All families at once, because the kernel loads the module of a family that is asked for by name.
        families = _families(kernel)
        for name, command, number, order in (("fou", *_FOU, _NETWORK_ORDER), ("l2tp", *_L2TP, _HOST_ORDER)):
            if name in families:
                found |= frozenset(_ports(kernel, families[name], command, b"", number, order))
        encrypted: frozenset[int] = frozenset()
        if "wireguard" in families:
            for device in devices:
                if device.kind == "wireguard":
                    which = attribute(_WGDEVICE_A_IFINDEX, _INDEX.pack(device.ifindex))
                    ports = _ports(kernel, families["wireguard"], _WIREGUARD[0], which, _WIREGUARD[1], _HOST_ORDER)
                    encrypted |= frozenset(ports)
    return Ports(found, encrypted)


def _families(kernel: DumpSocket) -> dict[str, int]:
    """The families of generic netlink that are loaded: name → message type."""
    found = {}
    for _, body in kernel.dump(_GENL_ID_CTRL, _GENERIC.pack(_CTRL_CMD_GETFAMILY, _VERSION, 0)):
        values = dict(attributes_of(body, _GENERIC.size))
        name = values.get(_CTRL_ATTR_FAMILY_NAME, b"").rstrip(b"\0").decode(errors="replace")
        found[name] = int(_HOST_ORDER.unpack_from(values[_CTRL_ATTR_FAMILY_ID])[0])
    return found


def _ports(
    kernel: DumpSocket, family: int, command: int, which: bytes, number: int, order: struct.Struct
) -> Iterator[int]:
    """The ports in the attribute `number` of each message of a dump. `which` are the attributes of the request."""
    for _, body in kernel.dump(family, _GENERIC.pack(command, _VERSION, 0) + which):
        value = dict(attributes_of(body, _GENERIC.size)).get(number, b"")
        if len(value) == order.size and (port := int(order.unpack(value)[0])):
            yield port
