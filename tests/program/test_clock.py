"""If the real agent's wall clock is an hour ahead, and then an hour back, it prints no wrong age and no wrong
sentence."""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from portward.lab.agent import Agent, until
from portward.lab.demo import records
from portward.lab.topology import CONTOSO

# The daemon's program in this test: its wall clock is wrong by the seconds in a file. The verbs have the right
# time.
STARTER = """\
import datetime, sys
from pathlib import Path

file = Path(sys.argv[1])

class Wrong(datetime.datetime):
    @classmethod
    def now(cls, zone=None):
        return datetime.datetime.now(zone) + datetime.timedelta(seconds=float(file.read_text()))

from portward.base import clock
clock.datetime = Wrong
sys.argv = ["portward", *sys.argv[sys.argv.index("run"):]]
from portward.cli import main
main()
"""


def shift(file: Path, seconds: int) -> None:
    """Sets the clock. Replaces the file by renaming, because the agent may read it at any time."""
    new = file.with_suffix(".new")
    new.write_text(str(seconds))
    new.replace(file)


@pytest.mark.parametrize("first", [3600, -3600])
def test_a_clock_an_hour_ahead_and_back_makes_no_wrong_age(agent: Agent, tmp_path: Path, first: int) -> None:
    agent.apply(*records())
    file, starter = tmp_path / "shift", tmp_path / "starter.py"
    shift(file, first)
    starter.write_text(STARTER)
    agent.start(within=[sys.executable, os.fspath(starter), os.fspath(file)])
    for seconds in (first, 0, -first, 0):
        shift(file, seconds)
        until(lambda seconds=seconds: abs(off(agent) - seconds) < 600, "the status is of the new time")  # type: ignore[misc]
        until(lambda: agent.metrics()["portward_self_check_age_seconds"] < 600, "the workers answer")
        assert 0 <= agent.metrics()["portward_store_age_seconds"] < 600  # once: it must hold at any moment
        text = agent.portward("status").stdout
        found = re.search(r", up ([^,]*), mode", text)
        assert found is not None
        for words in (found[1], *re.findall(r"answered (.*) ago", text)):
            assert re.fullmatch(r"(\d min )?\d+ s", words), text
        assert "does not report" not in text
        explained = agent.portward("explain", CONTOSO.segment, CONTOSO.address4)
        assert explained.returncode == 0
        assert "does not report" not in explained.stdout


def off(agent: Agent) -> float:
    """By how many seconds the agent's wall clock is wrong."""
    printed = json.loads(agent.portward("status", "--json").stdout)

    return (datetime.fromisoformat(printed["at"]) - datetime.now(UTC)).total_seconds()
