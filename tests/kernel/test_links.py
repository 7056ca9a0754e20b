"""Interfaces that appear, disappear and get the index of another one. A cached verdict never outlives its
tenant."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest

from kernel.busy import busy_table
from kernel.conftest import ALLOWED, DENIED, Gateway, source_records
from kernel.wire import Seen, link_address, same, segment
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, Tenant

INDEX = 4711


class Port:
    """A veth of the gateway with the fixed index `INDEX`. Its other end is in a namespace of its own."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._home = f"{gateway.lab.name}-port"
        namespaces.make(self._home)

    def make(self, name: str) -> None:
        """Makes the interface under this name."""
        gateway = self._gateway.lab.gateway
        namespaces.ip("-n", gateway, "link", "add", name, "index", str(INDEX), "type", "veth",
                      "peer", "name", "eth0", "netns", self._home)  # fmt: skip
        namespaces.batch(gateway, [f"link set {name} up"])
        namespaces.batch(self._home, ["link set eth0 up"])

    def delete(self, name: str) -> None:
        """Deletes the interface."""
        namespaces.batch(self._gateway.lab.gateway, [f"link del {name}"])

    def passes(self, name: str, source: str) -> bool:
        """Whether a packet that arrives on this interface reaches the Internet side."""
        import socket

        from scapy.layers.l2 import Ether

        packet = segment(source)
        view = Seen(self._gateway.lab.internet)
        with namespaces.inside(self._home):
            out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        try:
            out.bind(("eth0", 0))
            out.send(bytes(Ether(dst=link_address(self._gateway.lab.gateway, name)) / packet))
            return view.late(same(packet), self._gateway.lab.gateway) is not None
        finally:
            out.close()
            view.close()


@pytest.fixture
def port(gateway: Gateway) -> Iterator[Port]:
    found = Port(gateway)
    yield found
    for name in ("vni7001", "vni7002"):
        namespaces.run(gateway.lab.gateway, ["ip", "link", "del", name])
    namespaces.remove(f"{gateway.lab.name}-port")


def attach(gateway: Gateway, name: str, address: str, offer: str) -> None:
    """Attaches a source in the segment of that name to a new subscription."""
    gateway.agent.apply(*source_records(Tenant("port", int(name[3:])), address, offer, uuid4()))


def followed(gateway: Gateway, name: str, *, there: bool = True) -> None:
    """Waits until the agent treats the interface as a segment; with `there` False, until it no longer does."""
    until(lambda: (f"{name}:" in gateway.agent.portward("status").stdout) is there, f"{name} followed")


def test_the_packets_of_a_new_interface_get_verdicts_at_once(gateway: Gateway, port: Port) -> None:
    attach(gateway, "vni7001", "10.70.0.1", ALLOWED)
    port.make("vni7001")
    until(lambda: port.passes("vni7001", "10.70.0.1"), "the allowed source passes")
    assert not port.passes("vni7001", "10.70.0.9")


def test_an_index_used_again_by_another_segment_has_no_cached_verdicts(gateway: Gateway, port: Port) -> None:
    attach(gateway, "vni7001", "10.70.1.1", ALLOWED)
    attach(gateway, "vni7002", "10.70.1.1", DENIED)
    port.make("vni7001")
    until(lambda: port.passes("vni7001", "10.70.1.1"), "the allowed source passes")
    port.delete("vni7001")
    port.make("vni7002")
    followed(gateway, "vni7002")
    assert not port.passes("vni7002", "10.70.1.1")


def test_an_index_used_again_while_the_table_is_busy_lets_nothing_pass(gateway: Gateway, port: Port) -> None:
    """Until the agent can write the table, the table still has the old tenant's segment for this index."""
    attach(gateway, "vni7001", "10.70.5.1", ALLOWED)
    attach(gateway, "vni7002", "10.70.5.1", DENIED)
    attach(gateway, "vni7002", "10.70.5.2", ALLOWED)
    port.make("vni7001")
    until(lambda: port.passes("vni7001", "10.70.5.1"), "the allowed source passes")
    with busy_table(gateway.agent.folder / "table"):
        port.delete("vni7001")
        port.make("vni7002")
        until(lambda: not held(gateway, "10.70.5.1"), "the cached verdict is forgotten")
        for _ in range(3):
            assert not port.passes("vni7002", "10.70.5.1")
        assert not held(gateway, "10.70.5.1")
    until(lambda: port.passes("vni7002", "10.70.5.2"), "the new tenant's own source passes once the table is free")
    assert not port.passes("vni7002", "10.70.5.1")


def test_a_ruleset_put_back_while_the_table_is_busy_still_drops_an_index_used_again(
    gateway: Gateway, port: Port
) -> None:
    attach(gateway, "vni7001", "10.70.6.1", ALLOWED)
    port.make("vni7001")
    until(lambda: port.passes("vni7001", "10.70.6.1"), "the allowed source passes")
    with busy_table(gateway.agent.folder / "table"):
        port.delete("vni7001")
        port.make("vni7002")
        until(lambda: "vni7002" in elements(gateway, "unsettled"), "the new interface is dropped")
        namespaces.load(gateway.lab.gateway, "delete table inet portward")
        until(lambda: "vni7002" in elements(gateway, "unsettled"), "the ruleset is back")
        assert not port.passes("vni7002", "10.70.6.1")
    until(lambda: "vni7002" not in elements(gateway, "unsettled"), "the table has taken the interface in")


def elements(gateway: Gateway, set_: str) -> str:
    """The elements of one of portward's sets; empty if there is no such set."""
    return gateway.listing(set_).partition("elements =")[2]


def test_an_interface_made_again_under_its_name_has_no_cached_verdicts(gateway: Gateway, port: Port) -> None:
    attach(gateway, "vni7001", "10.70.2.1", ALLOWED)
    port.make("vni7001")
    until(lambda: port.passes("vni7001", "10.70.2.1"), "the allowed source passes")
    assert held(gateway, "10.70.2.1")
    port.delete("vni7001")
    port.make("vni7001")
    until(lambda: not held(gateway, "10.70.2.1"), "the cached verdict is deleted")


def test_a_renamed_interface_is_another_segment(gateway: Gateway, port: Port) -> None:
    attach(gateway, "vni7001", "10.70.3.1", ALLOWED)
    attach(gateway, "vni7002", "10.70.3.1", DENIED)
    port.make("vni7001")
    until(lambda: port.passes("vni7001", "10.70.3.1"), "the allowed source passes")
    namespaces.batch(
        gateway.lab.gateway, ["link set vni7001 down", "link set vni7001 name vni7002", "link set vni7002 up"]
    )
    followed(gateway, "vni7002")
    assert not port.passes("vni7002", "10.70.3.1")


def test_other_interfaces_keep_their_cached_verdicts(gateway: Gateway, port: Port) -> None:
    assert gateway.passes(CONTOSO, "10.0.0.4")
    port.make("vni7001")
    followed(gateway, "vni7001")
    port.delete("vni7001")
    followed(gateway, "vni7001", there=False)
    assert held(gateway, "10.0.0.4")


def held(gateway: Gateway, source: str) -> bool:
    """Whether the kernel has a cached allow of this source."""
    listing = gateway.listing("allow4")
    return f". {source} " in listing
