"""The languages that there are, and which one a reader gets: gettext's catalogues in `locale/`.

English needs no catalogue; the build compiles the others.
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
# The order in which gettext looks at the environment.
_VARIABLES: Final = ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG")


def available() -> tuple[str, ...]:
    """The codes of all languages, English first."""
    found = (path.parent.parent.name for path in FOLDER.glob(f"*/LC_MESSAGES/{DOMAIN}.mo"))
    return (SOURCE, *sorted(code for code in found if code != SOURCE))


def language(code: str) -> Language:
    """The language with this code; raises InputError that names those there are."""
    if code not in available():
        raise InputError(f"{code!r} is no language that is there: {', '.join(available())}", field="--lang")
    if code == SOURCE:
        return ENGLISH
    return Language(code, gettext.translation(DOMAIN, FOLDER, [code]))


def preferred(environment: Mapping[str, str]) -> Language:
    """The language that the environment asks for; English where it asks for none, or for one that is not there."""
    asked = next((value for name in _VARIABLES if (value := environment.get(name))), "")
    known = available()
    for locale in asked.split(":"):
        code = re.split(r"[_.@]", locale, maxsplit=1)[0].lower()
        if code in known:
            return language(code)
    return ENGLISH


def chosen(code: str | None, environment: Mapping[str, str]) -> Language:
    """The language with this code, or else the one of the environment."""
    return preferred(environment) if code is None else language(code)
