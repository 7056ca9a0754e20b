"""Every text for another language has a translation, and the catalogues are in step with the code."""

from __future__ import annotations

import ast
import gettext
import re
from string import Formatter
from typing import Any

import pytest

import messages
from portward.i18n.catalogues import DOMAIN, FOLDER
from portward.policy import presets

CATALOGUES = sorted(FOLDER.glob(f"*/LC_MESSAGES/{DOMAIN}.po"))
TEXTS = messages.collected()
# Proper names, and words that are the same in both languages.
SAME = {
    "fr": {
        " → ", "Cloud Service Provider", "Enterprise Agreement", "Enterprise Dev/Test", "Pay-As-You-Go",
        "Enterprise Agreement, Microsoft Customer Agreement for Enterprise",
        "Microsoft Partner Network, BizSpark Plus, Azure Sponsorship",
        "machines", "{address} ({n} machines)", "{day} {month} {year}", "{n} machine",
    },
}  # fmt: skip
_CALLS = {"say", "_say", "marked", "marked_many"}

each = pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: path.parent.parent.name)


def both(value: Any) -> tuple[str, ...]:
    """A text, or all plural forms of a text that counts."""
    return (value,) if isinstance(value, str) else tuple(value)


def places(text: str) -> set[str]:
    """The names of the placeholders in a text."""
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def test_french_is_there() -> None:
    assert "fr" in {path.parent.parent.name for path in CATALOGUES}


@each
def test_every_text_is_translated(path: Any) -> None:
    have = messages.catalogue_of(path)
    for text in TEXTS:
        if text.id:
            found = have.get(text.id if isinstance(text.id, str) else text.id[0], text.context)
            assert found is not None, f"{text.id!r} is not in {path}: `make messages` adds it"
            assert all(both(found.string)), f"{text.id!r} has no translation in {path}"


@each
def test_no_translation_is_a_guess_or_the_english_text(path: Any) -> None:
    same = SAME[path.parent.parent.name]
    for text in messages.catalogue_of(path):
        if text.id:
            assert not text.fuzzy, text.id
            first, english = both(text.string)[0], both(text.id)[0]
            assert (first == english) == (english in same), f"{english!r}: {first!r}"


@each
def test_a_translation_has_the_same_places_and_the_same_end(path: Any) -> None:
    for text in messages.catalogue_of(path):
        if text.id and not text.context:
            for string in both(text.string):
                assert places(string) == places(both(text.id)[-1]), text.id
                assert string[:1].isspace() == both(text.id)[0][:1].isspace(), text.id
                assert (string[-1] in ".:,") == (both(text.id)[0][-1] in ".:,"), text.id


@each
def test_each_way_of_counting_has_its_own_form(path: Any) -> None:
    have = messages.catalogue_of(path)
    for text in have:
        if text.pluralizable:
            assert len(both(text.string)) == have.num_plurals, text.id


@each
def test_french_punctuation_has_its_spaces(path: Any) -> None:
    for text in messages.catalogue_of(path):
        for string in both(text.string) if text.id else ():
            # Not within a placeholder; a colon between digits or in `--all` has none.
            plain = re.sub(r"\{\w+\}", "x", string)
            assert not re.search(r"[^\u00a0][:»]", plain), string
            assert not re.search(r"[^\u202f][;!?]", plain), string
            assert not re.search("«[^\u00a0]", plain), string
            assert "'" not in plain, string


@each
def test_the_catalogue_is_in_step_with_the_code(path: Any) -> None:
    assert path.read_text() == messages.merged(path, TEXTS), "`make messages` brings it in step"


def test_the_template_is_in_step_with_the_code() -> None:
    text = messages.TEMPLATE.read_text()
    assert text.partition("\n\n")[2] == messages.written(TEXTS), "`make messages` brings it in step"


@each
def test_what_is_compiled_is_what_is_written(path: Any) -> None:
    with path.with_suffix(".mo").open("rb") as file:
        compiled = gettext.GNUTranslations(file)
    for text in messages.catalogue_of(path):
        english, strings = both(text.id), both(text.string)
        if text.id and text.context:
            assert compiled.pgettext(text.context, english[0]) == strings[0], "`make setup` compiles it"
        elif text.id and len(english) > 1:
            assert compiled.ngettext(english[0], english[1], 2) == strings[1], "`make setup` compiles it"
        elif text.id:
            assert compiled.gettext(english[0]) == strings[0], "`make setup` compiles it"


def test_no_text_escapes_the_collection() -> None:
    """This includes texts within f-strings, which Babel does not read."""
    known = {one for text in TEXTS if text.id for one in both(text.id)}
    for path in messages.sources():
        for node in ast.walk(ast.parse(path.read_text())):
            for given in node.args if isinstance(node, ast.Call) and says(node.func) else []:
                if isinstance(given, ast.Constant) and isinstance(given.value, str):
                    assert given.value in known, f"{path.name}:{given.lineno}: {given.value!r}"


def says(function: ast.expr) -> bool:
    """Whether a call of this function translates a text, or marks it for translation."""
    if isinstance(function, ast.Attribute) and function.attr == "many":
        function = function.value
    return getattr(function, "id", getattr(function, "attr", "")) in _CALLS


@pytest.mark.parametrize("name", presets.bundled())
def test_what_customers_see_of_a_preset_is_collected(name: str) -> None:
    known = {text.id for text in TEXTS}
    preset = presets.load(name)
    offers = [*preset.offers, *([preset.otherwise] if preset.otherwise else [])]
    shown = {preset.restart, preset.request} | {
        text for offer in offers for text in (offer.title, *offer.requires)
    }
    assert shown - {""} <= known
