"""A mistake in an operator's own preset is reported with file, line, field and a right value."""

from __future__ import annotations

from pathlib import Path

import pytest

from portward.errors import InputError
from portward.policy import presets

OWN = """\
name = "own"
title = "Our own policy"
source = "Decision of the board"
source_date = 2026-02-03
ports = [
  25,
  587,
]
internal = ["10.0.0.0/8", "fd00::/8"]

[[offers]]
ids = ["gold", "silver"]
title = "Gold and Silver"
exemption = "not-needed"

[[offers]]
ids = ["bronze"]
title = "Bronze"
exemption = "review"
created_before = 2020-01-01
"""


def write(tmp_path: Path, text: str) -> str:
    """Writes the text to a file, and returns its path as an operator would give it."""
    path = tmp_path / "own.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_an_own_preset_is_read_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write(tmp_path, OWN)
    assert presets.load(name).name == "own"
    monkeypatch.chdir(tmp_path)
    assert presets.load("own.toml") == presets.load("./own.toml") == presets.load(name)


REFUSED = {
    "unknown key": ("title = \"Our", "titel = \"Our", 2, "titel", "unknown key; did you mean 'title'?"),
    "unknown key of an offer": (
        'title = "Bronze"', 'title = "Bronze"\nwho = 1', 19, "offers[1].who",
        "unknown key; known here: ids, title, exemption, created_before, requires",
    ),
    "unknown table": (
        '[[offers]]\nids = ["bronze"]', '[[offer]]\nids = ["bronze"]', 16, "offer", "did you mean 'offers'?",
    ),
    "missing key": ("source_date = 2026-02-03\n", "", None, "source_date", "is missing"),
    "an offer without a path": ('exemption = "review"\n', "", 16, "offers[1].exemption", "is missing"),
    "an offer without ids": ('ids = ["bronze"]\n', "", 16, "offers[1].ids", "at least one id"),
    "unknown path": ('"review"', '"reviews"', 19, "offers[1].exemption", "did you mean 'review'?"),
    "unknown path, none near": (
        '"review"', '"maybe"', 19, "offers[1].exemption",
        "'maybe' is not a valid value (not-needed, self-service, review, never)",
    ),
    "offer twice": (
        '["bronze"]', '["bronze", "gold"]', 17, "offers[1].ids", "offer 'gold' stands in offers[0] too",
    ),
    "offer twice in one entry": ('["bronze"]', '["bronze", "bronze"]', 17, "offers[1].ids", "stands twice here"),
    "a date of words": (
        "2020-01-01", '"long ago"', 20, "offers[1].created_before", "expected a date like 2017-11-15",
    ),
    "a date of digits": (
        "2020-01-01", "2020", 20, "offers[1].created_before", "expected a date like 2017-11-15, got 2020",
    ),
    "no such day": ("2020-01-01", "2020-02-30", 20, "created_before", "Invalid date"),
    "an instant for a date": (
        "2020-01-01", "2020-01-01T00:00:00Z", 20, "offers[1].created_before", "expected a date like 2017-11-15",
    ),
    "a date that says nothing": (
        '"not-needed"', '"not-needed"\ncreated_before = 2020-01-01', 15, "offers[0].created_before",
        "takes no date",
    ),
    "port too high": ("587", "70000", 7, "ports[1]", "at most 65535, got 70000"),
    "port zero": ("587", "0", 7, "ports[1]", "at least 1, got 0"),
    "port in quotes": ("587", '"587"', 7, "ports[1]", "expected a whole number, got '587'"),
    "no ports": ("[\n  25,\n  587,\n]", "[]", 5, "ports", "at least 1 entry, got []"),
    "more ports than mail could have": (
        "587", ", ".join(map(str, range(100, 115))), 5, "ports", "at most 15 entries",
    ),
    "bits beyond the prefix": ("10.0.0.0/8", "10.0.0.5/8", 9, "internal[0]", "10.0.0.0/8"),
    "prefix too long": ("fd00::/8", "fd00::/129", 9, "internal[1]", "no IPv4 or IPv6 address or prefix"),
    "no prefix at all": ('"fd00::/8"', "8", 9, "internal[1]", "in quotes, got 8"),
    "the whole Internet": ("fd00::/8", "::/0", 9, "internal[1]", "the whole Internet"),
    "a key twice": ('title = "Bronze"', 'title = "Bronze"\ntitle = "Copper"', 19, "title", "stands twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    right, wrong, line, field, problem = REFUSED[case]
    assert OWN.count(right) == 1, "the case changes one place"
    name = write(tmp_path, OWN.replace(right, wrong))
    with pytest.raises(InputError) as caught:
        presets.load(name)
    assert (caught.value.file, caught.value.line, caught.value.field) == (name, line, field)
    assert problem in caught.value.problem
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{name}:{line}: {field}: " if line else f"{name}: {field}: ")


def test_otherwise_takes_no_ids(tmp_path: Path) -> None:
    name = write(tmp_path, OWN + '\n[otherwise]\ntitle = "Others"\nids = ["x"]\nexemption = "never"\n')
    with pytest.raises(InputError, match="takes no ids") as caught:
        presets.load(name)
    assert (caught.value.line, caught.value.field) == (24, "otherwise.ids")


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(InputError, match=r"no preset is called 'hetzer'; did you mean 'hetzner'\?"):
        presets.load("hetzer")


def test_a_name_like_no_other_gets_the_list_of_all() -> None:
    with pytest.raises(InputError) as caught:
        presets.load("xyz")
    assert all(name in str(caught.value) for name in presets.bundled())


def test_a_path_without_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file") as caught:
        presets.load(str(tmp_path / "gone.toml"))
    assert caught.value.file == str(tmp_path / "gone.toml")
