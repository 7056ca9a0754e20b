"""One document that operators write or read: YAML or JSON with lists of subscriptions, attachments, exemptions.

Records come out one by one, in the order of the file; a mistake is told with file, line, field and what would
be right. Lines are looked up when there is something to tell: a million records need none.
"""

from __future__ import annotations

import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from portward.config.documents import Steps, brief, dec_hook, explained, field_name, shortened
from portward.config.files import read_text, text_of
from portward.errors import InputError
from portward.inventory.days import with_times
from portward.model import Record
from portward.store.codec import KINDS, decode

_SPACE: Final = re.compile(r"[ \t\r\n]*")
# Bytes: a million attachments take some 150 MB of JSON. YAML takes 40 times its size of memory while it is read.
_LARGEST: Final = 256 * 1024 * 1024
# A record is at the third level of a document, and holds no further one.
_DEEPEST: Final = 32
# Merge keys (<<) of merge keys double a mapping at each step; the widest record has eight fields.
_WIDEST_MERGE: Final = 32
# Records that are written out as YAML at once: enough to be quick, little enough to be forgotten.
_CHUNK: Final = 1_000

_TAG: Final = "tag:yaml.org,2002:"
_TAGS: Final = tuple(_TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map"))


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc] # C where it is built
    """YAML in which dates stay text: a date that is none is then told with its place, like any other value.

    Of its tags it takes those that JSON has too. Its depth and its merges have bounds: libyaml's composer calls
    itself for each level and ends the process where the stack does, and merges of merges would fill the memory.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def descend_resolver(self, parent: yaml.Node | None, index: Any) -> None:
        """Called by the composer before each node."""
        self._depth += 1
        if self._depth > _DEEPEST:
            mark = None if parent is None else parent.start_mark
            raise yaml.composer.ComposerError(None, None, f"nested more than {_DEEPEST} levels deep", mark)

    def ascend_resolver(self) -> None:
        """Called by the composer after each node."""
        self._depth -= 1

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Called by the constructor before it makes a mapping: puts merged keys into it."""
        merged = [value for key, value in node.value if key.tag == f"{_TAG}merge"]
        if not merged:
            return
        if len(merged) > 1 or any(len(value.value) > _WIDEST_MERGE for value in merged):
            self._refuse_merge(node)
        super().flatten_mapping(node)
        if len(node.value) > _WIDEST_MERGE:
            self._refuse_merge(node)

    def _refuse_merge(self, node: yaml.Node) -> None:
        problem = f"<< makes a mapping of more than {_WIDEST_MERGE} keys"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    def _checked(self, node: yaml.Node) -> Any:
        """The value of a node of a known tag. Text that was tagged as something else fails in many ways."""
        try:
            return yaml.SafeLoader.yaml_constructors[node.tag](self, node)
        except (ValueError, LookupError):
            problem = f"{brief(node.value)} is no {node.tag.removeprefix(_TAG)} that can be read"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def _unknown(self, node: yaml.Node) -> Any:
        problem = f"the tag {brief(node.tag)} is not taken; a value stands here without one"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc] # as above
    """The way back: text that looks like a date needs no quotes."""


_Loader.yaml_constructors = {
    **{tag: _Loader._checked if tag in (f"{_TAG}bool", f"{_TAG}int", f"{_TAG}float") else construct
       for tag, construct in yaml.SafeLoader.yaml_constructors.items() if tag in _TAGS},
    None: _Loader._unknown,
}  # fmt: skip
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in _class.yaml_implicit_resolvers.items()
    }


class _Lists(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a document holds; its records are looked at one by one."""

    subscriptions: tuple[Any, ...] = ()
    attachments: tuple[Any, ...] = ()
    exemptions: tuple[Any, ...] = ()


class _RawLists(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The same of JSON: its records stay text until each is wanted, which saves most of the memory."""

    subscriptions: tuple[msgspec.Raw, ...] = ()
    attachments: tuple[msgspec.Raw, ...] = ()
    exemptions: tuple[msgspec.Raw, ...] = ()


class Document(ABC):
    """A document whose form was read; `name` is the file as the operator named it."""

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
            for place, item in enumerate(getattr(self._lists(), kind)):
                try:
                    yield (kind, place), self._record(kind, place, item)
                except InputError as error:
                    yield (kind, place), error

    def mistake(self, problem: str, *steps: str | int) -> InputError:
        """The error for a field of this document."""
        return InputError(shortened(problem), file=self.name, line=self.line(steps), field=field_name(steps))

    @abstractmethod
    def line(self, steps: Steps) -> int | None:
        """The line of a field, from 1; that of what is around it where the field itself is not there."""

    @abstractmethod
    def _lists(self) -> _Lists | _RawLists: ...

    def _record(self, kind: str, place: int, item: Any) -> Record:
        item = with_times(KINDS[kind], item)
        try:
            record: Record = msgspec.convert(item, KINDS[kind], dec_hook=dec_hook)
        except msgspec.ValidationError as error:
            problem, steps = explained(str(error), KINDS[kind], item)
            raise self.mistake(problem, kind, place, *steps) from None
        return record


class JsonDocument(Document):
    """A document in JSON."""

    def __init__(self, name: str, text: str) -> None:
        """Raises InputError for what is no JSON, has a key twice in one object, or has other top-level keys
        than the three lists."""
        super().__init__(name)
        self._text = text
        try:
            self._raw = msgspec.json.decode(text, type=_RawLists)
        except msgspec.ValidationError as error:
            problem, steps = explained(str(error), _Lists, self._anything())
            raise self.mistake(problem, *steps) from None
        except msgspec.DecodeError as error:
            raise self._malformed(error) from None
        self._refuse_double_keys()

    def line(self, steps: Steps) -> int:
        """See `Document`. Walks to the field value by value, since JSON's parser keeps no places."""
        place = _skip(self._text, 0)
        for step in steps:
            try:
                found = _json_step(self._text, place, step)
            except (ValueError, IndexError, RecursionError):  # no JSON, or nested deeply, before it is found
                break
            if found is None:
                break
            place = found
        return self._text.count("\n", 0, place) + 1

    def _lists(self) -> _RawLists:
        return self._raw

    def _record(self, kind: str, place: int, item: msgspec.Raw) -> Record:
        try:
            record: Record = _DECODERS[kind].decode(item)
        except msgspec.DecodeError as error:
            value = _value(item)
            if with_times(KINDS[kind], value) is not value:
                return super()._record(kind, place, value)
            problem, steps = explained(str(error), KINDS[kind], value)
            raise self.mistake(problem, kind, place, *steps) from None
        return record

    def _refuse_double_keys(self) -> None:
        # msgspec takes the last one and says nothing. A second reading costs 0.8 s for a million records.
        try:
            json.loads(self._text, object_pairs_hook=_once, parse_int=str, parse_float=str)
        except _DoubleKeyError as error:
            line, first = _double_lines(self._text, error.key)
            problem = f"stands twice in one object, first in line {first}"
            raise InputError(problem, file=self.name, line=line, field=field_name((error.key,))) from None

    def _anything(self) -> Any:
        """All of the document; raises InputError where it is no JSON further on."""
        try:
            return msgspec.json.decode(self._text)
        except (msgspec.ValidationError, RecursionError):  # a number that is too large; nested deeply
            return None
        except msgspec.DecodeError as error:
            raise self._malformed(error) from None

    def _malformed(self, error: msgspec.DecodeError) -> InputError:
        place = re.search(r"\(byte (\d+)\)", str(error))
        before = self._text.encode()[: int(place[1]) if place else None]
        problem = re.sub(r"^JSON is malformed: | ?\(byte \d+\)", "", str(error))
        return InputError(f"not JSON: {problem}", file=self.name, line=before.count(b"\n") + 1)


class YamlDocument(Document):
    """A document in YAML."""

    def __init__(self, name: str, text: str) -> None:
        """Raises InputError for what is no YAML, or has other top-level keys than the three lists."""
        super().__init__(name)
        self._node, content = self._parsed(text)
        try:
            self._content = msgspec.convert(content, _Lists)
        except msgspec.ValidationError as error:
            problem, steps = explained(str(error), _Lists, content)
            raise self.mistake(problem, *steps) from None

    def line(self, steps: Steps) -> int:
        """See `Document`."""
        node, line = self._node, self._node.start_mark.line
        for step in steps:
            found = _yaml_step(node, step)
            if found is None:
                break
            line, node = found
        return int(line) + 1

    def _lists(self) -> _Lists:
        return self._content

    def _parsed(self, text: str) -> tuple[yaml.Node, Any]:
        try:
            loader = _Loader(text)
        except yaml.YAMLError as error:  # a character that YAML does not take
            raise self._malformed(error, text) from None
        try:
            node = loader.get_single_node()
            if node is None:
                raise InputError("the document is empty", file=self.name)
            self._refuse_double_keys(node)
            return node, loader.construct_document(node)
        except yaml.YAMLError as error:
            raise self._malformed(error, text) from None
        finally:
            loader.dispose()

    def _malformed(self, error: yaml.YAMLError, text: str) -> InputError:
        if isinstance(error, yaml.MarkedYAMLError):
            mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
            return InputError(f"not YAML: {problem}", file=self.name, line=mark.line + 1 if mark else None)
        place = getattr(error, "position", None)
        line = None if place is None else text.encode().count(b"\n", 0, place) + 1
        return InputError(f"not YAML: {str(error).splitlines()[0]}", file=self.name, line=line)

    def _refuse_double_keys(self, root: yaml.Node) -> None:
        # Each node once: an alias is the same node again, and aliases of aliases would never come to an end.
        seen, waiting = {id(root)}, [root]
        while waiting:
            node = waiting.pop()
            children = node.value if isinstance(node, yaml.SequenceNode) else []
            if isinstance(node, yaml.MappingNode):
                self._refuse_double(node)
                children = [value for _, value in node.value]
            for child in children:
                if id(child) not in seen:
                    seen.add(id(child))
                    waiting.append(child)

    def _refuse_double(self, node: yaml.MappingNode) -> None:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # the constructor refuses it; as text, aliases in it would fill the memory
            line, name = key.start_mark.line + 1, key.value
            if name in lines:
                problem = f"stands twice in one mapping, first in line {lines[name]}"
                raise InputError(problem, file=self.name, line=line, field=field_name((name,)))
            lines[name] = line


_DECODERS: Final = {kind: msgspec.json.Decoder(type_, dec_hook=dec_hook) for kind, type_ in KINDS.items()}


def read_document(name: str) -> Document:
    """One file, `-` for standard input: JSON where it is called so or begins like it, else YAML. Raises
    InputError."""
    if name == "-":
        title = "standard input"
        if sys.stdin is None:
            raise InputError("is closed", file=title)
        text = text_of(sys.stdin.buffer, title, _LARGEST)
    else:
        title, text = name, read_text(Path(name), _LARGEST, pipe=True)
    as_json = name.endswith(".json") or text[_skip(text, 0) :][:1] in ("{", "[")
    try:
        return JsonDocument(title, text) if as_json else YamlDocument(title, text)
    except RecursionError:
        raise InputError("nested too deeply", file=title) from None


def json_text(records: Mapping[str, str]) -> Iterator[str]:
    """A store's records (key → JSON) as pieces of a JSON document that `read_document` takes; a record to a
    line. Raises RecordError for a record that cannot be read, since it would be missing."""
    for place, (kind, keys) in enumerate(_by_kind(records).items()):
        yield f'{"," if place else "{"}"{kind}":['
        for number, key in enumerate(keys):
            decode(key, records[key])
            yield f"{',' if number else ''}\n{records[key]}"
        yield "\n]"
    yield "}\n"


def yaml_text(records: Mapping[str, str]) -> Iterator[str]:
    """The same in YAML; fields that say nothing are left out."""
    for kind, keys in _by_kind(records).items():
        yield f"{kind}:{'' if keys else ' []'}\n"
        waiting = iter(keys)
        while part := [_told_fields(key, records[key]) for key in islice(waiting, _CHUNK)]:
            yield yaml.dump(part, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000)


def _by_kind(records: Mapping[str, str]) -> dict[str, list[str]]:
    """The keys of each kind, sorted; a key of no kind is refused when its turn comes."""
    kinds: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for key in sorted(records):
        kinds.setdefault(key.partition("/")[0], []).append(key)
    return kinds


def _told_fields(key: str, body: str) -> dict[str, Any]:
    decode(key, body)
    fields: dict[str, Any] = msgspec.json.decode(body)
    return {name: value for name, value in fields.items() if value not in (None, "")}


def _value(text: str | msgspec.Raw) -> Any:
    """What stands there, to be quoted in a message; None where even that cannot be read."""
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
    if len(dict(pairs)) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DoubleKeyError(key)
            seen.add(key)


_JSON_PART: Final = re.compile(r'"(?:\\.|[^"\\])*+"(?P<key>[ \t\r\n]*+:)?|(?P<open>[\[{])|[\]}]|\n')


def _double_lines(text: str, key: str) -> tuple[int, int]:
    """The lines of the second and the first `key` of the first object of a JSON text to be closed that has it
    twice."""
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


def _yaml_step(node: yaml.Node, step: str | int) -> tuple[int, yaml.Node] | None:
    """The line (from 0) and the node of a key, or of a place in a list."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == step:
                return key.start_mark.line, value
    elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        found = node.value[step]
        return found.start_mark.line, found
    return None


def _json_step(text: str, place: int, step: str | int) -> int | None:
    """Where the value of a key, or of a place in a list, begins in the value that begins at `place`."""
    if text[place] not in "{[":
        return None
    decoder = json.JSONDecoder(parse_int=str, parse_float=str)  # Python reads no number of 5,000 digits
    mapping, at, count = text[place] == "{", _skip(text, place + 1), 0
    while text[at] not in "}]":
        start = at
        name: Any = count
        if mapping:
            name, at = decoder.raw_decode(text, at)
            at = _skip(text, _skip(text, at) + 1)
        if name == step:
            return start if mapping and text[at] not in "{[" else at
        _, at = decoder.raw_decode(text, at)
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
        count += 1
    return None


def _skip(text: str, place: int) -> int:
    """The next place that holds no white space."""
    found = _SPACE.match(text, place)
    return found.end() if found else place
