"""The rows of the test: a customer for each mail software and each thing that portward can do to it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from enum import StrEnum
from ipaddress import ip_network
from typing import Final, NamedTuple
from uuid import UUID

from mail.clients import CLIENTS, Client, Fate, Said
from portward.lab.topology import Tenant
from portward.model import Attachment, Exemption, ExemptionState, Mode, RateLimit, Record, Subscription

LIMIT: Final = RateLimit(per_minute=20, burst=2)
_REQUESTED: Final = datetime(2026, 1, 9, 12, tzinfo=UTC)
_RESTARTED: Final = datetime(2026, 1, 10, tzinfo=UTC)
_BIG: Final = 3 << 20  # bytes of a mail that is on its way for longer than a revocation takes


class State(StrEnum):
    """How portward treats a customer."""

    ALLOWED = "allowed"
    DROPPED = "dropped"
    REJECTED = "rejected"
    LIMITED = "limited"
    OBSERVED = "observed"
    REVOKED = "revoked"


# The states of the customers on each gateway, by its `refuse_with`: how it blocks a denied source.
STATES: Final = {
    "drop": (State.ALLOWED, State.DROPPED, State.LIMITED, State.OBSERVED, State.REVOKED),
    "reject": (State.REJECTED, State.REVOKED),
}


class Verdicts(NamedTuple):
    """Labels `verdict` of a subscription's counters: those that must be there, and others that may."""

    always: Set[str]
    sometimes: Set[str] = frozenset()

    @property
    def all(self) -> Set[str]:
        """Both."""
        return self.always | self.sometimes


VERDICTS: Final = {
    State.ALLOWED: Verdicts({"allow"}),
    State.DROPPED: Verdicts({"deny"}),
    State.REJECTED: Verdicts({"reject"}),
    State.LIMITED: Verdicts({"rated"}, {"throttled", "deferred"}),
    State.OBSERVED: Verdicts({"would_deny"}),
    State.REVOKED: Verdicts({"allow"}, {"deny", "reject"}),
}
EXPECTED: Final = {
    State.ALLOWED: Fate.DELIVERED,
    State.DROPPED: Fate.TIMED_OUT,
    State.REJECTED: Fate.REFUSED,
    State.LIMITED: Fate.DELIVERED,
    State.OBSERVED: Fate.DELIVERED,
}


@dataclass
class Row:
    """A customer: its machine, a subscription for each address family, and what its software said."""

    kind: type[Client]
    state: State
    tenant: Tenant
    subscriptions: dict[int, UUID] = field(default_factory=lambda: {4: uuid.uuid4(), 6: uuid.uuid4()})
    said: dict[int, list[Said]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind.NAME}, {self.state}"

    def address(self, family: int) -> str:
        """Its address of a family."""
        return self.tenant.address4 if family == 4 else self.tenant.address6

    def records(self) -> Iterator[Record]:
        """The customer's records in the store: subscriptions, exemptions and attachments."""
        for family, id_ in self.subscriptions.items():
            offer = "enterprise-agreement" if self.state is State.ALLOWED else "pay-as-you-go"
            mode = Mode.OBSERVE if self.state is State.OBSERVED else Mode.ENFORCE
            yield Subscription(id=id_, offer=offer, created=date(2022, 6, 30), mode=mode)
            if self.state in (State.LIMITED, State.REVOKED):
                limit = LIMIT if self.state is State.LIMITED else None
                yield _exemption(id_, ExemptionState.GRANTED, limit)
            yield Attachment(
                segment=self.tenant.segment, address=ip_network(self.address(family)), subscription=id_,
                started=_RESTARTED,
            )  # fmt: skip

    def revocations(self) -> Iterator[Record]:
        """The records that revoke the customer's exemptions."""
        for id_ in self.subscriptions.values():
            yield _exemption(id_, ExemptionState.REVOKED, None)

    def mails(self, mark: str) -> list[str]:
        """The mails that the customer sends, marked with `mark`: four if it has a rate limit, which is more than
        the limit lets through at once. A customer that will be revoked sends one big mail, so that it takes
        long."""
        count = 4 if self.state is State.LIMITED else 1
        size = _BIG if self.state is State.REVOKED else 2_000
        return [mail(f"{mark}-{number}", size) for number in range(count)]


def mail(mark: str, size: int) -> str:
    """A mail of about `size` bytes; its last line holds the mark."""
    line = "All work and no play makes Jack a dull boy, said the gateway.\n"
    head = f"From: sender@tenant.example\nTo: rcpt@mail.example\nSubject: {mark}\n\n"
    return f"{head}{line * (size // len(line))}end-{mark}\n"


def _exemption(id_: UUID, state: ExemptionState, limit: RateLimit | None) -> Exemption:
    return Exemption(subscription=id_, state=state, requested=_REQUESTED, decided=_REQUESTED, limit=limit)


def rows(states: Sequence[State]) -> list[Row]:
    """A row for each software in each of these states."""
    pairs = [(kind, state) for state in states for kind in CLIENTS]
    return [
        Row(kind, state, Tenant(f"{state}-{number}", 1101 + number)) for number, (kind, state) in enumerate(pairs)
    ]
