"""The metrics count exactly the packets that were on the wire, by segment and by subscription."""

from __future__ import annotations

import itertools
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

import pytest
from scapy.layers.inet import TCP

from kernel.conftest import ALLOWED, DENIED, LAB_KINDS, Gateway, source_records
from kernel.test_rates import customer
from kernel.wire import meanwhile, seen, segment
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM, MAIL4, MAIL6, Tenant
from portward.model import Mode

_ALL = 0x0003  # ETH_P_ALL
_SOURCE4, _SOURCE6 = FABRIKAM.address4, FABRIKAM.address6


@pytest.fixture(scope="module", params=LAB_KINDS)
def lab_kind(request: pytest.FixtureRequest) -> str:
    """Each test once with a gateway that routes, and once with one that bridges."""
    return str(request.param)


class Wire:
    """Counts packets from a segment to TCP port 25 by source, as they arrive at the gateway, before any rule."""

    def __init__(self, gateway: Gateway, tenant: Tenant) -> None:
        with namespaces.inside(gateway.lab.gateway):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 25)
        self._socket.bind((tenant.segment, 0))
        self._socket.setblocking(False)
        self._sources: Counter[str] = Counter()

    def sources(self) -> Counter[str]:
        """Packets so far, by source address."""
        while True:
            try:
                frame, address = self._socket.recvfrom(65_535)
            except BlockingIOError:
                return self._sources
            if address[2] == socket.PACKET_OUTGOING or len(frame) < 54:
                continue
            if frame[12:14] == b"\x08\0" and frame[23] == 6 and frame[36:38] == b"\0\x19":
                self._sources[socket.inet_ntop(socket.AF_INET, frame[26:30])] += 1
            if frame[12:14] == b"\x86\xdd" and frame[20] == 6 and frame[56:58] == b"\0\x19":
                self._sources[socket.inet_ntop(socket.AF_INET6, frame[22:38])] += 1

    def close(self) -> None:
        """Stops counting."""
        self._socket.close()


@contextmanager
def on_the_wire(gateway: Gateway, tenant: Tenant) -> Iterator[Wire]:
    """A `Wire` that is closed at the end."""
    wire = Wire(gateway, tenant)
    try:
        yield wire
    finally:
        wire.close()


def counted(gateway: Gateway, tenant: Tenant) -> dict[str, int]:
    """Verdict → packets of a segment, by the metrics."""
    start = f'portward_packets_total{{segment="{tenant.segment}",verdict="'
    found = gateway.agent.metrics().items()
    return {name.removeprefix(start)[:-2]: int(value) for name, value in found if name.startswith(start) and value}


def counted_for(gateway: Gateway, id_: UUID) -> dict[str, int]:
    """Verdict → packets of a subscription, by the metrics."""
    start = f'portward_subscription_packets_total{{subscription="{id_}",verdict="'
    found = gateway.agent.metrics().items()
    return {name.removeprefix(start)[:-2]: int(value) for name, value in found if name.startswith(start) and value}


def connect(gateway: Gateway, tenant: Tenant, family: int) -> tuple[str, float]:
    """Tries to connect to the Internet side; gives the result as a word, and the seconds until it was known."""
    with namespaces.inside(gateway.lab.home(tenant)):
        client = socket.socket(family, socket.SOCK_STREAM)
    client.settimeout(10.0)
    began = time.monotonic()
    try:
        client.connect((MAIL4 if family == socket.AF_INET else MAIL6, 25))
        came = "connected"
    except ConnectionRefusedError:
        came = "refused"
    except TimeoutError:
        came = "timed out"
    finally:
        client.close()
    return came, time.monotonic() - began


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def test_every_connection_of_a_rejected_source_is_refused_and_counted(make_gateway, family: int) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(verdicts={"refuse_with": "reject"})
    id_ = gateway.source(FABRIKAM, _SOURCE4 if family == socket.AF_INET else _SOURCE6, DENIED)
    with on_the_wire(gateway, FABRIKAM) as wire:
        tries = []
        for number in range(60):
            tries.append(connect(gateway, FABRIKAM, family))
            time.sleep(max(0.0, 0.05 - tries[-1][1]) if number % 2 else 0.0)  # pause: the pace of the connections
        assert Counter(came for came, _ in tries) == {"refused": 60}
        sent = wire.sources().total()
        assert sent >= 60
        until(lambda: counted(gateway, FABRIKAM) == {"reject": sent}, f"{sent} packets counted by segment")
        assert counted_for(gateway, id_) == {"reject": sent}


def test_a_flood_of_a_rejected_source_is_answered_within_its_budget_and_counted_whole(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(verdicts={"refuse_with": "reject"}, queue={"source_resets": 5})
    id_ = gateway.source(FABRIKAM, _SOURCE4, DENIED)
    with on_the_wire(gateway, FABRIKAM) as wire:
        assert connect(gateway, FABRIKAM, socket.AF_INET)[0] == "refused"
        packet = segment(_SOURCE4)
        for _ in range(2_000):
            gateway.senders[FABRIKAM].send(packet)
        # The kernel may drop some of the 2,000 before the gateway's interface. Neither side counts these.
        until(
            lambda: counted(gateway, FABRIKAM) == {"reject": wire.sources().total()},
            "the flood counted by segment",
        )
        sent = wire.sources().total()
        assert sent > 500
        assert counted_for(gateway, id_) == {"reject": sent}
        metrics = gateway.agent.metrics()
    answered = sum(
        value for name, value in metrics.items() if name.startswith("portward_judged_packets") and "reset" in name
    )
    assert answered + metrics['portward_screen_packets_total{rule="held"}'] == sent
    assert answered <= 200, "beyond the budget nothing reaches a worker"


def test_a_flood_of_rejected_sources_takes_no_answer_from_another_segment(make_gateway) -> None:  # type: ignore[no-untyped-def]
    """FABRIKAM's flood uses up the limit that all segments share. CONTOSO's packets are answered all the same."""
    gateway = make_gateway(verdicts={"refuse_with": "reject"}, queue={"resets": 2})
    gateway.source(FABRIKAM, _SOURCE4, DENIED)
    gateway.source(CONTOSO, "10.0.0.41", DENIED)
    tries = [segment("10.0.0.41", sport=5000 + number) for number in range(20)]
    with (
        seen(gateway.lab.home(CONTOSO)) as view,
        meanwhile(lambda: gateway.senders[FABRIKAM].send(segment(_SOURCE4))),
    ):
        until(lambda: gateway.agent.metrics()['portward_screen_packets_total{rule="held"}'] > 100, "a flood")
        for packet in tries:
            gateway.senders[CONTOSO].send(packet)
        answered: set[int] = set()

        def all_answered() -> bool:
            answered.update(
                packet[TCP].dport for packet in view.packets() if TCP in packet and "R" in packet[TCP].flags
            )
            return len(answered) == len(tries)

        until(all_answered, "an answer to each", seconds=15)


class Exact:
    """A gateway, and the comparison of its counts with the wire."""

    def __init__(self, gateway: Gateway, wire: Wire) -> None:
        self.gateway, self._wire = gateway, wire

    def send(self, source: str, packets: int, flags: str = "S", pause: float = 0.002) -> None:
        """Sends packets from a source of FABRIKAM's segment, with `pause` seconds after each."""
        for _ in range(packets):
            self.gateway.senders[FABRIKAM].send(segment(source, flags))
            time.sleep(pause)  # pause: the pace of the sender

    def holds(self, sources: dict[str, UUID], *verdicts: str) -> None:
        """Waits until the metrics have as many packets as the wire: for the whole segment, and for each of these
        sources under its subscription. Then asserts that the segment's packets have no other verdicts than
        these."""
        metrics = self.gateway

        def same() -> bool:
            carried = self._wire.sources()
            return sum(counted(metrics, FABRIKAM).values()) == carried.total() and all(
                sum(counted_for(metrics, id_).values()) == carried[source] for source, id_ in sources.items()
            )

        try:
            until(same, "as many packets counted as the wire has carried", seconds=15)
        except TimeoutError:
            counts = {source: counted_for(metrics, id_) for source, id_ in sources.items()}
            raise AssertionError(
                f"{counted(metrics, FABRIKAM)}, {counts} and not {self._wire.sources()}"
            ) from None
        assert set(counted(metrics, FABRIKAM)) <= {*verdicts}


@pytest.fixture
def exact(make_gateway) -> Iterator[Exact]:  # type: ignore[no-untyped-def]
    """A gateway whose FABRIKAM segment is compared with the wire."""
    gateway = make_gateway()
    with on_the_wire(gateway, FABRIKAM) as wire:
        yield Exact(gateway, wire)


_ONE, _TWO, _SIX = "10.0.0.41", "10.0.0.42", "2001:db8:1002::43"


def test_allowed_denied_observed_and_unknown_packets_are_counted_exactly(exact: Exact) -> None:
    sources = {
        _ONE: exact.gateway.source(FABRIKAM, _ONE, ALLOWED),
        _TWO: exact.gateway.source(FABRIKAM, _TWO, DENIED),
        _SIX: exact.gateway.source(FABRIKAM, _SIX, DENIED, Mode.OBSERVE),
    }
    for source in (*sources, "10.0.0.99"):
        exact.send(source, 30)
    exact.holds(sources, "allow", "deny", "would_deny", "unknown")
    found = counted(exact.gateway, FABRIKAM)
    assert {found[verdict] for verdict in ("allow", "deny", "would_deny", "unknown")} == {30}


def test_a_revocation_in_the_midst_of_a_transfer_loses_no_packet(exact: Exact) -> None:
    """The cached verdict is deleted between two readings of its counter. The packets since the last one must
    count."""
    id_ = exact.gateway.source(FABRIKAM, _ONE, ALLOWED)
    with meanwhile(lambda: exact.send(_ONE, 1, "PA", pause=0.0005)):
        for offer in (DENIED, ALLOWED, DENIED, ALLOWED):
            exact.gateway.agent.apply(*source_records(FABRIKAM, _ONE, offer, id_))
            time.sleep(0.3)  # pause: each policy is in force for a while
    exact.holds({_ONE: id_}, "allow", "deny")
    assert min(counted_for(exact.gateway, id_).values()) > 50, "both verdicts had a share"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_counts_nothing_twice_and_leaves_nothing_out(exact: Exact, number: int) -> None:
    """This holds for the counters of verdicts that stayed in the cache, and for packets while no agent ran."""
    gateway = exact.gateway
    sources = {_ONE: gateway.source(FABRIKAM, _ONE, ALLOWED), _TWO: gateway.source(FABRIKAM, _TWO, DENIED)}
    for source in sources:
        exact.send(source, 100)
    exact.holds(sources, "allow", "deny")
    gateway.agent.stop(number)
    for source in sources:
        exact.send(source, 20)
    gateway.agent.start()
    exact.holds(sources, "allow", "deny")
    for source in sources:
        exact.send(source, 5)
    exact.holds(sources, "allow", "deny")
    assert counted(gateway, FABRIKAM) == {"allow": 125, "deny": 125}


def test_a_restart_is_no_rise_for_prometheus(exact: Exact) -> None:
    """By the rule of `increase()`, a counter that is smaller than before has started again at 0."""
    gateway = exact.gateway
    id_ = gateway.source(FABRIKAM, _ONE, DENIED)
    exact.send(_ONE, 100)
    exact.holds({_ONE: id_}, "deny")
    # The changes delete the cached verdict, and with it the kernel's count of these 100.
    for offer in (ALLOWED, DENIED):
        gateway.agent.apply(*source_records(FABRIKAM, _ONE, offer, id_))
    exact.send(_ONE, 50)
    exact.holds({_ONE: id_}, "deny")
    scraped = [150]
    gateway.agent.stop()
    gateway.agent.start()
    exact.send(_ONE, 7)

    def settled() -> bool:
        name = f'portward_packets_total{{segment="{FABRIKAM.segment}",verdict="deny"}}'
        with suppress(OSError):  # it is not up yet
            metrics = gateway.agent.metrics()
            if name in metrics:
                scraped.append(int(metrics[name]))
        return scraped[-1] % 50 == 7

    until(settled, "all packets counted")
    rises = [now - before if now >= before else now for before, now in itertools.pairwise(scraped)]
    assert sum(rises) == 7


def test_verdicts_that_expire_lose_no_packet(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(verdicts={"allow_seconds": 4, "deny_seconds": 4})
    with on_the_wire(gateway, FABRIKAM) as wire:
        exact = Exact(gateway, wire)
        sources = {_ONE: gateway.source(FABRIKAM, _ONE, ALLOWED), _TWO: gateway.source(FABRIKAM, _TWO, DENIED)}
        for _ in range(5):
            for source in sources:
                exact.send(source, 200)
        exact.holds(sources, "allow", "deny")


def test_packets_beyond_a_segments_share_and_of_a_policy_before_are_counted(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(verdicts={"segment_sources": 16})
    with on_the_wire(gateway, FABRIKAM) as wire:
        exact = Exact(gateway, wire)
        id_ = gateway.source(FABRIKAM, "10.0.7.0/24", DENIED)
        for number in range(100):
            exact.send(f"10.0.7.{number}", 1)
        exact.holds({}, "deny")
        assert sum(counted_for(gateway, id_).values()) == 100


def test_packets_that_find_a_full_set_are_counted(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(verdicts={"sources": 16})
    with on_the_wire(gateway, FABRIKAM) as wire:
        exact = Exact(gateway, wire)
        denied = gateway.source(FABRIKAM, "10.0.7.0/24", DENIED)
        allowed = gateway.source(FABRIKAM, "2001:db8:1002:7::/64", ALLOWED)
        for number in range(1, 100):
            exact.send(f"10.0.7.{number}", 1)
            exact.send(f"2001:db8:1002:7::{number}", 1)
        exact.holds({}, "allow", "deny")
        assert (counted_for(gateway, denied), counted_for(gateway, allowed)) == ({"deny": 99}, {"allow": 99})


def test_a_source_that_is_not_cached_takes_one_place_whatever_the_policy_was(make_gateway) -> None:  # type: ignore[no-untyped-def]
    """Otherwise each change of policy would add another element for it, until the set is full."""
    gateway = make_gateway(verdicts={"sources": 16})
    with on_the_wire(gateway, FABRIKAM) as wire:
        exact = Exact(gateway, wire)
        id_ = gateway.source(FABRIKAM, "10.0.7.0/24", DENIED)
        for number in range(40):
            exact.send(f"10.0.7.{number}", 1)
        for _ in range(5):
            gateway.source(FABRIKAM, "10.0.9.1", ALLOWED)
            exact.send("10.0.7.40", 3)
        exact.holds({}, "deny")
        assert counted_for(gateway, id_) == {"deny": 55}
        assert gateway.listing("uncached4").count(" . 10.0.7.40 . ") == 1


def test_a_packet_whose_limit_is_still_to_come_is_counted(exact: Exact) -> None:
    id_, records = customer(FABRIKAM, "10.0.8.0/24")
    exact.gateway.agent.apply(*records)
    exact.send("10.0.8.1", 20)
    exact.holds({"10.0.8.1": id_}, "deferred", "rated", "throttled")
    assert counted_for(exact.gateway, id_)["deferred"] >= 1


def test_packets_over_a_segments_rate_are_counted_by_segment(make_gateway) -> None:  # type: ignore[no-untyped-def]
    gateway = make_gateway(queue={"segment_rate": 5, "segment_burst": 5})
    with on_the_wire(gateway, FABRIKAM) as wire:
        exact = Exact(gateway, wire)
        for number in range(100):
            exact.send(f"10.7.0.{number}", 1, pause=0)
        exact.holds({}, "unknown", "unjudged")
        assert counted(gateway, FABRIKAM)["unjudged"] > 50
