"""All records of the operators' documents together: each record is checked, and no key occurs twice.

Everything is checked before anything is used. A mistake is reported with file, line, field and what would be
right. Records are kept as the store keeps them, as JSON: a million of them take some 400 MB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from typing import Final
from uuid import UUID

from msgspec.structs import replace

from portward.base.characters import unshown
from portward.config.documents import Steps, brief
from portward.errors import InputError, together
from portward.inventory.document import Document
from portward.model import Attachment, Exemption, ExemptionState, Record, Subscription
from portward.store.codec import encode, key_of
from portward.store.validity import INSTANTS, flaws
from portward.store.values import Progress

# How many mistakes of an inventory are reported.
_MOST_MISTAKES: Final = 20


class Inventory:
    """Records of one or several documents. `records` holds their JSON by key; `offers` and `subscriptions` are
    the offers and subscriptions that they name, each with the key of the first record that does."""

    def __init__(self, documents: Sequence[Document], progress: Progress | None = None) -> None:
        """Checks what a record and the records together can show; raises InputError, with up to 20 mistakes.
        `progress` hears how many records were taken so far."""
        self._documents = documents
        self.records: dict[str, str] = {}
        self.offers: dict[str, str] = {}
        self.subscriptions: dict[UUID, str] = {}
        # The latest start of a machine, and the key of its record.
        self.latest_start: tuple[datetime, str] | None = None
        # The latest day on which a subscription was created, and its key.
        self.latest_creation: tuple[date, str] | None = None
        found: list[InputError] = []
        for document in documents:
            for steps, record in document.each():
                wrong = record if isinstance(record, InputError) else self._mistake_of(document, steps, record)
                if wrong is not None:
                    found.append(wrong)
                    if len(found) == _MOST_MISTAKES:
                        raise together(found)
                elif progress is not None and len(self.records) % 10_000 == 0:
                    progress(len(self.records))
        if found:
            raise together(found)

    def _mistake_of(self, document: Document, steps: Steps, record: Record) -> InputError | None:
        """Takes a record; gives its first mistake instead if it has one."""
        for field, problem in mistakes(record):
            return document.mistake(problem, *steps, field)
        key = key_of(record)
        if key in self.records:
            return document.mistake(f"{key} stands in {self._first_place(key)} already", *steps)
        self._take(key, record)
        return None

    def mistake(self, key: str, problem: str, *fields: str) -> InputError:
        """The error for a field of the record under `key`."""
        document, steps = self._first(key)
        return document.mistake(problem, *steps, *fields)

    def _take(self, key: str, record: Record) -> None:
        if isinstance(record, Subscription):
            self.offers.setdefault(record.offer, key)
            if self.latest_creation is None or record.created > self.latest_creation[0]:
                self.latest_creation = record.created, key
            self.records[key] = encode(record)
        else:
            self.subscriptions.setdefault(record.subscription, key)
            started = record.started if isinstance(record, Attachment) else None
            if started is not None and (self.latest_start is None or started > self.latest_start[0]):
                self.latest_start = started, key
            self.records[key] = encode(_in_utc(record))

    def _first(self, key: str) -> tuple[Document, Steps]:
        for document in self._documents:
            for steps, record in document.each():
                if not isinstance(record, InputError) and key_of(record) == key:
                    return document, steps
        raise KeyError(key)

    def _first_place(self, key: str) -> str:
        document, steps = self._first(key)
        return f"{document.name}:{document.line(steps)}"


def _in_utc(record: Attachment | Exemption) -> Record:
    """The record with its instants in UTC, as the store keeps them: one instant, one text."""
    moved = {
        name: value.astimezone(UTC)
        for name in INSTANTS[type(record)]
        if (value := getattr(record, name)) is not None and value.tzinfo is not UTC
    }
    return replace(record, **moved) if moved else record


def mistakes(record: Record) -> Iterator[tuple[str, str]]:
    """The mistakes in a record beyond the types of its fields: (field, what would be right)."""
    yield from flaws(record)
    match record:
        case Subscription():
            if not record.offer:
                yield "offer", "an offer needs an id, like pay-as-you-go"
            if record.offer != record.offer.strip():
                yield "offer", f"{brief(record.offer)} begins or ends with white space: an id does not"
            yield from _unshown(name=record.name)
            yield from _invisible(offer=record.offer)
        case Exemption():
            yield from _exemption_mistakes(record)
            yield from _unshown(by=record.by)
            # A justification that a person wrote may have several lines.
            yield from _unshown(
                lines=True, justification=record.justification, reason=record.reason, fraud_note=record.fraud_note
            )
            if record.details is not None:
                yield from _unshown(
                    details=f"{record.details.mail_software}{record.details.reverse_dns}",
                )


def _unshown(*, lines: bool = False, **texts: str) -> Iterator[tuple[str, str]]:
    for field, text in texts.items():
        yield from _named(field, text, unshown(text, lines=lines))


def _invisible(**ids: str) -> Iterator[tuple[str, str]]:
    """Ids are compared, so what cannot be seen in them is a mistake; in a name it is a letter's part."""
    for field, text in ids.items():
        yield from _named(field, text, next((sign for sign in text if not sign.isprintable()), None))


def _named(field: str, text: str, sign: str | None) -> Iterator[tuple[str, str]]:
    if sign is not None:
        yield field, f"{brief(text)} holds U+{ord(sign):04X}, which cannot be printed: leave it out"


def _exemption_mistakes(record: Exemption) -> Iterator[tuple[str, str]]:
    if record.state is not ExemptionState.REQUESTED and record.decided is None:
        yield "state", f"an exemption that is {record.state} needs `decided`, the time of that decision"
    if record.state is ExemptionState.REQUESTED and record.decided is not None:
        yield "decided", "an exemption that is requested is not decided yet: leave `decided` out"
    if record.state is ExemptionState.REJECTED and record.until is not None:
        yield "until", "an exemption that is rejected has no end: only a grant takes `until`"
    if record.state in (ExemptionState.REQUESTED, ExemptionState.REJECTED) and record.limit is not None:
        yield "limit", f"an exemption that is {record.state} lets nothing through: only a grant takes a limit"
    if record.requested is not None and record.decided is not None and record.decided < record.requested:
        when = f"{_utc(record.decided)} is before `requested`, {_utc(record.requested)}"
        yield "decided", when
    if record.until is not None and record.decided is not None and record.until <= record.decided:
        yield "until", f"{_utc(record.until)} is not after `decided`, {_utc(record.decided)}"


def _utc(at: datetime) -> str:
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")
