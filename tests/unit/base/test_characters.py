"""The characters that texts may hold, and how texts of other programs are shown."""

from __future__ import annotations

import json
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portward.base.characters import alike, from_bytes, json_shown, shown, unreadable, unshown

texts = st.text(st.characters(exclude_categories=()), max_size=40)


@pytest.mark.parametrize(
    "name",
    [
        "می\u200cخواهم",
        "क्\u200dष",
        "👩\u200d💻",
        "山田\u3000太郎",
        "Société\u00a0Générale",
        "a\u202fb",
        "\u200fאבג",
        "\U0001fae8",
    ],
)
def test_names_of_the_world_are_right_and_are_shown_as_they_are(name: str) -> None:
    assert unshown(name) is None
    assert shown(name) == name


@pytest.mark.parametrize(
    "sign",
    ["\n", "\r", "\x1b", "\x9b", "\x85", "\u2028", "\u202e", "\u2067", "\u200b", "\udc9b", "\uffff"],
)
def test_what_changes_the_text_around_it_is_refused_and_escaped(sign: str) -> None:
    assert unshown(f"fabri{sign}kam") == sign
    assert shown(f"fabri{sign}kam").isascii()


def test_controls_separators_and_surrogates_are_never_shown() -> None:
    for number in range(sys.maxunicode + 1):
        if unicodedata.category(chr(number)) in ("Cc", "Cs", "Zl", "Zp"):
            assert unshown(chr(number)) is not None
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert all(
        unshown(chr(number)) for number in range(0x3000) if unicodedata.bidirectional(chr(number)) in turning
    )


def test_only_reasons_have_lines() -> None:
    assert unshown("one\n\ttwo", lines=True) is None
    assert unshown("one\rtwo", lines=True) == "\r"


@given(texts)
def test_what_is_shown_is_one_line_and_stays_as_it_is(text: str) -> None:
    printed = shown(text)
    assert unshown(printed) is None
    assert len(printed.splitlines()) <= 1
    assert shown(printed) == printed


@given(texts, st.booleans())
def test_json_means_the_same(text: str, ascii_only: bool) -> None:
    written = json.dumps({"a": text}, ensure_ascii=False, indent=1)
    printed = json_shown(written, ascii_only=ascii_only)
    assert json.loads(printed) == json.loads(written)
    assert all(unshown(line) is None for line in printed.split("\n"))
    assert printed.isascii() or not ascii_only


@given(texts)
def test_every_text_has_an_ascii_form(text: str) -> None:
    assert alike(text).isascii()


def test_a_byte_is_shown_as_that_byte() -> None:
    assert shown(b"M\xfcller".decode("utf-8", "surrogateescape")) == "M\\xfcller"


def test_words_that_the_locale_could_not_read_are_read_as_utf_8() -> None:
    assert from_bytes("Müller".encode().decode("ascii", "surrogateescape")) == "Müller"
    assert unreadable(from_bytes("M\udcfcller"))
    assert not unreadable("Müller")
