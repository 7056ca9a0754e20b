"""What the README shows is taken by the program: its configuration is the defaults, its inventory is accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from portward.config.keys import Config, Metrics, Queue, Verdicts
from portward.config.load import load_config
from portward.inventory.difference import check_offers, check_references
from portward.inventory.records import read_inventory
from portward.policy import presets

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def block(language: str, holding: str) -> str:
    """The code block of a language that holds some text."""
    found: list[str] = [text for text in re.findall(rf"(?s)```{language}\n(.*?)```", README) if holding in text]
    assert len(found) == 1
    return found[0]


def test_the_configuration_shows_every_default(tmp_path: Path) -> None:
    path = tmp_path / "portward.toml"
    path.write_text(block("toml", "segments ="))
    assert load_config(path) == Config(segments=("vni*",), uplinks=("eth0",))


def test_the_configuration_names_every_key() -> None:
    text = block("toml", "segments =")
    for struct in (Config, Queue, Verdicts, Metrics):
        for name in struct.__struct_fields__:
            assert re.search(rf"(?m)^\[?{name}\b", text), f"{struct.__name__}.{name} is not in the README"


def test_the_inventory_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "inventory.yaml"
    path.write_text(block("yaml", "attachments:"))
    inventory = read_inventory([str(path)])
    check_offers(inventory, presets.load(presets.DEFAULT))
    check_references({}, inventory, prune=False)
    assert len(inventory.records) == 3


@pytest.mark.parametrize("target", re.findall(r"`make ([a-z-]+)`", README))
def test_every_make_target_that_is_named_is_there(target: str) -> None:
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text()
    assert re.search(rf"(?m)^{target}:", makefile)
