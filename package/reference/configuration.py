"""The page on portward.toml. Types, defaults and ranges come from the structs, meanings from the sample file."""

from __future__ import annotations

import re
from typing import get_args

import msgspec

from package.reference.tables import MEANINGS, code, section_table, sentence
from portward.config.keys import Config
from portward.config.template import template
from portward.daemon.settings import FIXED


def fills() -> dict[str, object]:
    """The values for the text of the page."""
    said, tables = _meanings(), _tables()
    main = {name: said[name] for name in Config.__struct_fields__ if name not in tables}
    sections = (
        f"## `{title}`\n\n{said[name]}\n\n"
        + section_table(struct, {key: said[f"{name}.{key}"] for key in struct.__struct_fields__})
        for name, (title, struct) in tables.items()
    )
    return {
        "fixed": ", ".join(f"`[{name}]`" if name in tables else code(name) for name in FIXED),
        "main": section_table(Config, main),
        "tables": "\n".join(sections),
        "sample": template(),
    }


def _tables() -> dict[str, tuple[str, type[msgspec.Struct]]]:
    """The tables of the file: name → the line that begins one, and its keys."""
    found: dict[str, tuple[str, type[msgspec.Struct]]] = {}
    for field in msgspec.structs.fields(Config):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            found[field.name] = f"[{field.name}]", field.type
        elif isinstance(item := next(iter(get_args(field.type)), None), type) and issubclass(item, msgspec.Struct):
            found[field.name] = f"[[{field.name}]]", item
    return found


def _meanings() -> dict[str, str]:
    """Key (`queue.rate`) or table (`queue`) → the comment before it in the sample file, and the sentences that
    meanings.toml adds. Raises KeyError if these are for a key that is not in the file."""
    said: dict[str, str] = {}
    prefix = comment = ""
    for line in template().splitlines():
        if line.startswith("# "):
            comment = sentence(line.removeprefix("# "))
        elif found := re.fullmatch(r"#?\[?\[(\w+)\]\]?", line):
            prefix = f"{found[1]}."
            said[found[1]] = comment
        elif found := re.match(r"#?(\w+) = ", line):
            said[prefix + found[1]] = comment
    return said | {key: f"{said[key]} {more}" for key, more in MEANINGS["configuration"].items()}
