"""`portward top` in a pipe, in a file, and in a narrow terminal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from portward.cli.program import app
from portward.ops import top_talkers
from portward.ops.top_talkers import Talker

LONG = "2001:db8:1002:ffff:ffff:ffff:ffff:fff4"
NAMED = "a customer with a name that is as long as names of customers can be"


class Kernel:
    """Returns rows like `TopTalkers`: the first reading has no rates."""

    def __init__(self, _: Any) -> None:
        self._readings = 0

    def read(self, _: float) -> list[Talker]:
        """Two sources, one packet a second more each time."""
        self._readings += 1
        rate = float(self._readings - 1)
        return [
            Talker("vni1002", LONG, "deny", rate, 70 + self._readings, NAMED),
            Talker("vni1001", "10.0.0.4", "allow", 0.0, 5, ""),
        ]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(top_talkers, "TopTalkers", Kernel)
    path = tmp_path / "portward.toml"
    path.write_text('segments = ["vni*"]\nuplinks = ["up0"]\n')
    return path


def top(config: Path, *more: str, **environment: str) -> Result:
    argv = ["top", "--interval", "0.2", "--config", str(config), *more]
    return CliRunner().invoke(app, argv, env=environment, catch_exceptions=False)


def test_a_pipe_gets_every_reading_whole_in_plain_lines(config: Path) -> None:
    result = top(config, "--count", "2", COLUMNS="40")
    head = f"segment  {'source':<{len(LONG)}}  verdict  packets/s  packets  subscription"
    other = f"vni1001  {'10.0.0.4':<{len(LONG)}}  allow          0.0        5"
    assert result.stdout.splitlines() == [
        head, f"vni1002  {LONG}  deny           1.0       72  {NAMED}", other,
        head, f"vni1002  {LONG}  deny           2.0       73  {NAMED}", other,
    ]  # fmt: skip


def test_a_customers_name_of_another_tool_makes_no_row(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Kernel, "read", lambda *_: [Talker("vni1", "10.0.0.4", "deny", 1.0, 2, "x\nvni2  y\x1b[2J")]
    )
    lines = top(config, "--count", "1").stdout.splitlines()
    assert len(lines) == 2
    assert lines[1].endswith(r"x\nvni2  y\x1b[2J")


def test_a_narrow_terminal_cuts_lines_off_at_its_edge(config: Path) -> None:
    result = top(config, "--count", "1", COLUMNS="60", LINES="25", FORCE_COLOR="1", TERM="xterm")
    assert f"vni1002  {LONG}  deny" in result.stdout
    assert NAMED not in result.stdout
    assert os.linesep + "vni1001  10.0.0.4 " in result.stdout.replace("\r", "")
