"""Compiles the catalogues of texts (`*.po` → `*.mo`, which `gettext` reads), as a part of every build.

hatchling calls it for a wheel and for an editable install, so that `make setup`, `make install` and `pip wheel`
all have them. By itself, `python hatch_build.py` compiles them in the checkout.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LOCALE = Path(__file__).resolve().parent / "agent" / "portward" / "locale"
_NO_TIME = datetime(1970, 1, 1, tzinfo=UTC)


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg,misc] # comes without types
    """Hatchling calls it before it builds."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles all catalogues. Raises PoFileError, which fails the build, for one that cannot be read."""
        compile_catalogues(LOCALE)


def compile_catalogues(folder: Path) -> None:
    """Compiles every catalogue of the folder `<language>/LC_MESSAGES/<domain>.po`, beside it."""
    for path in sorted(folder.glob("*/LC_MESSAGES/*.po")):
        with path.open("rb") as source:
            catalogue = read_po(source, abort_invalid=True)
        # Otherwise babel writes the time of the build, but the same sources must give the same wheel.
        catalogue.creation_date = catalogue.revision_date = _NO_TIME
        with path.with_suffix(".mo").open("wb") as target:
            write_mo(target, catalogue)


if __name__ == "__main__":
    compile_catalogues(LOCALE)
