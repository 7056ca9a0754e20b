"""The kernel's treatment of a packet agrees with `decide()`, for many sources, destinations and policies."""

from __future__ import annotations

import random
import time
from datetime import UTC, date, datetime, timedelta
from ipaddress import ip_address, ip_network
from uuid import uuid4

import pytest
from scapy.layers.inet import TCP
from scapy.packet import Packet

from kernel.conftest import LAB_KINDS, Gateway
from kernel.wire import Seen, segment, waiting
from portward.lab import namespaces
from portward.lab.topology import MAIL4, MAIL6, Tenant
from portward.model import (
    Address,
    Attachment,
    Exemption,
    ExemptionState,
    Mode,
    Record,
    Standing,
    Subscription,
    Workload,
)
from portward.policy import presets
from portward.policy.decide import decide

AZURE = presets.load("azure-2020")
OFFERS = [id_ for offer in AZURE.offers for id_ in offer.ids]
NOW = datetime.now(UTC)
# Destinations by address family: on the Internet, internal, and with the same first octets as an internal one.
DESTINATIONS = {
    4: [MAIL4, "10.9.0.1", "172.20.0.1", "172.32.0.1", "192.0.9.1"],
    6: [MAIL6, "fd00:9::1", "2600::1"],
}
PREFIXES = ["10.20.0.0/16", "10.20.1.0/24", "10.20.1.128/25", "2001:db8:20::/48", "2001:db8:20:1::/64"]
SOURCES = [f"10.20.{net}.{host}" for net in (0, 1) for host in (1, 127, 129, 200)]
SOURCES += [f"2001:db8:20:{net}::{host}" for net in (0, 1) for host in (1, 2)]


def random_policy(segment_: str) -> list[Record]:
    """Prefixes and hosts of one segment, under random offers, standings and modes."""
    records: list[Record] = []
    for address in [*PREFIXES, *random.sample(SOURCES, 7)]:
        id_ = uuid4()
        records.append(
            Subscription(
                id=id_,
                offer=random.choice(OFFERS),
                created=random.choice([date(2016, 1, 1), date(2022, 1, 1)]),
                standing=random.choice([*Standing, Standing.GOOD, Standing.GOOD]),
                mode=random.choice([Mode.ENFORCE, Mode.ENFORCE, Mode.ENFORCE, Mode.OBSERVE]),
            )
        )
        records.append(
            Attachment(
                segment=segment_,
                address=ip_network(address),
                subscription=id_,
                workload=random.choice([Workload.VM, Workload.VM, Workload.VM, Workload.PAAS]),
                started=random.choice([None, NOW - timedelta(days=1)]),
            )
        )
        state = random.choice([None, *ExemptionState, ExemptionState.GRANTED])
        if state is not None:
            asked = NOW - timedelta(days=random.choice([0, 2]))
            decided = None if state is ExemptionState.REQUESTED else asked
            ends = state is ExemptionState.GRANTED and asked < NOW - timedelta(days=1)
            until = random.choice([None, None, NOW - timedelta(hours=1)]) if ends else None
            records.append(Exemption(subscription=id_, state=state, requested=asked, decided=decided, until=until))
    return records


def passes(records: list[Record], segment_: str, source: Address, destination: Address) -> bool:
    """Whether the policy lets a packet pass, derived from the records by `decide()`."""
    covering = [
        record
        for record in records
        if isinstance(record, Attachment)
        and record.segment == segment_
        and record.address.version == source.version
        and source in record.address
    ]
    best = max(covering, key=lambda record: record.address.prefixlen, default=None)
    owner = next((r for r in records if isinstance(r, Subscription) and best and r.id == best.subscription), None)
    grant = next(
        (r for r in records if isinstance(r, Exemption) and best and r.subscription == best.subscription), None
    )
    decision = decide(
        AZURE, subscription=owner, exemption=grant, attachment=best, now=datetime.now(UTC), destination=destination
    )
    return decision.allows or (owner is not None and owner.mode is Mode.OBSERVE)


def arrived(gateway: Gateway, sent: dict[int, tuple[Tenant, Packet]]) -> set[int]:
    """Sends packets; gives the sequence numbers of those that reach the Internet side."""
    view, found = Seen(gateway.lab.internet), set[int]()
    try:
        for tenant, packet in sent.values():
            gateway.senders[tenant].send(packet)
        quiet = time.monotonic()
        while time.monotonic() - quiet < 1.0 or waiting(gateway.lab.gateway):
            for packet in view.packets():
                if TCP in packet and packet[TCP].seq in sent:
                    found.add(packet[TCP].seq)
                    quiet = time.monotonic()
    finally:
        view.close()
    return found


@pytest.fixture(scope="module", params=LAB_KINDS)
def lab_kind(request: pytest.FixtureRequest) -> str:
    """Once with a gateway that routes and once with one that bridges."""
    return str(request.param)


def test_the_kernel_does_what_decide_says(gateway: Gateway) -> None:
    """Three random policies. Under each of them every packet is sent twice: a worker gives the first verdict, the
    cache the second one."""
    namespaces.batch(
        gateway.lab.router,
        [f"route replace {net} via 198.51.100.2" for net in ("10.9.0.0/16", "172.16.0.0/12")]
        + ["route replace fd00:9::/32 via 2001:db8:ffff::2"],
    )
    both = {True: 0, False: 0}
    for _ in range(3):
        records = [record for tenant in gateway.lab.tenants for record in random_policy(tenant.segment)]
        gateway.agent.apply(*records, prune=True, confirm=True)
        for _ in range(2):
            sent, expected = {}, {}
            for tenant in gateway.lab.tenants:
                for source in SOURCES:
                    for destination in DESTINATIONS[ip_address(source).version]:
                        packet = segment(source, to=destination)
                        number = packet[TCP].seq
                        sent[number] = (tenant, packet)
                        expected[number] = passes(
                            records, tenant.segment, ip_address(source), ip_address(destination)
                        )
            found = arrived(gateway, sent)
            wrong = [sent[number] for number, good in expected.items() if (number in found) is not good]
            assert not wrong, [(tenant.name, packet.src, packet.dst) for tenant, packet in wrong]
            for good in expected.values():
                both[good] += 1
    assert min(both.values()) > 50, "the policies were too much alike to show anything"
