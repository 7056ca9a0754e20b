"""Inventories in files and on standard input."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from portward.config.files import read_text, text_of
from portward.errors import InputError
from portward.inventory.document import Document
from portward.inventory.json_document import JsonDocument
from portward.inventory.records import Inventory
from portward.inventory.yaml_document import YamlDocument
from portward.store.values import Progress

# A million attachments take about 150 MB of JSON. YAML of this size would need 10 GB of memory.
_MAX_BYTES: Final = 256 * 1024 * 1024
_JSON_BEGINS: Final = re.compile(r"[ \t\r\n]*[{\[]")


def read_inventory(names: Sequence[str], progress: Progress | None = None) -> Inventory:
    """The inventory in these files, `-` for standard input; raises InputError."""
    return Inventory([read_document(name) for name in names], progress)


def read_document(name: str) -> Document:
    """One file, or standard input for `-`. It is JSON if its name ends in `.json` or its text begins with `{` or
    `[`, else YAML. Raises InputError."""
    if name == "-":
        title = "standard input"
        if sys.stdin is None:
            raise InputError("is closed", file=title)
        text = text_of(sys.stdin.buffer, title, _MAX_BYTES)
    else:
        title, text = name, read_text(Path(name), _MAX_BYTES, pipe=True)
    as_json = name.endswith(".json") or _JSON_BEGINS.match(text) is not None
    try:
        return JsonDocument(title, text) if as_json else YamlDocument(title, text)
    except RecursionError:
        raise InputError("nested too deeply", file=title) from None
