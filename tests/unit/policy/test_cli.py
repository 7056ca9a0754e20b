"""`portward policy list` and `show` print the presets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from portward.cli.policy import app
from portward.errors import InputError
from portward.policy import presets


def run(*arguments: str) -> str:
    """The output of a verb of `policy`, which must succeed."""
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_list_names_every_preset_and_the_default() -> None:
    lines = run("list").splitlines()
    assert [line.split()[0] for line in lines] == list(presets.bundled())
    assert [line.split()[0] for line in lines if "(default)" in line] == ["azure-2020"]


def test_list_in_json() -> None:
    found = {row["name"]: row for row in json.loads(run("list", "--json"))}
    assert tuple(found) == presets.bundled()
    assert found["hetzner"]["ports"] == [25, 465]
    assert found["azure-2023"]["source_date"] == "2023-12-20"


def test_show_prints_source_ports_prefixes_and_every_offer() -> None:
    text = run("show", "azure-2020")
    preset = presets.load("azure-2020")
    for part in (preset.title, preset.source, "2020-12-01", "10.0.0.0/8", "fc00::/7", preset.restart):
        assert part in text
    for offer in preset.offers:
        assert all(id_ in text for id_ in offer.ids)
    assert "created before 2017-11-15" in text


def test_show_in_json_has_what_the_file_says() -> None:
    found = json.loads(run("show", "oracle", "--json"))
    assert found["ports"] == [25]
    assert found["otherwise"]["created_before"] == "2021-06-24"
    assert "::1" in found["internal"]


def test_show_takes_a_path(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        'name = "own"\ntitle = "Ours"\nsource = "us"\nsource_date = 2026-02-03\nports = [26]\ninternal = []\n'
        '[otherwise]\ntitle = "All"\nexemption = "not-needed"\n'
    )
    text = run("show", str(path))
    assert "own: Ours" in text
    assert "26" in text
    assert "any offer" in text


def test_show_takes_the_preset_of_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "portward.toml"
    path.write_text('segments = ["vni*"]\nuplinks = ["up0"]\npreset = "hetzner"\n')
    assert run("show", "--config", str(path)) == run("show", "hetzner")
    assert run("show", "oracle", "--config", str(path)) == run("show", "oracle")
    assert run("list", "--config", str(path)) == run("list")


def test_an_unknown_name_is_an_error_for_the_program_to_print() -> None:
    with pytest.raises(InputError, match="did you mean 'oracle'"):
        run("show", "oracel")


@pytest.mark.parametrize(
    ("verb", "example"),
    [("list", "Example: portward policy list"), ("show", "Example: portward policy show azure-2020")],
)
def test_each_verb_shows_an_example(verb: str, example: str) -> None:
    assert example in run(verb, "--help")
