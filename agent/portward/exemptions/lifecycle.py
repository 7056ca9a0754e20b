"""The life of an exemption: requested → granted or rejected, granted → revoked or ended, and a new request after
each. Pure: no clock, no files.

The preset says how an offer gets an exemption (the policy page of the default preset, December 2020): it is not
needed, by self-service (decided at once by standing and payment history), by review (a person decides, after an
anti-fraud check), or never.

    case = Case(preset, subscription, exemption, now)
    record = request(case, Application(justification="…"), by="alice")      # raises RefusedError

Each action returns the new record for the store, or raises RefusedError with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from enum import StrEnum
from typing import Final, NamedTuple, TypeAlias

from msgspec.structs import replace

from portward.base.words import utc
from portward.errors import PortwardError
from portward.i18n.language import marked
from portward.model import Details, Exemption, ExemptionState, FraudCheck, RateLimit, Standing, Subscription
from portward.policy.preset import ExemptionPath, Offer, Preset, ReviewQuestion

# `Exemption.by` if no person decided.
SELF_SERVICE: Final = marked("self-service")
ANTI_FRAUD: Final = marked("anti-fraud check")


# Why self-service rejects a request. Customers read these texts, so they are in the catalogues.
_BY_STANDING: Final = {
    Standing.PAST_DUE: marked("the account's standing is past-due: settle that with the provider, and ask again"),
    Standing.DISABLED: marked("the account's standing is disabled: settle that with the provider, and ask again"),
}
_CHECK_FAILED: Final = marked("the anti-fraud check failed")
_NO_PAYMENT_HISTORY: Final = marked(
    "the account has no payment history yet: ask again after the first invoice is paid"
)


class State(StrEnum):
    """The state of an exemption at a time: the recorded state, none, or expired at its own end."""

    NONE = "none"
    REQUESTED = "requested"
    GRANTED = "granted"
    REJECTED = "rejected"
    REVOKED = "revoked"
    EXPIRED = "expired"


class Action(StrEnum):
    """An operation on an exemption."""

    REQUEST = "request"
    GRANT = "grant"
    REJECT = "reject"
    LIMIT = "limit"
    REVOKE = "revoke"


class RefusedError(PortwardError):
    """The policy or the exemption's state does not allow an action. The text says what to do instead."""


class Case(NamedTuple):
    """The facts that an action is decided on, at the time `now`."""

    preset: Preset
    subscription: Subscription
    exemption: Exemption | None
    now: datetime


class Application(NamedTuple):
    """A request for an exemption: why mail cannot go through a relay, the details for a review, and its end."""

    justification: str = ""
    details: Details | None = None
    until: datetime | None = None


class FraudResult(NamedTuple):
    """The result of an anti-fraud check, and its explanation."""

    result: FraudCheck
    note: str = ""


# Runs an anti-fraud check for a request by the named actor; never raises.
FraudChecker: TypeAlias = Callable[[Case, Application, str], FraudResult]


_REFUSED: Final = {
    (State.REQUESTED, Action.REQUEST): "it was asked for already, {when}, and waits for a decision",
    (
        State.GRANTED,
        Action.REQUEST,
    ): "it is granted already, {when}: revoke it first if it must be decided again",
    (State.NONE, Action.GRANT): "there is no request: `portward exemption request` comes first",
    (State.GRANTED, Action.GRANT): "it is granted already, {when}",
    (State.REJECTED, Action.GRANT): "the request was rejected {when}: a new request comes first",
    (State.REVOKED, Action.GRANT): "it was revoked {when}: a new request comes first",
    (State.EXPIRED, Action.GRANT): "the grant has ended {when}: a new request comes first",
    (State.NONE, Action.REJECT): "there is no request that could be rejected",
    (State.GRANTED, Action.REJECT): "it is granted, {when}: `portward exemption revoke` takes a grant back",
    (State.REJECTED, Action.REJECT): "the request was rejected already, {when}",
    (State.REVOKED, Action.REJECT): "it was revoked {when}, and there is no new request",
    (State.EXPIRED, Action.REJECT): "the grant has ended {when}, and there is no new request",
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
    """The state of an exemption at `now`."""
    if exemption is None:
        return State.NONE
    if exemption.state is ExemptionState.GRANTED and exemption.until is not None and now >= exemption.until:
        return State.EXPIRED
    return State(exemption.state.value)


def refusal(state: State, action: Action) -> str | None:
    """Why an action is not possible in a state, with `{when}` in place of the time that matters; None if it is
    possible."""
    return _REFUSED.get((state, action))


def path_of(case: Case) -> ExemptionPath:
    """How the subscription gets an exemption. Raises RefusedError if it cannot get one."""
    if why := no_path(case):
        raise _refused(case, why)
    return _offer(case).exemption


def no_path(case: Case) -> str:
    """Why no request of the subscription can be granted; empty if it can be."""
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
    """Why a grant changes nothing, for any machine; empty if it can change something. The order is that of
    `policy.decide`."""
    if case.subscription.standing is Standing.DISABLED:
        return "the account's standing is disabled, and then no machine may send"
    return no_path(case)


def check_application(case: Case, asked: Application) -> ExemptionPath:
    """How this request would be decided. Raises RefusedError if it cannot be granted: then the anti-fraud check
    need not run."""
    _expect(case, Action.REQUEST)
    path = path_of(case)
    if asked.until is not None and asked.until <= case.now:
        raise _refused(case, f"it would end at {_time(asked.until)}, which has passed")
    if path is ExemptionPath.REVIEW:
        _check_details(case, asked)
    return path


def request(case: Case, asked: Application, *, by: str, check: FraudResult | None = None) -> Exemption:
    """Requests an exemption, which is decided at once or stays pending. `check` is the result of the anti-fraud
    check for a request that a person will review."""
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
    """Grants a request. It needs a passed anti-fraud check: the recorded one, or `check`, which the person who
    decides states. `until` replaces the requested end."""
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
    """Rejects a request."""
    return _rejected(case, _expect(case, Action.REJECT), by, _given(case, reason, "rejection"))


def limit(case: Case, limit: RateLimit | None) -> Exemption:
    """Changes or removes the rate limit of a grant. It counts for the same machines as before."""
    return replace(_expect(case, Action.LIMIT), limit=limit)


def revoke(case: Case, *, by: str, reason: str) -> Exemption:
    """Revokes a grant at once."""
    record = _expect(case, Action.REVOKE)
    reason = _given(case, reason, "revocation")
    return replace(record, state=ExemptionState.REVOKED, decided=case.now, by=by, reason=reason)


def check_revocable(case: Case) -> None:
    """Raises RefusedError if there is no grant to revoke."""
    _expect(case, Action.REVOKE)


def state_text(state: State, exemption: Exemption | None) -> str:
    """The state in a few words, with the time that matters."""
    return state.value if exemption is None else f"{state.value} {_when(state, exemption)}"


def _decided_at_once(case: Case, pending: Exemption) -> Exemption:
    """Decides by self-service: a subscription in good standing with a payment history gets the exemption (the
    policy page of the default preset)."""
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
    """The rule for the offer, which `no_path` has found in the preset."""
    offer = case.preset.offer(case.subscription.offer)
    assert offer is not None  # noqa: S101 # as the docstring says
    return offer


def _check_details(case: Case, asked: Application) -> None:
    """Raises RefusedError with everything that a review needs and the request does not state."""
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
    """The record that an action starts from. Raises RefusedError if the action is not possible. A request without
    a record starts from an empty one."""
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
    return "an unknown time" if at is None else utc(at)
