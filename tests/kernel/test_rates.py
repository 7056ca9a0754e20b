"""Exemptions with a rate limit: all sources of a subscription together open at most that many connections a
minute.

The limits here refill by one connection a minute. So within a test only the burst can be used.
"""

from __future__ import annotations

import re
import signal
from datetime import UTC, date, datetime
from ipaddress import ip_network
from typing import Any
from uuid import UUID, uuid4

import pytest

from kernel.conftest import LAB_KINDS, Gateway
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM, Tenant
from portward.model import Attachment, Exemption, ExemptionState, Mode, RateLimit, Record, Subscription

_GRANTED = datetime(2026, 1, 9, 12, tzinfo=UTC)
_RESTARTED = datetime(2026, 1, 10, tzinfo=UTC)
_BURST = 4
_LIMIT = RateLimit(per_minute=1, burst=_BURST)


@pytest.fixture(scope="module", params=LAB_KINDS)
def lab_kind(request: pytest.FixtureRequest) -> str:
    """Each test once with a gateway that routes, and once with one that bridges."""
    return str(request.param)


def customer(tenant: Tenant, *prefixes: str, limit: RateLimit | None = _LIMIT) -> tuple[UUID, list[Record]]:
    """A subscription whose exemption has a limit, and its sources; gives its id and the records."""
    id_ = uuid4()
    return id_, [
        Subscription(id=id_, offer="pay-as-you-go", created=date(2022, 6, 30)),
        grant(id_, limit),
        *(
            Attachment(segment=tenant.segment, address=ip_network(prefix), subscription=id_, started=_RESTARTED)
            for prefix in prefixes
        ),
    ]


def grant(id_: UUID, limit: RateLimit | None, state: ExemptionState = ExemptionState.GRANTED) -> Exemption:
    """An exemption that is in force, unless `state` says otherwise."""
    return Exemption(subscription=id_, state=state, requested=_GRANTED, decided=_GRANTED, limit=limit)


def known(gateway: Gateway, tenant: Tenant, source: str) -> None:
    """Sends packets of a source until the kernel has its limit. A worker requests the limit when it gets a
    packet."""

    def asked() -> bool:
        gateway.passes(tenant, source, "A")
        return "lets its subscription" in kernel(gateway, tenant, source)

    until(asked, f"the limit of {source} in the kernel")


def kernel(gateway: Gateway, tenant: Tenant, source: str) -> str:
    return str(explained(gateway, tenant, source)["kernel"])


def explained(gateway: Gateway, tenant: Tenant, source: str) -> dict[str, Any]:
    return gateway.agent.explain(tenant.segment, source)


def opened(gateway: Gateway, tenant: Tenant, *sources: str, attempts: int) -> int:
    """Tries to open `attempts` connections, from the sources in turn; gives how many were opened."""
    return sum(gateway.passes(tenant, sources[number % len(sources)]) for number in range(attempts))


def test_one_source_opens_as_many_connections_as_the_limit_says(gateway: Gateway) -> None:
    _, records = customer(FABRIKAM, "10.0.1.1")
    gateway.agent.apply(*records)
    assert opened(gateway, FABRIKAM, "10.0.1.1", attempts=_BURST + 3) == _BURST


def test_all_sources_of_a_subscription_share_its_limit(gateway: Gateway) -> None:
    sources = ("10.0.1.11", "10.0.1.12", "10.0.1.13", "2001:db8:1002::11")
    _, records = customer(FABRIKAM, *sources)
    gateway.agent.apply(*records)
    assert opened(gateway, FABRIKAM, *sources, attempts=2 * _BURST) == _BURST


def test_what_is_open_goes_on_beyond_the_limit(gateway: Gateway) -> None:
    _, records = customer(FABRIKAM, "10.0.1.21")
    gateway.agent.apply(*records)
    assert opened(gateway, FABRIKAM, "10.0.1.21", attempts=_BURST + 1) == _BURST
    for flags in ("A", "PA", "FA", "R", "SA"):
        assert gateway.passes(FABRIKAM, "10.0.1.21", flags)
    for flags in ("S", "SEC", "SPU", "SF"):
        assert not gateway.passes(FABRIKAM, "10.0.1.21", flags)


def test_others_are_not_limited(gateway: Gateway) -> None:
    _, limited = customer(FABRIKAM, "10.0.1.31")
    _, free = customer(FABRIKAM, "10.0.1.32", limit=None)
    _, namesake = customer(CONTOSO, "10.0.1.31")
    gateway.agent.apply(*limited, *free, *namesake)
    assert opened(gateway, FABRIKAM, "10.0.1.31", attempts=_BURST + 1) == _BURST
    assert opened(gateway, FABRIKAM, "10.0.1.32", attempts=3 * _BURST) == 3 * _BURST
    assert opened(gateway, CONTOSO, "10.0.1.31", attempts=_BURST) == _BURST


def test_a_source_within_a_prefix_is_limited_from_its_first_connection_on(gateway: Gateway) -> None:
    _, records = customer(FABRIKAM, "10.0.1.64/27", "2001:db8:1002:64::/64")
    gateway.agent.apply(*records)
    assert not gateway.passes(FABRIKAM, "10.0.1.70"), "its limit is not known yet"
    known(gateway, FABRIKAM, "10.0.1.70")
    known(gateway, FABRIKAM, "2001:db8:1002:64::70")
    assert opened(gateway, FABRIKAM, "10.0.1.70", "2001:db8:1002:64::70", attempts=_BURST + 3) == _BURST


def test_a_more_specific_prefix_of_another_customer_is_not_limited(gateway: Gateway) -> None:
    _, records = customer(FABRIKAM, "10.0.1.96/28")
    _, inside = customer(FABRIKAM, "10.0.1.100", limit=None)
    gateway.agent.apply(*records, *inside)
    known(gateway, FABRIKAM, "10.0.1.99")
    assert opened(gateway, FABRIKAM, "10.0.1.99", attempts=_BURST + 1) == _BURST
    assert opened(gateway, FABRIKAM, "10.0.1.100", attempts=_BURST + 1) == _BURST + 1


def test_internal_destinations_are_not_limited(gateway: Gateway) -> None:
    _, records = customer(FABRIKAM, "10.0.1.111")
    gateway.agent.apply(*records)
    assert opened(gateway, FABRIKAM, "10.0.1.111", attempts=_BURST + 1) == _BURST
    before = gateway.counted("throttled"), gateway.counted("internal")
    gateway.passes(FABRIKAM, "10.0.1.111", to="10.9.9.9")  # no host has this address
    assert (gateway.counted("throttled"), gateway.counted("internal")) == (before[0], before[1] + 1)


def test_a_revocation_takes_the_limit_away_with_the_exemption(gateway: Gateway) -> None:
    id_, records = customer(FABRIKAM, "10.0.1.121")
    gateway.agent.apply(*records)
    assert gateway.passes(FABRIKAM, "10.0.1.121")
    gateway.agent.apply(grant(id_, None, ExemptionState.REVOKED))
    for flags in ("S", "A", "PA"):
        assert not gateway.passes(FABRIKAM, "10.0.1.121", flags)
    assert "lets its subscription" not in kernel(gateway, FABRIKAM, "10.0.1.121")


def test_another_limit_counts_at_once(gateway: Gateway) -> None:
    id_, records = customer(FABRIKAM, "10.0.1.131")
    gateway.agent.apply(*records)
    assert opened(gateway, FABRIKAM, "10.0.1.131", attempts=_BURST + 1) == _BURST
    gateway.agent.apply(grant(id_, RateLimit(per_minute=1, burst=2)))
    assert opened(gateway, FABRIKAM, "10.0.1.131", attempts=4) == 2
    gateway.agent.apply(grant(id_, None))
    assert opened(gateway, FABRIKAM, "10.0.1.131", attempts=8) == 8


def test_a_restart_of_a_machine_does_not_fill_the_bucket_again(gateway: Gateway) -> None:
    _, records = customer(FABRIKAM, "10.0.1.141")
    gateway.agent.apply(*records)
    assert opened(gateway, FABRIKAM, "10.0.1.141", attempts=_BURST + 1) == _BURST
    attachment = records[-1]
    gateway.agent.apply(
        Attachment(
            segment=FABRIKAM.segment, address=ip_network("10.0.1.141"),
            subscription=attachment.subscription, started=datetime(2026, 1, 11, tzinfo=UTC),  # type: ignore[union-attr]
        )
    )  # fmt: skip
    assert opened(gateway, FABRIKAM, "10.0.1.141", attempts=2) == 0


def test_a_restart_of_the_agent_does_not_fill_the_bucket_again(gateway: Gateway) -> None:
    _, records = customer(FABRIKAM, "10.0.1.151")
    gateway.agent.apply(*records)
    assert opened(gateway, FABRIKAM, "10.0.1.151", attempts=_BURST + 1) == _BURST
    gateway.agent.stop(signal.SIGKILL)
    assert gateway.passes(FABRIKAM, "10.0.1.151", "A"), "without an agent what is open goes on"
    gateway.agent.start()
    assert not gateway.passes(FABRIKAM, "10.0.1.151")
    assert gateway.passes(FABRIKAM, "10.0.1.151", "A")


def test_a_limit_that_no_source_has_any_more_leaves_the_kernel(gateway: Gateway) -> None:
    id_, records = customer(FABRIKAM, "10.0.1.161", limit=RateLimit(per_minute=7, burst=9))
    gateway.agent.apply(*records)

    def there() -> bool:
        listing = gateway.lab.run(gateway.lab.gateway, "nft", "list", "limits").stdout
        return "-7-9" in listing

    assert there()
    gateway.agent.apply(grant(id_, None, ExemptionState.REVOKED))
    until(lambda: not there(), "the limit is collected")


def test_rules_that_another_program_removes_come_back_with_limits(gateway: Gateway) -> None:
    _, records = customer(FABRIKAM, "10.0.1.171")
    gateway.agent.apply(*records)
    assert gateway.passes(FABRIKAM, "10.0.1.171")
    repairs = gateway.agent.metrics()["portward_ruleset_repairs_total"]
    gateway.nft("delete", "table", gateway.family, "portward")
    until(lambda: gateway.agent.metrics()["portward_ruleset_repairs_total"] > repairs, "the ruleset is back")
    assert not gateway.passes(FABRIKAM, "10.0.1.171"), "its limit has to be asked for"
    known(gateway, FABRIKAM, "10.0.1.171")
    assert opened(gateway, FABRIKAM, "10.0.1.171", attempts=_BURST + 2) == _BURST


def test_a_source_that_another_program_takes_out_of_the_map_may_send_again(gateway: Gateway) -> None:
    _, records = customer(FABRIKAM, "10.0.1.201")
    gateway.agent.apply(*records)
    assert gateway.passes(FABRIKAM, "10.0.1.201")
    gateway.nft("flush", "map", gateway.family, "portward", "rates4")
    assert not gateway.passes(FABRIKAM, "10.0.1.201"), "its limit has to be asked for"
    known(gateway, FABRIKAM, "10.0.1.201")
    assert gateway.passes(FABRIKAM, "10.0.1.201")


def test_a_source_that_another_program_adds_to_the_map_is_taken_out(gateway: Gateway) -> None:
    _, records = customer(FABRIKAM, "10.0.1.211")
    gateway.agent.apply(*records)
    assert gateway.passes(FABRIKAM, "10.0.1.211")
    limits = gateway.nft("list", "map", gateway.family, "portward", "rates4")
    (name,) = re.findall(r'10\.0\.1\.211 : "(\S+)"', limits)
    element = f'{{ "{FABRIKAM.segment}" . 192.168.66.6 : "{name}" }}'
    gateway.nft("add", "element", gateway.family, "portward", "rates4", element)
    assert gateway.passes(FABRIKAM, "192.168.66.6", "A"), "nothing else would show that it is taken out"
    until(lambda: not gateway.passes(FABRIKAM, "192.168.66.6", "A"), "it is taken out")
    assert gateway.passes(FABRIKAM, "10.0.1.211")
    name = 'portward_divergence_total{kind="remembered"}'
    until(lambda: gateway.agent.metrics()[name] >= 1, "the difference counted")


def test_what_was_within_and_beyond_the_limit_is_counted_apart(gateway: Gateway) -> None:
    id_, records = customer(FABRIKAM, "10.0.1.181")
    gateway.agent.apply(*records)
    assert opened(gateway, FABRIKAM, "10.0.1.181", attempts=_BURST + 3) == _BURST

    def packets(verdict: str) -> float:
        name = f'portward_subscription_packets_total{{subscription="{id_}",verdict="{verdict}"}}'
        return gateway.agent.metrics().get(name, 0)

    until(lambda: packets("throttled") == 3, "three connections beyond the limit counted")
    until(lambda: packets("rated") == _BURST, "those within the limit counted")
    explanation = explained(gateway, FABRIKAM, "10.0.1.181")
    assert explanation["verdict"] == "allow"
    assert explanation["limit"] == {"per_minute": 1, "burst": _BURST}
    assert "dropped lately of this source: 3" in explanation["kernel"]


def test_where_everything_is_observed_nothing_is_limited(gateway: Gateway) -> None:
    _, records = customer(FABRIKAM, "10.0.1.191")
    observed = [
        Subscription(id=record.id, offer=record.offer, created=record.created, mode=Mode.OBSERVE)
        if isinstance(record, Subscription)
        else record
        for record in records
    ]
    gateway.agent.apply(*observed)
    assert opened(gateway, FABRIKAM, "10.0.1.191", attempts=2 * _BURST) == 2 * _BURST
