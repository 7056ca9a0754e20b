"""The nouns of the policy, as frozen values: subscription, attachment, exemption, reason.

The store holds them as JSON, operators write them as YAML or JSON, and `decide()` takes them. They are parsed
once, at the edge, which refuses unknown fields. Instants are aware datetimes in UTC. A record cannot be part of a
reference cycle, so the garbage collector does not track a million of them (`gc=False`).
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
    # A field of a msgspec struct takes one custom type, not a union of two. At run time it is their common base.
    class Network(ABC):  # noqa: B024 # it only names what two types have in common
        """A prefix of either family."""

    Network.register(IPv4Network)
    Network.register(IPv6Network)


Instant: TypeAlias = Annotated[datetime, msgspec.Meta(tz=True)]


class Standing(StrEnum):
    """The state of the subscription's account with the provider."""

    GOOD = "good"
    PAST_DUE = "past-due"
    DISABLED = "disabled"


class Workload(StrEnum):
    """The kind of sender: a virtual machine, or a platform service such as a managed firewall."""

    VM = "vm"
    PAAS = "paas"


class Mode(StrEnum):
    """Whether a verdict is enforced, or only decided and counted."""

    ENFORCE = "enforce"
    OBSERVE = "observe"


class ExemptionState(StrEnum):
    """The latest recorded state of an exemption. After its end, a grant is still recorded as granted."""

    REQUESTED = "requested"
    GRANTED = "granted"
    REJECTED = "rejected"
    REVOKED = "revoked"


class FraudCheck(StrEnum):
    """The result of an anti-fraud check. `refer`: a person must decide."""

    PASS = "pass"  # noqa: S105 # no password
    FAIL = "fail"
    REFER = "refer"


class Authentication(StrEnum):
    """A standard by which a domain shows that mail in its name is genuine (RFC 7208, 6376, 7489)."""

    SPF = "spf"
    DKIM = "dkim"
    DMARC = "dmarc"


class Reason(StrEnum):
    """Why a source may or may not send. Other tools rely on these codes, so they never change."""

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
        """Whether a source with this reason may open connections."""
        return self.value.startswith("allowed-")


class Subscription(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """A customer's contract. `created` is a UTC date. `offer` is the id of an offer in the preset."""

    id: UUID
    offer: str
    created: date
    name: str = ""
    standing: Standing = Standing.GOOD
    payment_history: bool = False
    mode: Mode = Mode.ENFORCE


class Attachment(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """A source behind the gateway: a segment (interface name) and an address or prefix in it.

    `started` is when the workload was last started; None if that is not recorded.
    """

    segment: str
    address: Network
    subscription: UUID
    workload: Workload = Workload.VM
    started: Instant | None = None


class RateLimit(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """The rate limit of a whole subscription, however many sources it has: new connections to the policy ports,
    `per_minute`, and up to `burst` at once."""

    per_minute: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_RATE_PER_MINUTE)]
    burst: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_BURST)] = 5

    def __str__(self) -> str:
        return f"{self.per_minute} new connections a minute, {self.burst} at once"


class Details(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """The description of the mail in a request for review; `volume` is in messages a day."""

    mail_software: str = ""
    volume: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_MESSAGES_PER_DAY)] | None = None
    reverse_dns: str = ""
    authentication: tuple[Authentication, ...] = ()
    terms_accepted: bool = False


class Exemption(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """The latest state of a subscription's permission to send. A subscription has at most one.

    `decided` is when it was granted, rejected or revoked; `by` is who did it, or who requested it, and `reason` is
    why. A grant is valid until `until`, or for ever if that is None, and within `limit`, if there is one.
    `fraud_check` is the result of an anti-fraud check, and `fraud_note` its explanation.
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
