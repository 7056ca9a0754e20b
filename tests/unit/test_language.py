"""The choice of a reader's language, and how each language writes dates, numbers and lists."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone

import pytest

from portward.errors import InputError
from portward.i18n.catalogues import available, chosen, language, preferred
from portward.i18n.language import ENGLISH

FRENCH = language("fr")


@pytest.mark.parametrize(
    ("environment", "code"),
    [
        ({}, "en"),
        ({"LANG": "fr_FR.UTF-8"}, "fr"),
        ({"LANG": "fr"}, "fr"),
        ({"LANG": "fr_CA@euro"}, "fr"),
        ({"LANG": "C.UTF-8"}, "en"),
        ({"LANG": "tlh_QO.UTF-8"}, "en"),
        ({"LC_MESSAGES": "fr_FR.UTF-8", "LANG": "en_US.UTF-8"}, "fr"),
        ({"LC_ALL": "C", "LC_MESSAGES": "fr_FR.UTF-8", "LANG": "fr_FR.UTF-8"}, "en"),
        ({"LC_ALL": "", "LC_MESSAGES": "", "LANG": "fr_FR.UTF-8"}, "fr"),
        ({"LANGUAGE": "de:fr:en", "LC_ALL": "en_GB.UTF-8"}, "fr"),
        ({"LANGUAGE": "en:fr", "LANG": "fr_FR.UTF-8"}, "en"),
    ],
)
def test_the_locale_says_which_language_in_the_order_of_gettext(environment: dict[str, str], code: str) -> None:
    assert preferred(environment).code == code
    assert chosen(None, environment).code == code


def test_an_option_beats_the_locale() -> None:
    assert chosen("en", {"LC_ALL": "fr_FR.UTF-8"}) is ENGLISH
    assert chosen("fr", {"LC_ALL": "C"}).code == "fr"


@pytest.mark.parametrize("code", ["", "xx", "FR", "fr_FR", "../fr"])
def test_an_unknown_language_is_refused_with_those_there_are(code: str) -> None:
    with pytest.raises(InputError, match="en, fr"):
        chosen(code, {"LANG": "fr_FR.UTF-8"})


def test_english_needs_no_catalogue() -> None:
    assert available()[0] == "en"


def test_dates_and_times_are_written_as_each_language_does() -> None:
    assert ENGLISH.day(date(2026, 1, 1)) == "1 January 2026"
    assert FRENCH.day(date(2026, 1, 1)) == "1er janvier 2026"
    assert FRENCH.day(date(2026, 8, 12)) == "12 août 2026"
    at = datetime(2026, 1, 9, 7, 5, tzinfo=timezone(timedelta(hours=-5)))
    assert ENGLISH.time(at) == "9 January 2026 at 12:05 UTC"
    assert FRENCH.time(at.astimezone(UTC)) == "9 janvier 2026 à 12\u00a0h\u00a005 UTC"


def test_numbers_have_their_thousands_apart() -> None:
    assert ENGLISH.number(1_234_567) == "1,234,567"
    assert FRENCH.number(1_234_567) == "1\u202f234\u202f567"


@pytest.mark.parametrize(("count", "words"), [(0, "0 machine"), (1, "1 machine"), (2, "2 machines")])
def test_french_counts_nothing_as_one(count: int, words: str) -> None:
    assert FRENCH.many("{n} machine", "{n} machines", count, n=count) == words
    assert ENGLISH.many("{n} machine", "{n} machines", 0, n=0) == "0 machines"


def test_things_are_listed_and_words_are_quoted() -> None:
    assert ENGLISH.both(["a"]) == "a"
    assert ENGLISH.both(["a", "b", "c"]) == "a, b and c"
    assert FRENCH.both(["a", "b", "c"]) == "a, b et c"
    assert FRENCH.quoted("x") == "«\u00a0x\u00a0»"


def test_what_no_catalogue_has_stays_as_it_is() -> None:
    assert FRENCH("ask {them} nicely") == "ask {them} nicely"
    assert FRENCH("") == ""
