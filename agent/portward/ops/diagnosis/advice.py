"""Decides what blocks an account, and which ways lead to a solution. Pure; it works with codes, not with texts.

A *matter* is a reason with the machines that it applies to. A *way* is a sequence of steps. The ways of a matter
are alternatives; the first one is the quickest.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, TypeAlias

import msgspec

from portward.exemptions.lifecycle import SELF_SERVICE, State
from portward.model import Reason, Standing
from portward.ops.diagnosis.facts import Facts, Machine
from portward.ops.diagnosis.outcome import Blocking
from portward.policy.preset import ExemptionPath, Preset
from portward.policy.reasons import REASONS, Solution
from portward.policy.remedy import relay_is_free, some_may_send


class Step(StrEnum):
    """One thing to do. The values are fixed, because tools rely on them."""

    NONE = "none"
    STAY_WITHIN_LIMIT = "stay-within-limit"
    RELAY = "relay"
    API = "api"
    SETTLE_ACCOUNT = "settle-account"
    PAY_INVOICE = "pay-first-invoice"
    PUT_RIGHT = "put-right"
    ASK_SELF_SERVICE = "ask-self-service"
    ASK_REVIEW = "ask-review"
    WAIT = "wait"
    RESTART = "restart"
    RESTART_AFTER_GRANT = "restart-after-grant"
    RECORD_GRANT = "record-grant"
    VIRTUAL_MACHINE = "virtual-machine"
    OTHER_SUBSCRIPTION = "other-subscription"
    TELL_SUBSCRIPTION = "tell-subscription"
    GATEWAY = "gateway"
    LOOK = "look-at-gateway"


Way: TypeAlias = tuple[Step, ...]

_URGENCY: Final = tuple(REASONS)
# Outcomes that differ from the policy come first.
_OUTCOMES: Final = (Blocking.SHUT, Blocking.OPEN, Blocking.UNKNOWN, Blocking.AS_POLICY)


class Matter(msgspec.Struct, frozen=True):
    """A reason, the machines with this reason and the same outcome, and the ways to a solution. `observed`: the
    machines pass nevertheless, because the rule is only observed."""

    reason: Reason
    machines: tuple[Machine, ...]
    ways: tuple[Way, ...]
    outcome: Blocking
    observed: bool = False

    @property
    def beyond_limit(self) -> int:
        """New connections of its machines that the kernel dropped beyond the rate limit within about a minute."""
        return sum(machine.drops.beyond_limit for machine in self.machines if machine.drops)


def in_order(machines: tuple[Machine, ...], first: Machine | None = None) -> tuple[Machine, ...]:
    """The machines in order: those that need an action first, and `first` before all others."""

    def place(machine: Machine) -> tuple[object, ...]:
        network = machine.address
        return (
            machine != first,
            machine.reason.allows and machine.outcome is not Blocking.SHUT,
            _URGENCY.index(machine.reason),
            _OUTCOMES.index(machine.outcome),
            machine.observed,
            not (machine.drops and machine.drops.beyond_limit),
            machine.segment,
            network.version,
            int(network.network_address),
        )

    return tuple(sorted(machines, key=place))


def matters(preset: Preset, facts: Facts) -> tuple[Matter, ...]:
    """The matters of an account: first that of the source in question, then those that need an action.

    An account without machines has one matter, that of its virtual machines if it had any. A source of an unknown
    subscription has one, too.
    """
    if facts.subscription is None or not facts.machines:
        reason = facts.reason_of_machines(preset)
        if reason is Reason.DENIED_RESTART_REQUIRED and facts.exemption and facts.exemption.decided:
            reason = Reason.ALLOWED_EXEMPT  # for every machine that is started from now on
        without = _matter(preset, facts, reason, (), facts.outcome, observed=facts.observed)
        return _split(preset, facts, reason, facts.machines) or (without,)
    found = sorted({machine.reason for machine in facts.machines}, key=_URGENCY.index)
    made = [one for reason in found for one in _split(preset, facts, reason, facts.machines)]
    if facts.asked is not None:
        made.sort(key=lambda matter: facts.machines[0] not in matter.machines)
    return tuple(made)


def _split(preset: Preset, facts: Facts, reason: Reason, machines: tuple[Machine, ...]) -> tuple[Matter, ...]:
    """The matters of the machines with this reason: one for each outcome, and separate ones if observed."""
    kinds: dict[tuple[int, bool], list[Machine]] = {}
    for machine in machines:
        if machine.reason is reason:
            observed = machine.observed and not reason.allows
            kinds.setdefault((_OUTCOMES.index(machine.outcome), observed), []).append(machine)
    return tuple(
        _matter(preset, facts, reason, tuple(held), _OUTCOMES[number], observed=observed)
        for (number, observed), held in sorted(kinds.items(), key=lambda kind: kind[0])
    )


def _matter(
    preset: Preset,
    facts: Facts,
    reason: Reason,
    machines: tuple[Machine, ...],
    found: Blocking,
    *,
    observed: bool = False,
) -> Matter:
    if reason.allows and found is Blocking.SHUT:
        return Matter(reason, machines, ((Step.GATEWAY,),), found)
    if reason.allows and found is Blocking.UNKNOWN:
        return Matter(reason, machines, ((Step.LOOK,),), found)
    return Matter(reason, machines, _ways(preset, facts, reason, machines), found, observed)


def _ways(preset: Preset, facts: Facts, reason: Reason, machines: tuple[Machine, ...]) -> tuple[Way, ...]:
    relay: Way = (Step.RELAY if relay_is_free(preset) else Step.API,)
    solution = REASONS[reason].solution
    match solution:
        case Solution.RECORD_SOURCE:
            return ((Step.TELL_SUBSCRIPTION,),)
        case Solution.SETTLE_ACCOUNT:
            return ((Step.SETTLE_ACCOUNT,),)
        case Solution.OTHER_SUBSCRIPTION:
            return (relay, (Step.OTHER_SUBSCRIPTION,)) if some_may_send(preset) else (relay,)
        case Solution.VIRTUAL_MACHINE:
            return (relay, *_from_virtual_machines(preset, facts))
        case Solution.DECISION:
            return ((Step.WAIT, *_restart_after(preset)), relay)
        case Solution.RESTART if facts.exemption is None or facts.exemption.decided is None:
            return ((Step.RECORD_GRANT,), relay)
        case Solution.RESTART:
            return ((Step.RESTART,),)
        case Solution.FIRST_EXEMPTION | Solution.EXEMPTION_AFTER_REJECTION | Solution.EXEMPTION_AFTER_REVOCATION:
            return (relay, _asking(preset, facts))
        case Solution.NOTHING_TO_SOLVE if any(
            machine.drops and machine.drops.beyond_limit for machine in machines
        ):
            return ((Step.STAY_WITHIN_LIMIT,), relay)
        case Solution.NOTHING_TO_SOLVE:
            return ((Step.NONE,),)


def _from_virtual_machines(preset: Preset, facts: Facts) -> tuple[Way, ...]:
    """How a customer whose platform service may not send gets a virtual machine that may."""
    reason = facts.reason_of_machines(preset)
    if reason.allows:
        return ((Step.VIRTUAL_MACHINE,),)
    solution = REASONS[reason].solution
    match solution:
        case Solution.OTHER_SUBSCRIPTION:
            return ((Step.OTHER_SUBSCRIPTION, Step.VIRTUAL_MACHINE),) if some_may_send(preset) else ()
        case Solution.DECISION:
            return ((Step.VIRTUAL_MACHINE, Step.WAIT, *_restart_after(preset)),)
        case Solution.RESTART if facts.exemption and facts.exemption.decided:
            # A machine that is started from now on is started after the grant.
            return ((Step.VIRTUAL_MACHINE,),)
        case Solution.RESTART:
            return ((Step.VIRTUAL_MACHINE, Step.RECORD_GRANT),)
        case (
            Solution.FIRST_EXEMPTION | Solution.EXEMPTION_AFTER_REJECTION | Solution.EXEMPTION_AFTER_REVOCATION
            # A machine of a known account that is in order never has one of these.
            | Solution.NOTHING_TO_SOLVE | Solution.RECORD_SOURCE | Solution.SETTLE_ACCOUNT
            | Solution.VIRTUAL_MACHINE
        ):  # fmt: skip
            return ((Step.VIRTUAL_MACHINE, *_asking(preset, facts)),)


def _asking(preset: Preset, facts: Facts) -> Way:
    """The steps from the present state of the account to an exemption that is in force."""
    subscription = facts.subscription
    offer = None if subscription is None else preset.offer(subscription.offer)
    if subscription is None or offer is None:
        raise ValueError(f"no exemption can be asked for by {facts.id}")
    steps: list[Step] = []
    if _was_decided_by_a_person(facts):
        steps.append(Step.PUT_RIGHT)
    if offer.exemption is ExemptionPath.SELF_SERVICE:
        # Self-service checks these (see the preset), and rejects an account that lacks one.
        if subscription.standing is not Standing.GOOD:
            steps.append(Step.SETTLE_ACCOUNT)
        if not subscription.payment_history:
            steps.append(Step.PAY_INVOICE)
        return (*steps, Step.ASK_SELF_SERVICE, *_restart_after(preset))
    return (*steps, Step.ASK_REVIEW, Step.WAIT, *_restart_after(preset))


def _was_decided_by_a_person(facts: Facts) -> bool:
    """Whether a person rejected or revoked the exemption, so that the cause must be resolved first. Self-service
    only states what the account lacks."""
    refused = facts.state in (State.REJECTED, State.REVOKED)
    return refused and facts.exemption is not None and facts.exemption.by != SELF_SERVICE


def _restart_after(preset: Preset) -> Way:
    return (Step.RESTART_AFTER_GRANT,) if preset.restart else ()
