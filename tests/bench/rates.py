"""How exactly a limit of new connections holds over a minute, for one source and for fifty of one subscription,
and whether it affects other customers.

All sources send SYNs for the same minute, at even distances, and more than their limit lets through. A limit of N
a minute with a burst of B lets B + N connections through within its first minute.
"""

from __future__ import annotations

import time
from datetime import UTC, date, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Final, NamedTuple
from uuid import UUID, uuid4

from scapy.layers.inet import TCP

from bench.figures import Figure
from kernel.conftest import Gateway, running_gateway
from kernel.wire import Seen, Sender, segment
from portward.lab.topology import FABRIKAM
from portward.model import Attachment, Exemption, ExemptionState, RateLimit, Record, Subscription

_GRANTED: Final = datetime(2026, 1, 9, 12, tzinfo=UTC)
_BURST: Final = 10
_SECONDS: Final = 60.0


class _Customer(NamedTuple):
    name: str
    limit: RateLimit | None
    sources: list[str]
    per_second: float

    def records(self) -> list[Record]:
        id_ = uuid4()
        return [
            Subscription(id=id_, offer="pay-as-you-go", created=date(2022, 6, 30)),
            Exemption(
                subscription=id_,
                state=ExemptionState.GRANTED,
                requested=_GRANTED,
                decided=_GRANTED,
                limit=self.limit,
            ),
            *(_machine(source, id_) for source in self.sources),
        ]


def _machine(source: str, id_: UUID) -> Attachment:
    return Attachment(
        segment=FABRIKAM.segment,
        address=ip_network(source),
        subscription=id_,
        started=_GRANTED + timedelta(days=1),
    )


def _customers() -> list[_Customer]:
    def fifty(net: int) -> list[str]:
        return [f"10.1.{net}.{host}" for host in range(1, 41)] + [
            f"2001:db8:1002:{net}::{host:x}" for host in range(1, 11)
        ]

    def limit(rate: int) -> RateLimit:
        return RateLimit(per_minute=rate, burst=_BURST)

    return [
        _Customer("60_one_source", limit(60), ["10.1.1.1"], 4),
        _Customer("60_fifty_sources", limit(60), fifty(2), 4),
        _Customer("600_one_source", limit(600), ["10.1.3.1"], 25),
        _Customer("600_fifty_sources", limit(600), fifty(4), 25),
        _Customer("none", None, ["10.1.5.1"], 25),
    ]


def measure(folder: Path) -> list[Figure]:
    """`rate_error_percent_…`: by how much the SYNs that passed differ from the limit; and `rate_others_passed`:
    the share that passed of a customer without a limit."""
    customers = _customers()
    with running_gateway(folder) as gateway:
        gateway.agent.apply(*(record for customer in customers for record in customer.records()), confirm=True)
        sent, passed, seconds = _run(gateway, customers)
    figures = []
    for place, customer in enumerate(customers):
        if customer.limit is None:
            share = passed[place] / sent[place]
            figures.append(Figure("rate_others_passed", share, share, share, f"of {sent[place]} SYNs", ">= 1"))
            continue
        expected = _BURST + customer.limit.per_minute * seconds / 60
        error = abs(passed[place] - expected) / expected * 100
        figures.append(
            Figure(
                f"rate_error_percent_{customer.name}", error, error, error,
                f"%: {passed[place]} of {sent[place]} SYNs passed, {expected:.0f} expected", "<= 5",
            )
        )  # fmt: skip
    return figures


def _run(gateway: Gateway, customers: list[_Customer]) -> tuple[list[int], list[int], float]:
    """For each customer, the SYNs sent and the SYNs that passed; and the seconds from the first to the last."""
    sender, view = Sender(gateway.lab, FABRIKAM), Seen(gateway.lab.internet)
    sent = [0] * len(customers)
    owner: dict[int, int] = {}
    arrived: set[int] = set()

    def take() -> None:
        arrived.update(packet[TCP].seq for packet in view.packets() if TCP in packet and packet[TCP].dport == 25)

    try:
        began = time.monotonic()
        due = [began] * len(customers)
        last = began
        while (now := time.monotonic()) < began + _SECONDS:
            for place, customer in enumerate(customers):
                if due[place] <= now:
                    packet = segment(
                        customer.sources[sent[place] % len(customer.sources)], "S", sport=1024 + sent[place]
                    )
                    sender.send(packet)
                    owner[packet[TCP].seq] = place
                    sent[place] += 1
                    due[place] += 1 / customer.per_second
                    last = now
            take()
        time.sleep(0.2)  # pause: packets that are on their way arrive
        take()
    finally:
        sender.close()
        view.close()
    passed = [0] * len(customers)
    for sequence in arrived & owner.keys():
        passed[owner[sequence]] += 1
    return sent, passed, last - began
