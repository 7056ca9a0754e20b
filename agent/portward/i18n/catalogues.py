"""Reads gettext's catalogues in `locale/`, and picks the language of a reader.

English needs no catalogue. The build compiles those of the other languages.
"""

from __future__ import annotations

import gettext
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from portward.errors import InputError
from portward.i18n.language import ENGLISH, SOURCE, Language

DOMAIN: Final = "portward"
FOLDER: Final = Path(__file__).resolve().parents[1] / "locale"
# In the order of gettext.
_VARIABLES: Final = ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG")


def available() -> tuple[str, ...]:
    """The codes of all languages that have a compiled catalogue, English first."""
    found = (path.parent.parent.name for path in FOLDER.glob(f"*/LC_MESSAGES/{DOMAIN}.mo"))
    return (SOURCE, *sorted(code for code in found if code != SOURCE))


def language(code: str) -> Language:
    """The language with this code. Raises InputError, with all codes, for another code."""
    if code not in available():
        raise InputError(f"{code!r} is no language that is there: {', '.join(available())}", field="--lang")
    if code == SOURCE:
        return ENGLISH
    return Language(code, gettext.translation(DOMAIN, FOLDER, [code]))


def preferred(environment: Mapping[str, str]) -> Language:
    """The language that the environment names; English if it names none, or none that has a catalogue."""
    asked = next((value for name in _VARIABLES if (value := environment.get(name))), "")
    known = available()
    for locale in asked.split(":"):
        code = re.split(r"[_.@]", locale, maxsplit=1)[0].lower()
        if code in known:
            return language(code)
    return ENGLISH


def chosen(code: str | None, environment: Mapping[str, str]) -> Language:
    """The language with this code; if the code is None, that of the environment."""
    return preferred(environment) if code is None else language(code)
