"""A parser of the part of nft's language that portward writes, for the fake kernel (`fake`). Pure.

A text becomes commands: verb, table, object in the table, and body. Rules stay opaque text. `table inet t { … }`
becomes one command for each object in the block, as in nft.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple

_HOOKS: Final = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
_PRIORITIES: Final = {"raw": -300, "mangle": -150, "dstnat": -100, "filter": 0, "security": 50, "srcnat": 100}
_HOOK: Final = re.compile(r"type (\w+) hook (\w+)(?: device \S+)? priority ([a-z]*) ?([+-]? ?\d*)")
_COMMAND: Final = re.compile(
    r"(add|create|delete|flush|insert) (table|chain|set|map|rule|element|counter|limit) (inet|bridge) (\S+) ?(.*)",
    re.DOTALL,
)
_BLOCK: Final = re.compile(r"table (inet|bridge) (\S+) \{(.*)\}", re.DOTALL)
_THING: Final = re.compile(r"(chain|set|map|counter|limit) (\S+) ?(?:\{(.*)\})?", re.DOTALL)
_NUMBER: Final = re.compile(r'0x[0-9a-f]+|\d+|"\d{16}"')
_UNITS_MS: Final = {"s": 1_000, "m": 60_000, "h": 3_600_000}


class SyntaxFault(Exception):  # noqa: N818 # an error message of nft, not a PortwardError
    """The fake cannot read a text. The message is like nft's."""


class Command(NamedTuple):
    """`verb` is add, create, delete, flush or insert. `kind` is ruleset, table, chain, rule, set, map, element,
    counter or limit. `table` is as `key` gives it. `name` is empty for a table. `body` is the text in the braces,
    or the rule."""

    verb: str
    kind: str
    table: str = ""
    name: str = ""
    body: str = ""


def key(family: str, table: str) -> str:
    """The table's key in the fake: its name, with the family before it if that is not inet."""
    return table if family == "inet" else f"{family} {table}"


class SetDefinition(NamedTuple):
    """The definition of a set: its `text` without elements, the maximum number of elements (0: no maximum), the
    lifetime of an element in milliseconds (0: no end), and the elements as keys."""

    text: str
    size: int
    timeout_ms: int
    keys: tuple[bytes, ...]


@lru_cache
def commands(text: str) -> tuple[Command, ...]:
    """The commands of a text, with the values of its `define`s. Raises SyntaxFault."""
    return tuple(_commands(text))


def _commands(text: str) -> Iterator[Command]:
    for statement in _statements(_expanded(text)):
        if statement == "flush ruleset":
            yield Command("flush", "ruleset")
        elif block := _BLOCK.fullmatch(statement):
            yield from _block(key(block[1], block[2]), block[3])
        elif found := _COMMAND.fullmatch(statement):
            verb, kind, family, table, rest = found.groups()
            name, _, body = rest.partition(" ")
            if kind == "table":
                name, body = "", rest
            body = body.strip().removeprefix("{").removesuffix("}").strip()
            yield Command(verb, kind, key(family, table), name, body)
        else:
            raise SyntaxFault(f"syntax error, unexpected {statement.split(maxsplit=1)[0]}")


class Base(NamedTuple):
    """Type, hook (NF_INET_…) and priority of a base chain."""

    type: str
    hook: int
    priority: int


def base(body: str) -> Base | None:
    """The hook in the body of a chain; None for a regular chain."""
    found = _HOOK.search(body)
    if found is None:
        return None
    offset = found[4].replace(" ", "")
    return Base(found[1], _HOOKS[found[2]], _PRIORITIES.get(found[3], 0) + int(offset or 0))


@lru_cache
def rules_of(body: str) -> tuple[str, ...]:
    """The rules in the body of a chain."""
    return tuple(rule for rule in _statements(body) if not rule.startswith(("type ", "policy ")))


@lru_cache
def set_definition(body: str) -> SetDefinition:
    """The definition in the body of a set."""
    parts = [part for part in _statements(body) if not part.startswith("elements")]
    elements = next((part for part in _statements(body) if part.startswith("elements")), "= {}")
    size = next((int(part.split()[1]) for part in parts if part.startswith("size ")), 0)
    timeout = next((_milliseconds(part.split()[1]) for part in parts if part.startswith("timeout ")), 0)
    return SetDefinition("; ".join(parts), size, timeout, tuple(keys(elements.partition("=")[2])))


def keys(text: str) -> Iterator[bytes]:
    """Elements in braces as keys: numbers in the byte order of the host, everything else as text."""
    for item in text.strip().removeprefix("{").removesuffix("}").split(","):
        if word := item.strip():
            yield struct.pack("=I", _number(word)) if _NUMBER.fullmatch(word) else word.encode()


def _number(word: str) -> int:
    """A number. An interface index is in quotes and has leading zeros (module `ruleset`)."""
    return int(word, 16) if word.startswith("0x") else int(word.strip('"'))


def _expanded(text: str) -> str:
    """The text without comments, with each name of a `define` replaced by its value."""
    values: dict[str, str] = {}
    lines = []
    for line in text.splitlines():
        words = re.sub(r"\$(\w+)", lambda found: values[found[1]], re.sub(r"(^|\s)#.*", "", line))
        if found := re.fullmatch(r"define (\w+) = (.*)", words.strip()):
            values[found[1]] = found[2]
        else:
            lines.append(words)
    return "\n".join(lines)


def _statements(text: str) -> Iterator[str]:
    """The parts between line ends and semicolons outside of braces and quotes, with one space between words."""
    depth, quoted, part = 0, False, ""
    for sign in text + "\n":
        if sign == '"':
            quoted = not quoted
        if not quoted:
            depth += {"{": 1, "}": -1}.get(sign, 0)
            if depth < 0:
                raise SyntaxFault("syntax error, unexpected '}'")
            if depth == 0 and sign in ";\n":
                if words := re.sub(r"[ \t]+", " ", part).strip():
                    yield words
                part = ""
                continue
        part += sign
    if depth:
        raise SyntaxFault("syntax error, unexpected end of file")


def _block(table: str, body: str) -> Iterator[Command]:
    flags = [part for part in _statements(body) if part.startswith(("flags ", "comment "))]
    yield Command("add", "table", table, body="; ".join(flags))
    things = [part for part in _statements(body) if part not in flags]
    for part in things:
        found = _THING.fullmatch(part)
        if found is None:
            raise SyntaxFault(f"syntax error, unexpected {part.split(maxsplit=1)[0]}")
        yield Command("add", found[1], table, found[2], (found[3] or "").strip())


def _milliseconds(text: str) -> int:
    return int(text[:-1]) * _UNITS_MS[text[-1]]
