"""What operators write: YAML or JSON with the lists `subscriptions`, `attachments` and `exemptions`.

Everything is checked before anything is used; a mistake is told with file, line, field and what would be
right. Lines are looked up when there is something to tell: a million records need none.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from portward.documents import dec_hook, explained, field_name
from portward.errors import InputError
from portward.model import Attachment, Exemption, ExemptionState, Record, Subscription
from portward.store.protocol import KINDS, Progress, key_of

Steps = tuple[str | int, ...]

# What the kernel takes as an interface name (dev_valid_name in net/core/dev.c).
_INTERFACE: Final = re.compile(r"[^\s/:]{1,15}")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc] # C where it is built
    """YAML in which dates stay text: a date that is none is then told with its place, like any other value."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_SPACE: Final = re.compile(r"[ \t\r\n]*")


class Lists(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One document."""

    subscriptions: tuple[Subscription, ...] = ()
    attachments: tuple[Attachment, ...] = ()
    exemptions: tuple[Exemption, ...] = ()


class Document:
    """A document that was read: its records, and where each of them stands."""

    def __init__(self, name: str, text: str, *, as_json: bool) -> None:
        """`name` is the file as the operator named it. Raises InputError."""
        self.name, self._text, self._json = name, text, as_json
        self._node: yaml.Node | None = None
        self.lists = self._from_json() if as_json else self._from_yaml()

    def records(self) -> Iterator[tuple[Steps, Record]]:
        """Each record, and the steps to it."""
        for kind in KINDS:
            for place, record in enumerate(getattr(self.lists, kind)):
                yield (kind, place), record

    def mistake(self, problem: str, *steps: str | int) -> InputError:
        """The error for a field of this document."""
        return InputError(problem, file=self.name, line=self.line(steps), field=field_name(steps))

    def line(self, steps: Steps) -> int | None:
        """The line of a field, from 1; that of what is around it where the field itself is not there."""
        return _json_line(self._text, steps) if self._json else _yaml_line(self._node, steps)

    def _from_json(self) -> Lists:
        try:
            return msgspec.json.decode(self._text, type=Lists, dec_hook=dec_hook)
        except msgspec.ValidationError as error:
            problem, steps = explained(str(error), Lists, json.loads(self._text))
            raise self.mistake(problem, *steps) from None
        except msgspec.DecodeError as error:
            place = re.search(r"\(byte (\d+)\)", str(error))
            upto = self._text.encode()[: int(place[1])] if place else self._text.encode()
            problem = re.sub(r"^JSON is malformed: | ?\(byte \d+\)", "", str(error))
            raise InputError(f"not JSON: {problem}", file=self.name, line=upto.count(b"\n") + 1) from None

    def _from_yaml(self) -> Lists:
        loader = _Loader(self._text)
        try:
            self._node = loader.get_single_node()
            if self._node is None:
                raise InputError("the document is empty", file=self.name)
            self._refuse_double_keys(self._node)
            content = loader.construct_document(self._node)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else None
            raise InputError(f"not YAML: {error.problem or error.context}", file=self.name, line=line) from None
        except (yaml.YAMLError, ValueError) as error:
            raise InputError(f"not YAML: {error}", file=self.name) from None
        finally:
            loader.dispose()
        try:
            return msgspec.convert(content, Lists, dec_hook=dec_hook)
        except msgspec.ValidationError as error:
            problem, steps = explained(str(error), Lists, content)
            raise self.mistake(problem, *steps) from None

    def _refuse_double_keys(self, node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if key.value in seen:
                    raise InputError(
                        "stands twice in one mapping",
                        file=self.name,
                        line=key.start_mark.line + 1,
                        field=key.value,
                    )
                seen.add(key.value)
                self._refuse_double_keys(value)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._refuse_double_keys(item)


class Inventory:
    """Records of one or several documents, each key once."""

    def __init__(self, documents: Sequence[Document], progress: Progress | None = None) -> None:
        """Checks what no single field can show; raises InputError at the first mistake. `progress` hears how
        many records were taken so far."""
        self._documents = documents
        self.records: dict[str, Record] = {}
        for document in documents:
            for steps, record in document.records():
                for field, problem in _mistakes(record):
                    raise document.mistake(problem, *steps, field)
                key = key_of(record)
                if key in self.records:
                    first = self._place(key, document, steps)
                    raise document.mistake(f"{key} stands in {first} already", *steps)
                self.records[key] = record
                if progress is not None and len(self.records) % 10_000 == 0:
                    progress(len(self.records))

    def mistake(self, key: str, problem: str, *fields: str) -> InputError:
        """The error for a field of the record under `key`."""
        for document in self._documents:
            for steps, record in document.records():
                if key_of(record) == key:
                    return document.mistake(problem, *steps, *fields)
        return InputError(f"{key}: {problem}")

    def _place(self, key: str, until: Document, end: Steps) -> str:
        for document in self._documents:
            for steps, record in document.records():
                if (document, steps) != (until, end) and key_of(record) == key:
                    return f"{document.name}:{document.line(steps)}"
        return "another document"


def read_inventory(names: Sequence[str], progress: Progress | None = None) -> Inventory:
    """The inventory in these files, `-` for standard input; raises InputError."""
    return Inventory([read_document(name) for name in names], progress)


def read_document(name: str) -> Document:
    """One file, `-` for standard input: JSON where it is called so or begins like it, else YAML."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text (byte {error.start})", file=name) from None
    except OSError as error:
        raise InputError(error.strerror or str(error), file=name) from None
    as_json = name.endswith(".json") or text[:200].lstrip()[:1] in ("{", "[")
    return Document("standard input" if name == "-" else name, text, as_json=as_json)


def _mistakes(record: Record) -> Iterator[tuple[str, str]]:
    """What is wrong with a record beyond the types of its fields: (field, what would be right)."""
    match record:
        case Attachment() if not _INTERFACE.fullmatch(record.segment):
            yield (
                "segment",
                f"{record.segment!r} is no interface name: 1 to 15 characters, no space, '/' or ':'",
            )
        case Exemption():
            if record.state is not ExemptionState.REQUESTED and record.decided is None:
                yield (
                    "state",
                    f"an exemption that is {record.state} needs `decided`, the time of that decision",
                )
            if record.until is not None and record.decided is not None and record.until <= record.decided:
                yield "until", f"{record.until} is not after `decided`, {record.decided}"
        case Subscription() if not record.offer:
            yield "offer", "an offer needs an id, like pay-as-you-go"


def _yaml_line(node: yaml.Node | None, steps: Steps) -> int | None:
    if node is None:
        return None
    line = node.start_mark.line + 1
    for step in steps:
        found: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == step:
                    line, found = key.start_mark.line + 1, value
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            found = node.value[step]
            line = found.start_mark.line + 1
        if found is None:
            break
        node = found
    return line


def _json_line(text: str, steps: Steps) -> int | None:
    """The line of a field in JSON: walks to it value by value, since JSON's own parser keeps no places."""
    decoder = json.JSONDecoder()
    place = _SPACE.match(text, 0).end()  # type: ignore[union-attr] # matches the empty string too
    for step in steps:
        found = _json_step(text, place, step, decoder)
        if found is None:
            break
        place = found
    return text.count("\n", 0, place) + 1


def _json_step(text: str, place: int, step: str | int, decoder: json.JSONDecoder) -> int | None:
    """Where the value of a key, or of a place in a list, begins in the value that begins at `place`."""

    def skip(at: int) -> int:
        return _SPACE.match(text, at).end()  # type: ignore[union-attr] # as above

    if text[place] not in "{[":
        return None
    mapping, at, count = text[place] == "{", skip(place + 1), 0
    while text[at] not in "}]":
        start = at
        name: Any = count
        if mapping:
            name, at = decoder.raw_decode(text, at)
            at = skip(skip(at) + 1)
        if name == step:
            return start if mapping and text[at] not in "{[" else at
        _, at = decoder.raw_decode(text, at)
        at = skip(at)
        if text[at] == ",":
            at = skip(at + 1)
        count += 1
    return None
