"""Code that documents in TOML, YAML and JSON share: networks as text, the steps to a field, and msgspec's errors
in an operator's words. Pure.

Each format is decoded in a module of its own, because each finds the line of a field in its own way.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable
from datetime import date
from enum import Enum
from ipaddress import IPv4Network, IPv6Network, ip_network
from types import UnionType
from typing import Any, Final, TypeAlias, Union, get_args, get_origin

import msgspec

from portward.base.addresses import unmapped
from portward.model import Network

# The way to a field from the top of a document: keys of tables, and indexes of lists from 0.
Steps: TypeAlias = tuple[str | int, ...]

# The longest key, quoted value and problem that an operator is shown, in characters. The rest is cut off.
_MAX_WORD, _MAX_VALUE, _MAX_PROBLEM = 60, 200, 400

MISSING: Final = "is missing"
UNKNOWN_KEY: Final = "unknown key"

# One step in msgspec's path to a field: `.name`, `[3]`, or `[...]` for a key of a dict.
_STEP: Final = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")


def dec_hook(type_: Any, value: Any) -> Any:
    """msgspec's decoding hook: `value` as a `Network`. Raises ValueError if it is none, NotImplementedError for
    another type."""
    if type_ is Network:
        return network(value)
    raise NotImplementedError(type_)


def enc_hook(value: Any) -> Any:
    """msgspec's encoding hook: a network as text. Raises NotImplementedError for a value of another type."""
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
        return f"{UNKNOWN_KEY}; {nearest(unknown[1], fields_at(type_, steps))}", (*steps, unknown[1])
    if missing := re.match(r"Object missing required field `(.+)`", problem):
        return MISSING, (*steps, missing[1])
    if problem.startswith("Invalid enum value"):
        value, known = _value_at(document, steps), _enum_values(type_, steps)
        near = _near(str(value), known)
        hint = f"; {near}" if near else ""
        return f"{brief(value)} is not a valid value ({', '.join(known)}){hint}{_written(str(value))}", steps
    return _in_words(problem, _value_at(document, steps)), steps


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest of the known words as a question, or all of them if
    none is near."""
    known = list(known)
    near = _near(word, known)
    return f"{near}{_written(word)}" if near else f"known here: {', '.join(known)}{_written(word)}"


def _near(word: str, known: list[str]) -> str:
    """The question after the nearest of the known words; empty if none is near."""
    near = difflib.get_close_matches(word[:_MAX_WORD], known, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def _written(word: str) -> str:
    """How a word is written that is not ASCII: letters of other scripts look the same."""
    return "" if word.isascii() else f" (written here: {word[:_MAX_WORD]!a})"


def field_name(steps: Steps) -> str | None:
    """The steps as an operator would write them: `offers[3].created_before`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{_cut(step)}" for step in steps)
    return text.removeprefix(".")[:_MAX_VALUE] or None


def brief(value: Any) -> str:
    """`repr` of what an operator wrote, cut to what can be read in a message: it may be huge, be nested deeply,
    or hold itself."""
    return _BRIEF.repr(value)


def shortened(problem: str) -> str:
    """A problem, cut to what is still a line: it may quote a whole document."""
    return problem if len(problem) <= _MAX_PROBLEM else f"{problem[:_MAX_PROBLEM]} …"


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxstring = self.maxother = _MAX_VALUE

    def repr_bool(self, x: bool, _: int) -> str:
        return str(x).lower()

    def repr_NoneType(self, *_: object) -> str:  # noqa: N802 # reprlib finds it by the type's name
        return "nothing"

    def repr_int(self, x: int, level: int) -> str:
        # Python turns no number of more than 4,300 digits into text.
        return repr(x) if x.bit_length() <= 256 else f"a number of {x.bit_length()} bits"


_BRIEF: Final = _Brief()


def _cut(word: str) -> str:
    return word if len(word) <= _MAX_WORD else f"{word[:_MAX_WORD]}…"


def fields_at(type_: Any, steps: Steps) -> list[str]:
    """The field names of the struct at the end of `steps` from `type_`; none where there is no struct."""
    for item in _alternatives(_type_at(type_, steps)):
        if isinstance(item, type) and issubclass(item, msgspec.Struct):
            return list(item.__struct_fields__)
    return []


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
    given = brief(str(value)) if isinstance(value, str | date) else brief(value)
    if found := re.fullmatch(r"Expected `([\w| ]+)`, got `(\w+)`", problem):
        wanted = (name.strip() for name in found[1].split("|"))
        return f"expected {' or '.join(_TYPES.get(name, name) for name in wanted if name != 'null')}, got {given}"
    if found := re.fullmatch(r"Expected `(\w+)`( of length)? (>=|<=|>|<) (\S+)", problem):
        unit = (" entry", " entries") if found[1] == "array" else (" character", " characters")
        size = unit[found[4] != "1"] if found[2] else ""
        kind = _TYPES.get(found[1], found[1])
        return f"expected {kind} of {_BOUNDS[found[3]]} {found[4]}{size}, got {given}"
    if re.match(r"Invalid (RFC3339 encoded )?date(time)?", problem) or "Invalid UUID" in problem:
        kind = "uuid" if "UUID" in problem else "datetime" if "datetime" in problem else "date"
        return f"expected {_TYPES[kind]}, got {given}"
    if "timezone" in problem:
        return f"a time needs its zone: {given} and a Z at its end for UTC"
    if problem in ("Number out of range", "Integer value out of range"):
        return "no field takes a number as large as this"
    return problem.replace("`", "")
