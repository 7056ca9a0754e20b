"""Interface names of any bytes: portward and the kernel match each pattern with the same interfaces."""

from __future__ import annotations

import random
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from ipaddress import IPv4Address
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from kernel.conftest import ALLOWED, DENIED, Gateway, lab_name, source_records
from portward.base import interfaces
from portward.config.keys import Config
from portward.dataplane import rtnetlink, ruleset, templates
from portward.dataplane.desired import Surroundings
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.nft import Nft
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO
from portward.policy import presets

# Names that a parser could misread: patterns, escapes, keywords and numbers of nft, options, control characters,
# bytes that are not UTF-8, and names of the greatest length.
NAMES = (
    b"ten1", b"ten*", b"ten\\", b"ten\\*", b"ten\\1", b"te", b"*", b"\\*", b'q"q', b'"', b"'", b"$SEGMENTS",
    b"{ten1}", b"@ten", b"#x", b"a;b", b"a,b", b"-a", b"--help", b"...", b".a", b"7", b"0x7", b"1-3", b"iif",
    b"\xff", b"a\xff", b"a\xc3", b"a\xc3\xb6", b"\xc3\xb6", b"\xc3\xb6\xff", b"\x1b[31m", b"\x01", b"\x7f",
    b"\x80", b"\xc2\x85x", b"\xe2\x80\xaex", b"a" * 15, b"a" * 14, b"\xc3\xb6" * 7, b"\xc3\xb6" * 7 + b"x",
    b"\\x41", b"A", b"a\\xff",
)  # fmt: skip
_AZURE = presets.load("azure-2020")
_STEMS = sorted({interfaces.decoded(name)[:length] for name in NAMES for length in range(1, 16)})


def patterns() -> st.SearchStrategy[str]:
    """Patterns: names and beginnings of names that exist, and other texts that a configuration file may have."""
    text = st.one_of(st.sampled_from(_STEMS), st.text(st.sampled_from('ten\\*$"aö{;#@7 .-'), max_size=8))
    return st.builds(lambda stem, star: stem + star, text, st.sampled_from(("", "*"))).filter(
        interfaces.is_pattern
    )


class Ports:
    """A namespace with a veth of each name; a packet can be sent into each."""

    def __init__(self, home: str) -> None:
        self.home = home
        for place, name in enumerate(NAMES):
            text = interfaces.decoded(name)
            namespaces.ip("-n", self.home, "link", "add", "name", text, "address", _address(place),
                          "type", "veth", "peer", "name", f"p{place}")  # fmt: skip
            namespaces.ip("-n", self.home, "link", "set", "dev", text, "up")
            namespaces.batch(self.home, [f"link set p{place} up"])
        # A table behind portward's records the packets that the ruleset lets pass.
        namespaces.load(
            self.home,
            "table inet behind { set passed { type ipv4_addr; flags dynamic; size 1000; }\n"
            "chain behind { type filter hook prerouting priority -200;\n"
            "tcp dport 25 update @passed { ip saddr }; }; }",
        )
        with namespaces.inside(self.home):
            self.nft, self.netlink = Nft(), NfNetlink()
            # Otherwise packets from interfaces that are not segments would be dropped, too.
            self._surroundings = Surroundings(known=frozenset(one.ifindex for one in rtnetlink.devices()))
            self._out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)

    def stopped(self, pattern: str) -> set[bytes]:
        """Loads the ruleset for this pattern; gives the names of the interfaces whose packets it stops. These are
        the interfaces that it takes for segments."""
        want = ruleset.wanted(
            templates.read(),
            Config(segments=(pattern,), uplinks=("no uplink",)),
            _AZURE,
            native=False,
            state=ruleset.State(0, synced=True),
            surroundings=self._surroundings,
        )
        # Each text gets a libnftables context of its own, which works in the namespace in which it was made.
        with namespaces.inside(self.home):
            for text in ("add table inet portward", "delete table inet portward", want.whole):
                self.nft.load(f"{text}\n")
            self.nft.load("flush set inet behind passed\n")
        for place in range(len(NAMES)):
            source = str(IPv4Address("10.1.0.0") + place)
            self._out.bind((f"p{place}", 0))
            packet = Ether(dst=_address(place)) / IP(src=source, dst="203.0.113.25") / TCP(dport=25)
            self._out.send(bytes(packet))
        self._settled()
        passed = {element.key for element in self.netlink.elements("behind", "passed")}
        return {name for place, name in enumerate(NAMES) if (IPv4Address("10.1.0.0") + place).packed not in passed}

    def _settled(self) -> None:
        """Waits until each packet has been counted, as a miss or as one that passed."""
        deadline = time.monotonic() + 60
        while True:
            passed = len(self.netlink.elements("behind", "passed"))
            if passed + self.netlink.counters("portward")["missed"] == len(NAMES):
                return
            assert time.monotonic() < deadline, "packets are missing"

    def close(self) -> None:
        self._out.close()
        self.netlink.close()


def _address(place: int) -> str:
    return f"02:00:00:00:00:{place:02x}"


@pytest.fixture(scope="module")
def ports() -> Iterator[Ports]:
    home = lab_name()
    namespaces.make(home)
    try:
        with closing(Ports(home)) as found:
            yield found
    finally:
        namespaces.remove(home)


@given(pattern=patterns())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_pattern_means_the_same_to_portward_and_to_the_kernel(ports: Ports, pattern: str) -> None:
    mine = {name for name in NAMES if interfaces.matches((pattern,), interfaces.decoded(name))}
    assert ports.stopped(pattern) == mine


def test_every_name_is_read_as_it_is(ports: Ports) -> None:
    with namespaces.inside(ports.home):
        found = [interfaces.encoded(device.name) for device in rtnetlink.devices()]
    assert set(NAMES) <= set(found)
    assert all(interfaces.is_name(interfaces.decoded(name)) for name in found)


def test_the_kernel_refuses_what_is_no_name(ports: Ports) -> None:
    """It accepts every name that portward accepts, here a letter and one other byte."""
    for byte in [*random.sample(range(1, 256), 40), 0x20, 0x2F, 0x3A, 0xA0, 0x09, 0x25]:
        name = b"b%c" % byte
        text = interfaces.decoded(name)
        done = _ip(ports.home, "add", text)
        assert (done.returncode == 0) is interfaces.is_name(text), name
        if done.returncode == 0:
            assert _ip(ports.home, "del", text).returncode == 0


def test_an_interface_called_like_an_index_does_not_stand_in_its_place(gateway: Gateway) -> None:
    """A cached verdict is deleted by its interface index, and nft reads a number as an interface name first."""
    index = namespaces.run(
        gateway.lab.gateway, ["cat", f"/sys/class/net/{CONTOSO.segment}/ifindex"]
    ).stdout.strip()
    namespaces.ip("-n", gateway.lab.gateway, "link", "add", index, "index", "9999", "type", "ifb")
    try:
        allowed = source_records(CONTOSO, "10.90.0.1", ALLOWED, uuid4())
        gateway.agent.apply(*allowed)
        assert gateway.passes(CONTOSO, "10.90.0.1")
        denied = source_records(CONTOSO, "10.90.0.1", DENIED, uuid4())
        gateway.agent.apply(*denied)
        assert not gateway.passes(CONTOSO, "10.90.0.1")
    finally:
        namespaces.ip("-n", gateway.lab.gateway, "link", "del", index)


def test_a_segment_whose_name_is_not_text_is_closed_and_reported(gateway: Gateway) -> None:
    name = interfaces.decoded(b"vni\xff\x1b")
    assert _ip(gateway.lab.gateway, "add", name).returncode == 0
    try:
        shown = r"vni\xff\x1b"
        until(lambda: f"segment   {shown}:" in gateway.agent.portward("status").stdout, "followed")
        assert shown in gateway.agent.portward("check").stdout
        assert gateway.agent.portward("status", "--json").returncode == 0
        until(lambda: gateway.agent.metrics()["portward_segments"] >= 3, "counted")
        found = gateway.agent.portward("explain", name, "10.0.0.4").stdout
        assert f"{shown} 10.0.0.4: DENY" in found
        assert "has cached nothing for this source" in found
    finally:
        _ip(gateway.lab.gateway, "del", name)


def _ip(home: str, verb: str, name: str) -> subprocess.CompletedProcess[bytes]:
    """Makes or deletes an interface."""
    argv = ["ip", "-n", home, "link", verb, *(("name", name, "type", "ifb") if verb == "add" else ("dev", name))]
    return subprocess.run(argv, capture_output=True, check=False)
