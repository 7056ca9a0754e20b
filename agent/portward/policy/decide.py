"""May this source open a connection, and why? Pure: no clock, no files, the same inputs give the same answer.

Where several things hold, the first of these decides (the policy page of the default preset, December 2020):
destination not on the Internet; source unknown; subscription disabled; workload `paas`; offer always allowed;
created before the date; offer that can never be exempt, also where an old exemption says granted; the latest
state of the exemption; an exemption granted after the machine's last start.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from portward.model import Address, Attachment, Exemption, ExemptionState, Reason, Standing, Subscription, Workload
from portward.policy.preset import ExemptionPath, Preset


class Decision(NamedTuple):
    """Whether a source may open connections, by its reason."""

    reason: Reason

    @property
    def allows(self) -> bool:
        """True where it may."""
        return self.reason.allows


_DECISIONS = {reason: Decision(reason) for reason in Reason}


class Ruling(NamedTuple):
    """What holds for all attachments of one subscription with one workload: `reason`, but where the machine was
    started after `unless_started_after`, and not later than `now`, a grant counts. What nobody has recorded has
    not happened, and what is recorded for later, by a clock that is fast, has not happened yet."""

    reason: Reason
    unless_started_after: datetime | None = None
    now: datetime | None = None

    def of(self, started: datetime | None) -> Reason:
        """The reason for an attachment whose machine was last started at `started`; None where nobody knows."""
        if self.unless_started_after is None or self.now is None or started is None:
            return self.reason
        return Reason.ALLOWED_EXEMPT if self.unless_started_after < started <= self.now else self.reason


def decide(
    preset: Preset,
    *,
    subscription: Subscription | None,
    exemption: Exemption | None,
    attachment: Attachment | None,
    now: datetime,
    destination: Address | None = None,
) -> Decision:
    """The decision for a source at the time `now`. `destination` None stands for anywhere on the Internet;
    `attachment` or `subscription` None for a source of nobody; `exemption` is the subscription's, if any."""
    if destination is not None and is_internal(preset, destination):
        return _DECISIONS[Reason.ALLOWED_INTERNAL]
    if attachment is None:
        return _DECISIONS[Reason.DENIED_UNKNOWN_SOURCE]
    ruling = rule(preset, subscription, exemption, attachment.workload, now=now)
    return _DECISIONS[ruling.of(attachment.started)]


def rule(
    preset: Preset,
    subscription: Subscription | None,
    exemption: Exemption | None,
    workload: Workload,
    *,
    now: datetime,
) -> Ruling:
    """What holds for the attachments of a subscription with this workload at the time `now`: all that `decide`
    asks, but for the last start of each machine. So a million need not be decided one by one."""
    if subscription is None:
        return Ruling(Reason.DENIED_UNKNOWN_SOURCE)
    if subscription.standing is Standing.DISABLED:
        return Ruling(Reason.DENIED_DISABLED)
    if preset.paas_blocked and workload is Workload.PAAS:
        return Ruling(Reason.DENIED_PAAS)
    offer = preset.offer(subscription.offer)
    if offer is None:
        return Ruling(Reason.DENIED_INELIGIBLE)
    if offer.exemption is ExemptionPath.NOT_NEEDED:
        return Ruling(Reason.ALLOWED_OFFER)
    if offer.created_before is not None and subscription.created < offer.created_before:
        return Ruling(Reason.ALLOWED_GRANDFATHERED)
    if offer.exemption is ExemptionPath.NEVER:
        return Ruling(Reason.DENIED_INELIGIBLE)
    return _exempt(preset, exemption, now)


def is_internal(preset: Preset, destination: Address) -> bool:
    """Whether a destination is not on the Internet. An IPv4-mapped IPv6 address is never on the wire as such
    (RFC 4038, 4.2), and so is judged by the IPv6 prefixes, as the kernel does."""
    return any(destination.version == net.version and destination in net for net in preset.internal)


def _exempt(preset: Preset, exemption: Exemption | None, now: datetime) -> Ruling:
    match exemption:
        case None:
            return Ruling(Reason.DENIED_NOT_EXEMPT)
        case Exemption(state=ExemptionState.REQUESTED):
            return Ruling(Reason.DENIED_PENDING)
        case Exemption(state=ExemptionState.REJECTED):
            return Ruling(Reason.DENIED_REJECTED)
        case Exemption(state=ExemptionState.REVOKED):
            return Ruling(Reason.DENIED_REVOKED)
    if exemption.until is not None and now >= exemption.until:
        return Ruling(Reason.DENIED_NOT_EXEMPT)
    if preset.restart:
        return Ruling(Reason.DENIED_RESTART_REQUIRED, unless_started_after=exemption.decided, now=now)
    return Ruling(Reason.ALLOWED_EXEMPT)


def rule_text(
    preset: Preset,
    reason: Reason,
    *,
    subscription: Subscription | None,
    exemption: Exemption | None,
    attachment: Attachment | None,
) -> str:
    """Which rule of the preset gave `reason` to these facts, with the dates that mattered.

    Apart from `decide`, since a bulk load decides a million times and nobody reads the words.
    """
    offer = None if subscription is None else preset.offer(subscription.offer)
    title = "offer" if offer is None else f"offer {offer.title}"
    match reason:
        case Reason.ALLOWED_INTERNAL:
            text = "internal: the destination is not on the Internet"
        case Reason.DENIED_UNKNOWN_SOURCE:
            text = "a source of no known subscription is denied"
        case Reason.DENIED_DISABLED:
            text = "a disabled subscription is denied, whatever its offer"
        case Reason.DENIED_PAAS:
            text = "paas_blocked: platform services are denied, whatever the offer"
        case Reason.ALLOWED_OFFER:
            text = f"{title}: always allowed"
        case Reason.ALLOWED_GRANDFATHERED:
            text = f"{title}: created {_day(subscription)}, before {offer.created_before if offer else None}"
        case Reason.DENIED_INELIGIBLE if offer is None:
            unknown = None if subscription is None else subscription.offer
            text = f"offer {unknown!r} is not in the preset, so it can never be exempt"
        case Reason.DENIED_INELIGIBLE:
            text = f"{title}: never exempt"
        case Reason.DENIED_RESTART_REQUIRED:
            started = attachment.started if attachment else None
            granted = exemption.decided if exemption else None
            text = f"{title}: granted {_time(granted)}, machine last started {_time(started)}"
        case _:
            path = offer.exemption if offer else "nothing"
            text = f"{title}: exemption by {path}{_exemption_state(exemption)}"
    return f"{preset.name}: {text}"


def _exemption_state(exemption: Exemption | None) -> str:
    if exemption is None:
        return ", none asked for"
    until = f", until {_time(exemption.until)}" if exemption.until else ""
    return f", {exemption.state} {_time(exemption.decided or exemption.requested)}{until}"


def _day(subscription: Subscription | None) -> str:
    return "" if subscription is None else subscription.created.isoformat()


def _time(at: datetime | None) -> str:
    return "at an unknown time" if at is None else at.strftime("%Y-%m-%d %H:%M:%SZ")
