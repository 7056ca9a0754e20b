"""The solution and the texts of each reason, for operators and for the letter to a customer. A new reason gets one
entry here. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import Final, NamedTuple

from portward.i18n.language import marked
from portward.model import Reason


class Solution(Enum):
    """The way to end a denial. `policy.remedy` puts it in words, and `ops.diagnosis.advice` makes steps of it.
    mypy demands a case for each one there."""

    NOTHING_TO_SOLVE = auto()
    RECORD_SOURCE = auto()
    SETTLE_ACCOUNT = auto()
    OTHER_SUBSCRIPTION = auto()
    VIRTUAL_MACHINE = auto()
    DECISION = auto()
    RESTART = auto()
    FIRST_EXEMPTION = auto()
    EXEMPTION_AFTER_REJECTION = auto()
    EXEMPTION_AFTER_REVOCATION = auto()


class ReasonTexts(NamedTuple):
    """The solution of one reason, and its texts, to be translated.

    `short` is half a sentence for operators. `letter` is a sentence for the customer; it has the fields `{ports}`
    and, for some reasons, `{title}` (of the offer) and `{when}`, which are empty or begin with a space.
    """

    solution: Solution
    short: str
    letter: str


_NOTHING: Final = marked("Nothing is blocked here: connections to {ports} pass.")
# In order of urgency: reasons that need an action come first; of these, the ones that the customer can act on at
# once.
REASONS: Final[Mapping[Reason, ReasonTexts]] = {
    Reason.DENIED_UNKNOWN_SOURCE: ReasonTexts(
        Solution.RECORD_SOURCE,
        marked("no known subscription has this source"),
        marked(
            "Our records do not say which subscription this address belongs to, so its connections to {ports} are "
            "blocked."
        ),
    ),
    Reason.DENIED_DISABLED: ReasonTexts(
        Solution.SETTLE_ACCOUNT,
        marked("the subscription is disabled"),
        marked("The subscription is disabled, and so connections to {ports} are blocked."),
    ),
    Reason.DENIED_RESTART_REQUIRED: ReasonTexts(
        Solution.RESTART,
        marked("an exemption is granted, but the machine was not restarted since"),
        marked(
            "An exemption was granted{when}, but it counts for a virtual machine only once that was restarted. "
            "Until then its connections to {ports} are blocked."
        ),
    ),
    Reason.DENIED_PENDING: ReasonTexts(
        Solution.DECISION,
        marked("an exemption was asked for and is not decided yet"),
        marked(
            "You asked for an exemption{when}. It is not decided yet, and until then connections to {ports} stay "
            "blocked."
        ),
    ),
    Reason.DENIED_REJECTED: ReasonTexts(
        Solution.EXEMPTION_AFTER_REJECTION,
        marked("the request for an exemption was rejected"),
        marked("Connections to {ports} are blocked, as your request for an exemption was rejected{when}."),
    ),
    Reason.DENIED_REVOKED: ReasonTexts(
        Solution.EXEMPTION_AFTER_REVOCATION,
        marked("the exemption was revoked"),
        marked("Connections to {ports} are blocked, as the exemption was revoked{when}."),
    ),
    Reason.DENIED_NOT_EXEMPT: ReasonTexts(
        Solution.FIRST_EXEMPTION,
        marked("the offer needs an exemption and there is none in force"),
        marked(
            "Connections to {ports} are blocked: this kind of subscription{title} needs an exemption for them, "
            "and none has been asked for."
        ),
    ),
    Reason.DENIED_INELIGIBLE: ReasonTexts(
        Solution.OTHER_SUBSCRIPTION,
        marked("the offer can never be exempt"),
        marked(
            "Connections to {ports} are blocked for this kind of subscription{title}, and it can never be exempt "
            "from that."
        ),
    ),
    Reason.DENIED_PAAS: ReasonTexts(
        Solution.VIRTUAL_MACHINE,
        marked("traffic through a platform service stays blocked"),
        marked(
            "Mail on {ports} through a platform service, such as a managed firewall, is not supported: it stays "
            "blocked whatever the subscription."
        ),
    ),
    Reason.ALLOWED_EXEMPT: ReasonTexts(
        Solution.NOTHING_TO_SOLVE,
        marked("the subscription's exemption counts for this machine"),
        marked("Nothing is blocked here: an exemption was granted{when}, and connections to {ports} pass."),
    ),
    Reason.ALLOWED_GRANDFATHERED: ReasonTexts(
        Solution.NOTHING_TO_SOLVE,
        marked("the subscription was created before the policy came into force"),
        _NOTHING,
    ),
    Reason.ALLOWED_OFFER: ReasonTexts(
        Solution.NOTHING_TO_SOLVE, marked("the subscription's offer may always send"), _NOTHING
    ),
    Reason.ALLOWED_INTERNAL: ReasonTexts(
        Solution.NOTHING_TO_SOLVE, marked("the destination is not on the Internet"), _NOTHING
    ),
}
