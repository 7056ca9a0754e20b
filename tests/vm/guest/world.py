"""The gateway's surroundings: an uplink with a mail server, and tenants that send from the machine's first second.

    up0 ────────── net: 203.0.113.25, 2001:db8:25::25, listening on ports 25, 26 and 587; the watcher
    host1, host2 ─ red, blue: VXLAN, segments vni1001 (allowed) and vni1002 (blocked)
    trunk0 ─────── grey: VLANs, segments vlan101 (allowed) and vlan102 (blocked)
    cust1, cust2 ─ lime, teal: ports of a VRF, segments cust1 (allowed) and cust2 (blocked)
    tap1, tap2 ─── pink, mint: ports of the bridge br0, segments tap1 (allowed) and tap2 (blocked)
    up1 ────────── net: the other port of br0. The next hop of pink and mint is there, not on the gateway.

On the right are network namespaces. The gateway is the machine itself; systemd-networkd brings its ends of the
links up, as on any host. The tenants' ends are up before that. So their packets reach the uplink as soon as the
gateway forwards them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RUN = Path("/run/vm")
MAIL4, MAIL6 = "203.0.113.25", "2001:db8:25::25"
SMTP_PORT, OTHER_PORT, RELAY_PORT = 25, 26, 587

# Segment → namespace, interface in it, gateway's address, machine's address, prefix of its further addresses.
SEGMENTS = {
    "vni1001": ("red", "eth0", "10.1.0.1", "10.1.0.4", "10.1.16.0/20"),
    "vni1002": ("blue", "eth0", "10.2.0.1", "10.2.0.4", "10.2.16.0/20"),
    "vlan101": ("grey", "vlan101", "10.101.0.1", "10.101.0.4", "10.101.16.0/20"),
    "vlan102": ("grey", "vlan102", "10.102.0.1", "10.102.0.4", "10.102.16.0/20"),
    "cust1": ("lime", "eth0", "10.31.0.1", "10.31.0.4", "10.31.16.0/20"),
    "cust2": ("teal", "eth0", "10.32.0.1", "10.32.0.4", "10.32.16.0/20"),
    "tap1": ("pink", "eth0", "10.41.0.1", "10.41.0.4", "10.41.16.0/20"),
    "tap2": ("mint", "eth0", "10.42.0.1", "10.42.0.4", "10.42.16.0/20"),
}
BRIDGED = ("tap1", "tap2")
BLOCKED = ("vni1002", "vlan102", "cust2", "tap2")
ALLOWED = ("vni1001", "vlan101", "cust1", "tap1")
BLOCKED6 = "2001:db8:1002"
# Link addresses of the gateway's ends. Senders need them before the gateway answers ARP and neighbour
# solicitations.
MACS = {segment: f"02:00:00:00:01:{number:02x}" for number, segment in enumerate(SEGMENTS, 1)}
# A VLAN has the address of the interface below it.
MACS["vlan101"] = MACS["vlan102"] = "02:00:00:00:01:0f"
# Bridged tenants send to the other side of the bridge.
MACS["tap1"] = MACS["tap2"] = "02:00:00:00:01:1f"


def main() -> None:
    """Makes namespaces and links, starts the watcher, the server and the senders, and returns."""
    RUN.mkdir(exist_ok=True)
    _sysctl("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    _net()
    _vxlan("red", 1001, 1, MACS["vni1001"])
    _vxlan("blue", 1002, 2, MACS["vni1002"])
    _trunk()
    _port("lime", "cust1")
    _port("teal", "cust2")
    _port("pink", "tap1")
    _port("mint", "tap2")
    _beyond_the_bridge()
    for segment, (namespace, interface, gateway, address, prefix) in SEGMENTS.items():
        _home(segment, namespace, interface, gateway, address, prefix)
    _start("net", "watcher")
    _start("net", "server")
    for segment in BLOCKED:
        _start(SEGMENTS[segment][0], "sender", segment)
    _networkd()


def ip(*words: str) -> None:
    """Runs `ip`; raises CalledProcessError."""
    subprocess.run(["ip", *words], check=True)


def _net() -> None:
    ip("netns", "add", "net")
    ip("link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", "net")
    for line in (
        "link set lo up", "link set eth0 up",
        "addr add 198.51.100.2/24 dev eth0", "addr add 2001:db8:ffff::2/64 dev eth0 nodad",
        f"addr add {MAIL4}/32 dev lo", f"addr add {MAIL6}/128 dev lo",
        "route add 10.0.0.0/8 via 198.51.100.1", "-6 route add 2001:db8::/32 via 2001:db8:ffff::1",
    ):  # fmt: skip
        ip("-n", "net", *line.split())


def _vxlan(namespace: str, vni: int, number: int, mac: str) -> None:
    ip("netns", "add", namespace)
    ip("link", "add", f"host{number}", "type", "veth", "peer", "name", "host0", "netns", namespace)
    for line in (
        "link set lo up", "link set host0 up", f"addr add 192.0.{number}.2/30 dev host0",
        f"link add eth0 type vxlan id {vni} local 192.0.{number}.2 remote 192.0.{number}.1 dstport 4789",
        "link set eth0 up",
    ):  # fmt: skip
        ip("-n", namespace, *line.split())


def _trunk() -> None:
    ip("netns", "add", "grey")
    ip(
        "link",
        "add",
        "trunk0",
        "address",
        MACS["vlan101"],
        "type",
        "veth",
        "peer",
        "name",
        "trunk0",
        "netns",
        "grey",
    )
    ip("-n", "grey", "link", "set", "lo", "up")
    ip("-n", "grey", "link", "set", "trunk0", "up")
    for number in (101, 102):
        ip(
            "-n",
            "grey",
            "link",
            "add",
            "link",
            "trunk0",
            "name",
            f"vlan{number}",
            "type",
            "vlan",
            "id",
            str(number),
        )
        ip("-n", "grey", "link", "set", f"vlan{number}", "up")


def _beyond_the_bridge() -> None:
    ip(
        "link", "add", "up1", "type", "veth", "peer", "name", "eth1", "address", MACS["tap1"], "netns", "net",
    )  # fmt: skip
    ip("-n", "net", "link", "set", "eth1", "up")
    for name in BRIDGED:
        _, _, gateway, address, prefix = SEGMENTS[name]
        ip("-n", "net", "addr", "add", f"{gateway}/24", "dev", "eth1")
        ip("-n", "net", "route", "add", prefix, "via", address, "dev", "eth1")


def _port(namespace: str, name: str) -> None:
    ip("netns", "add", namespace)
    own = [] if name in BRIDGED else ["address", MACS[name]]
    ip("link", "add", name, *own, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    ip("-n", namespace, "link", "set", "lo", "up")
    ip("-n", namespace, "link", "set", "eth0", "up")


def _home(segment: str, namespace: str, interface: str, gateway: str, address: str, prefix: str) -> None:
    """A tenant's addresses and default route. The route is in a table of its own, because two tenants may share a
    namespace."""
    table = str(1000 + list(SEGMENTS).index(segment))
    for line in (
        f"addr add {address}/24 dev {interface}",
        f"route add local {prefix} dev lo",
        f"route add {gateway}/32 dev {interface} table {table}",
        f"route add default via {gateway} dev {interface} table {table}",
        f"rule add from {prefix} lookup {table}",
        f"rule add from {address} lookup {table}",
        f"neigh add {gateway} lladdr {MACS[segment]} dev {interface}",
    ):
        ip("-n", namespace, *line.split())
    if segment == "vni1002":
        ip("-n", namespace, "addr", "add", f"{BLOCKED6}::4/64", "dev", interface, "nodad")


def _networkd() -> None:
    """Writes the configuration of the gateway's own network, which systemd-networkd brings up later."""
    folder = Path("/run/systemd/network")
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "up0.network": "[Match]\nName=up0\n[Network]\nAddress=198.51.100.1/24\nAddress=2001:db8:ffff::1/64\n"
        "IPForward=yes\nIPv6AcceptRA=no\n[Route]\nGateway=198.51.100.2\n[Route]\nGateway=2001:db8:ffff::2\n"
        "[Route]\nGateway=198.51.100.2\nGatewayOnLink=yes\nTable=100\n",
        "trunk0.network": "[Match]\nName=trunk0\n[Network]\nVLAN=vlan101\nVLAN=vlan102\nLinkLocalAddressing=no\n",
        "vrf0.netdev": "[NetDev]\nName=vrf0\nKind=vrf\n[VRF]\nTable=100\n",
        "vrf0.network": "[Match]\nName=vrf0\n",
    }
    for number, vni in ((1, 1001), (2, 1002)):
        files[f"host{number}.network"] = (
            f"[Match]\nName=host{number}\n[Network]\nAddress=192.0.{number}.1/30\nVXLAN=vni{vni}\n"
        )
        files[f"vni{vni}.netdev"] = (
            f"[NetDev]\nName=vni{vni}\nKind=vxlan\nMACAddress={MACS[f'vni{vni}']}\n[VXLAN]\nVNI={vni}\n"
            f"Local=192.0.{number}.1\nRemote=192.0.{number}.2\nDestinationPort=4789\n"
        )
    for number in (101, 102):
        files[f"vlan{number}.netdev"] = f"[NetDev]\nName=vlan{number}\nKind=vlan\n[VLAN]\nId={number}\n"
    files["br0.netdev"] = "[NetDev]\nName=br0\nKind=bridge\n[Bridge]\nSTP=no\nForwardDelaySec=0\n"
    files["br0.network"] = "[Match]\nName=br0\n[Network]\nLinkLocalAddressing=no\nConfigureWithoutCarrier=yes\n"
    for name in ("up1", *BRIDGED):
        files[f"{name}.network"] = f"[Match]\nName={name}\n[Network]\nBridge=br0\n"
    for segment, (_, _, gateway, address, prefix) in SEGMENTS.items():
        if segment in BRIDGED:
            continue
        in_vrf = segment.startswith("cust")
        text = f"[Match]\nName={segment}\n[Network]\nAddress={gateway}/24\nIPv6AcceptRA=no\n"
        text += "VRF=vrf0\n" if in_vrf else ""
        text += "Address=2001:db8:1002::1/64\n" if segment == "vni1002" else ""
        text += f"[Route]\nDestination={prefix}\nGateway={address}\n"
        if in_vrf:  # the way back begins in the main table
            text += f"[Route]\nDestination={gateway.rpartition('.')[0]}.0/24\nTable=254\nScope=link\n"
            text += f"[Route]\nDestination={prefix}\nGateway={address}\nGatewayOnLink=yes\nTable=254\n"
        files[f"{segment}.network"] = text
    for name, text in files.items():
        (folder / name).write_text(text)


def _sysctl(*settings: str) -> None:
    for setting in settings:
        name, value = setting.split("=")
        Path("/proc/sys", *name.split(".")).write_text(value)


def _start(namespace: str, program: str, *words: str) -> None:
    """Starts a program that stays until the machine is off."""
    log = os.open(RUN / f"{program}-{'-'.join(words)}.log", os.O_WRONLY | os.O_CREAT, 0o644)
    subprocess.Popen(
        ["ip", "netns", "exec", namespace, sys.executable, "-B", "-m", f"vm.guest.{program}", *words],
        stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
