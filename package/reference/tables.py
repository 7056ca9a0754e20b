"""Tables in Markdown, the types of struct fields in words, and what each key means."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import inspect

from portward.config.documents import enc_hook
from portward.model import Network

HERE: Final = Path(__file__).parent
TEXT: Final = HERE / "text"
# Struct, enum or verb → key → what it means.
MEANINGS: Final[Mapping[str, Mapping[str, str]]] = tomllib.loads((HERE / "meanings.toml").read_text())


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a `|` in a cell is escaped."""
    heads = list(head)
    lines = [heads, ["---"] * len(heads), *(list(row) for row in rows)]
    return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def meanings(name: str, keys: Iterable[str]) -> dict[str, str]:
    """The meanings of these keys, in their order. Raises KeyError for a key without a meaning, ValueError for a
    meaning without a key."""
    said = {key: MEANINGS[name][key] for key in keys}
    if unknown := set(MEANINGS[name]) - set(said):
        raise ValueError(f"meanings.toml: [{name}] has {sorted(unknown)}, and the code has not")
    return said


def struct_table(
    struct: type[msgspec.Struct],
    name: str = "",
    *,
    typed: Callable[[inspect.Type], str] | None = None,
    filled: Callable[[str], str] = str,
) -> str:
    """The table of a struct's keys. `name`: of its meanings, if it is not the struct's; `typed`: how a type is
    written, if not as `in_words`; `filled`: puts values into a meaning."""
    found: Any = inspect.type_info(struct)
    said = meanings(name or struct.__name__, (one.encode_name for one in found.fields))
    return _keys(found.fields, said, typed or in_words, filled)


def section_table(struct: type[msgspec.Struct], said: Mapping[str, str]) -> str:
    """The table of those of a struct's keys that have one of these meanings."""
    found: Any = inspect.type_info(struct)
    return _keys([one for one in found.fields if one.encode_name in said], said, in_words, str)


def enum_table(enum: type[Enum], head: str) -> str:
    """The table of an enum's values, under this heading."""
    said = meanings(enum.__name__, (str(one.value) for one in enum))
    return table((head, "meaning"), ((code(value), text) for value, text in said.items()))


def in_words(type_: inspect.Type) -> str:
    """A type in words, for a reader who knows no Python."""
    match type_:
        case inspect.EnumType(cls=cls):
            return ", ".join(code(str(one.value)) for one in cls)
        case inspect.IntType():
            return "whole number" + _range(type_)
        case inspect.FloatType():
            return "number" + _range(type_)
        case inspect.VarTupleType(item_type=item):
            return f"list of: {in_words(item)}{_length(type_)}"
        case inspect.DictType(key_type=key, value_type=value):
            return f"object: {in_words(key)} → {in_words(value)}"
        case inspect.UnionType(types=types):
            return " or ".join(in_words(one) for one in types if not isinstance(one, inspect.NoneType))
        case inspect.StructType(cls=cls):
            return f"[{cls.__name__}](#{cls.__name__.lower()})"
        case inspect.CustomType(cls=cls):
            return _CUSTOM[cls]
    return _PLAIN[type(type_)]


_CUSTOM: Final[Mapping[object, str]] = {Path: "path", Network: "address or prefix"}
_PLAIN: Final[Mapping[type, str]] = {
    inspect.StrType: "text",
    inspect.BoolType: "true or false",
    inspect.UUIDType: "UUID",
    inspect.DateType: "date",
    inspect.DateTimeType: "time",
}


def code(text: str) -> str:
    """A text as a machine writes it."""
    return f"`{text}`"


def sentence(text: str) -> str:
    """A text of one line that begins with a capital letter and ends with a full stop."""
    text = " ".join(text.split())
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "!", "?")) else ".")


def _keys(
    fields: Iterable[inspect.Field],
    said: Mapping[str, str],
    typed: Callable[[inspect.Type], str],
    filled: Callable[[str], str],
) -> str:
    return table(
        ("key", "type", "default", "meaning"),
        ((code(one.encode_name), typed(one.type), _default(one), filled(said[one.encode_name])) for one in fields),
    )


def _default(field: inspect.Field) -> str:
    """The default as the configuration or JSON writes it."""
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if value is None or isinstance(value, msgspec.Struct):
        return "–"
    return code(json.dumps(msgspec.to_builtins(value, enc_hook=_plain)))


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else enc_hook(value)


def _range(type_: inspect.IntType | inspect.FloatType) -> str:
    if type_.le is None:
        return ""
    return f", above {type_.gt:,} to {type_.le:,}" if type_.gt is not None else f", {type_.ge:,} to {type_.le:,}"


def _length(type_: inspect.VarTupleType) -> str:
    parts = [f"at least {type_.min_length}"] if type_.min_length else []
    parts += [f"at most {type_.max_length}"] if type_.max_length else []
    return f" ({', '.join(parts)})" if parts else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
