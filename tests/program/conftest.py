"""The program as a process, driven by its command line."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from portward.lab.agent import Agent
from portward.lab.topology import CONTOSO, FABRIKAM, Lab

Portward = Callable[..., subprocess.CompletedProcess[str]]

_names = itertools.count()


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A gateway without an agent."""
    with Lab(f"pwp{os.getpid()}", (CONTOSO, FABRIKAM)) as found:
        yield found


@pytest.fixture
def agent(lab: Lab, tmp_path: Path) -> Iterator[Agent]:
    """An agent that is not started yet, in a lab whose kernel holds nothing of an earlier one. Its table has no
    owner, because some tests are the other program that changes it."""
    found = Agent(lab, tmp_path, ruleset={"owned": "never"})
    yield found
    found.stop()
    found.portward("rules", "remove", "--yes")


@pytest.fixture
def portward(tmp_path: Path) -> Portward:
    """Runs a verb with a configuration in the test's folder, in the machine's own namespace."""
    config = tmp_path / "portward.toml"
    settings: dict[str, Any] = {
        "segments": ["vni*"],
        "uplinks": ["up0"],
        "store": f"sqlite:{tmp_path / 'portward.db'}",
        "table": str(tmp_path / "table"),
    }
    config.write_bytes(msgspec.toml.encode(settings))

    def run(*arguments: str, text: str | None = None, configured: bool = True) -> subprocess.CompletedProcess[str]:
        more = ["--config", str(config)] if configured else []
        return subprocess.run(
            [sys.executable, "-m", "portward", *arguments, *more],
            input=text, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    return run


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr, and nothing on stdout."""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert result.stdout == ""
    return lines[0]
