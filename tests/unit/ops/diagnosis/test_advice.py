"""The next step is right for every offer, state, workload and standing, and no step contradicts another."""

from __future__ import annotations

import itertools
from datetime import date, timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from portward.exemptions.lifecycle import ANTI_FRAUD, SELF_SERVICE
from portward.model import RateLimit, Reason, Standing, Workload
from portward.ops.diagnosis.advice import Matter, Step, in_order, matters
from portward.ops.diagnosis.facts import Drops
from portward.policy import presets
from portward.policy.preset import ExemptionPath
from unit.ops.diagnosis.samples import (
    AFTER,
    BEFORE,
    GRANTED,
    NOW,
    State,
    attachment,
    exemption,
    facts,
    subscription,
)

AZURE = presets.load("azure-2020")
OFFERS = {
    ExemptionPath.NOT_NEEDED: "enterprise-agreement",
    ExemptionPath.SELF_SERVICE: "pay-as-you-go",
    ExemptionPath.REVIEW: "azure-sponsorship",
    ExemptionPath.NEVER: "free-trial",
}
NONE, RELAY, WAIT, RESTART = Step.NONE, Step.RELAY, Step.WAIT, Step.RESTART
AFTER_GRANT, SELF, REVIEW = Step.RESTART_AFTER_GRANT, Step.ASK_SELF_SERVICE, Step.ASK_REVIEW
OTHER, RIGHT, VM = Step.OTHER_SUBSCRIPTION, Step.PUT_RIGHT, Step.VIRTUAL_MACHINE

_ASKING = {
    ExemptionPath.SELF_SERVICE: (SELF, AFTER_GRANT),
    ExemptionPath.REVIEW: (REVIEW, WAIT, AFTER_GRANT),
}
_NEVER = ((RELAY,), (OTHER,))


def expected(path: ExemptionPath, state: State) -> tuple[tuple[Step, ...], ...]:
    """The ways for a virtual machine that was last started before the grant, with the account in order, written a
    second time by hand."""
    if path is ExemptionPath.NOT_NEEDED:
        return ((NONE,),)
    if path is ExemptionPath.NEVER:
        return _NEVER
    asking = _ASKING[path]
    return {
        State.NONE: ((RELAY,), asking),
        State.REQUESTED: ((WAIT, AFTER_GRANT), (RELAY,)),
        State.GRANTED: ((RESTART,),),
        State.REJECTED: ((RELAY,), (RIGHT, *asking)),
        State.REVOKED: ((RELAY,), (RIGHT, *asking)),
        State.EXPIRED: ((RELAY,), asking),
    }[state]


def only(preset_name: str, offer: str, state: State, **more: object) -> Matter:
    """The matter of an account with one virtual machine."""
    preset = presets.load(preset_name)
    (found,) = matters(preset, facts(preset, subscription(offer, **more), exemption(state), attachment()))
    return found


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("path", ExemptionPath)
def test_each_state_on_each_path_has_its_next_step(path: ExemptionPath, state: State) -> None:
    assert only("azure-2020", OFFERS[path], state).ways == expected(path, state)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("path", ExemptionPath)
def test_a_disabled_account_is_put_in_order_before_anything_else(path: ExemptionPath, state: State) -> None:
    found = only("azure-2020", OFFERS[path], state, standing=Standing.DISABLED)
    assert found.ways == ((Step.SETTLE_ACCOUNT,),)


@pytest.mark.parametrize("state", [State.NONE, State.EXPIRED, State.REJECTED, State.REVOKED])
@pytest.mark.parametrize("standing", [Standing.GOOD, Standing.PAST_DUE])
@pytest.mark.parametrize("paid", [True, False])
def test_self_service_is_asked_once_the_account_qualifies(state: State, standing: Standing, paid: bool) -> None:
    way = only("azure-2020", "csp", state, standing=standing, payment_history=paid).ways[-1]
    assert (Step.SETTLE_ACCOUNT in way) == (standing is Standing.PAST_DUE)
    assert (Step.PAY_INVOICE in way) == (not paid)
    assert way[-2:] == (SELF, AFTER_GRANT)


def test_a_review_does_not_look_at_payments_first() -> None:
    way = only("azure-2020", "azure-sponsorship", State.NONE, standing=Standing.PAST_DUE, payment_history=False)
    assert way.ways == ((RELAY,), (REVIEW, WAIT, AFTER_GRANT))


def test_what_self_service_rejected_needs_no_more_than_what_the_account_lacks_now() -> None:
    rejected = exemption(State.REJECTED, by=SELF_SERVICE, reason="whatever it was")
    (found,) = matters(AZURE, facts(AZURE, subscription("csp"), rejected, attachment()))
    assert found.ways == ((RELAY,), (SELF, AFTER_GRANT))
    checked = exemption(State.REJECTED, by=ANTI_FRAUD, reason="a list of names")
    (found,) = matters(AZURE, facts(AZURE, subscription("azure-sponsorship"), checked, attachment()))
    assert found.ways[-1][0] is RIGHT


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("path", ExemptionPath)
def test_a_platform_service_is_led_to_what_may_send(path: ExemptionPath, state: State) -> None:
    owner = subscription(OFFERS[path])
    (found,) = matters(AZURE, facts(AZURE, owner, exemption(state), attachment(workload=Workload.PAAS)))
    assert found.reason is Reason.DENIED_PAAS
    assert found.ways[0] == (RELAY,)
    (way,) = found.ways[1:]
    machine = expected(path, state)
    if path is ExemptionPath.NEVER:
        assert way == (OTHER, VM)
    elif machine == ((NONE,),):
        assert way == (VM,)
    elif state is State.GRANTED:
        assert way == (VM,), "one that is started now is started after the grant"
    else:
        assert way == (VM, *next(one for one in machine if one != (RELAY,)))


@pytest.mark.parametrize(
    ("started", "ways"), [(BEFORE, ((RESTART,),)), (AFTER, ((NONE,),)), (None, ((RESTART,),))]
)
def test_a_grant_wants_a_restart_of_those_not_started_since(started: Any, ways: object) -> None:
    (found,) = matters(
        AZURE, facts(AZURE, subscription("csp"), exemption(State.GRANTED), attachment(started=started))
    )
    assert found.ways == ways


def test_a_grant_without_a_date_is_ours_to_record_since_no_restart_helps() -> None:
    (found,) = matters(
        AZURE, facts(AZURE, subscription("csp"), exemption(State.GRANTED, decided=None), attachment(started=AFTER))
    )
    assert found.ways == ((Step.RECORD_GRANT,), (RELAY,))


def test_a_preset_without_restarts_never_asks_for_one() -> None:
    for state in State:
        steps = set(itertools.chain(*only("scaleway", "account", state).ways))
        assert not steps & {RESTART, AFTER_GRANT}
    assert only("scaleway", "account", State.GRANTED).ways == ((NONE,),)


def test_if_587_is_enforced_an_api_takes_the_relays_place() -> None:
    assert only("digitalocean", "account", State.NONE).ways == ((Step.API,),)
    assert only("hetzner", "account", State.NONE).ways[0] == (RELAY,)


def test_an_old_subscription_has_nothing_to_do() -> None:
    found = only("azure-2020", "free-trial", State.REJECTED, created=date(2017, 1, 1))
    assert (found.reason, found.ways) == (Reason.ALLOWED_GRANDFATHERED, ((NONE,),))


def test_an_offer_that_the_preset_does_not_know_can_never_be_exempt() -> None:
    assert only("azure-2020", "no-such-offer", State.GRANTED).ways == _NEVER


def test_a_source_or_an_account_without_records_is_to_be_found() -> None:
    for id_ in (None, subscription("csp").id):
        (found,) = matters(AZURE, facts(AZURE, None, None, id=id_))
        assert found.ways == ((Step.TELL_SUBSCRIPTION,),)


def test_an_account_without_machines_gets_the_steps_for_a_machine() -> None:
    (found,) = matters(AZURE, facts(AZURE, subscription("csp"), exemption(State.NONE)))
    assert found.ways == expected(ExemptionPath.SELF_SERVICE, State.NONE)
    (found,) = matters(AZURE, facts(AZURE, subscription("csp"), exemption(State.GRANTED)))
    # It is unknown whether mail of a machine without a record passes.
    assert (found.reason, found.ways) == (Reason.ALLOWED_EXEMPT, ((Step.LOOK,),))


def test_new_connections_beyond_a_limit_are_to_be_spread_or_relayed() -> None:
    granted = exemption(State.GRANTED, limit=RateLimit(per_minute=30))
    known = facts(AZURE, subscription("csp"), granted, attachment(started=AFTER))
    for beyond, ways in ((0, ((NONE,),)), (3, ((Step.STAY_WITHIN_LIMIT,), (RELAY,)))):
        machine = replace(known.machines[0], drops=Drops(beyond_limit=beyond))
        (found,) = matters(AZURE, replace(known, machines=(machine,)))
        assert (found.ways, found.beyond_limit) == (ways, beyond)


def test_a_mixed_account_has_a_matter_for_each_reason_and_the_asked_one_first() -> None:
    owner, granted = subscription("csp"), exemption(State.GRANTED)
    machines = (
        attachment("10.0.0.9", AFTER),
        attachment("10.0.0.7", BEFORE),
        attachment("10.0.0.5", None),
        attachment("10.0.0.8", AFTER, workload=Workload.PAAS),
    )
    known = facts(AZURE, owner, granted, *machines)
    found = matters(AZURE, replace(known, machines=in_order(known.machines)))
    assert [(one.reason, [str(m.address.network_address) for m in one.machines]) for one in found] == [
        (Reason.DENIED_RESTART_REQUIRED, ["10.0.0.5", "10.0.0.7"]),
        (Reason.DENIED_PAAS, ["10.0.0.8"]),
        (Reason.ALLOWED_EXEMPT, ["10.0.0.9"]),
    ]
    first = in_order(known.machines, known.machines[0])
    assert first[0] is known.machines[0]
    assert [m.reason for m in first[1:]] == sorted(
        (m.reason for m in known.machines[1:]), key=[one.reason for one in found].index
    )


@pytest.mark.parametrize("name", presets.bundled())
def test_no_step_contradicts_another(name: str) -> None:
    preset = presets.load(name)
    offers = [id_ for offer in preset.offers for id_ in offer.ids] + ["an-unknown-offer"]
    cases = itertools.product(offers, State, Workload, Standing, (True, False), (BEFORE, AFTER, None))
    for offer, state, workload, standing, paid, started in cases:
        owner = subscription(offer, standing=standing, payment_history=paid)
        known = facts(preset, owner, exemption(state), attachment(started=started, workload=workload))
        (found,) = matters(preset, known)
        case, steps = (name, offer, state, workload, standing, paid, started), list(itertools.chain(*found.ways))
        assert found.ways, case
        assert (NONE in steps) == (found.reason.allows), case
        assert NONE not in steps or steps == [NONE], case
        assert len(steps) == len(set(steps)), case
        assert not {SELF, REVIEW, OTHER} <= set(steps), case
        assert not ({SELF, REVIEW} & set(steps) and OTHER in steps), case
        assert (Step.RELAY in steps) <= (587 not in preset.ports), case
        assert (Step.API in steps) <= (587 in preset.ports), case
        assert ({RESTART, AFTER_GRANT} & set(steps) != set()) <= bool(preset.restart), case
        known_offer = preset.offer(offer)
        asks = known_offer is not None and known_offer.exemption in _ASKING
        assert bool({SELF, REVIEW} & set(steps)) <= asks, case
        assert (OTHER in steps) <= (not asks), case


def test_a_start_that_is_recorded_for_later_does_not_count_yet() -> None:
    later = attachment(started=NOW + timedelta(hours=1))
    (found,) = matters(AZURE, facts(AZURE, subscription("csp"), exemption(State.GRANTED), later))
    assert found.ways == ((RESTART,),)
    assert GRANTED < NOW
