"""Accounts in every state, for the tests of the diagnosis."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from ipaddress import ip_network
from typing import Any
from uuid import UUID

from msgspec.structs import replace

from portward.exemptions.lifecycle import State
from portward.model import Attachment, Exemption, ExemptionState, Standing, Subscription, Workload
from portward.ops.diagnosis.facts import Facts, FactSource, Machine
from portward.ops.diagnosis.outcome import outcome
from portward.ops.effect import Policy, handling, now
from portward.ops.host_state import CachedState, Host
from portward.policy.decide import decide
from portward.policy.preset import Preset

ID = UUID("11111111-0000-4000-8000-000000000002")
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
GRANTED = datetime(2026, 1, 9, 12, tzinfo=UTC)
BEFORE, AFTER = GRANTED - timedelta(days=8), GRANTED + timedelta(days=8)
ENFORCES, NOTHING_CACHED = Host(), CachedState()
REASON = "the terms of use were broken"


def subscription(offer: str, **more: Any) -> Subscription:
    """A subscription of 2022, in good standing and with a payment history."""
    fields = {"name": "fabrikam", "created": date(2022, 6, 30), "payment_history": True, **more}
    return Subscription(id=ID, offer=offer, **fields)


def exemption(state: State, **more: Any) -> Exemption | None:
    """The exemption in this state."""
    if state is State.NONE:
        return None
    fields: dict[str, Any] = {"requested": GRANTED - timedelta(days=1)}
    if state is not State.REQUESTED:
        fields["decided"] = GRANTED
    if state is State.EXPIRED:
        fields["until"] = NOW - timedelta(days=1)
    if state in (State.REJECTED, State.REVOKED):
        fields |= {"by": "ada", "reason": REASON}
    recorded = ExemptionState.GRANTED if state is State.EXPIRED else ExemptionState(state.value)
    return Exemption(subscription=ID, state=recorded, **{**fields, **more})


def attachment(address: str = "10.0.0.4", started: datetime | None = BEFORE, **more: Any) -> Attachment:
    """A machine of the subscription."""
    return Attachment(
        segment=more.pop("segment", "vni1002"),
        address=ip_network(address),
        subscription=ID,
        started=started,
        **more,
    )


def facts(
    preset: Preset,
    owner: Subscription | None,
    granted: Exemption | None,
    *attachments: Attachment,
    observed: bool = False,
    host: Host = ENFORCES,
    found: CachedState | None = NOTHING_CACHED,
    **more: Any,
) -> Facts:
    """The facts about an account with these records, on this host. `found` is the kernel's cache for each machine;
    None if their segment is not there."""
    machines = tuple(
        _met(
            host,
            found,
            Machine(
                segment=one.segment,
                address=one.address,
                reason=decide(preset, subscription=owner, exemption=granted, attachment=one, now=NOW).reason,
                workload=one.workload,
                started=one.started,
                observed=observed,
            ),
        )
        for one in attachments
    )
    place = handling(host)
    if found is not None and machines:
        more = {"here": place, "places": {one.segment: place for one in machines}, **more}
    fields = {"at": NOW, "place": FactSource.STORE, "revision": 7, "preset": preset.name, "id": ID, **more}
    return Facts(subscription=owner, exemption=granted, machines=machines, **fields)


def _met(host: Host, found: CachedState | None, machine: Machine) -> Machine:
    """The machine with what happens to it on this host."""
    passes = machine.reason.allows or machine.observed
    verdict = "allow" if machine.reason.allows else "deny"
    made = now(host, found, Policy(verdict=verdict, observed=machine.observed))
    prefix = machine.address.num_addresses > 1
    return replace(
        machine, now=made, outcome=outcome(handling(host), made, passes=passes, prefix=prefix, opens=host.opens)
    )


__all__ = ["Standing", "State", "Workload"]
