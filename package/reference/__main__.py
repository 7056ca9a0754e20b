"""Writes the reference pages."""

from __future__ import annotations

from pathlib import Path

from package.reference import pages

FOLDER = Path(__file__).resolve().parents[2] / "docs/reference"

for name, text in pages().items():
    (FOLDER / name).write_text(text)
