"""All mistakes of a file are reported at once, unless one hides another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from portward.config.load import load_config
from portward.errors import InputError
from portward.inventory.files import read_inventory

CONFIG = """\
segments = ["vni*"]
uplinks = ["up0"]
mode = "watch"
queues = 3
max_flip_share = 7
[queue]
workers = 0
first = "a"
[verdicts]
deny_seconds = 30
refuse_with = "nothing"
"""
INVENTORY = """\
subscriptions:
  - id: 11111111-0000-4000-8000-000000000001
    offer: pay-as-you-go
    created: 2022-06-30
    standing: goood
  - id: 11111111-0000-4000-8000-000000000002
    offer: pay-as-you-go
    created: 2022-06-31
  - id: 11111111-0000-4000-8000-000000000003
    offer: " pay-as-you-go"
    created: 2022-06-30
  - id: 11111111-0000-4000-8000-000000000004
    offer: pay-as-you-go
    created: 2022-06-30
  - id: 11111111-0000-4000-8000-000000000004
    offer: pay-as-you-go
    created: 2022-06-30
"""


def mistakes(path: Path) -> list[str]:
    """The places of the mistakes in a configuration."""
    with pytest.raises(InputError) as error:
        load_config(path)
    return [line.removeprefix(str(path)) for line in error.value.lines()]


def test_every_key_of_a_configuration_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "portward.toml"
    path.write_text(CONFIG)
    found = sorted(mistakes(path), key=lambda line: int(line.split(":")[1]))
    assert [line.split(":")[1:3] for line in found] == [
        ["3", " mode"], ["4", " queues"], ["5", " max_flip_share"], ["7", " queue.workers"], ["8", " queue.first"],
        ["11", " verdicts.refuse_with"],
    ]  # fmt: skip


def test_so_are_values_of_the_right_type_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "portward.toml"
    path.write_text('segments = ["vni*", "a b"]\nuplinks = ["vni7"]\nstore = "etcd:x"\n')
    assert [line.split(":")[1] for line in mistakes(path)] == ["1", "3"]


def test_a_key_that_is_missing_is_reported_with_the_others(tmp_path: Path) -> None:
    path = tmp_path / "portward.toml"
    path.write_text('mode = "watch"\nsegments = ["vni*"]\n')
    assert any("uplinks: is missing" in line for line in mistakes(path))


def test_no_mistake_is_made_up(tmp_path: Path) -> None:
    """A list with a mistake is skipped to find the next mistake, and must not be reported as missing."""
    path = tmp_path / "portward.toml"
    path.write_text('segments = [3]\nuplinks = ["up0"]\n')
    assert len(mistakes(path)) == 1


def test_every_record_of_an_inventory_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "inventory.yaml"
    path.write_text(INVENTORY)
    with pytest.raises(InputError) as error:
        read_inventory([str(path)])
    found = [line.removeprefix(str(path)) for line in error.value.lines()]
    assert [line.split(":")[1] for line in found] == ["5", "8", "10", "15"]
    assert "'goood' is not a valid value (good, past-due, disabled); did you mean 'good'?" in found[0]


def test_not_more_than_a_screen_of_them(tmp_path: Path) -> None:
    path = tmp_path / "inventory.yaml"
    path.write_text("subscriptions:\n" + "  - id: 3\n" * 100)
    with pytest.raises(InputError) as error:
        read_inventory([str(path)])
    assert len(error.value.lines()) == 20


def test_a_verb_prints_a_line_for_each(tmp_path: Path) -> None:
    path = tmp_path / "portward.toml"
    path.write_text(CONFIG)
    argv = [sys.executable, "-m", "portward", "check", "--config", str(path)]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 6
    assert all(line.startswith(f"portward: {path}:") for line in lines)
