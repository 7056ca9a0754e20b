"""The prose check finds unclear English on its line, and ignores code."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from prose import __main__ as prose

RULES = prose.read_rules((prose.HERE / "rules.toml").read_text())


def found(name: str, text: str) -> list[tuple[int, str]]:
    """Line and rule of each place in a file of this name."""
    return [(place.line, place.rule.name) for place in prose.places(Path(name), text, RULES)]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("docs/a.md", "# Title\n\nA limit of so\nmany packets.\n", (3, "so-many")),
        ("docs/a.md", "One line.\nWhere the store is lost, the table is used.\n", (2, "where-for-if")),
        ("docs/a.md", "- One item.\n- Nobody reads it.\n", (2, "nobody")),
        ("README.md", " ".join(["word"] * 46), (1, "long")),
        ("agent/a.py", '"""One.\n\nWhat is DEFERRED is dropped.\n"""\n', (3, "what")),
        ("agent/a.py", "x = 1\n# The kernel is\n# to learn the limit.\n", (2, "is-to")),
        ("agent/a.py", "raise ValueError(f'{x!r} is none of its values')\n", (1, "none-of")),
        ("rules/a.nft", "table inet t {\n    # Somebody else's rules.\n}\n", (2, "nobody")),
        ("Makefile", "all:\n# Drops are told here.\n", (2, "told")),
    ],
)
def test_what_is_unclear_is_found_on_its_line(name: str, text: str, expected: tuple[int, str]) -> None:
    assert expected in found(name, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("docs/a.md", "Run `told` here:\n\n```sh\necho nobody\n```\n\n[A page](nobody.md).\n"),
        ("docs/a.md", "What does it cost? A port is where packets arrive.\n"),
        ("docs/a.md", "| " + " | ".join(["three words here"] * 30) + " |\n"),
        ("docs/a.md", "It drops packets. " * 30),
        ("agent/a.py", "judge = told\nname = 'nobody'\n"),
        ("tests/unit/test_a.py", "assert text == 'so many packets were dropped'\n"),
        ("rules/a.nft", "so many rules\n"),
        ("agent/a.c", "/* nobody */\n"),
    ],
)
def test_what_is_clear_and_what_is_code_is_not_found(name: str, text: str) -> None:
    assert found(name, text) == []


def test_the_count_that_remains_is_of_the_rules_there_are() -> None:
    remaining = tomllib.loads(prose.REMAINING.read_text())
    assert remaining.keys() <= {rule.name for rule in RULES}


def test_what_the_tool_quotes_and_what_tests_feed_in_is_not_read() -> None:
    names = {str(name) for name in prose.files()}
    assert {"README.md", "Makefile", "agent/portward/model.py", "tests/unit/test_prose.py"} <= names
    assert not {name for name in names if name.startswith(("tests/prose/", "tests/inputs/config/", ".venv"))}
