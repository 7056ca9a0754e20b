"""The flaws that make a record of the right types impossible to hold for a gateway. Every record passes this
check, whether an operator wrote it, a verb made it, or another tool put it into the store.

It accepts everything that the policy table and the kernel can hold. `inventory.records` refuses more (an empty id
of an offer, for example). A store may have such records, and they get a verdict like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from portward.base import limits
from portward.base.interfaces import is_segment_name
from portward.config.documents import brief
from portward.model import Attachment, Details, Exemption, RateLimit, Record, Subscription

# Field → its maximum length in characters.
_SUBSCRIPTION_TEXTS: Final = {"offer": limits.MAX_NAME_CHARS, "name": limits.MAX_NAME_CHARS}
_EXEMPTION_TEXTS: Final = {
    "by": limits.MAX_NAME_CHARS,
    "justification": limits.MAX_TEXT_CHARS,
    "reason": limits.MAX_TEXT_CHARS,
    "fraud_note": limits.MAX_TEXT_CHARS,
}
_DETAILS_TEXTS: Final = {"mail_software": limits.MAX_NAME_CHARS, "reverse_dns": limits.MAX_NAME_CHARS}

INSTANTS: Final[dict[type[Record], tuple[str, ...]]] = {
    Subscription: (),
    Attachment: ("started",),
    Exemption: ("requested", "decided", "until"),
}


def flaws(record: Record) -> Iterator[tuple[str, str]]:
    """The flaws of a record: (field, what would be right). None if every gateway can hold it."""
    for name in INSTANTS[type(record)]:
        at = getattr(record, name)
        if at is not None and (problem := limits.time_problem(at)) is not None:
            yield name, problem
    match record:
        case Subscription():
            yield from _texts(record, _SUBSCRIPTION_TEXTS)
        case Attachment():
            yield from _attachment_flaws(record)
        case Exemption():
            yield from _texts(record, _EXEMPTION_TEXTS)
            if record.details is not None:
                yield from _details_flaws(record.details)
            if record.limit is not None:
                yield from _limit_flaws(record.limit)


def is_interface(name: str) -> bool:
    """Whether an attachment can be in a segment with this name."""
    return is_segment_name(name)


# Each segment has many attachments. 65,536 is more than a gateway has interfaces.
_is_interface: Final = lru_cache(maxsize=65_536)(is_interface)


def _attachment_flaws(record: Attachment) -> Iterator[tuple[str, str]]:
    if not _is_interface(record.segment):
        problem = (
            f"{brief(record.segment)} is no interface name: 1 to 15 printable bytes, no space, "
            "'/', ':', '%' or '*'"
        )
        yield "segment", problem
    if getattr(record.address.network_address, "scope_id", None):
        yield "address", "an address needs no zone: the segment says which one"


def _details_flaws(details: Details) -> Iterator[tuple[str, str]]:
    for name, problem in _texts(details, _DETAILS_TEXTS):
        yield f"details.{name}", problem
    if details.volume is not None and (
        wrong := limits.number_problem(details.volume, limits.MAX_MESSAGES_PER_DAY)
    ):
        yield "details.volume", wrong
    # Each value once is enough; the limit only bounds the memory.
    if len(details.authentication) > limits.MAX_NAME_CHARS:
        yield "details.authentication", f"{len(details.authentication)} entries are too many"


def _limit_flaws(limit: RateLimit) -> Iterator[tuple[str, str]]:
    bounds = {"per_minute": limits.MAX_RATE_PER_MINUTE, "burst": limits.MAX_BURST}
    for name, most in bounds.items():
        if (problem := limits.number_problem(getattr(limit, name), most)) is not None:
            yield f"limit.{name}", problem


def _texts(record: Subscription | Exemption | Details, longest: dict[str, int]) -> Iterator[tuple[str, str]]:
    for name, most in longest.items():
        if (problem := limits.text_problem(getattr(record, name), most)) is not None:
            yield name, problem
