"""Texts, dates, numbers and lists in the reader's language. Pure: `i18n.catalogues` reads the translations.

The texts in the code are English, and are the keys of the catalogues. A function that writes one takes a
`Language` and calls it:

    say("Please wait for the decision on your request.")
    say("asked for on {when}", when=say.time(at))
    say.many("{n} machine", "{n} machines", count, n=say.number(count))

`marked` marks a text that is stored first and translated later. `make messages` collects all of them, and the
customers' texts in the bundled presets.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Final, Protocol

# The language of the texts in the code.
SOURCE: Final = "en"


def marked(text: str) -> str:
    """Returns the text itself. The call marks it for the catalogues."""
    return text


def marked_many(one: str, several: str) -> tuple[str, str]:
    """As `marked`, for the first two arguments of `Language.many`."""
    return one, several


_MONTHS: Final = (
    marked("January"), marked("February"), marked("March"), marked("April"), marked("May"), marked("June"),
    marked("July"), marked("August"), marked("September"), marked("October"), marked("November"),
    marked("December"),
)  # fmt: skip


class Translations(Protocol):
    """A catalogue, as `gettext.GNUTranslations` has it."""

    def gettext(self, message: str) -> str:
        """The translation of a text; the text itself if there is none."""

    def ngettext(self, msgid1: str, msgid2: str, n: int) -> str:
        """The translation of a text that counts `n` things."""

    def pgettext(self, context: str, message: str) -> str:
        """The translation of a text in a context."""


class _Untranslated:
    """English: the texts are their own translations."""

    def gettext(self, message: str) -> str:
        return message

    def ngettext(self, msgid1: str, msgid2: str, n: int) -> str:
        return msgid1 if n == 1 else msgid2

    def pgettext(self, context: str, message: str) -> str:
        return message


class Language:
    """One language, by its code (`en`, `fr`)."""

    def __init__(self, code: str, translations: Translations) -> None:
        self.code, self._translations = code, translations

    def __call__(self, text: str, /, **values: object) -> str:
        """The text in this language, with the values in place of their names in braces."""
        found = self._translations.gettext(text) if text else ""
        return found.format(**values) if values else found

    def many(self, one: str, several: str, count: int, /, **values: object) -> str:
        """The text for `count` things: `one` or `several`, by the plural rule of the language."""
        found = self._translations.ngettext(one, several, count)
        return found.format(**values) if values else found

    def number(self, value: int) -> str:
        """A whole number with separators between the thousands."""
        return f"{value:,}".replace(",", self._translations.pgettext("between thousands", ","))

    def day(self, at: date) -> str:
        """A date, for example 30 June 2022."""
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
        """A list in one line: a, b and c. At least one thing."""
        *others, last = things
        if not others:
            return last
        return self("{things} and {last}", things=", ".join(others), last=last)

    def quoted(self, text: str) -> str:
        """A text in quotation marks."""
        return self("“{text}”", text=text)


ENGLISH: Final = Language(SOURCE, _Untranslated())
