"""A TOML text becomes a typed value, or one line that names file, line and field."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from datetime import date
from enum import StrEnum
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from msgspec import Meta

from portward.base.resources import rules
from portward.config.toml import decode_toml, toml_line, toml_mistake
from portward.errors import InputError
from portward.model import Network


class Colour(StrEnum):
    """An enum of the document."""

    RED = "red"
    GREEN = "green"


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the document."""

    size: Annotated[int, Meta(ge=1, le=9)] = 1
    colour: Colour | None = None


class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A document."""

    name: str
    day: date | None = None
    nets: tuple[Network, ...] = ()
    main: Part = Part()
    parts: tuple[Part, ...] = ()
    by_name: dict[str, Part] = {}


def read(text: str) -> Document:
    """Reads a text as a document."""
    return decode_toml(text, "a.toml", Document)


def refusal(text: str) -> tuple[int | None, str | None, str]:
    """Line, field and problem of a text that is refused."""
    with pytest.raises(InputError) as caught:
        read(text)
    assert caught.value.file == "a.toml"
    assert "\n" not in str(caught.value)
    return caught.value.line, caught.value.field, caught.value.problem


def test_values_have_their_types() -> None:
    text = 'name = "x"\nday = 2026-02-03\nnets = ["10.0.0.0/8", "::1"]\n[[parts]]\ncolour = "red"\n'
    assert read(text) == Document(
        name="x",
        day=date(2026, 2, 3),
        nets=(ip_network("10.0.0.0/8"), ip_network("::1/128")),
        parts=(Part(colour=Colour.RED),),
    )


REFUSED = {
    'name = 3': (1, "name", "expected text in quotes, got 3"),
    'name = "x"\nday = 3': (2, "day", "expected a date like 2017-11-15, got 3"),
    'name = "x"\n\n[main]\nsize = 12': (4, "main.size", "expected a whole number of at most 9, got 12"),
    'name = "x"\n[main]\nsize = true': (3, "main.size", "expected a whole number, got true"),
    'name = "x"\nmain.size = 0': (2, "main.size", "expected a whole number of at least 1, got 0"),
    'name = "x"\nmain = { colour = "red",\tsize = "1" }': (2, "main.size", "expected a whole number, got '1'"),
    'name = "x"\nmain = 3': (2, "main", "expected a table, got 3"),
    'name = "x"\n[main]\ncolour = "grey"': (
        3, "main.colour", "'grey' is not a valid value (red, green); did you mean 'green'?",
    ),
    'name = "x"\n[[parts]]\n[[parts]]\n# so\ncolour = "blue"': (
        5, "parts[1].colour", "'blue' is not a valid value (red, green)",
    ),
    'name = "x"\nparts = [\n  {size = 2},\n  {size = 3, sise = 4},\n]': (
        4, "parts[1].sise", "unknown key; did you mean 'size'?",
    ),
    'name = "x"\n[by_name."a.b"]\nsizes = 2': (2, "by_name", "unknown key; did you mean 'size'?"),
    'nam = "x"': (1, "nam", "unknown key; did you mean 'name'?"),
    '# nothing': (None, "name", "is missing"),
    'name = "x"\nnets = [\n  "10.0.0.0/8",\n  "10.1.2.3/8",\n]': (
        4, "nets[1]",
        "'10.1.2.3/8' has bits beyond its prefix length: 10.0.0.0/8, or the address alone, would be right",
    ),
    'name = "x"\nnets = [10]': (2, "nets[0]", "expected an address or a prefix in quotes, got 10"),
    # A string whose content looks like tables and keys.
    'name = """\n[main]\nsize = 1\n"""\n[main]\nsize = "a"': (6, "main.size", "expected a whole number, got 'a'"),
    "name = '''\n[[parts]]'''''\n[[parts]]\nsize = 'a'": (4, "parts[0].size", "expected a whole number, got 'a'"),
    # Not TOML.
    'name = "x"\nday = 2026-02-30': (2, "day", "Invalid date or datetime"),
    'name = "x"\nname = "y"': (2, "name", "stands twice"),
    'name = "x"\n[main]\n[main]': (3, "main", "Cannot declare ('main',) twice"),
    'name = "x"\nday =': (2, "day", "no value stands here"),
    'name = "x"\n\nday': (3, None, "Expected '=' after a key in a key/value pair"),
    'name = "x': (1, "name", "the text that begins here has no end: a quote is missing"),
    'name = "x\nday = 1': (1, "name", "the text that begins here has no end: a quote is missing"),
    "# it's\nname = 'x\nday = 1": (2, "name", "the text that begins here has no end: a quote is missing"),
    'name = """x\nday = 1\n': (1, "name", "the text that begins here has no end: a quote is missing"),
    'nets = ["10.0.0.0/8"\n\n# so\nname = "x"\n': (
        1, "nets", "the list that begins here has no end: ']' is missing",
    ),
    '[main]\nnets = ["10.0.0.0/8",\nname = "x"\n': (
        2, "nets", "the list that begins here has no end: ']' is missing",
    ),
    'nets = ["a",\n[main]\nsize = 1\n': (1, "nets", "the list that begins here has no end: ']' is missing"),
    'nets = ["a"\n[main]\nsize = 1\n': (1, "nets", "the list that begins here has no end: ']' is missing"),
    'name = "x"\nnets = ["a"': (2, "nets", "the list that begins here has no end: ']' is missing"),
    'name = "x"\nnets = ["a",\n': (2, "nets", "the list that begins here has no end: ']' is missing"),
    'main = {size = 1\nname = "x"': (1, "main", "the table that begins here has no end: '}' is missing"),
    'nets = ["a" "b"]': (1, "nets", "a comma is missing between two values"),
    'nets = [\n  "a"\n  "b",\n]': (3, None, "a comma is missing between two values"),
    'name = enforce': (1, "name", """'enforce' is no value: text needs quotes, "enforce\""""),
    'name = "x"\nnets = [vni*, "b"]': (2, "nets", """'vni*' is no value: text needs quotes, "vni*\""""),
    'name = 127.0.0.1:9125 # here': (
        1, "name", "'127.0.0.1:9125' is neither a number nor a date like 2026-01-10; text needs quotes",
    ),
    'size = 60s': (1, "size", "'60s' is neither a number nor a date like 2026-01-10; text needs quotes"),
    'size = True': (1, "size", "'True' is no value: true or false, in small letters"),
    'size = yes': (1, "size", "'yes' is no value: true or false, in small letters"),
    'nets = ["a"\r\n[main]\r\nsize = 1\r\n': (
        1, "nets", "the list that begins here has no end: ']' is missing",
    ),
    '[main\nsize = 1': (1, None, "Expected ']' at the end of a table declaration"),
    'name = "x" "y"': (1, "name", "Expected newline or end of document after a statement"),
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text: str) -> None:
    line, field, problem = refusal(text)
    want_line, want_field, want_problem = REFUSED[text]
    assert (line, problem) == (want_line, want_problem)
    if want_field == "by_name":
        assert field is not None
        assert field.startswith("by_name")
    else:
        assert field == want_field


def test_a_mistake_that_its_type_does_not_show_has_a_line_too() -> None:
    error = toml_mistake('name = "x"\n\nnets = [\n  "::1",\n]\n', "a.toml", "no loopback", "nets", 0)
    assert str(error) == "a.toml:4: nets[0]: no loopback"


def leaves(value: Any, steps: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every value of a document with the steps to it."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, item in items:
        yield from leaves(item, (*steps, step))
    if not items:
        yield steps, value


@pytest.mark.parametrize("path", sorted(rules("policy").glob("*.toml")), ids=lambda path: str(path.stem))
def test_each_value_of_a_real_document_is_on_the_reported_line(path: Path) -> None:
    text = path.read_text()
    lines = text.splitlines()
    found = list(leaves(tomllib.loads(text)))
    assert found
    for steps, value in found:
        line = toml_line(text, steps)
        assert line is not None
        assert str(value).lower() in lines[line - 1].lower()  # TOML writes true, Python True


KEYS = st.sampled_from(["a", "b", "c-1", '"a"', "'b'", '"\\u0061"', "a.b", 'c . "d e"', "1"])
SCALARS = st.sampled_from(
    ["1", "-2.5e3", "true", "inf", "2026-01-01", "2026-01-01 10:00:00Z", '"x # y"', "'[a]'", '"\\""', "''", '""',
     '"""\n[a]\nb = 1\n"""', "'''\n]}\n'''", '"""a""""', "'''b'''''", '"""\\\n x"""'],
)  # fmt: skip
BLANKS = st.sampled_from(["", " ", "\t"])
GAPS = st.sampled_from(["", " ", "\n", " # ]\n", "\r\n"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(st.tuples(GAPS, inner, GAPS).map("".join), max_size=3).map(lambda of: f"[{','.join(of)}]"),
        st.lists(st.tuples(BLANKS, KEYS, st.just(" = "), inner, BLANKS).map("".join), max_size=2).map(
            lambda of: f"{{{','.join(of)}}}"
        ),
    ),
    max_leaves=6,
)
LINES = st.one_of(
    st.tuples(BLANKS, KEYS, BLANKS, st.just("="), BLANKS, VALUES, BLANKS).map("".join),
    KEYS.map(lambda key: f"[{key}]"),
    KEYS.map(lambda key: f" [[ {key} ]] # so"),
    st.sampled_from(["", "# [a]", "\r"]),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.lists(LINES, max_size=6).map("\n".join))
def test_every_value_of_a_valid_document_has_a_line(text: str) -> None:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        reject()
    for steps, _ in leaves(document):
        if steps:
            assert toml_line(text, steps) is not None
            assert toml_line(text, steps) == toml_line(text, (*steps, "beyond"))


SUB_TABLES = """\
a."b c".d = 1
[[x]]
[x.y]
k = 2
[[x.z]]
k = 3
[[x.z]]
k = 4
[[x]]
"k" = 5
[ x . y ]   # spaced
'k' = 6
t = 2026-01-01 10:00:00  # a space within
[[x.z]]
k = [ [1,
 2], "]", '''
]''', { q = 7 } ]
"""


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        (("a", "b c", "d"), 1), (("x", 0, "y", "k"), 4), (("x", 0, "z", 0, "k"), 6), (("x", 0, "z", 1, "k"), 8),
        (("x", 1, "k"), 10), (("x", 1, "y"), 11), (("x", 1, "y", "k"), 12), (("x", 1, "y", "t"), 13),
        (("x", 1, "z", 0, "k", 0, 1), 16), (("x", 1, "z", 0, "k", 2), 16), (("x", 1, "z", 0, "k", 3, "q"), 17),
        (("x", 1, "z", 0, "not here"), 14), (("x", 7), 2), (("nowhere",), None), ((), None),
    ],
)  # fmt: skip
def test_lines_of_sub_tables_and_nested_values(steps: tuple[str | int, ...], line: int | None) -> None:
    tomllib.loads(SUB_TABLES)  # it is TOML
    assert toml_line(SUB_TABLES, steps) == line
