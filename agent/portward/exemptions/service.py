"""The verbs on exemptions and on the starts of machines, on a store.

Each verb reads the store, decides by `lifecycle`, and writes only if the store has not changed meanwhile. So every
decision is made on the records that it replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from msgspec.structs import replace

from portward.base.limits import CLOCK_DRIFT
from portward.config.documents import network_text
from portward.errors import InputError, PortwardError
from portward.exemptions import lifecycle
from portward.exemptions.lifecycle import Application, Case, FraudChecker, FraudResult, RefusedError, State
from portward.inventory.records import mistakes
from portward.model import Address, Attachment, Exemption, RateLimit, Reason, Subscription
from portward.policy.decide import decide
from portward.policy.preset import ExemptionPath, Preset
from portward.store.codec import encode, key_of, readable
from portward.store.confirmation import confirmation
from portward.store.lookup import find
from portward.store.protocol import Store
from portward.store.update import Reading, Written, update
from portward.store.values import Change, Put


class NotFoundError(PortwardError):
    """The store has no record of what was named."""


class ExemptionRow(NamedTuple):
    """An exemption, its subscription (None if the store has none) and its state now."""

    subscription: UUID
    owner: Subscription | None
    exemption: Exemption
    state: State


class ExemptionChange(NamedTuple):
    """The result of an action: the new record, and the revision that it was written as."""

    subscription: Subscription
    exemption: Exemption
    written: Written


class RecordedStart(NamedTuple):
    """A start that was recorded: the attachment that covers the address, and the reason why its machine may or may
    not send now."""

    attachment: Attachment
    reason: Reason
    written: Written


class ExemptionService:
    """The exemptions of one store, under one preset. Every method raises StoreError."""

    def __init__(
        self,
        store: Store,
        preset: Preset,
        *,
        actor: str,
        clock: Callable[[], datetime],
        trust_clock: bool = False,
        check: FraudChecker | None = None,
    ) -> None:
        """`actor` is the name for the log. `clock` returns the time in UTC. `check` runs the provider's anti-fraud
        check; None if there is none."""
        self.store, self._preset, self._fraud_check = store, preset, check
        self._actor, self._clock, self._trust_clock = actor, clock, trust_clock

    def request(self, id_: UUID, asked: Application) -> ExemptionChange:
        """Requests an exemption; raises NotFoundError and RefusedError."""
        found = self._check(id_, asked)
        return self._change(id_, lambda case: lifecycle.request(case, asked, by=self._actor, check=found))

    def grant(
        self, id_: UUID, *, check: FraudResult | None, until: datetime | None, limit: RateLimit | None
    ) -> ExemptionChange:
        """Grants a request; raises NotFoundError and RefusedError."""
        return self._change(
            id_,
            lambda case: lifecycle.grant(case, by=self._actor, check=check, until=until, limit=limit),
        )

    def reject(self, id_: UUID, reason: str) -> ExemptionChange:
        """Rejects a request; raises NotFoundError and RefusedError."""
        return self._change(id_, lambda case: lifecycle.reject(case, by=self._actor, reason=reason))

    def limit(self, id_: UUID, limit: RateLimit | None) -> ExemptionChange:
        """Changes or removes the rate limit of a grant; raises NotFoundError and RefusedError."""
        return self._change(id_, lambda case: lifecycle.limit(case, limit))

    def revoke(self, id_: UUID, reason: str) -> ExemptionChange:
        """Revokes a grant; raises NotFoundError and RefusedError."""
        return self._change(id_, lambda case: lifecycle.revoke(case, by=self._actor, reason=reason))

    def revoke_all(self, ids: Sequence[UUID], reason: str) -> Written:
        """Revokes many grants, all of them or none, however many subscriptions that flips: the revision confirms
        itself. Raises NotFoundError and RefusedError."""

        def decide(reading: Reading) -> list[Put]:
            puts = []
            for id_ in ids:
                record = _checked(lifecycle.revoke(self._case(reading, id_), by=self._actor, reason=reason))
                puts.append(Put(key_of(record), encode(record)))
            return [*puts, confirmation(reading.revision + 1, alone=True)]

        return self._update(decide)

    def not_revocable(self, ids: Iterable[UUID]) -> Iterator[tuple[UUID, PortwardError]]:
        """The subscriptions whose exemption cannot be revoked, and why. Writes nothing."""
        reading = Reading(self.store, self._clock, trust_clock=self._trust_clock)
        for id_ in ids:
            try:
                lifecycle.check_revocable(self._case(reading, id_))
            except (NotFoundError, RefusedError) as error:
                yield id_, error

    def started(self, segment: str, address: Address, at: datetime | None) -> RecordedStart:
        """Records that the machine behind an address was started, at `at` or now. Raises NotFoundError, and
        PortwardError for a start before the recorded one, which could not undo that one."""
        found: list[tuple[Attachment, Reason]] = []

        def record_start(reading: Reading) -> list[Put]:
            _, attachment, subscription, exemption = find(self.store, segment, address)
            if attachment is None:
                raise NotFoundError(
                    f"no attachment covers {address} in segment {segment}: the inventory lacks it, see "
                    "`portward apply`"
                )
            started = at or reading.now
            _check_start(attachment, started, reading.now)
            record = replace(attachment, started=started)
            decision = decide(
                self._preset, subscription=subscription, exemption=exemption, attachment=record, now=reading.now
            )
            found[:] = [(record, decision.reason)]
            return [Put(key_of(record), encode(record))]

        written = self._update(record_start)
        return RecordedStart(*found[0], written)

    def rows(self, now: datetime) -> Iterator[ExemptionRow]:
        """All exemptions, in the order of their subscriptions."""
        for key, body in self.store.under("exemptions/"):
            record = readable(key, body)
            if isinstance(record, Exemption):
                owner = self._subscription(record.subscription)
                yield ExemptionRow(record.subscription, owner, record, lifecycle.state_of(record, now))

    def row(self, id_: UUID, now: datetime) -> ExemptionRow:
        """The exemption of a subscription; raises NotFoundError if there is none."""
        owner = self._subscription(id_)
        record = readable(f"exemptions/{id_}", self.store.get(f"exemptions/{id_}"))
        if isinstance(record, Exemption):
            return ExemptionRow(id_, owner, record, lifecycle.state_of(record, now))
        if owner is None:
            raise NotFoundError(
                f"no subscription {id_} is in the store: `portward exemption list` shows those there are"
            )
        raise NotFoundError(f"there is no request for an exemption of {id_}{_named(owner)}")

    def history(self, id_: UUID) -> list[Change]:
        """All changes of a subscription's exemption, oldest first; raises NotFoundError."""
        changes = list(self.store.history(f"exemptions/{id_}"))
        if not changes:
            self.row(id_, self._clock())  # raises NotFoundError with the reason
        return changes

    def _check(self, id_: UUID, asked: Application) -> FraudResult | None:
        """The result of the provider's anti-fraud check, for a request that a person will review; else None. It
        runs before the write, because it may take minutes."""
        reading = Reading(self.store, self._clock, trust_clock=self._trust_clock)
        case = self._case(reading, id_)
        if lifecycle.check_application(case, asked) is not ExemptionPath.REVIEW or self._fraud_check is None:
            return None
        return self._fraud_check(case, asked, self._actor)

    def _change(self, id_: UUID, act: Callable[[Case], Exemption]) -> ExemptionChange:
        done: list[tuple[Subscription, Exemption]] = []

        def decide(reading: Reading) -> list[Put]:
            case = self._case(reading, id_)
            record = _checked(act(case))
            done[:] = [(case.subscription, record)]
            return [Put(key_of(record), encode(record))]

        written = self._update(decide)
        return ExemptionChange(*done[0], written)

    def _update(self, decide: Callable[[Reading], list[Put]]) -> Written:
        return update(self.store, decide, actor=self._actor, clock=self._clock, trust_clock=self._trust_clock)

    def _case(self, reading: Reading, id_: UUID) -> Case:
        subscription, exemption = reading.get(f"subscriptions/{id_}"), reading.get(f"exemptions/{id_}")
        if not isinstance(subscription, Subscription):
            raise NotFoundError(f"no subscription {id_} is in the store: `portward apply` brings it in")
        return Case(
            self._preset, subscription, exemption if isinstance(exemption, Exemption) else None, reading.now
        )

    def _subscription(self, id_: UUID) -> Subscription | None:
        record = readable(f"subscriptions/{id_}", self.store.get(f"subscriptions/{id_}"))
        return record if isinstance(record, Subscription) else None


def _checked(record: Exemption) -> Exemption:
    """The record. Raises InputError if an inventory could not contain it, for example because a text is not
    printable."""
    for field, problem in mistakes(record):
        raise InputError(problem, field=field)
    return record


def _check_start(attachment: Attachment, started: datetime, now: datetime) -> None:
    place = f"{attachment.segment} {network_text(attachment.address)}"
    if started > now + CLOCK_DRIFT:
        raise PortwardError(f"{place}: {started:%Y-%m-%d %H:%M:%SZ} lies in the future: a start has happened")
    if attachment.started is not None and started < attachment.started:
        raise PortwardError(
            f"{place}: a later start is recorded already, {attachment.started:%Y-%m-%d %H:%M:%SZ}; "
            "`portward apply` corrects one that is wrong"
        )


def _named(owner: Subscription) -> str:
    return f" ({owner.name})" if owner.name else ""
