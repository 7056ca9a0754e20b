"""A TOML text → a typed value, or the file, line and field of each mistake and what would be right. Pure.

tomllib keeps no positions. So `toml_line` walks through the text again, and only if there is a mistake to report.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

from portward.config.documents import MISSING, UNKNOWN_KEY, Steps, dec_hook, explained, field_name, shortened
from portward.config.tomlsyntax import syntax_mistake
from portward.errors import InputError, together

T = TypeVar("T")

# No file of portward needs more levels. tomllib recurses for lists, and its time grows with the square of the
# parts of a dotted key.
_MAX_DEPTH: Final = 16
# How many mistakes of one document are reported: what fits on a terminal.
_MAX_MISTAKES: Final = 20
# The key of a `key =` or the name of a `[table]` at the beginning of a line.
_KEY_OF_LINE: Final = re.compile(r"\s*\[?\[?\s*([\w.-]+)\s*(?:=|\])")


def decode_toml(text: str, name: str, type_: type[T], hook: Callable[[type, Any], Any] = dec_hook) -> T:
    """The text as a value of `type_`, a msgspec struct, whose further types `hook` decodes. Raises InputError with
    every mistake that can be seen at once; `name` is the file as the operator named it."""
    if (line := _deep(text)) is not None:
        raise InputError(f"nested more than {_MAX_DEPTH} levels deep", file=name, line=line)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(name, text, str(error)) from None
    except ValueError as error:  # Python's own limit for a number's digits
        line = _long_number(text)
        problem = "not TOML: " + (str(error) if line is None else "a number of more digits than can be read")
        raise InputError(problem, file=name, line=line) from None
    return _converted(text, name, document, type_, hook)


def toml_mistake(text: str, name: str, problem: str, *steps: str | int) -> InputError:
    """The error for the field at `steps` of a valid text, which has the right type and is wrong all the same."""
    return InputError(shortened(problem), file=name, line=toml_line(text, steps), field=field_name(steps))


def _converted(text: str, name: str, document: Any, type_: type[T], hook: Callable[[type, Any], Any]) -> T:
    """The document as a value; raises InputError with all mistakes, except those that another one hides."""
    found: list[InputError] = []
    left_out: set[Steps] = set()
    while True:
        try:
            read = msgspec.convert(document, type_, dec_hook=hook)
            break
        except msgspec.ValidationError as error:
            problem, steps = explained(str(error), type_, document)
        # A missing key may stand in the text under a misspelled name, which is reported already.
        consequence = problem == MISSING and any(one.problem.startswith(UNKNOWN_KEY) for one in found)
        if steps not in left_out and not consequence:
            line = toml_line(text, steps)
            found.append(InputError(problem, file=name, line=line, field=field_name(steps)))
        key = tuple(itertools.takewhile(lambda step: isinstance(step, str), steps))
        if problem == MISSING or len(found) == _MAX_MISTAKES or not _leave_out(document, key):
            break
        left_out.add(key)
    if found:
        raise together(found)
    return read


def _leave_out(document: Any, key: Steps) -> bool:
    """Removes a key with a mistake from the document, so that the next mistake shows. False if it is not there."""
    for step in key[:-1]:
        document = document.get(step) if isinstance(document, dict) else None
    if not key or not isinstance(document, dict) or key[-1] not in document:
        return False
    del document[key[-1]]
    return True


def toml_line(text: str, steps: Steps) -> int | None:
    """The line (from 1) on which the field at `steps` begins in a valid TOML text; if the field is not there,
    that of the nearest table around it; None if the text has no such table."""
    lines = _Positions(text).lines
    for length in range(len(steps), 0, -1):
        if steps[:length] in lines:
            return lines[steps[:length]]
    return None


def _syntax_error(name: str, text: str, message: str) -> InputError:
    """tomllib's message with the line of the mistake, and the key on that line if there is one."""
    problem, line = syntax_mistake(text, message)
    key = _KEY_OF_LINE.match(text.split("\n")[line - 1])
    return InputError(shortened(problem), file=name, line=line, field=field_name((key[1],)) if key else None)


# Brackets and the dots of a key, outside of strings and comments: the depth of a TOML text depends on them. Up to
# the first mistake in the text, this finds the same strings and comments as tomllib.
_DEPTH_PART: Final = re.compile(
    r"""
    (?P<key> (?: (?: [A-Za-z0-9_-]++ | "(?:\\.|[^"\\\n])*+" | '[^'\n]*+' ) [ \t]*+ \. [ \t]*+ ){MAX_DEPTH} )
    | "{3} (?:\\.|(?!"{3})[^\\])*+ (?:"{3,5}|\\?\Z) | '{3} (?:(?!'{3}).)*+ (?:'{3,5}|\Z)
    | "(?:\\.|[^"\\\n])*+" | '[^'\n]*+' | [A-Za-z0-9_-]++ | \#[^\n]*+
    | (?P<open>[\[{]) | (?P<close>[\]}])
    """.replace("MAX_DEPTH", str(_MAX_DEPTH)),
    re.DOTALL | re.VERBOSE,
)


def _deep(text: str) -> int | None:
    """The line (from 1) at which a TOML text is nested too deeply; None if it is not."""
    depth = 0
    for found in _DEPTH_PART.finditer(text):
        depth += (found["open"] is not None) - (found["close"] is not None)
        if found["key"] is not None or depth > _MAX_DEPTH:
            return text.count("\n", 0, found.start()) + 1
    return None


def _long_number(text: str) -> int | None:
    """The line (from 1) of the first number that is too long for Python; None if there is none."""
    found = re.search(r"[0-9_]{1000}", text)
    return text.count("\n", 0, found.start()) + 1 if found else None


class _Positions:
    """The line of each key, table and list item, from one walk through a TOML text that tomllib has accepted.

    The walk finds positions only. It relies on tomllib for what the text means and whether it is valid.
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
        self._items: dict[Steps, int] = {}  # array of tables → index of its last table
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
        for number, key in enumerate(keys, 1):
            table = (*table, key)
            if brackets == 2 and number == len(keys):
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
        index = 0
        while self._skip_blank() < len(self._text) and self._text[self._at] != end:
            if end == "]":
                self._note((*steps, index), self._at)
                self._value((*steps, index))
            else:
                self._pair(steps)
            index += 1
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
