"""A document in JSON, and a store's records as one. Pure.

Neither msgspec nor Python's own parser keeps the line of a value, or refuses a key that an object has twice. So
this module finds both; lines only if there is a mistake to report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from portward.config.documents import Steps, dec_hook, explained, field_name
from portward.errors import InputError
from portward.inventory.days import with_times
from portward.inventory.document import Document, Lists, keys_by_kind
from portward.model import Record
from portward.store.codec import KINDS, decode

_SPACE: Final = re.compile(r"[ \t\r\n]*")
_DECODERS: Final = {kind: msgspec.json.Decoder(type_, dec_hook=dec_hook) for kind, type_ in KINDS.items()}


class _RawLists(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`Lists` whose records stay text until each is decoded, which saves most of the memory."""

    subscriptions: tuple[msgspec.Raw, ...] = ()
    attachments: tuple[msgspec.Raw, ...] = ()
    exemptions: tuple[msgspec.Raw, ...] = ()


class JsonDocument(Document):
    """A document in JSON, whose parser keeps no positions: they are looked up in the text."""

    def __init__(self, name: str, text: str) -> None:
        """Raises InputError for what is no JSON, has a key twice in one object, or has other top-level keys
        than the three lists."""
        super().__init__(name)
        self._text = text
        try:
            self._raw = msgspec.json.decode(text, type=_RawLists)
        except msgspec.ValidationError as error:
            problem, steps = explained(str(error), Lists, self._anything())
            raise self.mistake(problem, *steps) from None
        except msgspec.DecodeError as error:
            raise self._malformed(error) from None
        self._refuse_double_keys()

    def line(self, steps: Steps) -> int:
        """See `Document`. Decodes value by value up to the field."""
        at = _skip(self._text, 0)
        for step in steps:
            try:
                found = _step_into(self._text, at, step)
            except (ValueError, IndexError, RecursionError):  # not JSON before the field, or nested too deeply
                break
            if found is None:
                break
            at = found
        return self._text.count("\n", 0, at) + 1

    def _lists(self) -> _RawLists:
        return self._raw

    def _record(self, kind: str, index: int, item: msgspec.Raw) -> Record:
        try:
            record: Record = _DECODERS[kind].decode(item)
        except msgspec.DecodeError as error:
            value = _value(item)
            if with_times(KINDS[kind], value) is not value:
                return super()._record(kind, index, value)
            problem, steps = explained(str(error), KINDS[kind], value)
            raise self.mistake(problem, kind, index, *steps) from None
        return record

    def _refuse_double_keys(self) -> None:
        # msgspec takes the last one silently. This second decoding costs 0.8 s for a million records.
        try:
            json.loads(self._text, object_pairs_hook=_once, parse_int=str, parse_float=str)
        except _DoubleKeyError as error:
            line, first = _double_lines(self._text, error.key)
            problem = f"stands twice in one object, first in line {first}"
            raise InputError(problem, file=self.name, line=line, field=field_name((error.key,))) from None

    def _anything(self) -> Any:
        """The whole document, to be quoted in a message; None if it cannot be decoded. Raises InputError if it
        is not JSON."""
        try:
            return msgspec.json.decode(self._text)
        except (msgspec.ValidationError, RecursionError):  # a number that is too large; nested deeply
            return None
        except msgspec.DecodeError as error:
            raise self._malformed(error) from None

    def _malformed(self, error: msgspec.DecodeError) -> InputError:
        offset = re.search(r"\(byte (\d+)\)", str(error))
        before = self._text.encode()[: int(offset[1]) if offset else None]
        problem = re.sub(r"^JSON is malformed: | ?\(byte \d+\)", "", str(error))
        return InputError(f"not JSON: {problem}", file=self.name, line=before.count(b"\n") + 1)


def json_text(records: Mapping[str, str]) -> Iterator[str]:
    """A store's records (key → JSON) as pieces of a JSON document, one record a line. Raises RecordError for a
    record that cannot be read, because it would be missing."""
    for count, (kind, keys) in enumerate(keys_by_kind(records).items()):
        yield f'{"," if count else "{"}"{kind}":['
        for number, key in enumerate(keys):
            decode(key, records[key])
            yield f"{',' if number else ''}\n{records[key]}"
        yield "\n]"
    yield "}\n"


def _value(text: msgspec.Raw) -> Any:
    """A record, to be quoted in a message; None if even that cannot be decoded."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None


class _DoubleKeyError(Exception):
    """A JSON object holds `key` more than once."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _once(pairs: list[tuple[str, Any]]) -> None:
    """Raises _DoubleKeyError if an object has a key twice."""
    if len(dict(pairs)) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DoubleKeyError(key)
            seen.add(key)


# A string, with the colon after it if it is a key; the ends of lists and objects; the end of a line.
_JSON_PART: Final = re.compile(r'"(?:\\.|[^"\\])*+"(?P<key>[ \t\r\n]*+:)?|(?P<open>[\[{])|[\]}]|\n')


def _double_lines(text: str, key: str) -> tuple[int, int]:
    """The lines of the second and of the first `key` in the object that has it twice; of several such objects, the
    one that ends first, as for `json.loads`."""
    line = 1
    waiting: list[list[int]] = []
    for found in _JSON_PART.finditer(text):
        part = found[0]
        if found["open"]:
            waiting.append([])
        elif part in "]}":
            lines = waiting.pop()
            if len(lines) > 1:
                return lines[1], lines[0]
        elif found["key"] and json.loads(part.rstrip(" \t\r\n:")) == key:
            waiting[-1].append(line)
        line += part.count("\n")
    raise KeyError(key)


def _step_into(text: str, start: int, step: str | int) -> int | None:
    """The offset of a key's field, or of a list's item, in the value that begins at `start`. A field with a list
    or an object begins with that, another one with its key. None if the value has no such step."""
    if text[start] not in "{[":
        return None
    decoder = json.JSONDecoder(parse_int=str, parse_float=str)  # Python reads no number of 5,000 digits
    mapping, at, count = text[start] == "{", _skip(text, start + 1), 0
    while text[at] not in "}]":
        begin = at
        name: Any = count
        if mapping:
            name, at = decoder.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)
        if name == step:
            return begin if mapping and text[at] not in "{[" else at
        _, at = decoder.raw_decode(text, at)
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
        count += 1
    return None


def _skip(text: str, at: int) -> int:
    """The next character at or after `at` that is no white space."""
    found = _SPACE.match(text, at)
    return found.end() if found else at
