"""One document of operators: lists of subscriptions, attachments and exemptions, in YAML or JSON. Pure.

Records come out one by one, in the order of the file. A mistake is reported with file, line, field and what
would be right. Lines are looked up only if there is a mistake to report: a million good records need none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from portward.config.documents import Steps, dec_hook, explained, field_name, shortened
from portward.errors import InputError
from portward.inventory.days import with_times
from portward.model import Record
from portward.store.codec import KINDS


class Lists(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The top level of a document. Its records are decoded later, one by one."""

    subscriptions: tuple[Any, ...] = ()
    attachments: tuple[Any, ...] = ()
    exemptions: tuple[Any, ...] = ()


class Document(ABC):
    """A document whose top level was read; `name` is the file as the operator named it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def records(self) -> Iterator[tuple[Steps, Record]]:
        """Each record and the steps to it; raises InputError at one that cannot be read."""
        for steps, record in self.each():
            if isinstance(record, InputError):
                raise record
            yield steps, record

    def each(self) -> Iterator[tuple[Steps, Record | InputError]]:
        """Each record, or why it cannot be read, and the steps to it."""
        for kind in KINDS:
            for index, item in enumerate(getattr(self._lists(), kind)):
                try:
                    yield (kind, index), self._record(kind, index, item)
                except InputError as error:
                    yield (kind, index), error

    def mistake(self, problem: str, *steps: str | int) -> InputError:
        """The error for a field of this document."""
        return InputError(shortened(problem), file=self.name, line=self.line(steps), field=field_name(steps))

    @abstractmethod
    def line(self, steps: Steps) -> int | None:
        """The line (from 1) of a field; if the field is not there, that of what is around it."""

    @abstractmethod
    def _lists(self) -> Any:
        """The three lists, as attributes named by `KINDS`."""

    def _record(self, kind: str, index: int, item: Any) -> Record:
        item = with_times(KINDS[kind], item)
        try:
            record: Record = msgspec.convert(item, KINDS[kind], dec_hook=dec_hook)
        except msgspec.ValidationError as error:
            problem, steps = explained(str(error), KINDS[kind], item)
            raise self.mistake(problem, kind, index, *steps) from None
        return record


def keys_by_kind(records: Mapping[str, str]) -> dict[str, list[str]]:
    """The keys of a store's records (key → JSON) by kind, sorted. Keys of an unknown kind are kept under it;
    `decode` refuses them."""
    kinds: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for key in sorted(records):
        kinds.setdefault(key.partition("/")[0], []).append(key)
    return kinds
