"""The texts for each reason: for operators, and for the letter to a customer. A new reason gets one entry here.
Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from portward.i18n.language import marked
from portward.model import Reason


class ReasonTexts(NamedTuple):
    """Texts for one reason, to be translated.

    `short` is half a sentence for operators. `letter` is a sentence for the customer; it has the fields `{ports}`
    and, for some reasons, `{title}` (of the offer) and `{when}`, which are empty or begin with a space.
    """

    short: str
    letter: str


_NOTHING: Final = marked("Nothing is blocked here: connections to {ports} pass.")
# In order of urgency: reasons that need an action come first; of these, the ones that the customer can act on at
# once.
REASONS: Final[Mapping[Reason, ReasonTexts]] = {
    Reason.DENIED_UNKNOWN_SOURCE: ReasonTexts(
        marked("no known subscription has this source"),
        marked(
            "Our records do not say which subscription this address belongs to, so its connections to {ports} are "
            "blocked."
        ),
    ),
    Reason.DENIED_DISABLED: ReasonTexts(
        marked("the subscription is disabled"),
        marked("The subscription is disabled, and so connections to {ports} are blocked."),
    ),
    Reason.DENIED_RESTART_REQUIRED: ReasonTexts(
        marked("an exemption is granted, but the machine was not restarted since"),
        marked(
            "An exemption was granted{when}, but it counts for a virtual machine only once that was restarted. "
            "Until then its connections to {ports} are blocked."
        ),
    ),
    Reason.DENIED_PENDING: ReasonTexts(
        marked("an exemption was asked for and is not decided yet"),
        marked(
            "You asked for an exemption{when}. It is not decided yet, and until then connections to {ports} stay "
            "blocked."
        ),
    ),
    Reason.DENIED_REJECTED: ReasonTexts(
        marked("the request for an exemption was rejected"),
        marked("Connections to {ports} are blocked, as your request for an exemption was rejected{when}."),
    ),
    Reason.DENIED_REVOKED: ReasonTexts(
        marked("the exemption was revoked"),
        marked("Connections to {ports} are blocked, as the exemption was revoked{when}."),
    ),
    Reason.DENIED_NOT_EXEMPT: ReasonTexts(
        marked("the offer needs an exemption and there is none in force"),
        marked(
            "Connections to {ports} are blocked: this kind of subscription{title} needs an exemption for them, "
            "and none has been asked for."
        ),
    ),
    Reason.DENIED_INELIGIBLE: ReasonTexts(
        marked("the offer can never be exempt"),
        marked(
            "Connections to {ports} are blocked for this kind of subscription{title}, and it can never be exempt "
            "from that."
        ),
    ),
    Reason.DENIED_PAAS: ReasonTexts(
        marked("traffic through a platform service stays blocked"),
        marked(
            "Mail on {ports} through a platform service, such as a managed firewall, is not supported: it stays "
            "blocked whatever the subscription."
        ),
    ),
    Reason.ALLOWED_EXEMPT: ReasonTexts(
        marked("the subscription's exemption counts for this machine"),
        marked("Nothing is blocked here: an exemption was granted{when}, and connections to {ports} pass."),
    ),
    Reason.ALLOWED_GRANDFATHERED: ReasonTexts(
        marked("the subscription was created before the policy came into force"), _NOTHING
    ),
    Reason.ALLOWED_OFFER: ReasonTexts(marked("the subscription's offer may always send"), _NOTHING),
    Reason.ALLOWED_INTERNAL: ReasonTexts(marked("the destination is not on the Internet"), _NOTHING),
}
