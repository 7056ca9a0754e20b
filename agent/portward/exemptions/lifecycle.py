"""The life of an exemption: requested → granted or rejected, granted → revoked or ended, and a new request after
each. Pure: no clock, no files.

Which way an offer takes is the preset's to say (the policy page of the default preset, December 2020): not needed,
self-service (decided at once by standing and payment history), review (a person decides, after an anti-fraud
check), or never.

    case = Case(preset, subscription, exemption, now)
    record = request(case, Application(justification="…"), by="alice")      # raises RefusedError

Each action gives the record that the store is to hold from then on, or refuses with a text of its own.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Final, NamedTuple

from msgspec.structs import replace

from portward.errors import PortwardError
from portward.i18n.language import marked
from portward.model import Details, Exemption, ExemptionState, FraudCheck, RateLimit, Standing, Subscription
from portward.policy.preset import ExemptionPath, Offer, Preset, ReviewQuestion

# Who decided, where it was no person.
SELF_SERVICE: Final = marked("self-service")
ANTI_FRAUD: Final = marked("anti-fraud check")


# Why self-service says no. The customer reads these, so they are in the catalogues.
_BY_STANDING: Final = {
    Standing.PAST_DUE: marked("the account's standing is past-due: settle that with the provider, and ask again"),
    Standing.DISABLED: marked("the account's standing is disabled: settle that with the provider, and ask again"),
}
_CHECK_FAILED: Final = marked("the anti-fraud check failed")
_NO_PAYMENT_HISTORY: Final = marked(
    "the account has no payment history yet: ask again after the first invoice is paid"
)


class State(StrEnum):
    """Where an exemption stands at a time: its recorded state, none, or ended by its own date."""

    NONE = "none"
    REQUESTED = "requested"
    GRANTED = "granted"
    REJECTED = "rejected"
    REVOKED = "revoked"
    EXPIRED = "expired"


class Action(StrEnum):
    """What can be done to an exemption."""

    REQUEST = "request"
    GRANT = "grant"
    REJECT = "reject"
    LIMIT = "limit"
    REVOKE = "revoke"


class RefusedError(PortwardError):
    """An action that the policy or the exemption's state does not allow; the text says what would be right."""


class Case(NamedTuple):
    """What an action is decided on: the facts as they stand at `now`."""

    preset: Preset
    subscription: Subscription
    exemption: Exemption | None
    now: datetime


class Application(NamedTuple):
    """What somebody asks for: why not through a relay, what a review wants to know, until when."""

    justification: str = ""
    details: Details | None = None
    until: datetime | None = None


class FraudResult(NamedTuple):
    """What an anti-fraud check found, and in which words."""

    result: FraudCheck
    note: str = ""


_REFUSED: Final = {
    (State.REQUESTED, Action.REQUEST): "it was asked for already, {when}, and waits for a decision",
    (
        State.GRANTED,
        Action.REQUEST,
    ): "it is granted already, {when}: revoke it first where it is to be decided anew",
    (State.NONE, Action.GRANT): "nobody has asked for it: `portward exemption request` comes first",
    (State.GRANTED, Action.GRANT): "it is granted already, {when}",
    (State.REJECTED, Action.GRANT): "the request was rejected {when}: a new request comes first",
    (State.REVOKED, Action.GRANT): "it was revoked {when}: a new request comes first",
    (State.EXPIRED, Action.GRANT): "the grant has ended {when}: a new request comes first",
    (State.NONE, Action.REJECT): "there is no request that could be rejected",
    (State.GRANTED, Action.REJECT): "it is granted, {when}: `portward exemption revoke` takes a grant back",
    (State.REJECTED, Action.REJECT): "the request was rejected already, {when}",
    (State.REVOKED, Action.REJECT): "it was revoked {when}, and nobody has asked again",
    (State.EXPIRED, Action.REJECT): "the grant has ended {when}, and nobody has asked again",
    (State.NONE, Action.LIMIT): "there is no exemption that could have a limit",
    (
        State.REQUESTED,
        Action.LIMIT,
    ): "it is only asked for, {when}: `grant --rate` gives it a limit",
    (
        State.REJECTED,
        Action.LIMIT,
    ): "the request was rejected {when}, so nothing is let through",
    (State.REVOKED, Action.LIMIT): "it was revoked {when}, and nothing is let through",
    (State.EXPIRED, Action.LIMIT): "it has ended by itself {when}, and nothing is let through",
    (State.NONE, Action.REVOKE): "there is no exemption that could be revoked",
    (
        State.REQUESTED,
        Action.REVOKE,
    ): "it is not granted, only asked for {when}: `portward exemption reject` says no",
    (State.REJECTED, Action.REVOKE): "it was never granted: the request was rejected {when}",
    (State.REVOKED, Action.REVOKE): "it was revoked already, {when}",
    (State.EXPIRED, Action.REVOKE): "it has ended by itself {when}: there is nothing to revoke",
}


def state_of(exemption: Exemption | None, now: datetime) -> State:
    """Where an exemption stands at `now`."""
    if exemption is None:
        return State.NONE
    if exemption.state is ExemptionState.GRANTED and exemption.until is not None and now >= exemption.until:
        return State.EXPIRED
    return State(exemption.state.value)


def refusal(state: State, action: Action) -> str | None:
    """Why an action is not possible in a state, with `{when}` for the time that mattered; None where it is."""
    return _REFUSED.get((state, action))


def path_of(case: Case) -> ExemptionPath:
    """The way that the subscription's request would take; raises RefusedError where there is none."""
    if why := no_path(case):
        raise _refused(case, why)
    return _offer(case).exemption


def no_path(case: Case) -> str:
    """Why no request of the subscription can be granted; empty if one can."""
    offer = case.preset.offer(case.subscription.offer)
    if offer is None:
        return f"the preset {case.preset.name} does not know the offer {case.subscription.offer!r}"
    if offer.exemption is ExemptionPath.NOT_NEEDED:
        return f"none is needed: subscriptions of the offer {offer.title} may always send"
    if offer.created_before is not None and case.subscription.created < offer.created_before:
        return f"none is needed: the subscription was created before {offer.created_before}"
    if offer.exemption is ExemptionPath.NEVER:
        return (
            f"subscriptions of the offer {offer.title} can never be exempt: send through an authenticated relay, "
            "or use another kind of subscription"
        )
    return ""


def useless(case: Case) -> str:
    """Why a grant makes no difference, whatever machine it is for; empty if it can. The order is that of
    `policy.decide`."""
    if case.subscription.standing is Standing.DISABLED:
        return "the account's standing is disabled, and then no machine may send"
    return no_path(case)


def check_application(case: Case, asked: Application) -> ExemptionPath:
    """The way that this request would take, and RefusedError where it would take none: so that an anti-fraud
    check need not run for it."""
    _expect(case, Action.REQUEST)
    path = path_of(case)
    if asked.until is not None and asked.until <= case.now:
        raise _refused(case, f"it would end at {_time(asked.until)}, which has passed")
    if path is ExemptionPath.REVIEW:
        _check_details(case, asked)
    return path


def request(case: Case, asked: Application, *, by: str, check: FraudResult | None = None) -> Exemption:
    """Asks for an exemption: decided at once, or pending. `check` is what an anti-fraud check found, for a request
    that a person is to review."""
    path = check_application(case, asked)
    pending = Exemption(
        subscription=case.subscription.id,
        state=ExemptionState.REQUESTED,
        requested=case.now,
        until=asked.until,
        by=by,
        justification=asked.justification,
        details=asked.details,
    )
    if path is ExemptionPath.SELF_SERVICE:
        return _decided_at_once(case, pending)
    if check is None:
        return pending
    checked = replace(pending, fraud_check=check.result, fraud_note=check.note)
    if check.result is FraudCheck.FAIL:
        return _rejected(case, checked, ANTI_FRAUD, check.note or _CHECK_FAILED)
    return checked


def grant(
    case: Case,
    *,
    by: str,
    check: FraudResult | None = None,
    until: datetime | None = None,
    limit: RateLimit | None = None,
) -> Exemption:
    """Says yes to what was asked for. It needs an anti-fraud check that was passed: the one on record, or `check`,
    which the one who decides states. `until` takes the place of the end that was asked for."""
    record = _expect(case, Action.GRANT)
    path_of(case)
    found = check or (None if record.fraud_check is None else FraudResult(record.fraud_check, record.fraud_note))
    if found is None or found.result is not FraudCheck.PASS:
        was = "none is on record" if found is None else f"on record is {found.result.value!r}"
        raise _refused(
            case, f"a grant needs an anti-fraud check that was passed, and {was}: --fraud-check says how"
        )
    until = until or record.until
    if until is not None and until <= case.now:
        raise _refused(case, f"it would end at {_time(until)}, which has passed: --until says another end")
    return replace(
        record,
        state=ExemptionState.GRANTED,
        decided=case.now,
        until=until,
        by=by,
        reason="",
        fraud_check=found.result,
        fraud_note=found.note,
        limit=limit,
    )


def reject(case: Case, *, by: str, reason: str) -> Exemption:
    """Says no to what was asked for."""
    return _rejected(case, _expect(case, Action.REJECT), by, _given(case, reason, "rejection"))


def limit(case: Case, limit: RateLimit | None) -> Exemption:
    """Gives a grant another limit, or none; it counts for the same machines as before."""
    return replace(_expect(case, Action.LIMIT), limit=limit)


def revoke(case: Case, *, by: str, reason: str) -> Exemption:
    """Takes a grant back, at once."""
    record = _expect(case, Action.REVOKE)
    reason = _given(case, reason, "revocation")
    return replace(record, state=ExemptionState.REVOKED, decided=case.now, by=by, reason=reason)


def check_revocable(case: Case) -> None:
    """Raises RefusedError if there is no grant that could be revoked."""
    _expect(case, Action.REVOKE)


def state_text(state: State, exemption: Exemption | None) -> str:
    """The state in a few words, with the time that mattered."""
    return state.value if exemption is None else f"{state.value} {_when(state, exemption)}"


def _decided_at_once(case: Case, pending: Exemption) -> Exemption:
    """The policy page: a subscription that is valid, in good standing and has a payment history qualifies."""
    if (lacking := _BY_STANDING.get(case.subscription.standing)) is not None:
        return _rejected(case, pending, SELF_SERVICE, lacking)
    if not case.subscription.payment_history:
        return _rejected(case, pending, SELF_SERVICE, _NO_PAYMENT_HISTORY)
    return replace(pending, state=ExemptionState.GRANTED, decided=case.now, by=SELF_SERVICE)


def _rejected(case: Case, record: Exemption, by: str, reason: str) -> Exemption:
    return replace(
        record, state=ExemptionState.REJECTED, decided=case.now, until=None, by=by, reason=reason, limit=None
    )


def _offer(case: Case) -> Offer:
    """The offer, after `no_path` has said that the preset knows it."""
    offer = case.preset.offer(case.subscription.offer)
    assert offer is not None  # noqa: S101 # as the docstring says
    return offer


def _check_details(case: Case, asked: Application) -> None:
    """Raises RefusedError that names all that a review still wants to know."""
    details = asked.details or Details()
    has = {
        ReviewQuestion.MAIL_SOFTWARE: bool(details.mail_software.strip()),
        ReviewQuestion.VOLUME: details.volume is not None,
        ReviewQuestion.REVERSE_DNS: bool(details.reverse_dns.strip()),
        ReviewQuestion.AUTHENTICATION: bool(details.authentication),
        ReviewQuestion.TERMS: details.terms_accepted,
    }
    missing = [] if asked.justification.strip() else ["justification: why mail cannot go through a relay"]
    missing += [item.value for item in _offer(case).asks if not has[item]]
    if missing:
        raise _refused(case, f"a review wants to know more: {', '.join(missing)}")


def _given(case: Case, reason: str, what: str) -> str:
    if not reason.strip():
        raise _refused(case, f"a {what} needs a reason: the customer will ask")
    return reason


def _expect(case: Case, action: Action) -> Exemption:
    """The record on which an action is possible; raises RefusedError where it is not. A request begins anew."""
    state = state_of(case.exemption, case.now)
    if (why := refusal(state, action)) is not None:
        raise _refused(case, why.format(when=_when(state, case.exemption)))
    return case.exemption or Exemption(subscription=case.subscription.id, state=ExemptionState.REQUESTED)


def _refused(case: Case, why: str) -> RefusedError:
    name = f" ({case.subscription.name})" if case.subscription.name else ""
    return RefusedError(f"exemption of {case.subscription.id}{name}: {why}")


def _when(state: State, exemption: Exemption | None) -> str:
    if exemption is None:
        return ""
    if state is State.REQUESTED:
        return f"at {_time(exemption.requested)}"
    if state is State.EXPIRED:
        return f"at {_time(exemption.until)}"
    by = f" by {exemption.by}" if exemption.by else ""
    until = f", until {_time(exemption.until)}" if state is State.GRANTED and exemption.until else ""
    return f"at {_time(exemption.decided)}{by}{until}"


def _time(at: datetime | None) -> str:
    return "an unknown time" if at is None else at.strftime("%Y-%m-%d %H:%M:%SZ")
