"""Devices that only a distribution's kernel has: tunnels that end on the gateway, and devices that take a
segment's packets, as a bridge does.

Each device is made, a blocked tenant sends through it, and it is removed. If the kernel lacks the device, the row
of its result says so."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator

from vm.guest.machine import row, sh, until
from vm.guest.sender import frame
from vm.guest.world import MACS, MAIL4, OTHER_PORT, SEGMENTS

_ABSENT = "not on this kernel"
_TENANT = "vni1002"
_NAMESPACE, _INTERFACE, _GATEWAY, _ADDRESS, _ = SEGMENTS[_TENANT]
# The source of the inner packets. It is not attached to any segment.
_INNER = "10.250.0.4"
_GRE, _IPIP = 47, 4

# Kind → the commands that make the tunnel on the gateway, and the packet that a tenant sends to it.
_TUNNELS: dict[str, tuple[list[str], Callable[[], bytes]]] = {
    "GRE": (
        [f"ip link add t0 type gre local {_GATEWAY} remote {_ADDRESS}"],
        lambda: _ip(_GRE, b"\0\0\x08\0" + _packet()),
    ),
    "IPIP": ([f"ip link add t0 type ipip local {_GATEWAY} remote {_ADDRESS}"], lambda: _ip(_IPIP, _packet())),
    "GENEVE": (
        [f"ip link add t0 address 02:00:00:00:09:01 type geneve id 5 remote {_ADDRESS} dstport 6082"],
        lambda: _ip(17, _udp(6082, b"\0\0\x65\x58\0\0\5\0" + _frame())),
    ),
    "VXLAN on a port of its own": (
        [f"ip link add t0 address 02:00:00:00:09:01 type vxlan id 5 remote {_ADDRESS} dstport 7790"],
        lambda: _ip(17, _udp(7790, b"\x08\0\0\0\0\0\5\0" + _frame())),
    ),
    "FOU": (
        ["ip fou add port 5555 ipproto 4", f"ip link add t0 type ipip local {_GATEWAY} remote {_ADDRESS}"],
        lambda: _ip(17, _udp(5555, _packet())),
    ),
    "L2TP over UDP": (
        [
            f"ip l2tp add tunnel tunnel_id 7 peer_tunnel_id 7 encap udp local {_GATEWAY} remote {_ADDRESS} "
            "udp_sport 1701 udp_dport 1701",
            "ip l2tp add session name t0 tunnel_id 7 session_id 7 peer_session_id 7 l2spec_type none",
            "ip link set t0 address 02:00:00:00:09:01",
        ],
        lambda: _ip(17, _udp(1701, struct.pack(">HHI", 3, 0, 7) + _frame(), source=1701)),
    ),
}
_STACKED = {
    "VLAN": ["ip link add link cust2 name top type vlan id 9"],
    "macvlan": ["ip link add link cust2 name top type macvlan mode bridge"],
    "ipvlan": ["ip link add link cust2 name top type ipvlan"],
    "bond": ["ip link add top type bond mode 1", "ip link set cust2 down", "ip link set cust2 master top"],
    "team": ["ip link add top type team", "ip link set cust2 down", "ip link set cust2 master top"],
}  # fmt: skip
_UNDO = ["ip link del t0", "ip fou del port 5555", "ip l2tp del tunnel tunnel_id 7", "ip link del top"]


def tunnels() -> None:
    """No tenant gets a packet into a tunnel that ends on the gateway, whatever its kind."""
    for kind, (lines, build) in _TUNNELS.items():
        with _made(f"{kind} tunnel", lines) as there:
            if there:
                sh("ip addr add 10.250.0.1/24 dev t0; ip link set t0 up")
                _known(lines)
                _is_dropped(kind, build())
    _in_a_vrf()
    _wireguard()


def stacked() -> None:
    """`portward status` names every device that takes a segment's packets. It does not name the VRF of `cust2`."""
    said = sh("portward status")
    row("packets of a segment in a VRF get verdicts", said.splitlines()[0][:80], good="STACKED" not in said)
    for kind, lines in _STACKED.items():
        with _made(f"{kind} on a segment", lines) as there:
            if there:
                until(lambda: "STACKED" in sh("portward status"), f"status names the {kind}", seconds=20)
                first = sh("portward status").splitlines()[0]
                chain = sh("nft list chain inet portward stacked", check=False)
                good = "top takes the packets of segment cust2" in first and "hook forward" in chain
                row(f"{kind} on a segment: named, and its packets to port 25 dropped", first[:100], good=good)
        sh("ip link set cust2 master vrf0; ip link set cust2 up; networkctl reconfigure cust2", check=False)
        until(lambda: "STACKED" not in sh("portward status"), "nothing stands on a segment", seconds=20)


def _known(lines: list[str]) -> None:
    """Waits until the ruleset has the tunnel's port, if it has one."""
    found = re.search(r"(?:dstport|fou add port|udp_sport) (\d+)", " ".join(lines))
    if found is not None:
        port = re.compile(rf"\b{found[1]}\b")
        until(
            lambda: port.search(sh("nft list chain inet portward from_segment")) is not None, "the port is known"
        )


def _is_dropped(kind: str, packet: bytes) -> None:
    before = _counter("tunnels")
    until(lambda: _sends(packet) and _counter("tunnels") > before, f"{kind} is dropped", seconds=15)
    received = sh("cat /sys/class/net/t0/statistics/rx_packets")
    row(f"a tenant's packet to a {kind} tunnel is dropped", f"{received} came out", good=received == "0")


def _in_a_vrf() -> None:
    """The same from a segment in a VRF, because there `iif` in hook input is the VRF and not the segment."""
    before = _counter("tunnels")
    namespace, interface, gateway, address, _ = SEGMENTS["cust2"]
    packet = _ip(_GRE, b"\0\0\x08\0" + _packet(), address, gateway)
    until(
        lambda: _sends(packet, namespace, interface, MACS["cust2"]) and _counter("tunnels") > before,
        "GRE from a segment in a VRF is dropped",
        seconds=15,
    )
    row("a tenant's packet to a tunnel, from a segment in a VRF, is dropped", "", good=True)


def _wireguard() -> None:
    with _made("WireGuard", ["ip link add t0 type wireguard", "ip link set t0 up"]) as there:
        if there:
            said = sh("portward check --without-store")
            row("check names a WireGuard device and its port", "", good="wireguard t0; " in f"{said}; ")


@contextlib.contextmanager
def _made(what: str, lines: list[str]) -> Iterator[bool]:
    """Makes a device, and removes it at the end. Gives False, and reports a row, if it could not be made; the row
    is good if this kernel does not have such a device."""
    said = ""
    for line in lines:
        done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip()
            break
    if said:
        absent = re.search(r"Unknown device type|support|No such file|Invalid argument", said) is not None
        row(what, f"{_ABSENT}: {said[:80]}", good=absent)
    try:
        yield not said
    except Exception as error:  # the other devices are still to be tried
        row(what, repr(error)[:150], good=False)
    finally:
        for line in _UNDO:
            subprocess.run(line.split(), capture_output=True, check=False)


def _counter(name: str) -> int:
    found = re.search(r"packets (\d+)", sh(f"nft list counter inet portward {name}"))
    return int(found[1]) if found else 0


def _sends(
    packet: bytes, namespace: str = _NAMESPACE, interface: str = _INTERFACE, mac: str = MACS[_TENANT]
) -> bool:
    """Sends a packet from a tenant's machine, from its IP header on."""
    code = (
        "import socket, sys; s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); "
        f"s.bind(('{interface}', 0)); s.send(bytes.fromhex(sys.argv[1]))"
    )
    whole = bytes.fromhex(mac.replace(":", "")) + bytes.fromhex("020000000999") + b"\x08\x00" + packet
    sh(f'ip netns exec {namespace} python3 -c "{code}" {whole.hex()}')
    return True


def _frame() -> bytes:
    """A frame for t0, from a source without an attachment, to a port that portward does not filter."""
    return frame(bytes.fromhex("020000000901"), bytes.fromhex("020000000902"), _INNER, MAIL4, OTHER_PORT, 1)


def _packet() -> bytes:
    return _frame()[14:]


def _udp(port: int, payload: bytes, source: int = 40_000) -> bytes:
    return struct.pack(">HHHH", source, port, 8 + len(payload), 0) + payload


def _ip(protocol: int, payload: bytes, source: str = _ADDRESS, to: str = _GATEWAY) -> bytes:
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0)
    header += socket.inet_aton(source) + socket.inet_aton(to)
    total = sum(struct.unpack(">10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    return header[:10] + struct.pack(">H", ~(total + (total >> 16)) & 0xFFFF) + header[12:] + payload
