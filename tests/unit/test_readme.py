"""The program accepts the configurations in the documents. The reference shows the defaults, and the README's
configuration is enough to run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from portward.config.keys import Config, Metrics, Queue, Verdicts
from portward.config.load import load_config
from portward.model import Mode

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
CONFIGURATION = (ROOT / "docs/reference/configuration.md").read_text()


def block(document: str, language: str, holding: str) -> str:
    """The code block of a language that holds some text."""
    found: list[str] = [text for text in re.findall(rf"(?s)```{language}\n(.*?)```", document) if holding in text]
    assert len(found) == 1
    return found[0]


def test_the_configuration_shows_every_default(tmp_path: Path) -> None:
    path = tmp_path / "portward.toml"
    path.write_text(block(CONFIGURATION, "toml", "segments ="))
    assert load_config(path) == Config(segments=("vni*",), uplinks=("eth0",))


def test_the_configuration_names_every_key() -> None:
    text = block(CONFIGURATION, "toml", "segments =")
    for struct in (Config, Queue, Verdicts, Metrics):
        for name in struct.__struct_fields__:
            assert re.search(rf"(?m)^#?\[*{name}\b", text), f"{struct.__name__}.{name} is not on the page"


def test_the_configuration_of_the_readme_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "portward.toml"
    path.write_text(block(README, "toml", "segments ="))
    assert load_config(path) == Config(segments=("vni*",), uplinks=("eth0",), mode=Mode.OBSERVE)


@pytest.mark.parametrize("target", re.findall(r"`make ([a-z-]+)`", README))
def test_every_make_target_that_is_named_is_there(target: str) -> None:
    assert re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text())
