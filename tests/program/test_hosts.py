"""The kinds of hosts in `docs/how-to/hosts`: the configuration of each page enforces on interfaces, addresses and
routes like those of such a host."""

from __future__ import annotations

import re
import socket
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest

from kernel.conftest import ALLOWED, DENIED, lab_name, require_bridges, takes_bridges
from portward.errors import KernelError
from portward.lab import namespaces
from portward.lab.agent import Agent
from portward.lab.topology import Lab
from portward.model import Attachment, Subscription

PAGES: Final = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "hosts"
MAIL: Final = "203.0.113.25"
# A port that no policy limits.
OTHER_PORT: Final = 587
# An answer to a SYN takes less than a millisecond, but the first one may wait for a retransmission after 1 or 3 s.
PATIENCE_S: Final = 30.0
# A denied connection has sent two SYNs by then.
SILENCE_S: Final = 2.5
# Calico gives each pod this gateway, and each interface of the node this address.
_CALICO: Final = "169.254.1.1"
_CALICO_MAC: Final = "ee:ee:ee:ee:ee:ee"
_MASQUERADE: Final = """
table ip other {{
  chain after {{ type nat hook postrouting priority srcnat; oifname "{uplink}" masquerade; }}
}}
"""


@dataclass
class Site:
    """A host with two machines `may` and `denied` behind it, and a mail server on the Internet side. `sources` are
    the segments and addresses that each machine has attachments for."""

    name: str
    host: str = ""
    made: list[str] = field(default_factory=list)
    sources: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, kind: str, name: str = "") -> str:
        """Makes a namespace, and returns its name."""
        name = name or f"{self.name}-{kind}"
        namespaces.make(name)
        self.made.append(name)
        return name

    def begin(self, uplink: str, host: str = "") -> None:
        """The host, and the Internet side behind its uplink."""
        self.host = self.add("host", host)
        net = self.add("net")
        namespaces.sysctl(
            self.host,
            "net.ipv4.ip_forward=1",
            "net.ipv4.conf.all.rp_filter=0",
            "net.ipv4.conf.default.rp_filter=0",
        )
        self.lines(
            f"link add {uplink} type veth peer name eth0 netns {net}",
            f"addr add 203.0.113.1/24 dev {uplink}",
            f"link set {uplink} up",
        )
        namespaces.batch(
            net, [f"addr add {MAIL}/24 dev eth0", "link set eth0 up", "route add default via 203.0.113.1"]
        )

    def close(self) -> None:
        """Removes all namespaces."""
        while self.made:
            namespaces.remove(self.made.pop())

    def lines(self, *lines: str) -> None:
        """Runs `ip` commands on the host."""
        namespaces.batch(self.host, lines)

    def machine(self, kind: str, port: str, segment: str, address: str, *lines: str, length: int = 24) -> None:
        """A machine with an address, whose interface on the host is `port`. Its packets belong to `segment`."""
        home = self.add(kind)
        self.lines(f"link add {port} type veth peer name eth0 netns {home}", f"link set {port} up")
        namespaces.batch(home, [f"addr add {address}/{length} dev eth0", "link set eth0 up", *lines])
        self.sources[kind] = [(segment, address)]

    def bridge(self, name: str, address: str) -> None:
        """A bridge with an address of the host."""
        self.lines(f"link add {name} type bridge", f"addr add {address} dev {name}", f"link set {name} up")

    def masquerade(self, uplink: str) -> None:
        """A rule of another program that translates sources."""
        namespaces.load(self.host, _MASQUERADE.format(uplink=uplink))

    def connects(self, kind: str, port: int, seconds: float) -> bool:
        """Whether a machine can open a connection to a port of the mail server."""
        with (
            namespaces.inside(f"{self.name}-net"),
            socket.create_server((MAIL, port)),
            namespaces.inside(f"{self.name}-{kind}"),
        ):
            try:
                socket.create_connection((MAIL, port), timeout=seconds).close()
            except TimeoutError:
                return False
            except ConnectionRefusedError:  # `refuse_with = "reject"`, because the server listens
                return False
            return True


def proxmox_bridged(site: Site) -> None:
    """Guests on the bridge of the uplink: one that may send, and one behind the bridge and the veth pair that the
    Proxmox firewall makes for it."""
    site.begin("eno1")
    with suppress(KernelError):  # as that firewall does
        namespaces.sysctl(site.host, "net.bridge.bridge-nf-call-iptables=1")
    site.lines("addr flush dev eno1")
    site.bridge("vmbr0", "203.0.113.1/24")
    site.lines("link set eno1 master vmbr0")
    for number, kind in ((100, "may"), (101, "denied")):
        site.machine(kind, f"tap{number}i0", f"tap{number}i0", f"203.0.113.{number}")
    site.lines(
        "link set tap100i0 master vmbr0", "link add fwbr101i0 type bridge",
        "link add fwln101i0 type veth peer name fwpr101p0", "link set tap101i0 master fwbr101i0",
        "link set fwln101i0 master fwbr101i0", "link set fwpr101p0 master vmbr0",
        *(f"link set {name} up" for name in ("fwbr101i0", "fwln101i0", "fwpr101p0")),
    )  # fmt: skip


def proxmox_routed(site: Site) -> None:
    """Guests of one bridge, each behind the bridge and the veth pair that the Proxmox firewall makes for it."""
    site.begin("eno1")
    with suppress(KernelError):  # a kernel without br_netfilter shows such frames to no rule
        namespaces.sysctl(site.host, "net.bridge.bridge-nf-call-iptables=1")  # as that firewall does
    site.bridge("vmbr1", "10.0.0.1/24")
    for number, kind in ((100, "may"), (101, "denied")):
        tap, bridge, inner, outer = f"tap{number}i0", f"fwbr{number}i0", f"fwln{number}i0", f"fwpr{number}p0"
        site.machine(kind, tap, "vmbr1", f"10.0.0.{number}", "route add default via 10.0.0.1")
        site.sources[kind].append((bridge, f"10.0.0.{number}"))
        site.lines(
            f"link add {bridge} type bridge", f"link add {inner} type veth peer name {outer}",
            f"link set {tap} master {bridge}", f"link set {inner} master {bridge}",
            f"link set {outer} master vmbr1", *(f"link set {name} up" for name in (bridge, inner, outer)),
        )  # fmt: skip
    site.masquerade("eno1")


def libvirt(site: Site) -> None:
    """Guests of one network in the mode `nat`."""
    site.begin("eth0")
    site.bridge("virbr0", "192.168.122.1/24")
    for port, kind, address in (("vnet0", "may", "192.168.122.4"), ("vnet1", "denied", "192.168.122.5")):
        site.machine(kind, port, "virbr0", address, "route add default via 192.168.122.1")
        site.lines(f"link set {port} master virbr0")
    site.masquerade("eth0")


def evpn(site: Site) -> None:
    """Two VRFs with a bridge each, which has a VXLAN device and a machine. If the kernel has no VRF, a rule for
    the bridge leads to the same table of routes."""
    site.begin("eth0")
    for number, kind, vrf in ((101, "may", "vrf-red"), (102, "denied", "vrf-blue")):
        bridge = f"br{number}"
        site.bridge(bridge, f"10.0.{number}.1/24")
        try:
            site.lines(f"link add {vrf} type vrf table {number}")
            site.lines(f"link set {vrf} up", f"link set {bridge} master {vrf}")
        except KernelError:
            site.lines(f"rule add iif {bridge} lookup {number}")
        site.lines(
            f"link add vxlan{number} type vxlan id {number} local 203.0.113.1 dstport 4789 nolearning",
            f"link set vxlan{number} master {bridge}", f"link set vxlan{number} up",
            f"route add default via {MAIL} dev eth0 table {number}",
            f"route replace 10.0.{number}.0/24 dev {bridge}",
        )  # fmt: skip
        route = f"route add default via 10.0.{number}.1"
        site.machine(kind, f"port{number}", bridge, f"10.0.{number}.4", route)
        site.lines(f"link set port{number} master {bridge}")


def openstack(site: Site) -> None:
    """A router of neutron in a namespace of its own, with a port for each of two networks."""
    site.begin("qg-1f8a0a3f-7c", host=f"qrouter-{site.name}")
    for number, port, kind in ((1, "qr-0b5f41a2-6d", "may"), (2, "qr-9c1e77d0-01", "denied")):
        site.machine(kind, port, port, f"10.0.{number}.4", f"route add default via 10.0.{number}.1")
        site.lines(f"addr add 10.0.{number}.1/24 dev {port}")
    site.masquerade("qg-1f8a0a3f-7c")


def kubernetes(site: Site) -> None:
    """Pods as Calico connects them: an interface and a route for each, and a gateway that is on no interface. All
    interfaces are one group."""
    site.begin("eth0")
    # The node answers for the gateway because its own route there is another interface's.
    site.lines(f"route add default via {MAIL}")
    for number, kind in ((4, "may"), (5, "denied")):
        port, address = f"cali1234567890{number}", f"192.168.1.{number}"
        site.machine(
            kind, port, "calico", address,
            f"route add {_CALICO} dev eth0 scope link", f"route add default via {_CALICO}", length=32,
        )  # fmt: skip
        site.lines(f"link set {port} address {_CALICO_MAC}", f"route add {address}/32 dev {port} scope link")
        namespaces.sysctl(site.host, f"net.ipv4.conf.{port}.proxy_arp=1", f"net.ipv4.neigh.{port}.proxy_delay=0")
    site.masquerade("eth0")


KINDS: Final[dict[str, Callable[[Site], None]]] = {
    "proxmox-bridged": proxmox_bridged,
    "proxmox-routed": proxmox_routed,
    "libvirt": libvirt,
    "evpn": evpn,
    "openstack": openstack,
    "kubernetes": kubernetes,
}


def settings(page: str) -> dict[str, Any]:
    """The configuration of a page, with the mode that it takes in the end."""
    [text] = re.findall(r"(?s)```toml\n(.*?)```", (PAGES / f"{page}.md").read_text())
    found = tomllib.loads(text)
    assert found.pop("mode") == "observe"
    del found["store"]
    found.pop("table", None)
    # The agent of a lab has segments of its own by default.
    found.setdefault("segments", [])
    return found


@contextmanager
def running(page: str, folder: Path) -> Iterator[tuple[Site, Agent]]:
    """A host of this kind, with an agent that has the configuration of the page."""
    with ExitStack() as stack:
        site = Site(lab_name())
        stack.callback(site.close)
        KINDS[page](site)
        lab = Lab(site.name)
        lab.gateway = site.host
        agent = Agent(lab, folder, **settings(page))
        for kind, offer in (("may", ALLOWED), ("denied", DENIED)):
            id_ = uuid4()
            agent.apply(
                Subscription(id=id_, name=kind, offer=offer, created=date(2022, 6, 30)),
                *(
                    Attachment(segment=segment, address=ip_network(address), subscription=id_)
                    for segment, address in site.sources[kind]
                ),
            )
        if page == "openstack":
            agent.run_options = ("--instance", site.host, *agent.run_options)
        stack.callback(agent.stop)
        agent.start()
        yield site, agent


@pytest.mark.parametrize("page", KINDS)
def test_the_configuration_of_the_page_enforces_on_such_a_host(page: str, tmp_path: Path) -> None:
    if page == "proxmox-bridged":
        require_bridges()
    with running(page, tmp_path) as (site, agent):
        assert site.connects("may", 25, PATIENCE_S)
        assert site.connects("denied", OTHER_PORT, PATIENCE_S), "the way is open"
        assert not site.connects("denied", 25, SILENCE_S)
        done = agent.portward("check", "--without-store")
        assert (done.returncode, done.stderr) == (0, "")
        assert "no such interface now" not in done.stdout.replace("uplinks 'br4*': no such interface now", "")
        assert "PORT 25 IS OPEN" not in done.stdout


def test_every_page_of_an_enforced_kind_is_tested() -> None:
    index = (PAGES / "index.md").read_text()
    rows = re.findall(r"(?m)^\| \[[^]]*\]\(([\w-]+)\.md\) \| .* \| (\w+)[^|]* \|$", index)
    assert {page for page, enforced in rows if enforced == "yes"} == KINDS.keys()
    assert {path.stem for path in PAGES.glob("*.md")} == {"index", *KINDS}


def test_on_a_kernel_that_takes_no_queue_in_a_bridge_ports_are_reported_as_not_enforced(tmp_path: Path) -> None:
    """The page quotes these lines."""
    if takes_bridges():
        pytest.skip("this kernel takes a queue in a bridge")
    page = (PAGES / "proxmox-bridged.md").read_text()
    site = Site(lab_name())
    try:
        site.host = site.add("host")
        net = site.add("net")
        site.lines(
            f"link add eno1 type veth peer name eth0 netns {net}", "tuntap add tap100i0 mode tap",
            "tuntap add tap101i0 mode tap", "link add vmbr0 type bridge",
            *(f"link set {port} master vmbr0 up" for port in ("eno1", "tap100i0", "tap101i0")),
            "link set vmbr0 up",
        )  # fmt: skip
        lab = Lab(site.name)
        lab.gateway = site.host
        agent = Agent(lab, tmp_path, **settings("proxmox-bridged"))
        done, refused = agent.portward("check", "--without-store"), agent.portward("check")
    finally:
        site.close()
    assert refused.returncode == 1
    assert "this kernel takes no queue in a bridge" in refused.stderr
    warnings = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert warnings == [line for line in page.splitlines() if line.startswith("WARNING")]
