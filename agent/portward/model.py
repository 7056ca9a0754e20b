"""The nouns of the policy, as frozen values: subscription, attachment, exemption, reason.

They are what the store keeps (as JSON), what operators write (as YAML or JSON) and what `decide()` takes.
Parsed once, at the edge; unknown fields are refused there. Instants are aware datetimes in UTC.
No record can be part of a cycle, so the garbage collector need not look at a million of them (`gc=False`).
"""

from __future__ import annotations

from abc import ABC
from datetime import date, datetime
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, Annotated, TypeAlias
from uuid import UUID

import msgspec

from portward.base import limits

Address: TypeAlias = IPv4Address | IPv6Address
if TYPE_CHECKING:
    Network: TypeAlias = IPv4Network | IPv6Network
else:
    # msgspec takes one custom type in a field, no union of two: at run time it is their common base.
    class Network(ABC):  # noqa: B024 # it only names what two types have in common
        """A prefix of either family."""

    Network.register(IPv4Network)
    Network.register(IPv6Network)


Instant: TypeAlias = Annotated[datetime, msgspec.Meta(tz=True)]


class Standing(StrEnum):
    """How the provider sees the subscription's account."""

    GOOD = "good"
    PAST_DUE = "past-due"
    DISABLED = "disabled"


class Workload(StrEnum):
    """What sends: a virtual machine, or a platform service (a managed firewall, say)."""

    VM = "vm"
    PAAS = "paas"


class Mode(StrEnum):
    """Whether a verdict is carried out, or only worked out and counted."""

    ENFORCE = "enforce"
    OBSERVE = "observe"


class ExemptionState(StrEnum):
    """The latest recorded state of an exemption. A grant that has ended is still a record of a grant."""

    REQUESTED = "requested"
    GRANTED = "granted"
    REJECTED = "rejected"
    REVOKED = "revoked"


class FraudCheck(StrEnum):
    """What an anti-fraud check found; `refer`: a person has to look."""

    PASS = "pass"  # noqa: S105 # no password
    FAIL = "fail"
    REFER = "refer"


class Authentication(StrEnum):
    """What a domain publishes so that others can tell its mail from forged mail (RFC 7208, 6376, 7489)."""

    SPF = "spf"
    DKIM = "dkim"
    DMARC = "dmarc"


class Reason(StrEnum):
    """Why a source may or may not send. Fixed: tools rely on these codes."""

    ALLOWED_OFFER = "allowed-offer"
    ALLOWED_GRANDFATHERED = "allowed-grandfathered"
    ALLOWED_EXEMPT = "allowed-exempt"
    ALLOWED_INTERNAL = "allowed-internal"
    DENIED_NOT_EXEMPT = "denied-not-exempt"
    DENIED_INELIGIBLE = "denied-ineligible"
    DENIED_PENDING = "denied-pending"
    DENIED_REJECTED = "denied-rejected"
    DENIED_REVOKED = "denied-revoked"
    DENIED_RESTART_REQUIRED = "denied-restart-required"
    DENIED_PAAS = "denied-paas"
    DENIED_DISABLED = "denied-disabled"
    DENIED_UNKNOWN_SOURCE = "denied-unknown-source"

    @property
    def allows(self) -> bool:
        """True where a source with this reason may open connections."""
        return self.value.startswith("allowed-")


class Subscription(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """Who pays. `created` is a UTC date; `offer` is an id that the preset knows."""

    id: UUID
    offer: str
    created: date
    name: str = ""
    standing: Standing = Standing.GOOD
    payment_history: bool = False
    mode: Mode = Mode.ENFORCE


class Attachment(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """A source behind the gateway: a segment (interface name) and an address or prefix in it.

    `started` is when the workload was last started; None where nobody has said.
    """

    segment: str
    address: Network
    subscription: UUID
    workload: Workload = Workload.VM
    started: Instant | None = None


class RateLimit(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """New connections to the judged ports that a whole subscription may open, however many sources it has:
    `per_minute`, and `burst` of them at once."""

    per_minute: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_RATE_PER_MINUTE)]
    burst: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_BURST)] = 5

    def __str__(self) -> str:
        return f"{self.per_minute} new connections a minute, {self.burst} at once"


class Details(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """What a request for review tells of the mail that is to be sent; `volume` in messages a day."""

    mail_software: str = ""
    volume: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_MESSAGES_PER_DAY)] | None = None
    reverse_dns: str = ""
    authentication: tuple[Authentication, ...] = ()
    terms_accepted: bool = False


class Exemption(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """The latest state of a subscription's permission to send; there is one for each subscription.

    `decided` is when it was granted, rejected or revoked, by whom and for what `reason`; a grant counts until
    `until`, for ever if None, and within `limit`, if any. `fraud_check` is what an anti-fraud check found, in the
    words of `fraud_note`.
    """

    subscription: UUID
    state: ExemptionState
    requested: Instant | None = None
    decided: Instant | None = None
    until: Instant | None = None
    by: str = ""
    justification: str = ""
    reason: str = ""
    details: Details | None = None
    fraud_check: FraudCheck | None = None
    fraud_note: str = ""
    limit: RateLimit | None = None


Record: TypeAlias = Subscription | Attachment | Exemption
