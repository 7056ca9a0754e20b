"""Checks how the program reads a document. Either it refuses the document with one line that names it; or it takes
the document, and its result, written out and read again, is the same. Any other exception is a defect."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from portward.base.characters import unshown
from portward.config.documents import enc_hook
from portward.config.load import load_config
from portward.errors import InputError
from portward.inventory.difference import Difference, check_offers, check_references, described, difference
from portward.inventory.files import read_inventory
from portward.inventory.json_document import json_text
from portward.inventory.yaml_document import yaml_text
from portward.policy import presets
from portward.store.codec import decode, encode, key_of, key_only
from portward.store.values import RecordError
from portward.table.commits import Answers
from portward.table.writer import Writer

NOW: Final = datetime(2026, 6, 1, tzinfo=UTC)
ENDINGS: Final = {"config": "toml", "preset": "toml", "yaml": "yaml", "json": "json"}
_AZURE: Final = presets.load("azure-2020")
# Characters of the longest line that a person may be expected to read.
_LONGEST: Final = 1_500


class Oracle:
    """Reads documents of one kind, with its own files in `folder`, and checks the result."""

    def __init__(self, kind: str, folder: Path) -> None:
        self._kind, self._folder = kind, folder
        self._writer = Writer(folder, _AZURE, Answers(observe=False, reject=False)) if kind == "record" else None
        self._revision = 0

    def check(self, data: bytes) -> bool:
        """Whether the program takes a document. Raises AssertionError if the message or the result is wrong."""
        if self._writer is not None:
            return self._record(data, self._writer)
        path = self._folder / f"document.{ENDINGS[self._kind]}"
        path.write_bytes(data)
        try:
            self._document(path)
        except InputError as error:
            _is_a_line(str(error), f"{path}:")
            return False
        return True

    def _document(self, path: Path) -> None:
        if self._kind == "config":
            config = load_config(path)
            path.write_bytes(_toml(config))
            assert load_config(path) == config
        elif self._kind == "preset":
            preset = presets.load(str(path))
            path.write_bytes(_toml(preset))
            assert presets.load(str(path)).digest == preset.digest
        else:
            self._inventory(path)

    def _inventory(self, path: Path) -> None:
        inventory = read_inventory([str(path)])
        check_offers(inventory, _AZURE)
        check_references({}, inventory, prune=False)
        have = inventory.records
        made = Difference(dict(have), {}, ())
        for line in described({}, inventory, made):
            assert unshown(line) is None
        for ending, write in (("yaml", yaml_text), ("json", json_text)):
            again = path.with_name(f"export.{ending}")
            again.write_text("".join(write(have)))
            assert difference(have, read_inventory([str(again)]), prune=True).puts() == []

    def _record(self, data: bytes, writer: Writer) -> bool:
        key, _, body = data.decode(errors="backslashreplace").partition("\n")
        try:
            record = decode(key, body)
        except RecordError as error:
            _is_a_line(str(error), "")
            key_only(key)
            return False
        assert decode(key, encode(record)) == record
        assert key_of(record) == key
        away = key_only(key)
        assert away is not None
        self._revision += 1
        writer.apply([record], [], revision=self._revision, now=NOW)
        writer.decide_due(now=NOW)
        writer.next_expiry()
        writer.apply([], [away], revision=self._revision, now=NOW)
        return True


def _is_a_line(text: str, start: str) -> None:
    assert text.startswith(start)
    assert unshown(text) is None
    assert len(text) < _LONGEST


def _toml(value: Any) -> bytes:
    """A value of the program's own types as TOML, without None, which TOML cannot express."""

    def without_none(item: Any) -> Any:
        if isinstance(item, dict):
            return {name: without_none(inner) for name, inner in item.items() if inner is not None}
        return [without_none(inner) for inner in item] if isinstance(item, list | tuple) else item

    def hook(item: Any) -> Any:
        return str(item) if isinstance(item, Path) else enc_hook(item)

    return msgspec.toml.encode(without_none(msgspec.to_builtins(value, enc_hook=hook, builtin_types=(date,))))
