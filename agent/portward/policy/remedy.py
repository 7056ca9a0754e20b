"""Texts for customers: what a reason means, and what they can do next. Pure. English if no language is given."""

from __future__ import annotations

from typing import Final

from portward.i18n.language import ENGLISH, Language, marked
from portward.model import Reason, Subscription
from portward.policy.preset import ExemptionPath, Offer, Preset
from portward.policy.reasons import REASONS, Solution

_RELAY: Final = marked("Send through an authenticated relay on port 587, which is never limited")
_API: Final = marked("Send through a mail provider's API")


def reason_text(reason: Reason, say: Language = ENGLISH) -> str:
    """The meaning of a reason, as half a sentence."""
    return say(REASONS[reason].short)


def remedy(
    preset: Preset,
    reason: Reason,
    subscription: Subscription | None,
    say: Language = ENGLISH,
    *,
    limited: bool = False,
) -> str:
    """The next step for the customer, in one or two sentences. `limited`: the exemption has a rate limit."""
    if reason.allows and limited:
        return say(
            "New connections beyond the limit are dropped: spread the mail over more time, or ask for a higher "
            "limit. The receiving provider may still refuse the mail."
        )
    relay = say(_RELAY if relay_is_free(preset) else _API)
    offer = None if subscription is None else preset.offer(subscription.offer)
    solution = REASONS[reason].solution
    match solution:
        case Solution.NOTHING_TO_SOLVE:
            return say("Nothing is blocked here. The receiving provider may still refuse the mail.")
        case Solution.RECORD_SOURCE:
            return say(
                "If this machine is a customer's, the inventory lacks its attachment or subscription: add it."
            )
        case Solution.SETTLE_ACCOUNT:
            return say(
                "Contact the provider about the account: while it is disabled, nothing is sent on this port."
            )
        case Solution.VIRTUAL_MACHINE:
            return say("{relay}, or send from a virtual machine.", relay=relay)
        case Solution.OTHER_SUBSCRIPTION if some_may_send(preset):
            return say("{relay}, or use another kind of subscription: this one can never be exempt.", relay=relay)
        case Solution.OTHER_SUBSCRIPTION:
            return say("{relay}: this one can never be exempt.", relay=relay)
        case Solution.DECISION:
            return say("{relay}, and wait for the decision.", relay=relay)
        case Solution.RESTART:
            return say("To make the exemption count, {restart}.", restart=say(preset.restart))
        case Solution.EXEMPTION_AFTER_REVOCATION:
            return say("{relay}. For a new exemption ask the provider why this one was revoked.", relay=relay)
        case Solution.EXEMPTION_AFTER_REJECTION:
            return say("{relay}, or ask again: {asking}.", relay=relay, asking=_asking(preset, offer, say))
        case Solution.FIRST_EXEMPTION:
            return say("{relay}, or {asking}.", relay=relay, asking=_asking(preset, offer, say))


def relay_is_free(preset: Preset) -> bool:
    """Whether customers can send to a relay on port 587 (RFC 6409), because it is not a policy port."""
    return 587 not in preset.ports


def some_may_send(preset: Preset) -> bool:
    """Whether the preset allows any new subscription to send, at once or with an exemption."""
    offers = preset.offers if preset.otherwise is None else (*preset.offers, preset.otherwise)
    return any(offer.exemption is not ExemptionPath.NEVER for offer in offers)


def _asking(preset: Preset, offer: Offer | None, say: Language) -> str:
    """How to ask for an exemption, as the end of a sentence."""
    if offer is None or offer.exemption is ExemptionPath.NEVER:
        return say("use another kind of subscription")
    if offer.exemption is ExemptionPath.SELF_SERVICE:
        way = say("ask for an exemption yourself, it is decided at once")
    else:
        way = say(preset.request) if preset.request else say("ask the provider for an exemption")
    if not offer.requires:
        return way
    return say("{way} (it takes {requires})", way=way, requires=", ".join(map(say, offer.requires)))
