"""Reading a TOML document into a typed value; of a mistake, file, line, field and what is right.

tomllib gives no line of a value, so the text is walked for it, and only where there is something to tell.
"""

from __future__ import annotations

import difflib
import errno
import itertools
import os
import re
import reprlib
import stat
import tomllib
from bisect import bisect_left
from collections.abc import Iterable
from datetime import date
from enum import Enum
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, Final, TypeAlias, TypeVar, Union, get_args, get_origin

import msgspec

from portward.base.addresses import unmapped
from portward.config.tomlsyntax import syntax_mistake
from portward.errors import InputError, together
from portward.model import Network

T = TypeVar("T")

# Where a field is: keys of tables and places in lists, from the top.
Steps: TypeAlias = tuple[str | int, ...]

# A preset that lists every prefix of a large cloud has a quarter of it.
_LARGEST: Final = 1024 * 1024
# Deeper than anything here is read; tomllib recurses for lists, and takes the square of the parts of a key.
_DEEPEST: Final = 16
# What an operator still reads of a key or of a value that is quoted.
_LONGEST_WORD, _LONGEST_VALUE, _LONGEST_PROBLEM = 60, 200, 400

MISSING: Final = "is missing"
_UNKNOWN: Final = "unknown key"
# How many mistakes of one document are reported.
_MOST_MISTAKES: Final = 20

_STEP: Final = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")
_KEY_OF_LINE: Final = re.compile(r"\s*\[?\[?\s*([\w.-]+)\s*(?:=|\])")


def read_toml(path: Path, type_: type[T]) -> T:
    """The document at `path` as a value of `type_`, a msgspec struct; raises InputError."""
    text = _text(path)
    if (line := _deep(text)) is not None:
        raise InputError(f"nested more than {_DEEPEST} levels deep", file=str(path), line=line)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(path, text, str(error)) from None
    except ValueError as error:  # Python's own limit for a number's digits
        line = _long_number(text)
        problem = "not TOML: " + (str(error) if line is None else "a number of more digits than can be read")
        raise InputError(problem, file=str(path), line=line) from None
    return _converted(path, text, document, type_)


def _converted(path: Path, text: str, document: Any, type_: type[T]) -> T:
    """The document as a value; raises InputError with all mistakes, as far as one does not hide another."""
    found: list[InputError] = []
    left_out: set[Steps] = set()
    while True:
        try:
            read = msgspec.convert(document, type_, dec_hook=dec_hook)
            break
        except msgspec.ValidationError as error:
            problem, steps = explained(str(error), type_, document)
        # What is missing may be there under a name that is unknown.
        consequence = problem == MISSING and any(one.problem.startswith(_UNKNOWN) for one in found)
        if steps not in left_out and not consequence:
            line = toml_line(text, steps)
            found.append(InputError(problem, file=str(path), line=line, field=field_name(steps)))
        key = tuple(itertools.takewhile(lambda step: isinstance(step, str), steps))
        if problem == MISSING or len(found) == _MOST_MISTAKES or not _leave_out(document, key):
            break
        left_out.add(key)
    if found:
        raise together(found)
    return read


def _leave_out(document: Any, key: Steps) -> bool:
    """Takes a key with a mistake out of the document, so that the next mistake shows. False if it is not there."""
    for step in key[:-1]:
        document = document.get(step) if isinstance(document, dict) else None
    if not key or not isinstance(document, dict) or key[-1] not in document:
        return False
    del document[key[-1]]
    return True


def mistake(path: Path, problem: str, *steps: str | int) -> InputError:
    """The InputError for a field that is of the right type and wrong all the same."""
    line = toml_line(_text(path), steps)
    return InputError(shortened(problem), file=str(path), line=line, field=field_name(steps))


def dec_hook(type_: Any, value: Any) -> Any:
    """msgspec's hook for the types that it does not know: networks, from text, and paths."""
    if type_ is Path:
        if not isinstance(value, str):
            raise ValueError(f"expected a path in quotes, got {brief(value)}")
        return Path(value)
    if type_ is Network:
        return network(value)
    raise NotImplementedError(type_)


def enc_hook(value: Any) -> Any:
    """The way back: a network as text, a prefix of one address as that address."""
    if isinstance(value, IPv4Network | IPv6Network):
        return network_text(value)
    raise NotImplementedError(type(value))


def network(value: Any) -> Network:
    """An address or a prefix from text; raises ValueError that says what would be right."""
    if not isinstance(value, str):
        raise ValueError(f"expected an address or a prefix in quotes, got {brief(value)}")
    try:
        found = ip_network(value)
    except ValueError:
        found = None
    if found is not None:
        return unmapped(found)
    try:
        right = ip_network(value, strict=False)
    except ValueError:
        raise ValueError(f"{brief(value)} is no IPv4 or IPv6 address or prefix") from None
    raise ValueError(
        f"{brief(value)} has bits beyond its prefix length: {right}, or the address alone, would be right"
    )


def network_text(value: Network) -> str:
    """How a network is written: `10.0.0.4`, `10.0.0.0/24`, `2001:db8::/64`."""
    return str(value.network_address) if value.prefixlen == value.max_prefixlen else str(value)


def explained(message: str, type_: Any, document: Any) -> tuple[str, Steps]:
    """msgspec's message → the problem in our words, and the steps to the field."""
    # A problem may quote what the operator wrote; the path is the last thing in the message.
    problem, _, path = message.rpartition(" - at `$") if message.endswith("`") else (message, "", "")
    if not problem:
        problem, path = message, ""
    if key := re.fullmatch(r"Expected `str` - at `key` in `\$(.*)`", message):
        return "every key here is text: put it in quotes", tuple(_steps(key[1]))
    whole = re.fullmatch(r"Object contains unknown field `(.+)`", message, re.DOTALL)
    if whole and isinstance(document, dict) and whole[1] in document:  # at the top; its name may look like a path
        problem, path = message, ""
    steps = tuple(_steps(path.rstrip("`")))
    if unknown := re.match(r"Object contains unknown field `(.+)`", problem, re.DOTALL):
        return f"{_UNKNOWN}; {nearest(unknown[1], fields_at(type_, steps))}", (*steps, unknown[1])
    if missing := re.match(r"Object missing required field `(.+)`", problem):
        return MISSING, (*steps, missing[1])
    if problem.startswith("Invalid enum value"):
        value, known = _value_at(document, steps), _enum_values(type_, steps)
        near = _near(str(value), known)
        hint = f"; {near}" if near else ""
        return f"{brief(value)} is not a valid value ({', '.join(known)}){hint}{_written(str(value))}", steps
    return _in_words(problem, _value_at(document, steps)), steps


def nearest(word: str, known: Iterable[str]) -> str:
    """What was likely meant: the nearest of the known words, all of them where none is near."""
    known = list(known)
    near = _near(word, known)
    return f"{near}{_written(word)}" if near else f"known here: {', '.join(known)}{_written(word)}"


def _near(word: str, known: list[str]) -> str:
    """The question after the nearest of the known words; empty if none is near."""
    near = difflib.get_close_matches(word[:_LONGEST_WORD], known, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def _written(word: str) -> str:
    """How a word is written that is not ASCII: letters of other scripts look the same."""
    return "" if word.isascii() else f" (written here: {word[:_LONGEST_WORD]!a})"


def field_name(steps: Steps) -> str | None:
    """The steps as an operator would write them: `offers[3].created_before`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{_cut(step)}" for step in steps)
    return text.removeprefix(".")[:_LONGEST_VALUE] or None


def brief(value: Any) -> str:
    """`repr` of what an operator wrote, cut to what can be read in a message: it may be huge, be nested deeply,
    or hold itself."""
    return _BRIEF.repr(value)


def shortened(problem: str) -> str:
    """A problem, cut to what is still a line: it may quote a whole document."""
    return problem if len(problem) <= _LONGEST_PROBLEM else f"{problem[:_LONGEST_PROBLEM]} …"


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxstring = self.maxother = _LONGEST_VALUE

    def repr_bool(self, x: bool, _: int) -> str:
        return str(x).lower()

    def repr_NoneType(self, *_: object) -> str:  # noqa: N802 # reprlib finds it by the type's name
        return "nothing"

    def repr_int(self, x: int, level: int) -> str:
        # Python turns no number of more than 4,300 digits into text.
        return repr(x) if x.bit_length() <= 256 else f"a number of {x.bit_length()} bits"


_BRIEF: Final = _Brief()


def _cut(word: str) -> str:
    return word if len(word) <= _LONGEST_WORD else f"{word[:_LONGEST_WORD]}…"


def fields_at(type_: Any, steps: Steps) -> list[str]:
    """The field names of the struct at the end of `steps` from `type_`; none where there is no struct."""
    for item in _alternatives(_type_at(type_, steps)):
        if isinstance(item, type) and issubclass(item, msgspec.Struct):
            return list(item.__struct_fields__)
    return []


def toml_line(text: str, steps: Steps) -> int | None:
    """The line (from 1) on which the field at `steps` begins in a valid TOML text, or what it belongs to;
    None where nothing on the way to it is written."""
    lines = _Walk(text).lines
    for length in range(len(steps), 0, -1):
        if steps[:length] in lines:
            return lines[steps[:length]]
    return None


class _Walk:
    """One walk through a TOML text that tomllib has accepted: the line of each key, table and list item.

    It only tells where things stand; what they mean and whether they are right is tomllib's to say.
    """

    _BLANK: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
    # Up to two quotes may stand before the three that end a string of many lines (TOML 1.0, Strings).
    _STRING: Final = re.compile(
        r'"""(?:\\.|(?!""")[^\\])*"{3,5}|\'\'\'(?:(?!\'\'\').)*\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'',
        re.DOTALL,
    )
    _BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
    _PLAIN: Final = re.compile(r"[^,\]}#\n]+")  # numbers, dates (a space may part date and time), true, false

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._breaks = [found.start() for found in re.finditer("\n", text)]
        self._items: dict[Steps, int] = {}  # array of tables → place of its last table
        self.lines: dict[Steps, int] = {}
        table: Steps = ()
        while self._skip_blank() < len(text):
            if text[self._at] == "[":
                table = self._header()
            else:
                self._pair(table)

    def _header(self) -> Steps:
        start, brackets = self._at, 2 if self._text.startswith("[[", self._at) else 1
        self._at += brackets
        table: Steps = ()
        keys = self._keys()
        for place, key in enumerate(keys, 1):
            table = (*table, key)
            if brackets == 2 and place == len(keys):
                self._items[table] = self._items.get(table, -1) + 1
            self._note(table, start)
            if table in self._items:
                table = (*table, self._items[table])
                self._note(table, start)
        self._skip_blank()
        self._at += brackets
        return table

    def _pair(self, table: Steps) -> None:
        start = self._at
        for key in self._keys():
            table = (*table, key)
            self._note(table, start)
        self._at += 1  # the =
        self._value(table)

    def _value(self, steps: Steps) -> None:
        self._skip_blank()
        first = self._text[self._at]
        if first == "[":
            self._sequence(steps, "]")
        elif first == "{":
            self._sequence(steps, "}")
        else:
            found = self._STRING.match(self._text, self._at) or self._PLAIN.match(self._text, self._at)
            self._at = found.end() if found else len(self._text)

    def _sequence(self, steps: Steps, end: str) -> None:
        """A list up to `]`, or an inline table up to `}`."""
        self._at += 1
        place = 0
        while self._skip_blank() < len(self._text) and self._text[self._at] != end:
            if end == "]":
                self._note((*steps, place), self._at)
                self._value((*steps, place))
            else:
                self._pair(steps)
            place += 1
            if self._skip_blank() < len(self._text) and self._text[self._at] == ",":
                self._at += 1
        self._at += 1

    def _keys(self) -> list[str]:
        """The parts of a dotted key; stops at what follows it."""
        keys: list[str] = []
        while True:
            self._skip_blank()
            if quoted := self._STRING.match(self._text, self._at):
                keys.append(tomllib.loads(f"key = {quoted[0]}")["key"])
                self._at = quoted.end()
            else:
                bare = self._BARE_KEY.match(self._text, self._at)
                if bare is None:
                    raise ValueError(f"no key at character {self._at} of a TOML text")
                keys.append(bare[0])
                self._at = bare.end()
            self._skip_blank()
            if self._text[self._at] != ".":
                return keys
            self._at += 1

    def _skip_blank(self) -> int:
        found = self._BLANK.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return self._at

    def _note(self, steps: Steps, at: int) -> None:
        self.lines.setdefault(steps, bisect_left(self._breaks, at) + 1)


def _syntax_error(path: Path, text: str, message: str) -> InputError:
    """tomllib's message with the line of the mistake, and the key on that line if there is one."""
    problem, line = syntax_mistake(text, message)
    key = _KEY_OF_LINE.match(text.split("\n")[line - 1])
    return InputError(shortened(problem), file=str(path), line=line, field=_cut(key[1]) if key else None)


def read_text(path: Path, largest: int, *, pipe: bool = False) -> str:
    """The text in a file of at most `largest` bytes; with `pipe`, also in a pipe that somebody writes to. Raises
    InputError. Never waits for a writer, and never reads a device: some have no end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(error.strerror or str(error), file=str(path)) from None
    except ValueError:
        raise InputError("no file has a NUL in its name", file=str(path)) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISFIFO(mode) and pipe:
            os.set_blocking(descriptor, True)
        elif stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            kind = "pipe" if stat.S_ISFIFO(mode) else "device"
            raise InputError(f"is a {kind}; expected a file", file=str(path))
        elif stat.S_ISDIR(mode):
            raise InputError(os.strerror(errno.EISDIR), file=str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return text_of(file, str(path), largest)
    finally:
        os.close(descriptor)


def text_of(file: BinaryIO, name: str, largest: int) -> str:
    """The text in an open file of at most `largest` bytes, which operators know by `name`; raises InputError."""
    try:
        data = file.read(largest + 1)
    except OSError as error:
        raise InputError(error.strerror or str(error), file=name) from None
    if len(data) > largest:
        raise InputError(f"larger than {largest >> 20} MiB, the most that is read", file=name)
    try:
        return data.decode("utf-8-sig")  # editors of some systems begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"byte {data[error.start]:#04x} is not UTF-8", file=name, line=line) from None


def _text(path: Path) -> str:
    return read_text(path, _LARGEST)


# What the depth of a TOML text depends on: brackets and the dots of a key, where they stand in no string and in
# no comment. As far as a text is right, this reads it as tomllib does.
_DEPTH_PART: Final = re.compile(
    r"""
    (?P<key> (?: (?: [A-Za-z0-9_-]++ | "(?:\\.|[^"\\\n])*+" | '[^'\n]*+' ) [ \t]*+ \. [ \t]*+ ){DEEPEST} )
    | "{3} (?:\\.|(?!"{3})[^\\])*+ (?:"{3,5}|\\?\Z) | '{3} (?:(?!'{3}).)*+ (?:'{3,5}|\Z)
    | "(?:\\.|[^"\\\n])*+" | '[^'\n]*+' | [A-Za-z0-9_-]++ | \#[^\n]*+
    | (?P<open>[\[{]) | (?P<close>[\]}])
    """.replace("DEEPEST", str(_DEEPEST)),
    re.DOTALL | re.VERBOSE,
)


def _deep(text: str) -> int | None:
    """The line where a TOML text is nested too deeply to be read; None where it is not."""
    depth = 0
    for found in _DEPTH_PART.finditer(text):
        depth += (found["open"] is not None) - (found["close"] is not None)
        if found["key"] is not None or depth > _DEEPEST:
            return text.count("\n", 0, found.start()) + 1
    return None


def _long_number(text: str) -> int | None:
    found = re.search(r"[0-9_]{1000}", text)
    return text.count("\n", 0, found.start()) + 1 if found else None


def _steps(path: str) -> list[str | int]:
    found: list[str | int] = []
    for name, place in _STEP.findall(path.removeprefix("$")):
        if place:
            found.append(int(place) if place.isdigit() else place)
        else:
            found.append(name)
    return found


def _type_at(type_: Any, steps: Steps) -> Any:
    """The declared type at the end of `steps`; Any where the declaration does not say."""
    for step in steps:
        for item in _alternatives(type_):
            if isinstance(item, type) and issubclass(item, msgspec.Struct) and isinstance(step, str):
                type_ = next((field.type for field in msgspec.structs.fields(item) if field.name == step), Any)
                break
            arguments = [argument for argument in get_args(item) if argument is not Ellipsis]
            if arguments:
                type_ = arguments[-1]  # of a list its items, of a dict its values
                break
        else:
            return Any
    return type_


def _alternatives(type_: Any) -> tuple[Any, ...]:
    """The members of a union, without what Annotated adds; a type alone is its only member."""
    while hasattr(type_, "__metadata__"):
        type_ = type_.__origin__
    return get_args(type_) if isinstance(type_, UnionType) or get_origin(type_) is Union else (type_,)


def _enum_values(type_: Any, steps: Steps) -> list[str]:
    return [
        str(member.value)
        for item in _alternatives(_type_at(type_, steps))
        if isinstance(item, type) and issubclass(item, Enum)
        for member in item
    ]


def _value_at(document: Any, steps: Steps) -> Any:
    for step in steps:
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError):
            return None
    return document


_TYPES = {
    "str": "text in quotes", "int": "a whole number", "bool": "true or false", "array": "a list",
    "object": "a table", "date": "a date like 2017-11-15", "datetime": "a time like 2026-01-10T08:00:00Z",
    "uuid": "a UUID like 11111111-0000-4000-8000-000000000001", "float": "a number",
}  # fmt: skip


_BOUNDS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}


def _in_words(problem: str, value: Any) -> str:
    """msgspec's own words for a wrong value, as an operator would say it."""
    told = brief(str(value)) if isinstance(value, str | date) else brief(value)
    if found := re.fullmatch(r"Expected `([\w| ]+)`, got `(\w+)`", problem):
        wanted = (name.strip() for name in found[1].split("|"))
        return f"expected {' or '.join(_TYPES.get(name, name) for name in wanted if name != 'null')}, got {told}"
    if found := re.fullmatch(r"Expected `(\w+)`( of length)? (>=|<=|>|<) (\S+)", problem):
        unit = (" entry", " entries") if found[1] == "array" else (" character", " characters")
        size = unit[found[4] != "1"] if found[2] else ""
        kind = _TYPES.get(found[1], found[1])
        return f"expected {kind} of {_BOUNDS[found[3]]} {found[4]}{size}, got {told}"
    if re.match(r"Invalid (RFC3339 encoded )?date(time)?", problem) or "Invalid UUID" in problem:
        kind = "uuid" if "UUID" in problem else "datetime" if "datetime" in problem else "date"
        return f"expected {_TYPES[kind]}, got {told}"
    if "timezone" in problem:
        return f"a time needs its zone: {told} and a Z at its end for UTC"
    if problem in ("Number out of range", "Integer value out of range"):
        return "no field takes a number as large as this"
    return problem.replace("`", "")
