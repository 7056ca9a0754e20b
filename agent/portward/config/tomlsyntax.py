"""Names the mistake in a text that is not valid TOML, and its line, in the words of the person who wrote it.

tomllib names the place at which it could not go on. For a list without its end, that is the next key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile
from typing import Final

_AT: Final = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)")
_NAME: Final = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')"""
_KEY: Final = rf"{_NAME}(?:[ \t]*\.[ \t]*{_NAME})*[ \t]*"
_NEXT_KEY: Final = re.compile(rf"{_KEY}=")
# The line with the name of a table. A list in a list may look the same: its brackets fit together too.
_HEADER: Final = re.compile(rf"^[ \t]*\[{{1,2}}[ \t]*{_KEY}\]{{1,2}}[ \t]*(?=\#|$)", re.MULTILINE)
# Strings, comments and names of tables, and what stands in none: brackets, and a quote that begins no string.
_PART: Final = re.compile(
    _HEADER.pattern + r'|"{3}(?:\\.|(?!"{3})[^\\])*+"{3,5}|\'{3}(?:(?!\'{3})[\s\S])*+\'{3,5}'
    r'|"(?:\\.|[^"\\\n])*+"|\'[^\'\n]*+\'|\#[^\n]*+|(?P<open>[\[{])|(?P<close>[\]}])|(?P<quote>["\'])',
    re.MULTILINE,
)
_WORD: Final = re.compile(r"[^\s,\]}#\"'=]+")
_VALUE: Final = re.compile(r"[^=\n]*=[ \t]*([^#\n]*)")
_NO_QUOTE: Final = (
    "Illegal character '\\n'",
    "Unterminated string",
    "Expected \"'",
    "Found invalid character '\\n'",
)
_IN_LIST: Final = ("Unclosed array", "Unclosed inline table", "Invalid value")
_FLAGS: Final = ("true", "false", "yes", "no", "on", "off")


def syntax_mistake(text: str, message: str) -> tuple[str, int]:
    """tomllib's message about a text → the problem, and its line from 1."""
    text = text.replace("\r\n", "\n")  # as tomllib does
    found = _AT.search(message)
    problem, at = _AT.sub("", message), len(text.rstrip())
    if found and found[1]:
        at = _place(text, int(found[1]), int(found[2]))
    if problem.startswith(_NO_QUOTE) and (quote := _lone_quote(text)) is not None:
        return "the text that begins here has no end: a quote is missing", _line(text, quote)
    if problem in _IN_LIST and (opened := _opened(text, at)) is not None and _should_have_ended(text, at):
        end = "]" if text[opened] == "[" else "}"
        kind = "list" if end == "]" else "table"
        return f"the {kind} that begins here has no end: {end!r} is missing", _line(text, opened)
    return _in_words(text, problem, at), _line(text, at)


def _in_words(text: str, problem: str, at: int) -> str:
    match problem:
        case "Cannot overwrite a value":
            return "stands twice"
        case "Unclosed array" | "Unclosed inline table":
            return "a comma is missing between two values"
        case "Invalid value":
            word = _WORD.match(text, at)
            return _no_value(word[0]) if word else "no value stands here"
        case "Expected newline or end of document after a statement":
            value = _VALUE.match(text, text.rfind("\n", 0, at) + 1)
            written = value[1].strip() if value else ""
            return _no_value(written) if written and written[0] not in "\"'[{" else problem
    return problem


def _no_value(written: str) -> str:
    if written.lower() in _FLAGS:
        return f"{written!r} is no value: true or false, in small letters"
    if written[0].isdigit():
        return f"{written!r} is neither a number nor a date like 2026-01-10; text needs quotes"
    return f'{written!r} is no value: text needs quotes, "{written}"'


def _opened(text: str, at: int) -> int | None:
    """Where the innermost bracket stands that is open at a place of the text; None if none is."""
    opened: list[int] = []
    for part in _parts(text, at):
        if part["open"]:
            opened.append(part.start())
        elif part["close"] and opened:
            opened.pop()
    return opened[-1] if opened else None


def _should_have_ended(text: str, at: int) -> bool:
    """Whether what stands at the place is no part of a list or of a table in braces: the end of the text, a key,
    the name of a table, or the end of a line: such a table has one line only."""
    rest = text[at:]
    return (
        not rest.strip()
        or rest[0] == "\n"
        or any((_NEXT_KEY.match(text, at), _HEADER.match(text, text.rfind("\n", 0, at) + 1)))
    )


def _lone_quote(text: str) -> int | None:
    return next((part.start() for part in _parts(text, len(text)) if part["quote"]), None)


def _parts(text: str, end: int) -> Iterator[re.Match[str]]:
    return takewhile(lambda part: part.start() < end, _PART.finditer(text))


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _place(text: str, line: int, column: int) -> int:
    """The offset in the text of a column in a line. Both count from 1."""
    return sum(len(one) + 1 for one in text.split("\n")[: line - 1]) + column - 1
