"""Texts in the reader's language, by `gettext` and the catalogues in `locale/`.

The texts in the code are English, and are the keys of the catalogues. Who writes one takes a `Language` and calls
it:

    say("Please wait for the decision on your request.")
    say("asked for on {when}", when=say.time(at))
    say.many("{n} machine", "{n} machines", count, n=say.number(count))

`marked` names a text that is kept first and said later. `make messages` collects all of them, the customers' texts
in the bundled presets too. English needs no catalogue; the build compiles the others.
"""

from __future__ import annotations

import gettext
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Final

from portward.errors import InputError

DOMAIN: Final = "portward"
FOLDER: Final = Path(__file__).resolve().parent / "locale"
SOURCE: Final = "en"
# The order in which gettext looks at the environment.
_VARIABLES: Final = ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG")


def marked(text: str) -> str:
    """The text as it is; says that it is in the catalogues."""
    return text


def marked_many(one: str, several: str) -> tuple[str, str]:
    """The same for a text that counts: what `Language.many` takes first."""
    return one, several


_MONTHS: Final = (
    marked("January"), marked("February"), marked("March"), marked("April"), marked("May"), marked("June"),
    marked("July"), marked("August"), marked("September"), marked("October"), marked("November"),
    marked("December"),
)  # fmt: skip


class Language:
    """One language, by its code (`en`, `fr`)."""

    def __init__(self, code: str, translations: gettext.NullTranslations) -> None:
        self.code, self._translations = code, translations

    def __call__(self, text: str, /, **values: object) -> str:
        """The text in this language, with the values in the places that name them."""
        found = self._translations.gettext(text) if text else ""
        return found.format(**values) if values else found

    def many(self, one: str, several: str, count: int, /, **values: object) -> str:
        """The text for so many things, `one` or `several`, in the language's own way of counting."""
        found = self._translations.ngettext(one, several, count)
        return found.format(**values) if values else found

    def number(self, value: int) -> str:
        """A whole number with its thousands set apart."""
        return f"{value:,}".replace(",", self._translations.pgettext("between thousands", ","))

    def day(self, at: date) -> str:
        """A date: 30 June 2022."""
        month = self(_MONTHS[at.month - 1])
        if at.day == 1:
            return self("1 {month} {year}", month=month, year=at.year)
        return self("{day} {month} {year}", day=at.day, month=month, year=at.year)

    def time(self, at: datetime) -> str:
        """A time to the minute, in UTC."""
        at = at.astimezone(UTC)
        time = self("{hour}:{minute}", hour=f"{at:%H}", minute=f"{at:%M}")
        return self("{day} at {time} UTC", day=self.day(at), time=time)

    def both(self, things: Sequence[str]) -> str:
        """All of the things in one line: a, b and c."""
        *others, last = things
        if not others:
            return last
        return self("{things} and {last}", things=", ".join(others), last=last)

    def quoted(self, text: str) -> str:
        """Somebody's own words, in quotation marks."""
        return self("“{text}”", text=text)


ENGLISH: Final = Language(SOURCE, gettext.NullTranslations())


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
