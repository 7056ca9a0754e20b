"""What a reason means, and what the customer can do next. Pure texts."""

from __future__ import annotations

from typing import Final

from portward.model import Reason, Subscription
from portward.policy.preset import ExemptionPath, Offer, Preset

_WORDS: Final = {
    Reason.ALLOWED_OFFER: "the subscription's offer may always send",
    Reason.ALLOWED_GRANDFATHERED: "the subscription was created before the policy came into force",
    Reason.ALLOWED_EXEMPT: "the subscription's exemption counts for this machine",
    Reason.ALLOWED_INTERNAL: "the destination is not on the Internet",
    Reason.DENIED_NOT_EXEMPT: "the offer needs an exemption and there is none in force",
    Reason.DENIED_INELIGIBLE: "the offer can never be exempt",
    Reason.DENIED_PENDING: "an exemption was asked for and is not decided yet",
    Reason.DENIED_REJECTED: "the request for an exemption was rejected",
    Reason.DENIED_REVOKED: "the exemption was revoked",
    Reason.DENIED_RESTART_REQUIRED: "an exemption is granted, but the machine was not restarted since",
    Reason.DENIED_PAAS: "traffic through a platform service stays blocked",
    Reason.DENIED_DISABLED: "the subscription is disabled",
    Reason.DENIED_UNKNOWN_SOURCE: "no known subscription has this source",
}
_RECEIVER: Final = "The receiving provider may still refuse the mail."
_RELAY: Final = "Send through an authenticated relay on port 587, which is never limited"


def reason_in_words(reason: Reason) -> str:
    """The reason as half a sentence."""
    return _WORDS[reason]


def remedy(preset: Preset, reason: Reason, subscription: Subscription | None) -> str:
    """What the customer can do next, in one or two sentences."""
    if reason.allows:
        return f"Nothing is blocked here. {_RECEIVER}"
    relay = _RELAY if 587 not in preset.ports else "Send through a mail provider's API"
    offer = None if subscription is None else preset.offer(subscription.offer)
    match reason:
        case Reason.DENIED_UNKNOWN_SOURCE:
            return "If this machine is a customer's, the inventory lacks its attachment or subscription: add it."
        case Reason.DENIED_DISABLED:
            return "Contact the provider about the account: while it is disabled, nothing is sent on this port."
        case Reason.DENIED_PAAS:
            return f"{relay}, or send from a virtual machine."
        case Reason.DENIED_INELIGIBLE:
            other = ", or use another kind of subscription" if _some_may_send(preset) else ""
            return f"{relay}{other}: this one can never be exempt."
        case Reason.DENIED_PENDING:
            return f"{relay}, and wait for the decision."
        case Reason.DENIED_RESTART_REQUIRED:
            return f"To make the exemption count, {preset.restart}."
        case Reason.DENIED_REVOKED:
            return f"{relay}. For a new exemption ask the provider why this one was revoked."
        case Reason.DENIED_REJECTED:
            return f"{relay}, or ask again: {_asking(preset, offer)}."
        case _:
            return f"{relay}, or {_asking(preset, offer)}."


def _some_may_send(preset: Preset) -> bool:
    """Whether the preset lets any new subscription through, at once or by an exemption."""
    offers = preset.offers if preset.otherwise is None else (*preset.offers, preset.otherwise)
    return any(offer.exemption is not ExemptionPath.NEVER for offer in offers)


def _asking(preset: Preset, offer: Offer | None) -> str:
    """How an exemption is asked for, as the end of a sentence."""
    if offer is None or offer.exemption is ExemptionPath.NEVER:
        return "use another kind of subscription"
    needs = f" (it takes {', '.join(offer.requires)})" if offer.requires else ""
    if offer.exemption is ExemptionPath.SELF_SERVICE:
        return f"ask for an exemption yourself, it is decided at once{needs}"
    return f"{preset.request or 'ask the provider for an exemption'}{needs}"
