"""Packets that wait in a queue while their interface changes its owner. None of them passes by the old owner's
verdict."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import pytest
from scapy.packet import Packet as Sent

from kernel import wire
from kernel.busy import busy_table
from kernel.conftest import ALLOWED, DENIED, Gateway, lab_name, source_records
from kernel.test_reload import enforcing
from kernel.test_translation import TRICKS, comes_out, others
from kernel.wire import Sender, same, seen, segment
from portward.daemon.core import Core
from portward.dataplane.links import Links
from portward.dataplane.rate_limits import Bucket
from portward.dataplane.verdict_cache import Source
from portward.ipc import mark
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, MAIL4, Lab, Tenant
from portward.worker.messages import ACCEPT, FORWARD, PREROUTING, Packet, Verdicts, read
from portward.worker.nfqueue import SLOT, Queue

_NEW = Tenant("renamed", 7003)
_OWNER = UUID(int=7003)
# Hook → the address to which the tenant sends, so that the packet waits in that hook.
_TO = {PREROUTING: MAIL4, FORWARD: TRICKS["an-internal-address"][1]}


# --- with the whole agent, whose table is locked ---


@contextmanager
def stopped(gateway: Gateway) -> Iterator[None]:
    """Within the `with`, the gateway's worker is stopped. It must be short, because after two seconds the
    self-check ends the worker."""
    (process,) = gateway.workers()
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def waiting(gateway: Gateway) -> int:
    """How many packets wait in the queue."""
    return wire.waiting(gateway.lab.gateway)


def rename(lab: Lab, name: str, new: str) -> None:
    """Renames an interface of the gateway while it is up, which needs Linux 6.2 or later. If it went down, the
    kernel would drop the waiting packets from it."""
    namespaces.ip("-n", lab.gateway, "link", "set", name, "name", new)


def unsettled(gateway: Gateway) -> bool:
    """Whether there is an interface for which the table still has another segment."""
    return "elements" in gateway.listing("unsettled")


@pytest.mark.parametrize("hook", _TO)
@pytest.mark.parametrize("renamed", [False, True], ids=["as-it-was", "renamed"])
def test_what_waits_while_its_interface_is_renamed_does_not_get_through(
    make_gateway: Callable[..., Gateway], hook: int, renamed: bool
) -> None:
    """The table is locked, so the worker finds the verdict of the interface's former tenant."""
    gateway = make_gateway()
    gateway.agent.apply(*source_records(_NEW, "10.0.7.1", DENIED, _OWNER))
    gateway.source(CONTOSO, "10.0.7.1", ALLOWED)
    packet = segment("10.0.7.1", to=_TO[hook])
    with (
        others(gateway, TRICKS["an-internal-address"][0]),
        busy_table(gateway.agent.folder / "table"),
        seen(gateway.lab.internet) as view,
    ):
        until(lambda: gateway.agent.metrics()["portward_guard_loaded"] == 1, "the guard is loaded")
        with stopped(gateway):
            gateway.senders[CONTOSO].send(packet)
            until(lambda: waiting(gateway) == 1, "the packet waits")
            if renamed:
                rename(gateway.lab, CONTOSO.segment, _NEW.segment)
                until(lambda: unsettled(gateway), "the interface is unsettled")
        assert (view.late(same(packet), gateway.lab.gateway) is not None) is not renamed


def test_the_new_owner_of_an_interface_need_not_wait_until_late_verdicts_are_out_of_the_way(
    make_gateway: Callable[..., Gateway],
) -> None:
    """The new owner's first translated packet is dropped, and a later one finds the cached verdict."""
    gateway = make_gateway()
    gateway.agent.apply(*source_records(_NEW, "10.0.7.1", ALLOWED, _OWNER))
    gateway.source(CONTOSO, "10.0.7.1", DENIED)
    text, to, port = TRICKS["an-internal-address"]
    with others(gateway, text):
        until(lambda: gateway.agent.metrics()["portward_guard_loaded"] == 1, "the guard is loaded")
        assert not comes_out(gateway, CONTOSO, "10.0.7.1", to, port)
        rename(gateway.lab, CONTOSO.segment, _NEW.segment)
        until(lambda: comes_out(gateway, CONTOSO, "10.0.7.1", to, port), "it sends")
        assert "elements" in gateway.listing("renewed"), "the time is not over yet"


# --- without a worker: the test itself gives a verdict that it found before the interface changed ---


class Waiting(NamedTuple):
    """A queue, and a packet of the tenant that waits in it."""

    queue: Queue
    packet: Packet
    sent: Sent

    def accepted(self, lab: Lab, mark_: int) -> bool:
        """Accepts the packet with this mark; gives whether it comes out."""
        verdicts = Verdicts(0, 1)
        assert self.packet.id is not None
        with seen(lab.internet) as view:
            verdicts.give(ACCEPT, self.packet.id, mark_)
            self.queue.send(verdicts.take())
            return view.late(same(self.sent), lab.gateway) is not None


class Ground(NamedTuple):
    """The agent's `Core` in a lab, and a queue without a worker."""

    core: Core
    lab: Lab
    queue: Queue

    def waiting(self, hook: int) -> Waiting:
        """Sends a packet that waits in this hook; gives it."""
        sent = segment("10.0.0.4", to=_TO[hook])
        sender = Sender(self.lab, CONTOSO)
        try:
            sender.send(sent)
        finally:
            sender.close()
        assert select.select([self.queue], [], [], 3)[0], "the packet waits"
        ((length,),) = self.queue.receive()
        (packet,) = read(bytes(self.queue.buffer[:SLOT][:length]))
        assert isinstance(packet, Packet)
        assert packet.hook == hook
        return Waiting(self.queue, packet, sent)

    def verdict(self, hook: int, packet: Packet, verdict: mark.Class = mark.Class.ALLOW) -> int:
        """The mark with which a worker would accept the packet now. In hook forward a worker does not change the
        mark."""
        epoch = mark.epoch_of(self.core.generation)
        return packet.mark if hook == FORWARD else mark.stamp(packet.mark, verdict, epoch)


@pytest.fixture
def ground(tmp_path: Path, hook: int) -> Iterator[Ground]:
    """A `Ground` for a hook. The guard is loaded only for hook forward, because otherwise it would queue the
    packets of `screen` a second time."""
    lab = Lab(lab_name(), (CONTOSO,))
    with enforcing(tmp_path, lab=lab) as core:
        namespaces.load(lab.gateway, "delete table inet lab")
        if hook == FORWARD:
            namespaces.batch(lab.gateway, ["route replace 10.96.0.0/16 via 198.51.100.2"])
            namespaces.load(lab.gateway, TRICKS["an-internal-address"][0])
        core.dataplane.check()
        assert core.dataplane.guarded is (hook == FORWARD)
        queue = Queue(0, 16, 1)
        yield Ground(core, lab, queue)
        queue.close()


def become(ground: Ground, name: str) -> int:
    """Gives the tenant's interface another name, and updates table and kernel; gives its index."""
    old = CONTOSO.segment
    index = socket.if_nametoindex(old)
    rename(ground.lab, old, name)
    links = Links({index: name}, frozenset({index}))
    ground.core.dataplane.unsettle(frozenset({index}), 1)
    ground.core.intake.links_changed(links, 1)
    in_force = ground.core.dataplane.inet.sync.in_force
    assert in_force is not None
    assert not in_force.unsettled
    return index


@pytest.mark.parametrize("hook", _TO)
def test_a_verdict_found_before_the_table_knew_the_new_name_lets_nothing_pass(ground: Ground, hook: int) -> None:
    waiting = ground.waiting(hook)
    late = ground.verdict(hook, waiting.packet)
    become(ground, _NEW.segment)
    assert not waiting.accepted(ground.lab, late)


@pytest.mark.parametrize("hook", [PREROUTING])
@pytest.mark.parametrize("late", [False, True], ids=["found-before", "found-after"])
@pytest.mark.parametrize("verdict", [mark.Class.DENY, mark.Class.REFUSED, mark.Class.UNKNOWN])
def test_a_verdict_that_stops_a_packet_does_so_when_its_interface_is_no_segment_any_more(
    ground: Ground, verdict: mark.Class, late: bool
) -> None:
    waiting = ground.waiting(PREROUTING)
    found = ground.verdict(PREROUTING, waiting.packet, verdict)
    become(ground, "office0")
    if late:
        found = ground.verdict(PREROUTING, waiting.packet, verdict)
    assert not waiting.accepted(ground.lab, found)


@pytest.mark.parametrize("hook", [PREROUTING])
def test_without_a_verdict_nothing_passes_when_its_interface_is_no_segment_any_more(ground: Ground) -> None:
    waiting = ground.waiting(PREROUTING)
    become(ground, "office0")
    assert not waiting.accepted(ground.lab, waiting.packet.mark)


@pytest.mark.parametrize("hook", [PREROUTING])
@pytest.mark.parametrize("verdict", [mark.Class.ALLOW, mark.Class.OBSERVED, mark.Class.DENY])
def test_what_stops_nothing_passes_when_its_interface_is_no_segment_any_more(
    ground: Ground, verdict: mark.Class
) -> None:
    """The mark has a verdict that lets packets pass, or it is another program's, with an epoch that is not
    portward's."""
    waiting = ground.waiting(PREROUTING)
    become(ground, "office0")
    other = ground.core.generation + (4000 if verdict is mark.Class.DENY else 0)
    assert waiting.accepted(ground.lab, mark.stamp(0, verdict, mark.epoch_of(other)))


@pytest.mark.parametrize("hook", _TO)
def test_a_verdict_on_an_interface_that_stays_lets_the_packet_pass_also_after_a_change(
    ground: Ground, hook: int
) -> None:
    """A change of another interface does not affect the packet."""
    waiting = ground.waiting(hook)
    late = ground.verdict(hook, waiting.packet)
    index = socket.if_nametoindex(CONTOSO.segment)
    ground.core.intake.links_changed(Links({index: CONTOSO.segment, 901: "vni9"}, frozenset()), 1)
    assert waiting.accepted(ground.lab, late)


@pytest.mark.parametrize("hook", _TO)
def test_what_waits_from_an_interface_that_goes_is_dropped_by_the_kernel(ground: Ground, hook: int) -> None:
    """So if its index is used again, no such packet is taken for one of the new interface."""
    waiting = ground.waiting(hook)
    late = ground.verdict(hook, waiting.packet)
    namespaces.ip("-n", ground.lab.gateway, "link", "del", CONTOSO.segment)
    assert not waiting.accepted(ground.lab, late)


@pytest.mark.parametrize("hook", [FORWARD])
@pytest.mark.parametrize("cached", ["nothing", "allow", "observed", "rate limit", "deny"])
def test_what_is_cached_for_the_new_owner_passes_the_guard(ground: Ground, cached: str) -> None:
    waiting, dataplane = ground.waiting(FORWARD), ground.core.dataplane
    source = Source(socket.if_nametoindex(CONTOSO.segment), ip_address("10.0.0.4").packed)
    dataplane.inet.cache.interfaces.renew([source.link])
    if cached == "rate limit":
        dataplane.inet.rate_limits.add({source: Bucket(5, 10, 2)})
    elif cached != "nothing":
        dataplane.inet.cache.add({source: mark.Class[cached.upper()]})
    passes = cached in ("allow", "observed", "rate limit")
    assert waiting.accepted(ground.lab, waiting.packet.mark) is passes
