"""`portward diagnose` on a running gateway: real packets that were dropped, by machine, and the agent's count."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from ipaddress import ip_network
from typing import Any
from uuid import UUID, uuid4

from kernel.conftest import DENIED, Gateway
from kernel.wire import segment
from portward.lab.agent import until
from portward.lab.topology import FABRIKAM
from portward.model import Attachment, Exemption, ExemptionState, RateLimit, Subscription


def told(gateway: Gateway, *arguments: str) -> dict[str, Any]:
    """What `diagnose --json` says on the gateway."""
    result = gateway.agent.portward("diagnose", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def drops(answer: dict[str, Any], address: str) -> dict[str, Any]:
    """What was dropped of one machine."""
    (found,) = [machine["drops"] for machine in answer["facts"]["machines"] if machine["address"] == address]
    return dict(found)


def test_dropped_packets_are_told_by_machine(gateway: Gateway) -> None:
    id_ = uuid4()
    owner = Subscription(id=id_, name="diagnosed", offer=DENIED, created=date(2022, 6, 30), payment_history=True)
    places = ("10.0.0.140", "10.0.0.141", "10.0.0.144/28", "2001:db8:1002::d1a")
    gateway.agent.apply(
        owner,
        *(Attachment(segment=FABRIKAM.segment, address=ip_network(place), subscription=id_) for place in places),
    )
    other = gateway.source(FABRIKAM, "10.0.0.146", DENIED)
    before = drops(told(gateway, str(id_)), "10.0.0.140")
    assert (before["refused"], before["sources"]) == (0, 0)
    for source in ("10.0.0.140", "10.0.0.145", "10.0.0.146", "10.0.0.147", "2001:db8:1002::d1a"):
        for _ in range(3):
            assert not gateway.passes(FABRIKAM, source)
    answer = told(gateway, "diagnosed")
    assert answer["facts"]["place"] == "table"
    assert answer["facts"]["kernel"] == "asked"
    assert drops(answer, "10.0.0.140")["refused"] == 3
    assert drops(answer, "10.0.0.141")["refused"] == 0
    # Of the prefix without the address in it that is somebody else's.
    wide = drops(answer, "10.0.0.144/28")
    assert (wide["refused"], wide["sources"]) == (6, 2)
    assert drops(answer, "2001:db8:1002::d1a")["refused"] == 3
    assert drops(told(gateway, str(other)), "10.0.0.146")["refused"] == 3
    until(
        lambda: (told(gateway, str(id_))["facts"]["since_start"] or {}).get("refused") == 12,
        "the agent's own counters, read every five seconds",
    )
    result = gateway.agent.portward("diagnose", FABRIKAM.segment, "10.0.0.147", "--lang", "fr")
    assert "12 paquets refusés, de 4 sources, au cours des dernières 60" in result.stdout
    assert "→" in result.stdout
    assert "votre machine 10.0.0.147" in result.stdout


def test_a_source_of_nobody_is_told_as_one(gateway: Gateway) -> None:
    assert not gateway.passes(FABRIKAM, "192.168.78.1")
    answer = told(gateway, FABRIKAM.segment, "192.168.78.1")
    assert answer["facts"]["id"] is None
    assert answer["facts"]["nobody"]["nobody"]
    assert [matter["ways"] for matter in answer["matters"]] == [[["tell-subscription"]]]


def test_connections_beyond_a_limit_are_told(gateway: Gateway) -> None:
    id_, now = uuid4(), datetime.now(UTC)
    gateway.agent.apply(
        Subscription(id=id_, offer=DENIED, created=date(2022, 6, 30), payment_history=True),
        Exemption(
            subscription=id_,
            state=ExemptionState.GRANTED,
            decided=now - timedelta(hours=2),
            limit=RateLimit(per_minute=1, burst=2),
        ),
        Attachment(
            segment=FABRIKAM.segment,
            address=ip_network("10.0.0.160"),
            subscription=id_,
            started=now - timedelta(hours=1),
        ),
    )
    until(lambda: gateway.passes(FABRIKAM, "10.0.0.160"), "the source is within its limit")
    for number in range(6):
        gateway.senders[FABRIKAM].send(segment("10.0.0.160", "S", sport=41000 + number))
    until(lambda: drops(told(gateway, str(id_)), "10.0.0.160")["beyond_limit"] >= 4, "four beyond the limit")
    answer = told(gateway, str(id_))
    assert answer["matters"][0]["ways"] == [["stay-within-limit"], ["relay"]]
    assert "1 new connection a minute, and 2 at once" in answer["customer"]


def test_an_observed_gateway_says_that_packets_pass(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(mode="observe")
    id_: UUID = gateway.source(FABRIKAM, "10.0.0.170", DENIED)
    assert gateway.passes(FABRIKAM, "10.0.0.170")
    assert gateway.passes(FABRIKAM, "10.0.0.170")
    answer = told(gateway, str(id_))
    assert answer["matters"][0]["observed"]
    assert drops(answer, "10.0.0.170")["observed"] == 2
    assert drops(answer, "10.0.0.170")["refused"] == 0
