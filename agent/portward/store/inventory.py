"""What the operators' documents say together: every record checked, and each key once.

Everything is checked before anything is used; a mistake is told with file, line, field and what would be
right. Records are kept as the store keeps them, as JSON: a million of them in some 400 MB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import UTC
from functools import lru_cache
from typing import Final
from uuid import UUID

from msgspec.structs import replace

from portward.documents import Steps
from portward.errors import InputError
from portward.model import Attachment, Exemption, ExemptionState, Record, Subscription
from portward.store.document import Document, read_document
from portward.store.protocol import Progress, encode, key_of

# What the kernel takes as an interface name (dev_valid_name in net/core/dev.c), without the wildcard of the
# configuration: an attachment is in one segment. The length is in bytes.
_INTERFACE: Final = re.compile(r"(?!\.{1,2}$)[^\s/:*\0]+")
_LONGEST_INTERFACE: Final = 15
_INSTANTS: Final = {Attachment: ("started",), Exemption: ("requested", "decided", "until")}


class Inventory:
    """Records of one or several documents. `records` holds their JSON by key; `offers` and `subscriptions` are
    the offers and subscriptions that they name, each with the key of the first record that does."""

    def __init__(self, documents: Sequence[Document], progress: Progress | None = None) -> None:
        """Checks what a record and the records together can show; raises InputError at the first mistake.
        `progress` hears how many records were taken so far."""
        self._documents = documents
        self.records: dict[str, str] = {}
        self.offers: dict[str, str] = {}
        self.subscriptions: dict[UUID, str] = {}
        for document in documents:
            for steps, record in document.records():
                for field, problem in _mistakes(record):
                    raise document.mistake(problem, *steps, field)
                key = key_of(record)
                if key in self.records:
                    raise document.mistake(f"{key} stands in {self._first_place(key)} already", *steps)
                self._take(key, record)
                if progress is not None and len(self.records) % 10_000 == 0:
                    progress(len(self.records))

    def mistake(self, key: str, problem: str, *fields: str) -> InputError:
        """The error for a field of the record under `key`."""
        document, steps = self._first(key)
        return document.mistake(problem, *steps, *fields)

    def _take(self, key: str, record: Record) -> None:
        if isinstance(record, Subscription):
            self.offers.setdefault(record.offer, key)
            self.records[key] = encode(record)
        else:
            self.subscriptions.setdefault(record.subscription, key)
            self.records[key] = encode(_in_utc(record))

    def _first(self, key: str) -> tuple[Document, Steps]:
        for document in self._documents:
            for steps, record in document.records():
                if key_of(record) == key:
                    return document, steps
        raise KeyError(key)

    def _first_place(self, key: str) -> str:
        document, steps = self._first(key)
        return f"{document.name}:{document.line(steps)}"


def read_inventory(names: Sequence[str], progress: Progress | None = None) -> Inventory:
    """The inventory in these files, `-` for standard input; raises InputError."""
    return Inventory([read_document(name) for name in names], progress)


def _in_utc(record: Attachment | Exemption) -> Record:
    """The record with its instants in UTC, as the store keeps them: one instant, one text."""
    moved = {
        name: value.astimezone(UTC)
        for name in _INSTANTS[type(record)]
        if (value := getattr(record, name)) is not None and value.tzinfo is not UTC
    }
    return replace(record, **moved) if moved else record


def _mistakes(record: Record) -> Iterator[tuple[str, str]]:
    """What is wrong with a record beyond the types of its fields: (field, what would be right)."""
    match record:
        case Subscription():
            if not record.offer:
                yield "offer", "an offer needs an id, like pay-as-you-go"
        case Attachment():
            if not _is_interface(record.segment):
                problem = f"{record.segment!r} is no interface name: 1 to 15 bytes, no space, '/', ':' or '*'"
                yield "segment", problem
            if getattr(record.address.network_address, "scope_id", None):
                yield "address", "an address needs no zone: the segment says which one"
        case Exemption():
            yield from _exemption_mistakes(record)


def _exemption_mistakes(record: Exemption) -> Iterator[tuple[str, str]]:
    if record.state is not ExemptionState.REQUESTED and record.decided is None:
        yield "state", f"an exemption that is {record.state} needs `decided`, the time of that decision"
    if record.until is not None and record.decided is not None and record.until <= record.decided:
        yield "until", f"{record.until.isoformat()} is not after `decided`, {record.decided.isoformat()}"


@lru_cache(maxsize=65_536)  # a gateway's segments: each is in many attachments
def _is_interface(name: str) -> bool:
    return _INTERFACE.fullmatch(name) is not None and len(name.encode()) <= _LONGEST_INTERFACE
