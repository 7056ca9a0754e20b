"""The states of an exemption: each pair of state and action, and each way to an exemption that an offer may
have."""

from __future__ import annotations

import itertools
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from msgspec.structs import replace

from portward.exemptions import lifecycle
from portward.exemptions.lifecycle import Action, Application, Case, FraudResult, RefusedError, State
from portward.model import (
    Authentication,
    Details,
    Exemption,
    ExemptionState,
    FraudCheck,
    RateLimit,
    Standing,
    Subscription,
)
from portward.policy import presets
from portward.policy.preset import ExemptionPath, Offer, ReviewQuestion

AZURE = presets.load("azure-2020")
ID = UUID("11111111-0000-4000-8000-000000000002")
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
WHY = Application("our own mail servers, with their own reputation")
PASSED = FraudResult(FraudCheck.PASS, "called back")
ALLOWED = {
    (State.NONE, Action.REQUEST), (State.REJECTED, Action.REQUEST), (State.REVOKED, Action.REQUEST),
    (State.EXPIRED, Action.REQUEST), (State.REQUESTED, Action.GRANT), (State.REQUESTED, Action.REJECT),
    (State.GRANTED, Action.REVOKE), (State.GRANTED, Action.LIMIT),
}  # fmt: skip


def subscription(offer: str = "azure-sponsorship", **more: Any) -> Subscription:
    usual = Subscription(id=ID, name="fabrikam", offer=offer, created=date(2022, 6, 30), payment_history=True)
    return replace(usual, **more)


def record(state: State) -> Exemption | None:
    """A record that is in a state at NOW."""
    if state is State.NONE:
        return None
    granted = state is State.EXPIRED or state is State.GRANTED
    return Exemption(
        subscription=ID,
        state=ExemptionState.GRANTED if granted else ExemptionState(state.value),
        requested=NOW - 9 * DAY,
        decided=None if state is State.REQUESTED else NOW - 5 * DAY,
        until=NOW - DAY if state is State.EXPIRED else None,
        by="alice",
        justification="once",
    )


def case(state: State = State.NONE, offer: str = "azure-sponsorship", **more: Any) -> Case:
    return Case(AZURE, subscription(offer, **more), record(state), NOW)


def act(action: Action, of: Case) -> Exemption:
    """Does an action, with all the arguments that it needs."""
    match action:
        case Action.REQUEST:
            return lifecycle.request(of, WHY, by="bob")
        case Action.GRANT:
            return lifecycle.grant(of, by="bob", check=PASSED)
        case Action.REJECT:
            return lifecycle.reject(of, by="bob", reason="no need is shown")
        case Action.LIMIT:
            return lifecycle.limit(of, RateLimit(per_minute=9))
        case Action.REVOKE:
            return lifecycle.revoke(of, by="bob", reason="spam")


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("action", Action)
def test_each_pair_is_allowed_or_refused_in_words(state: State, action: Action) -> None:
    if (state, action) in ALLOWED:
        assert lifecycle.refusal(state, action) is None
        after = act(action, case(state))
        assert (
            lifecycle.state_of(after, NOW)
            is {
                Action.REQUEST: State.REQUESTED,
                Action.GRANT: State.GRANTED,
                Action.REJECT: State.REJECTED,
                Action.LIMIT: State.GRANTED,
                Action.REVOKE: State.REVOKED,
            }[action]
        )
        assert (after.decided is None) is (action is Action.REQUEST)
        assert after.by == ("alice" if action is Action.LIMIT else "bob")
    else:
        with pytest.raises(RefusedError, match=r"^exemption of 11111111-\S+ \(fabrikam\): ") as refused:
            act(action, case(state))
        assert "{" not in str(refused.value)


def test_every_refusal_has_a_text_of_its_own() -> None:
    texts = [lifecycle.refusal(*pair) for pair in itertools.product(State, Action) if pair not in ALLOWED]
    assert None not in texts
    assert len(set(texts)) == len(texts)


def test_a_grant_ends_at_its_date() -> None:
    granted = Exemption(subscription=ID, state=ExemptionState.GRANTED, decided=NOW, until=NOW + DAY)
    assert lifecycle.state_of(granted, NOW + DAY - timedelta(microseconds=1)) is State.GRANTED
    assert lifecycle.state_of(granted, NOW + DAY) is State.EXPIRED


# --- the four ways ---


@pytest.mark.parametrize("offer", ["pay-as-you-go", "csp"])
def test_self_service_grants_at_once_to_who_qualifies(offer: str) -> None:
    after = lifecycle.request(case(offer=offer), Application(), by="bob")
    assert (after.state, after.decided, after.by) == (ExemptionState.GRANTED, NOW, "self-service")
    assert after.requested == NOW


@pytest.mark.parametrize("standing", [Standing.PAST_DUE, Standing.DISABLED])
def test_self_service_rejects_who_is_not_in_good_standing(standing: Standing) -> None:
    after = lifecycle.request(case(offer="pay-as-you-go", standing=standing), Application(), by="bob")
    assert after.state is ExemptionState.REJECTED
    assert f"standing is {standing.value}" in after.reason
    assert after.decided == NOW


def test_self_service_rejects_who_has_no_payment_history() -> None:
    after = lifecycle.request(case(offer="csp", payment_history=False), Application(until=NOW + DAY), by="bob")
    assert after.state is ExemptionState.REJECTED
    assert "first invoice" in after.reason
    assert after.until is None


def test_a_review_waits_for_a_person_whatever_the_standing() -> None:
    for standing in Standing:
        after = lifecycle.request(case(standing=standing, payment_history=False), WHY, by="bob")
        assert after.state is ExemptionState.REQUESTED
        assert (after.decided, after.justification) == (None, WHY.justification)


def test_a_review_needs_a_justification() -> None:
    for empty in ("", " \n"):
        with pytest.raises(RefusedError, match="justification: why mail cannot go through a relay"):
            lifecycle.request(case(), Application(empty), by="bob")


def test_a_review_asks_what_the_preset_says() -> None:
    asking = replace(
        AZURE,
        offers=(
            Offer(
                ids=("asked",), title="ReviewQuestion", exemption=ExemptionPath.REVIEW, asks=tuple(ReviewQuestion)
            ),
        ),
    )
    details = Details(
        mail_software="postfix", volume=900, reverse_dns="mx.example.net",
        authentication=(Authentication.SPF,), terms_accepted=True,
    )  # fmt: skip
    facts = Case(asking, subscription("asked"), None, NOW)
    assert lifecycle.request(facts, WHY._replace(details=details), by="bob").details == details
    for field, empty, name in (
        ("mail_software", "", "mail-software"), ("volume", None, "volume"), ("reverse_dns", " ", "reverse-dns"),
        ("authentication", (), "authentication"), ("terms_accepted", False, "terms"),
    ):  # fmt: skip
        with pytest.raises(RefusedError, match=f"wants to know more: {name}$"):
            lifecycle.request(facts, WHY._replace(details=replace(details, **{field: empty})), by="bob")
    with pytest.raises(
        RefusedError, match=r"justification: .*, mail-software, volume, reverse-dns, authentication, terms$"
    ):
        lifecycle.request(facts, Application(), by="bob")


def test_an_offer_that_can_never_be_exempt_is_refused_with_an_alternative() -> None:
    with pytest.raises(RefusedError, match=r"Free Trial can never be exempt: .*relay, or use another kind"):
        lifecycle.request(case(offer="free-trial"), WHY, by="bob")


def test_a_subscription_that_needs_no_exemption_is_refused_with_that_reason() -> None:
    with pytest.raises(RefusedError, match=r"none is needed: subscriptions of the offer Enterprise Agreement"):
        lifecycle.request(case(offer="enterprise-agreement"), WHY, by="bob")
    for offer in ("pay-as-you-go", "azure-sponsorship", "free-trial"):
        with pytest.raises(RefusedError, match=r"none is needed: .* created before 2017-11-15"):
            lifecycle.request(case(offer=offer, created=date(2017, 11, 14)), WHY, by="bob")


def test_an_offer_that_the_preset_does_not_know_has_no_way() -> None:
    with pytest.raises(RefusedError, match="does not know the offer 'gold'"):
        lifecycle.request(case(offer="gold"), WHY, by="bob")


@pytest.mark.parametrize("offer", ["free-trial", "enterprise-agreement", "gold"])
def test_a_request_of_an_offer_that_has_changed_meanwhile_is_not_granted(offer: str) -> None:
    with pytest.raises(RefusedError):
        lifecycle.grant(case(State.REQUESTED, offer), by="bob", check=PASSED)
    # A grant from before the offer changed can still be revoked.
    assert lifecycle.revoke(case(State.GRANTED, offer), by="bob", reason="spam").state is ExemptionState.REVOKED


# --- the anti-fraud check ---


@pytest.mark.parametrize(
    ("result", "state"),
    [
        (FraudCheck.PASS, ExemptionState.REQUESTED),
        (FraudCheck.REFER, ExemptionState.REQUESTED),
        (FraudCheck.FAIL, ExemptionState.REJECTED),
    ],
)
def test_what_the_check_found_is_on_record(result: FraudCheck, state: ExemptionState) -> None:
    after = lifecycle.request(case(), WHY, by="bob", check=FraudResult(result, "seen before"))
    assert (after.state, after.fraud_check, after.fraud_note) == (state, result, "seen before")
    if result is FraudCheck.FAIL:
        assert (after.by, after.reason) == ("anti-fraud check", "seen before")


def test_a_check_grants_nothing_by_itself() -> None:
    for state in (State.NONE, State.REVOKED):
        assert lifecycle.request(case(state), WHY, by="bob", check=PASSED).state is ExemptionState.REQUESTED


@pytest.mark.parametrize("on_record", [None, FraudCheck.REFER])
def test_a_grant_needs_a_check_that_was_passed(on_record: FraudCheck | None) -> None:
    pending = case(State.REQUESTED)
    assert pending.exemption is not None
    pending = pending._replace(exemption=replace(pending.exemption, fraud_check=on_record))
    with pytest.raises(RefusedError, match="needs an anti-fraud check that was passed"):
        lifecycle.grant(pending, by="bob")
    for result in (FraudCheck.FAIL, FraudCheck.REFER):
        with pytest.raises(RefusedError, match=f"on record is '{result.value}'"):
            lifecycle.grant(pending, by="bob", check=FraudResult(result))
    after = lifecycle.grant(pending, by="bob", check=PASSED)
    assert (after.fraud_check, after.fraud_note, after.by) == (FraudCheck.PASS, "called back", "bob")


def test_a_check_that_was_passed_before_is_enough() -> None:
    pending = case(State.REQUESTED)
    assert pending.exemption is not None
    pending = pending._replace(
        exemption=replace(pending.exemption, fraud_check=FraudCheck.PASS, fraud_note="known")
    )
    after = lifecycle.grant(pending, by="bob")
    assert (after.state, after.fraud_note) == (ExemptionState.GRANTED, "known")


# --- ends, limits, reasons ---


def test_the_end_that_was_asked_for_holds_unless_another_is_said() -> None:
    asked = lifecycle.request(case(), WHY._replace(until=NOW + 9 * DAY), by="bob")
    pending = Case(AZURE, subscription(), asked, NOW + DAY)
    assert lifecycle.grant(pending, by="carol", check=PASSED).until == NOW + 9 * DAY
    assert lifecycle.grant(pending, by="carol", check=PASSED, until=NOW + 3 * DAY).until == NOW + 3 * DAY
    late = pending._replace(now=NOW + 10 * DAY)
    with pytest.raises(RefusedError, match="has passed: --until says another end"):
        lifecycle.grant(late, by="carol", check=PASSED)


def test_an_end_that_has_passed_is_refused() -> None:
    for offer in ("csp", "azure-sponsorship"):
        with pytest.raises(RefusedError, match="has passed"):
            lifecycle.request(case(offer=offer), WHY._replace(until=NOW), by="bob")


def test_a_limit_comes_with_the_grant_and_is_gone_with_the_next_one() -> None:
    limit = RateLimit(per_minute=60, burst=5)
    assert lifecycle.grant(case(State.REQUESTED), by="bob", check=PASSED, limit=limit).limit == limit
    again = lifecycle.request(case(State.REVOKED), WHY, by="bob")
    assert again.limit is None


def test_another_limit_leaves_the_grant_as_it_is() -> None:
    granted = record(State.GRANTED)
    assert granted is not None
    for limit in (RateLimit(per_minute=9), None):
        after = lifecycle.limit(Case(AZURE, subscription(), granted, NOW), limit)
        assert after == replace(granted, limit=limit)


def test_a_new_request_takes_nothing_over_from_the_one_before() -> None:
    old = Exemption(
        subscription=ID, state=ExemptionState.REVOKED, requested=NOW - 9 * DAY, decided=NOW - DAY, by="alice",
        reason="spam", fraud_check=FraudCheck.PASS, fraud_note="known", until=NOW + DAY,
        limit=RateLimit(per_minute=1), details=Details(volume=1),
    )  # fmt: skip
    after = lifecycle.request(Case(AZURE, subscription(), old, NOW), WHY, by="bob")
    assert after == Exemption(
        subscription=ID, state=ExemptionState.REQUESTED, requested=NOW, by="bob", justification=WHY.justification
    )


@pytest.mark.parametrize("empty", ["", "  "])
def test_a_rejection_and_a_revocation_need_a_reason(empty: str) -> None:
    with pytest.raises(RefusedError, match="a rejection needs a reason"):
        lifecycle.reject(case(State.REQUESTED), by="bob", reason=empty)
    with pytest.raises(RefusedError, match="a revocation needs a reason"):
        lifecycle.revoke(case(State.GRANTED), by="bob", reason=empty)


def test_a_revocation_keeps_what_was_on_record() -> None:
    granted = record(State.GRANTED)
    assert granted is not None
    before = replace(granted, limit=RateLimit(per_minute=9))
    after = lifecycle.revoke(Case(AZURE, subscription(), before, NOW), by="bob", reason="spam")
    assert after == replace(before, state=ExemptionState.REVOKED, decided=NOW, by="bob", reason="spam")
