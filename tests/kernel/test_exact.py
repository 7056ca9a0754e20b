"""What the metrics count is what the wire carried, packet for packet, by segment and by subscription."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import pytest

from kernel.conftest import DENIED, Gateway
from kernel.wire import segment
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import FABRIKAM, MAIL4, MAIL6, Tenant

_ALL = 0x0003  # ETH_P_ALL
_SOURCE4, _SOURCE6 = FABRIKAM.address4, FABRIKAM.address6


class Wire:
    """Packets from a segment to TCP port 25, as they come to the gateway, counted by source before any rule."""

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
    """Tries to connect to the Internet side: what came of it, and the seconds until it was known."""
    with namespaces.inside(gateway.lab.home(tenant)):
        client = socket.socket(family, socket.SOCK_STREAM)
    client.settimeout(1.0)
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
        # The kernel may drop some before the gateway, where nobody counts.
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
