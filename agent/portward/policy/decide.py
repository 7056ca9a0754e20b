"""May this source open a connection, and why? Pure: no clock and no files, and equal inputs give equal answers.

The first of these that applies decides (the policy page of the default preset, December 2020):

1. The destination is not on the Internet: allowed.
2. No attachment covers the source, or its subscription is unknown: denied.
3. The subscription is disabled: denied.
4. The workload is a platform service and the preset blocks those: denied.
5. The offer may always send, or the subscription was created before the offer's date: allowed.
6. The offer can never be exempt: denied, even if an old exemption is recorded as granted.
7. The latest state of the exemption. If the preset asks for a restart, a grant counts for a machine only after its
   next start.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from portward.base.words import utc
from portward.model import Address, Attachment, Exemption, ExemptionState, Reason, Standing, Subscription, Workload
from portward.policy.preset import ExemptionPath, Preset


class Decision(NamedTuple):
    """A verdict on a source: the reason says whether it may open connections."""

    reason: Reason

    @property
    def allows(self) -> bool:
        """Whether the source may open connections."""
        return self.reason.allows


# Made once: a bulk load decides a million times.
_DECISIONS = {reason: Decision(reason) for reason in Reason}


class Ruling(NamedTuple):
    """The decision for all attachments of one subscription with one workload.

    It is `reason`, except that a grant counts for a machine that was started after `unless_started_after` and not
    later than `now`. A start that is not recorded has not happened. A start that is recorded for a later time, by
    a clock that is fast, has not happened yet.
    """

    reason: Reason
    unless_started_after: datetime | None = None
    now: datetime | None = None

    def of(self, started: datetime | None) -> Reason:
        """The reason for an attachment whose machine was last started at `started`; None if that is unknown."""
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
    """The decision for a source at the time `now`. `destination` None means any address on the Internet.
    `attachment` or `subscription` None means an unknown source. `exemption` is the subscription's, if it has
    one."""
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
    """The decision for all attachments of a subscription with this workload at the time `now`. It leaves open only
    the last start of each machine, so that a subscription with a million attachments is decided once."""
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
    """Whether a destination is not on the Internet. An IPv4-mapped IPv6 address is compared with the IPv6
    prefixes, as the kernel does, because no packet has such an address (RFC 4038, 4.2)."""
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
    """The rule of the preset that gave `reason` for these records, with the dates that mattered, for an operator.

    Separate from `decide`, because a bulk load decides a million times and needs no text.
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
    return "at an unknown time" if at is None else utc(at)
