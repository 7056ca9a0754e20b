"""Verbs go by what the running agent has in force, also if portward.toml has a mistake by now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from portward import config as configuration
from portward.config import Config
from portward.errors import InputError
from portward.policy import preset as presets
from portward.runtime import Runtime
from portward.settings import Settings, forget, leave, settings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A configuration."""
    found = tmp_path / "portward.toml"
    write(found, preset="aws", queue={"workers": 2})
    return found


def write(path: Path, **more: Any) -> None:
    """Writes the configuration, with more keys."""
    base = {"segments": ["vni*"], "uplinks": ["up0"], "table": str(path.parent / "table")}
    path.write_bytes(msgspec.toml.encode({**base, **more}))


@pytest.fixture
def agent(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """An agent that runs with it; gives what it has in force."""
    monkeypatch.setattr("portward.runtime.faulthandler.enable", lambda _: None)
    config = configuration.load(path)
    runtime = Runtime(config.table)
    leave(path, config, presets.load(config.preset))
    yield config
    runtime.close()


def test_without_an_agent_the_file_counts(path: Path) -> None:
    assert settings(path) == Settings(configuration.load(path), presets.load("aws"))


def test_the_file_of_a_running_agent_that_says_the_same_needs_no_remark(path: Path, agent: Config) -> None:
    found = settings(path)
    assert found == Settings(agent, presets.load("aws"))
    assert found.preset.digest == presets.load("aws").digest


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ('mode = "watch"\n', "portward.toml:1: mode: 'watch' is not a valid value (enforce, observe)"),
        ("segments = [\n", "portward.toml:"),
        ('preset = "nonsense"\n', "no preset is called 'nonsense'"),
    ],
)
def test_a_mistake_in_the_file_is_said_and_what_is_in_force_counts(
    path: Path, agent: Config, wrong: str, told: str
) -> None:
    kept = "".join(line for line in path.read_text().splitlines(True) if not line.startswith("preset"))
    path.write_text(wrong + kept)
    found = settings(path)
    assert (found.config, found.preset.name) == (agent, "aws")
    (remark,) = found.remarks
    assert told in remark
    assert remark.endswith("the agent runs with the configuration that it read before")


def test_all_mistakes_of_the_file_are_said(path: Path, agent: Config) -> None:
    path.write_text('mode = "watch"\nsegmets = 3\n' + path.read_text())
    first, second = settings(path).remarks
    assert first.startswith(f"{path}:1: mode: 'watch' is not a valid value")
    assert second == (
        f"{path}:2: segmets: unknown key; did you mean 'segments'?: the agent runs with the configuration that it "
        "read before"
    )


def test_a_file_that_is_gone_is_a_mistake_too(path: Path, agent: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then its table cannot be named either: it is looked for where it is by default."""
    path.unlink()
    with pytest.raises(InputError):
        settings(path)
    monkeypatch.setattr("portward.config.DEFAULT_TABLE", agent.table)
    found = settings(path)
    assert found.config == agent
    assert "No such file" in found.remarks[0]


def test_what_was_changed_and_not_taken_in_is_said(path: Path, agent: Config) -> None:
    write(path, preset="google", queue={"workers": 4})
    found = settings(path)
    assert (found.config, found.preset.name) == (agent, "aws")
    assert found.remarks[0].startswith(f"{path}: not what the agent has in force (preset, queue): ")


def test_a_mistake_without_an_agent_is_an_error(path: Path) -> None:
    path.write_text('mode = "watch"\n' + path.read_text())
    with pytest.raises(InputError, match=r"portward.toml:1: mode"):
        settings(path)


@pytest.mark.parametrize("text", ["", "7", "{}", '{"format": 2}', '{"format": 1, "path": 3}'])
def test_what_cannot_be_read_does_not_count(path: Path, agent: Config, text: str) -> None:
    (agent.table / "in-force.json").write_text(text)
    assert settings(path).remarks == ()
    path.write_text('mode = "watch"\n' + path.read_text())
    with pytest.raises(InputError):
        settings(path)


def test_the_agent_of_another_configuration_does_not_count(path: Path, agent: Config) -> None:
    other = path.with_name("other.toml")
    other.write_text('mode = "watch"\n' + path.read_text())
    with pytest.raises(InputError):
        settings(other)


def test_what_an_agent_before_left_does_not_count_while_another_starts(path: Path, agent: Config) -> None:
    write(path, preset="google")
    assert settings(path).preset.name == "aws"
    forget(agent.table)
    assert settings(path) == Settings(configuration.load(path), presets.load("google"))
