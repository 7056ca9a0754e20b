"""Devices that take a segment's packets, as bridges do: their packets to port 25 do not pass silently."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from ipaddress import ip_network
from uuid import uuid4

import pytest
from scapy.layers.inet import IP, TCP, IPOption_LSRR
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from kernel.conftest import ALLOWED, Gateway, source_records
from kernel.wire import Seen, in_fragments, link_address, same, segment
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, MAIL4, MAIL6, Tenant
from portward.model import Attachment

SEGMENT = Tenant("stacked", 7001)
FROM4, FROM6 = "10.77.0.9", "2001:db8:7001::9"
# Commands that put a device on the segment, by the device's kind. The packets come out of the device `top`.
ABOVE = {
    "bridge": ["link add top type bridge", "link set vni7001 master top"],
    "macvlan": ["link add top link vni7001 type macvlan mode bridge"],
    "macvlan-on-bridge": [
        "link add under type bridge",
        "link set vni7001 master under",
        "link set under up",
        "link add top link under type macvlan mode bridge",
    ],
    "pair-on-bridge": [
        "link add under type bridge",
        "link add top type veth peer name near",
        "link set near master under",
        "link set vni7001 master under",
        "link set under up",
        "link set near up",
    ],
}
PACKETS: dict[str, Callable[[], list[Packet]]] = {
    "v4": lambda: [segment(FROM4)],
    "v6": lambda: [segment(FROM6)],
    "v4-options": lambda: [IP(src=FROM4, dst=MAIL4, options=b"\1" * 8) / TCP(dport=25, seq=next(_NUMBERS))],
    "v4-fragments": lambda: in_fragments(segment(FROM4) / Raw(bytes(200)), 40),
    "v4-source-route": lambda: [
        IP(src=FROM4, dst="10.99.0.1", options=[IPOption_LSRR(routers=[MAIL4])])
        / TCP(dport=25, seq=next(_NUMBERS))
    ],
    "v6-options": lambda: [IPv6(src=FROM6, dst=MAIL6) / IPv6ExtHdrDestOpt() / TCP(dport=25, seq=next(_NUMBERS))],
    "v6-without-ports": lambda: [
        IPv6(src=FROM6, dst=MAIL6) / IPv6ExtHdrFragment(id=7, nh=60, m=1) / Raw(bytes((6, 0, 1, 4, 0, 0, 0, 0)))
    ],
}
# Seconds to wait for a packet of a renamed interface. The lab translates addresses, so the guard is loaded, and
# then packets of a renamed interface without a cached verdict pass only after ten seconds: see chain `settled`.
_RENAMED = 30.0
_NUMBERS: Iterator[int] = iter(range(0x70000000, 0x7FFFFFFF, 0x1000))


class Stack:
    """A segment whose other end is in a namespace of its own, and the device above it."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.home = f"{gateway.lab.name}-stack"
        namespaces.make(self.home)
        namespaces.sysctl(
            gateway.lab.gateway,
            "net.ipv4.conf.all.accept_source_route=1",
            "net.ipv4.conf.default.accept_source_route=1",
        )
        # With br_netfilter packets would also pass the ruleset under the bridge's name. Most hosts do not have
        # that module, and `-e` makes sysctl ignore the missing keys.
        off = [f"net.bridge.bridge-nf-call-ip{version}tables=0" for version in ("", "6")]
        namespaces.run(gateway.lab.gateway, ["sysctl", "-qew", *off])
        namespaces.batch(gateway.lab.gateway, ["route replace 10.99.0.0/24 via 198.51.100.2"])
        namespaces.ip("-n", gateway.lab.gateway, "link", "add", SEGMENT.segment, "type", "veth",
                      "peer", "name", "eth0", "netns", self.home)  # fmt: skip
        namespaces.batch(gateway.lab.gateway, [f"link set {SEGMENT.segment} up"])
        namespaces.batch(self.home, ["link set eth0 up"])

    def put(self, kind: str, *, expected: str = "STACKED") -> None:
        """Puts the device `top` above the segment, and waits until `portward status` has the text `expected`."""
        namespaces.batch(self.gateway.lab.gateway, [*ABOVE[kind], "link set top up"])
        until(lambda: expected in self.status(), f"`status` says {expected}")

    def status(self) -> str:
        """The output of `portward status`."""
        return self.gateway.agent.portward("status").stdout

    def passes(self, *packets: Packet, at: str = "top", where: str | None = None) -> bool:
        """Sends packets to the link address of the device `at`; gives whether they reach the Internet side, or the
        namespace `where`."""
        gateway = self.gateway.lab.gateway
        last = segment(FROM6, port=587)
        view = Seen(where or self.gateway.lab.internet)
        with namespaces.inside(self.home):
            out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        is_it = same(packets[0]) if TCP in packets[0] else _of_fragments
        is_last, found = same(last), False

        def either(other: Packet) -> bool:
            nonlocal found
            found = found or is_it(other)
            return is_last(other)

        with closing(view), closing(out):
            out.bind(("eth0", 0))
            for packet in (*packets, last):
                out.send(bytes(Ether(dst=link_address(gateway, at)) / packet))
            if where is not None:
                return view.first(is_it, seconds=1) is not None
            assert view.first(either) is not None, "the packet to port 587 did not arrive"
        return found

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Within the `with`, the agent is stopped and sees nothing; its workers run on."""
        process = self.gateway.agent.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def until_seen(self) -> None:
        """Waits until the agent has seen all interfaces. It sees them in the order in which they were made, so it
        is enough to make one more and to wait for that."""
        home = self.gateway.lab.gateway
        namespaces.ip("-n", home, "link", "add", "marker", "type", "ifb")
        index = json.loads(namespaces.run(home, ["ip", "-j", "link", "show", "marker"]).stdout)[0]["ifindex"]
        listing = ["nft", "-j", "list", "set", "inet", "portward", "known_interfaces"]

        def known() -> bool:
            return re.search(rf'"marker"|\b{index}\b', namespaces.run(home, listing).stdout) is not None

        until(known, "the agent has seen the interface that came last")
        namespaces.ip("-n", home, "link", "del", "marker")

    def stopped(self, *counters: str) -> int:
        """The sum of these counters; by default the packets that were dropped from a device above a segment."""
        return sum(map(self._counter, counters or ("stacked",)))

    def _counter(self, name: str) -> int:
        argv = ["nft", "list", "counter", "inet", "portward", name]
        found = re.search(r"packets (\d+)", namespaces.run(self.gateway.lab.gateway, argv).stdout)
        assert found is not None
        return int(found[1])

    def close(self) -> None:
        """Deletes the devices, the segment and its namespace."""
        for name in ("top", "under", SEGMENT.segment):
            namespaces.run(self.gateway.lab.gateway, ["ip", "link", "del", name])
        namespaces.remove(self.home)
        until(lambda: "STACKED" not in self.status(), "nothing stands on a segment")


def _of_fragments(packet: Packet) -> bool:
    """Whether a packet comes from fragments that the segment's sources sent, reassembled or not."""
    if IP in packet:
        return bool(packet[IP].src == FROM4)
    return IPv6ExtHdrFragment in packet and bool(packet[IPv6].src == FROM6)


@pytest.fixture
def stack(gateway: Gateway) -> Iterator[Stack]:
    found = Stack(gateway)
    yield found
    found.close()


@pytest.mark.parametrize("kind", ABOVE)
@pytest.mark.parametrize("what", PACKETS)
def test_nothing_passes_to_port_25_out_of_a_device_above_a_segment(stack: Stack, kind: str, what: str) -> None:
    stack.put(kind)
    before = stack.stopped()
    assert not stack.passes(*PACKETS[what]())
    assert stack.stopped() > before


@pytest.mark.parametrize("kind", ABOVE)
@pytest.mark.parametrize("what", PACKETS)
def test_nothing_passes_before_the_agent_has_seen_the_device(stack: Stack, kind: str, what: str) -> None:
    before = stack.stopped("unknown_interface", "headers")
    with stack.unseen():
        namespaces.batch(stack.gateway.lab.gateway, [*ABOVE[kind], "link set top up"])
        assert not stack.passes(*PACKETS[what]())
        assert stack.stopped("unknown_interface", "headers") > before
        assert stack.passes(segment(FROM4, port=587))
        assert stack.passes(segment(FROM4, to="10.99.0.1")), "an internal destination"


def test_nothing_passes_when_a_segment_becomes_the_first_port_of_a_bridge_that_was_there(stack: Stack) -> None:
    namespaces.batch(stack.gateway.lab.gateway, ["link add top type bridge", "link set top up"])
    stack.until_seen()
    with stack.unseen():
        namespaces.batch(stack.gateway.lab.gateway, [f"link set {SEGMENT.segment} master top"])
        assert not stack.passes(segment(FROM4))
        assert stack.passes(segment(FROM4, port=587))


def test_nothing_passes_when_a_segment_becomes_the_first_port_below_a_device_that_was_there(stack: Stack) -> None:
    """A device on top of a bridge that has no port yet gives out the packets of the bridge's first port."""
    home = stack.gateway.lab.gateway
    under = ["link add under type bridge", "link set under up"]
    namespaces.batch(home, [*under, "link add top link under type macvlan mode bridge", "link set top up"])
    stack.until_seen()
    with stack.unseen():
        namespaces.batch(home, [f"link set {SEGMENT.segment} master under"])
        assert not stack.passes(segment(FROM4))
        assert stack.passes(segment(FROM4, port=587))


def test_mail_from_another_interface_passes_once_the_agent_has_seen_it(stack: Stack) -> None:
    """The other interface is neither a segment nor an uplink, as a network of the provider's own, so its packets
    need no verdict."""
    home = stack.gateway.lab.gateway
    namespaces.batch(home, [f"link set {SEGMENT.segment} name other7"])
    until(lambda: stack.passes(segment(FROM4), at="other7"), "it passes", seconds=_RENAMED)
    namespaces.batch(home, [f"link set other7 name {SEGMENT.segment}"])
    until(lambda: not stack.passes(segment(FROM4), at=SEGMENT.segment), "it is a segment again")


def test_mail_from_another_interface_passes_again_after_the_set_was_flushed(stack: Stack) -> None:
    home = stack.gateway.lab.gateway
    try:
        namespaces.batch(home, [f"link set {SEGMENT.segment} name other7"])
        until(lambda: stack.passes(segment(FROM4), at="other7"), "it passes", seconds=_RENAMED)
        with stack.unseen():
            namespaces.run(home, ["nft", "flush", "set", "inet", "portward", "known_interfaces"])
            assert not stack.passes(segment(FROM4), at="other7")
        until(lambda: stack.passes(segment(FROM4), at="other7"), "it passes again")
    finally:
        namespaces.batch(home, [f"link set other7 name {SEGMENT.segment}"])


def test_while_everything_is_only_observed_nothing_is_dropped(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(mode="observe")
    stack = Stack(gateway)
    try:
        with stack.unseen():
            namespaces.batch(gateway.lab.gateway, [*ABOVE["macvlan"], "link set top up"])
            assert stack.passes(segment(FROM4))
    finally:
        stack.close()


def test_other_ports_and_inner_destinations_pass(stack: Stack) -> None:
    stack.put("bridge")
    before = stack.stopped()
    assert stack.passes(segment(FROM4, port=587))
    inner = segment(FROM4, to="10.99.0.1")
    assert stack.passes(inner)
    assert stack.stopped() == before


def test_mail_into_a_segment_passes(stack: Stack) -> None:
    """Mail to a tenant passes if it comes in through such a device, as it does from the Internet."""
    stack.put("bridge")
    mail = segment(FROM6, to=CONTOSO.address6)
    assert stack.passes(mail, where=stack.gateway.lab.home(CONTOSO))


def test_a_device_above_that_is_a_segment_itself_gets_verdicts_for_its_packets(
    make_gateway: Callable[..., Gateway],
) -> None:
    gateway = make_gateway(segments=["vni*", "top"])
    stack = Stack(gateway)
    try:
        namespaces.batch(gateway.lab.gateway, [*ABOVE["bridge"], "link set top up"])
        until(lambda: "top:" in stack.status(), "followed")
        assert "STACKED" not in stack.status()  # once: it was refreshed for `followed`
        assert not stack.passes(segment(FROM4))
        id_ = uuid4()
        subscription, _ = source_records(SEGMENT, "10.77.0.0/16", ALLOWED, id_)
        network = ip_network("10.77.0.0/16")
        gateway.agent.apply(subscription, Attachment(segment="top", address=network, subscription=id_))
        until(lambda: stack.passes(segment("10.77.0.8")), "the allowed source passes")
    finally:
        stack.close()


def test_a_segment_taken_off_a_bridge_gets_verdicts_again(stack: Stack) -> None:
    stack.put("bridge")
    stack.gateway.agent.apply(*source_records(SEGMENT, "10.78.0.0/16", ALLOWED, uuid4()))
    assert not stack.passes(segment("10.78.0.1"))
    namespaces.batch(stack.gateway.lab.gateway, [f"link set {SEGMENT.segment} nomaster"])
    until(lambda: "STACKED" not in stack.status(), "nothing stands on it")
    assert "chain stacked" not in namespaces.run(stack.gateway.lab.gateway, ["nft", "list", "ruleset"]).stdout
    until(lambda: stack.passes(segment("10.78.0.2"), at=SEGMENT.segment), "the allowed source passes")
    assert not stack.passes(segment(FROM4), at=SEGMENT.segment)


def test_log_metric_and_check_name_it(stack: Stack) -> None:
    stack.put("macvlan")
    said = "macvlan top takes the packets of segment vni7001"
    until(lambda: stack.status().startswith(f"STACKED   {said}"), "status says so")
    assert said in stack.gateway.agent.log.read_text()
    until(lambda: stack.gateway.agent.metrics()["portward_stacked_devices"] == 1, "the metric")
    done = stack.gateway.agent.portward("check")
    assert done.returncode == 0, done.stderr
    assert f"WARNING: {said}" in done.stdout


def test_a_bridge_between_segment_and_uplink_is_named_as_open(stack: Stack) -> None:
    """Its frames never reach the IP stack, so portward cannot block them and must report it."""
    namespaces.ip("-n", stack.gateway.lab.gateway, "link", "add", "up0x", "type", "veth", "peer", "name", "up0y")
    stack.gateway.agent.configure(uplinks=["up0*"])
    stack.gateway.agent.reload()
    try:
        namespaces.batch(stack.gateway.lab.gateway, [*ABOVE["bridge"], "link set up0x master top"])
        until(lambda: "PORT 25 IS OPEN THERE" in stack.status(), "said")
        until(
            lambda: "bridge top forwards frames between segment vni7001 and uplink up0x" in stack.status(),
            "status says so",
        )
    finally:
        namespaces.batch(stack.gateway.lab.gateway, ["link del up0x"])
        stack.gateway.agent.configure(uplinks=["up0"])
        stack.gateway.agent.reload()


def test_a_port_that_leaves_a_bridge_is_still_there(stack: Stack) -> None:
    """The kernel announces the port as deleted, in a message of the bridge's address family. It still exists."""
    stack.put("bridge")
    namespaces.batch(stack.gateway.lab.gateway, [f"link set {SEGMENT.segment} nomaster"])
    until(lambda: "STACKED" not in stack.status(), "nothing stands on it")
    until(lambda: f"{SEGMENT.segment}:" in stack.status(), "status says so")


def test_the_baseline_finds_them_too(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway()
    gateway.agent.stop()
    stack = Stack(gateway)
    try:
        namespaces.batch(gateway.lab.gateway, [*ABOVE["bridge"], "link set top up"])
        namespaces.run(gateway.lab.gateway, ["nft", "delete", "table", "inet", "portward"])
        assert stack.passes(segment(FROM4)), "without rules the way is open"
        done = gateway.agent.portward("rules", "baseline")
        assert done.returncode == 0, done.stderr
        assert not stack.passes(segment(FROM4))
    finally:
        for name in ("top", SEGMENT.segment):
            namespaces.run(gateway.lab.gateway, ["ip", "link", "del", name])
        namespaces.remove(stack.home)
