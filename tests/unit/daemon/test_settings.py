"""Verbs use what the running agent has in force, even if portward.toml has a mistake now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from portward.config.keys import Config
from portward.config.load import load_config
from portward.daemon.runtime import Runtime
from portward.daemon.settings import Settings, forget, last, leave, settings
from portward.errors import InputError
from portward.policy import presets


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
    """A running agent with that configuration. Yields the configuration that it has in force."""
    monkeypatch.setattr("portward.daemon.runtime.faulthandler.enable", lambda _: None)
    config = load_config(path)
    runtime = Runtime(config.table)
    leave(path, config, presets.load(config.preset))
    yield config
    runtime.close()


def test_without_an_agent_the_file_counts(path: Path) -> None:
    assert settings(path) == Settings(load_config(path), presets.load("aws"))


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
    """The table's path is unknown then, too, so the verb looks at the default path."""
    path.unlink()
    with pytest.raises(InputError):
        settings(path)
    monkeypatch.setattr("portward.config.keys.DEFAULT_TABLE", agent.table)
    found = settings(path)
    assert found.config == agent
    assert "No such file" in found.remarks[0]


def test_what_was_changed_and_not_taken_in_is_said(path: Path, agent: Config) -> None:
    write(path, preset="google", queue={"workers": 4})
    found = settings(path)
    assert (found.config, found.preset.name) == (agent, "aws")
    assert found.remarks[0].startswith(f"{path}: not what the agent has in force (preset, queue): ")


@pytest.mark.parametrize(
    ("more", "keys", "how"),
    [
        ({"queue": {"workers": 4}}, "queue", "takes it in"),
        ({"queue": {"workers": 4}, "mode": "observe"}, "mode, queue", "takes all of it in"),
    ],
)
def test_what_takes_a_restart_is_not_said_to_be_taken_in_by_a_reload(
    path: Path, agent: Config, more: dict[str, Any], keys: str, how: str
) -> None:
    write(path, preset="aws", **more)
    assert settings(path).remarks == (
        f"{path}: not what the agent has in force ({keys}): `systemctl restart portward` {how}; a reload is "
        "refused, because queue cannot change while it runs",
    )


def test_what_a_reload_takes_in_is_said_to_need_one(path: Path, agent: Config) -> None:
    write(path, preset="aws", queue={"workers": 2}, mode="observe")
    assert settings(path).remarks == (
        f"{path}: not what the agent has in force (mode): `systemctl reload portward` takes it in, or the log "
        "says why not",
    )


def test_a_file_that_was_edited_since_an_agent_ran_counts_and_that_is_said(path: Path) -> None:
    """The kernel has the ruleset of the last agent, and workers may have its queues."""
    before = load_config(path)
    before.table.mkdir()
    leave(path, before, presets.load("aws"))
    assert settings(path).remarks == ()
    write(path, preset="aws", mode="observe", queue={"workers": 4})
    config, _, remarks = settings(path)
    assert config == load_config(path)
    assert remarks == (
        f"{path}: not what the agent had in force that ran here last (mode, queue): it counts from the next start "
        "on, and until then what is loaded in the kernel",
    )
    assert last(config).queue == before.queue
    forget(before.table)
    assert last(config) == config


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
    assert settings(path) == Settings(load_config(path), presets.load("google"))
