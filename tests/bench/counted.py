"""Packets sent = packets counted by subscription, exactly, while no element expires."""

from __future__ import annotations

import random
from pathlib import Path
from uuid import uuid4

from bench.figures import Figure
from kernel.conftest import ALLOWED, DENIED, running_gateway, source_records
from kernel.wire import segment
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM
from portward.model import Record


def measure(folder: Path, packets: int = 50_000) -> list[Figure]:
    """`counted_minus_sent` over packets of 40 sources of both customers, allowed and denied, in random order."""
    with running_gateway(folder, verdicts={"allow_seconds": 600, "deny_seconds": 600}) as gateway:
        sources = []
        records: list[Record] = []
        for number in range(40):
            tenant = (CONTOSO, FABRIKAM)[number % 2]
            address = f"10.0.0.{100 + number}" if number % 4 < 2 else f"2001:db8:{tenant.vni}::{number:x}"
            sources.append((tenant, address))
            records += source_records(tenant, address, (ALLOWED, DENIED)[number % 3 == 0], uuid4())
        gateway.agent.apply(*records)
        frames = {source: segment(source[1], "A") for source in sources}
        for number in range(packets):
            source = random.choice(sources)
            gateway.senders[source[0]].send(frames[source])
            if number % 500 == 0:
                # The first packets of each source wait in the queue. If it overflows, it drops packets that no
                # element counts.
                until(lambda: waiting(gateway.agent.metrics()) == 0, "the queue is empty")

        def counted() -> float:
            return sum(
                value
                for name, value in gateway.agent.metrics().items()
                if name.startswith("portward_subscription_packets_total")
            )

        until(lambda: counted() >= packets, f"{packets} packets counted", seconds=15)
        difference = counted() - packets
    return [
        Figure("counted_minus_sent", abs(difference), 0, abs(difference), f"packets of {packets}", "<= 0"),
    ]


def waiting(metrics: dict[str, float]) -> float:
    """Packets that wait in the queues, by the newest snapshot."""
    return sum(value for name, value in metrics.items() if name.startswith("portward_queue_waiting"))
