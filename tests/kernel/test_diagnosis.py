"""`portward diagnose` on a running gateway: it reports real dropped packets by machine, and the agent's own
count."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from ipaddress import ip_network
from typing import Any
from uuid import UUID, uuid4

import pytest

from kernel.conftest import ALLOWED, DENIED, Gateway, source_records
from kernel.wire import segment
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM, Tenant
from portward.model import Attachment, Exemption, ExemptionState, RateLimit, Subscription


def diagnosed(gateway: Gateway, *arguments: str) -> dict[str, Any]:
    """The answer of `portward diagnose --json` on the gateway."""
    result = gateway.agent.portward("diagnose", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def drops(answer: dict[str, Any], address: str) -> dict[str, Any]:
    """The counts of a machine's dropped packets, from an answer of `diagnose`."""
    (found,) = [machine["drops"] for machine in answer["facts"]["machines"] if machine["address"] == address]
    return dict(found)


PASSES_STILL = "At this moment these connections may pass all the same, since our block is not in force"
FAULT = "That is a fault on our side"
NOT_SEEN = "at this moment, we could not see."


def outcomes(answer: dict[str, Any]) -> list[str]:
    """The outcome of each machine, from an answer of `diagnose`."""
    return [machine["outcome"] for machine in answer["facts"]["machines"]]


def bridge(gateway: Gateway, tenant: Tenant) -> None:
    """Makes the tenant's segment a port of a bridge, and waits until the agent has seen that."""
    namespaces.batch(
        gateway.lab.gateway,
        ["link add br9 type bridge", f"link set {tenant.segment} master br9", "link set br9 up"],
    )
    until(lambda: "STACKED" in gateway.agent.portward("status").stdout, "the agent has seen the bridge")


def test_dropped_packets_are_reported_by_machine(gateway: Gateway) -> None:
    id_ = uuid4()
    owner = Subscription(id=id_, name="diagnosed", offer=DENIED, created=date(2022, 6, 30), payment_history=True)
    places = ("10.0.0.140", "10.0.0.141", "10.0.0.144/28", "2001:db8:1002::d1a")
    gateway.agent.apply(
        owner,
        *(Attachment(segment=FABRIKAM.segment, address=ip_network(place), subscription=id_) for place in places),
    )
    other = gateway.source(FABRIKAM, "10.0.0.146", DENIED)
    before = drops(diagnosed(gateway, str(id_)), "10.0.0.140")
    assert (before["refused"], before["sources"]) == (0, 0)
    for source in ("10.0.0.140", "10.0.0.145", "10.0.0.146", "10.0.0.147", "2001:db8:1002::d1a"):
        for _ in range(3):
            assert not gateway.passes(FABRIKAM, source)
    answer = diagnosed(gateway, "diagnosed")
    assert answer["facts"]["place"] == "table"
    assert answer["facts"]["kernel"] == "asked"
    assert drops(answer, "10.0.0.140")["refused"] == 3
    assert drops(answer, "10.0.0.141")["refused"] == 0
    # The counts of the prefix leave out the address in it that belongs to another customer.
    wide = drops(answer, "10.0.0.144/28")
    assert (wide["refused"], wide["sources"]) == (6, 2)
    assert drops(answer, "2001:db8:1002::d1a")["refused"] == 3
    assert drops(diagnosed(gateway, str(other)), "10.0.0.146")["refused"] == 3
    until(
        lambda: (diagnosed(gateway, str(id_))["facts"]["since_start"] or {}).get("refused") == 12,
        "the agent's own counters, read every five seconds",
    )
    result = gateway.agent.portward("diagnose", FABRIKAM.segment, "10.0.0.147", "--lang", "fr")
    assert "12 paquets refusés, de 4 sources, au cours des dernières 60" in result.stdout
    assert "→" in result.stdout
    assert "votre machine 10.0.0.147" in result.stdout


def test_an_unknown_source_is_reported_as_unknown(gateway: Gateway) -> None:
    assert not gateway.passes(FABRIKAM, "192.168.78.1")
    answer = diagnosed(gateway, FABRIKAM.segment, "192.168.78.1")
    assert answer["facts"]["id"] is None
    assert answer["facts"]["nobody"]["nobody"]
    assert [matter["ways"] for matter in answer["matters"]] == [[["tell-subscription"]]]


def test_connections_beyond_a_limit_are_reported(gateway: Gateway) -> None:
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
    until(lambda: drops(diagnosed(gateway, str(id_)), "10.0.0.160")["beyond_limit"] >= 4, "four beyond the limit")
    answer = diagnosed(gateway, str(id_))
    assert answer["matters"][0]["ways"] == [["stay-within-limit"], ["relay"]]
    assert "1 new connection a minute, and 2 at once" in answer["customer"]


def test_an_observed_gateway_says_that_packets_pass(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway(mode="observe")
    id_: UUID = gateway.source(FABRIKAM, "10.0.0.170", DENIED)
    assert gateway.passes(FABRIKAM, "10.0.0.170")
    assert gateway.passes(FABRIKAM, "10.0.0.170")
    answer = diagnosed(gateway, str(id_))
    assert answer["matters"][0]["observed"]
    assert drops(answer, "10.0.0.170")["observed"] == 2
    assert drops(answer, "10.0.0.170")["refused"] == 0
    assert answer["facts"]["here"] == "observes"


def test_an_allowed_source_is_not_reported_as_open_while_a_bridge_takes_its_packets(
    make_gateway: Callable[..., Gateway],
) -> None:
    gateway = make_gateway()
    id_ = gateway.source(CONTOSO, "10.0.0.81", ALLOWED)
    gateway.agent.apply(
        Attachment(segment=FABRIKAM.segment, address=ip_network("10.0.0.81"), subscription=id_),
    )
    answer = diagnosed(gateway, str(id_))
    assert (outcomes(answer), answer["facts"]["here"]) == (["as-policy", "as-policy"], "judges")
    assert "Nothing is blocked here" in answer["customer"]
    bridge(gateway, CONTOSO)
    assert not gateway.passes(CONTOSO, "10.0.0.81")
    assert gateway.passes(FABRIKAM, "10.0.0.81")
    answer = diagnosed(gateway, CONTOSO.segment, "10.0.0.81")
    assert [machine["segment"] for machine in answer["facts"]["machines"]] == [CONTOSO.segment, FABRIKAM.segment]
    assert outcomes(answer) == ["shut", "as-policy"]
    assert [matter["ways"] for matter in answer["matters"]] == [[["gateway"]], [["none"]]]
    assert answer["facts"]["places"] == {CONTOSO.segment: "stacked", FABRIKAM.segment: "judges"}
    before, after = answer["customer"].split("Nothing is blocked here")
    assert FAULT in before
    assert FAULT not in after


def test_a_denied_source_is_not_reported_as_blocked_while_an_older_verdict_lets_it_pass(
    make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent was killed, its worker still answers by the old table, and the store has a newer policy."""
    monkeypatch.setenv("PORTWARD_WORKERS_STAY", "60")
    gateway = make_gateway()
    id_ = gateway.source(FABRIKAM, "10.0.0.82", ALLOWED)
    assert gateway.passes(FABRIKAM, "10.0.0.82")
    gateway.agent.stop(signal.SIGKILL)
    gateway.agent.process = None
    gateway.agent.apply(*source_records(FABRIKAM, "10.0.0.82", DENIED, id_))
    assert gateway.passes(FABRIKAM, "10.0.0.82")
    answer = diagnosed(gateway, str(id_))
    assert (outcomes(answer), answer["facts"]["here"]) == (["open"], "unwatched")
    assert PASSES_STILL in answer["customer"]
    for name in ("allow4", "rates4"):
        kind = "map" if name == "rates4" else "set"
        gateway.lab.run(gateway.lab.gateway, "nft", "flush", kind, "inet", "portward", name)
    assert outcomes(diagnosed(gateway, str(id_))) == ["open"], "the worker goes by the table that was left"
    assert gateway.passes(FABRIKAM, "10.0.0.82")
    printed = gateway.agent.portward("diagnose", str(id_)).stdout
    assert "this gateway enforces the policy" not in printed
    assert "NOT KNOWN: no agent reports on this gateway" in printed


def test_while_the_agent_does_not_report_a_letter_says_only_the_policy(
    make_gateway: Callable[..., Gateway],
) -> None:
    """It also says that the store has a revision that the agent has not loaded yet."""
    gateway = make_gateway()
    id_ = gateway.source(FABRIKAM, "10.0.0.83", DENIED)
    assert gateway.agent.process is not None
    gateway.agent.process.send_signal(signal.SIGSTOP)
    try:
        printed = gateway.agent.portward("exemption", "request", str(id_), "--json").stdout
        revision = json.loads(printed)["revision"]
        until(lambda: diagnosed(gateway, str(id_))["facts"]["here"] == "unwatched", "the agent is seen as silent")
        answer = diagnosed(gateway, str(id_))
        assert outcomes(answer) == ["unknown"]
        assert NOT_SEEN in answer["customer"]
        assert answer["facts"]["behind"] == f"the store is at revision {revision}"
        assert answer["remarks"] == [
            f"the store is at revision {revision}, which this gateway has not taken in: see `portward status`"
        ]
        assert "A change of our records is not in force yet" in answer["customer"]
    finally:
        gateway.agent.process.send_signal(signal.SIGCONT)
    until(lambda: outcomes(diagnosed(gateway, str(id_))) == ["as-policy"], "the agent reports again")


def test_of_a_segment_that_is_not_here_a_letter_says_only_the_policy(gateway: Gateway) -> None:
    answer = diagnosed(gateway, "vni7999", "10.0.0.4")
    assert answer["facts"]["here"] is None
    assert NOT_SEEN in answer["customer"]
    printed = gateway.agent.portward("diagnose", "vni7999", "10.0.0.4").stdout
    assert "not known: no segment in question is an interface of this host now" in printed
