"""The reference pages of `docs/reference/`, made from the code, so that they say what the code does.

    python -m package.reference

`make docs` runs this; `tests/unit/test_reference.py` fails if a committed page is not what comes out. The prose of
each page stands in `text/`, what each key means in `meanings.toml`. All else comes from the code: keys, types,
defaults, ranges, metrics, codes, verbs, formats. A key without a meaning raises KeyError, so none is forgotten.

Read in this order: `tables` (Markdown, and types in words), then one module for each group of pages.
"""

from __future__ import annotations

from typing import Final

from package.reference import commands, configuration, files, metrics, output, policy
from package.reference.tables import TEXT

__all__ = ["pages"]

_HEAD: Final = "<!-- Made from the code by `python -m package.reference`. Do not change it by hand. -->\n\n"


def pages() -> dict[str, str]:
    """File name in `docs/reference/` → text."""
    fills: dict[str, dict[str, object]] = {
        "configuration.md": configuration.fills(),
        "presets.md": policy.presets_fills(),
        "inventory.md": policy.inventory_fills(),
        "reasons.md": policy.reasons_fills(),
        "metrics.md": metrics.fills(),
        "commands.md": commands.fills(),
        "exit-codes.md": commands.exit_codes_fills(),
        "json.md": output.fills(),
        "files.md": files.fills(),
        "store.md": files.store_fills(),
    }
    return {
        name: (_HEAD + (TEXT / name).read_text().format(**filled)).rstrip() + "\n"
        for name, filled in fills.items()
    }
