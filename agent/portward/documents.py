"""Reading a TOML document into a typed value; a mistake is told with file, line, field and what would be right.

tomllib gives no line of a value, so the line of a field is looked up in the text when, and only when, there
is something to tell.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from datetime import date
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec

from portward.errors import InputError
from portward.model import Network

T = TypeVar("T")

_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")
_HEADER = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?")
_KEY = re.compile(r"\s*([A-Za-z0-9_\-.\"']+)\s*=")
_AT_LINE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)")


def read_toml(path: Path, type_: type[T]) -> T:
    """The document at `path` as a value of `type_`, a msgspec struct; raises InputError."""
    text = _text(path)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _AT_LINE.search(str(error))
        line = int(found[1]) if found and found[1] else text.count("\n") + 1
        raise InputError(_AT_LINE.sub("", str(error)), file=str(path), line=line) from None
    try:
        return msgspec.convert(document, type_, dec_hook=dec_hook)
    except msgspec.ValidationError as error:
        problem, steps = explained(str(error), type_, document)
        line = toml_line(text, steps)
        raise InputError(problem, file=str(path), line=line, field=field_name(steps)) from None


def mistake(path: Path, problem: str, *steps: str | int) -> InputError:
    """The InputError for a field that is of the right type and wrong all the same."""
    return InputError(problem, file=str(path), line=toml_line(_text(path), steps), field=field_name(steps))


def dec_hook(type_: Any, value: Any) -> Any:
    """msgspec's hook for the types that it does not know: networks, from text, and paths."""
    if type_ is Path and isinstance(value, str):
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
        raise ValueError(f"expected an address or a prefix in quotes, got {value!r}")
    try:
        return ip_network(value)
    except ValueError:
        pass
    try:
        right = ip_network(value, strict=False)
    except ValueError:
        raise ValueError(f"{value!r} is no IPv4 or IPv6 address or prefix") from None
    raise ValueError(f"{value!r} has bits beyond its prefix length: {right}, or the address alone, would be right")


def network_text(value: Network) -> str:
    """How a network is written: `10.0.0.4`, `10.0.0.0/24`, `2001:db8::/64`."""
    return str(value.network_address) if value.prefixlen == value.max_prefixlen else str(value)


def explained(message: str, type_: Any, document: Any) -> tuple[str, tuple[str | int, ...]]:
    """msgspec's message → the problem in our words, and the steps to the field (keys and list places)."""
    problem, _, path = message.partition(" - at `")
    steps = tuple(_steps(path.rstrip("`")))
    if unknown := re.match(r"Object contains unknown field `(.+)`", problem):
        known = fields_at(type_, steps)
        near = difflib.get_close_matches(unknown[1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key; {hint}", (*steps, unknown[1])
    if missing := re.match(r"Object missing required field `(.+)`", problem):
        return f"{missing[1]!r} is missing", steps
    return _in_words(problem, _value_at(document, steps)), steps


def field_name(steps: tuple[str | int, ...]) -> str | None:
    """The steps as an operator would write them: `offers[3].created_before`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return text.lstrip(".") or None


def fields_at(type_: Any, steps: tuple[str | int, ...]) -> list[str]:
    """The field names of the struct at the end of `steps` from `type_`."""
    for step in steps:
        arguments = [item for item in get_args(type_) if item is not Ellipsis]
        structs = [item for item in (type_, *arguments) if isinstance(item, type) and issubclass(item, msgspec.Struct)]
        if isinstance(step, int):
            type_ = structs[0] if structs else Any
        else:
            owner = structs[0] if structs else None
            hints = {field.name: field.type for field in msgspec.structs.fields(owner)} if owner else {}
            type_ = hints.get(step, Any)
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        return list(type_.__struct_fields__)
    return []


def toml_line(text: str, steps: tuple[str | int, ...]) -> int | None:
    """The line (from 1) on which the field at `steps` stands in a TOML text, or the nearest thing above it."""
    best, best_length = None, 0
    arrays: dict[str, int] = {}
    prefix: tuple[str | int, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.fullmatch(line):
            name = header[2].replace('"', "")
            prefix = tuple(name.split("."))
            if header[1] == "[[":
                arrays[name] = arrays.get(name, -1) + 1
                prefix = (*prefix, arrays[name])
            here = prefix
        elif key := _KEY.match(line):
            here = (*prefix, *key[1].replace('"', "").split("."))
        else:
            continue
        if here == steps[: len(here)] and len(here) > best_length:
            best, best_length = number, len(here)
    return best


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text (byte {error.start})", file=str(path)) from None
    except OSError as error:
        raise InputError(error.strerror or str(error), file=str(path)) from None


def _steps(path: str) -> list[str | int]:
    found: list[str | int] = []
    for name, place in _STEP.findall(path.removeprefix("$")):
        if place:
            found.append(int(place) if place.isdigit() else place)
        else:
            found.append(name)
    return found


def _value_at(document: Any, steps: tuple[str | int, ...]) -> Any:
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


def _in_words(problem: str, value: Any) -> str:
    """msgspec's own words for a wrong value, as an operator would say it."""
    told = repr(str(value)) if isinstance(value, str | date) else repr(value)
    if found := re.match(r"Expected `([\w| ]+)`, got `(\w+)`$", problem):
        wanted = " or ".join(_TYPES.get(name.strip(), name.strip()) for name in found[1].split("|"))
        return f"expected {wanted}, got {told}"
    if found := re.match(r"Invalid enum value (.+)$", problem):
        return f"{told} is none of the values it can have"
    if re.match(r"Invalid (RFC3339 encoded )?date(time)?", problem) or "Invalid UUID" in problem:
        kind = "uuid" if "UUID" in problem else "datetime" if "datetime" in problem else "date"
        return f"expected {_TYPES[kind]}, got {told}"
    if "timezone" in problem:
        return f"a time needs its zone: {told} and a Z at its end for UTC"
    bounded = problem.replace("`", "")
    return f"{bounded}, got {told}" if bounded.startswith("Expected") and value is not None else bounded
