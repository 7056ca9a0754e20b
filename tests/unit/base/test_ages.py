"""Ages and durations come from the monotonic clock, so a jump of the wall clock does not change them."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from portward.base import clock
from portward.base.heartbeat import Heartbeat
from portward.cli.status_text import lines as status_lines
from portward.daemon.metrics import MetricsCollector
from portward.daemon.runtime import age_of, read_status
from portward.daemon.steps import StepRunner
from portward.dataplane.selfcheck import DifferenceKind, SelfCheck

AGENT = Path(clock.__file__).parents[1]
NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
OLD = Path(__file__).parents[1] / "golden" / "status-1.json"


class Host:
    """A wall clock that can be set, and a monotonic one that cannot."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.seconds = NOON, 5_000.0
        monkeypatch.setattr(clock, "utc_now", lambda: self.wall)
        monkeypatch.setattr(clock, "monotonic", lambda: self.seconds)

    def passes(self, seconds: float) -> None:
        self.wall += timedelta(seconds=seconds)
        self.seconds += seconds


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def status(folder: Path, **more: Any) -> dict[str, Any]:
    """A status as read from its file: the sample of an older agent, with the keys that this one adds."""
    written = msgspec.json.decode(OLD.read_bytes())
    written |= {"at": clock.utc_now(), "clock": clock.Stamp.now(), **more}
    (folder / "status.json").write_bytes(msgspec.json.encode(written))
    found = read_status(folder)
    assert found is not None
    return found


def test_only_the_clock_reads_the_wall_clock() -> None:
    """All other code gets the time from `clock`, so that each use is deliberate, and a test can set the time."""
    found = []
    for path in AGENT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and re.fullmatch(
                r"(time\.time(_ns)?|(datetime\.)?datetime\.(now|utcnow|today)|date\.today|time\.(gm|local)time)",
                ast.unparse(node.func),
            ):
                found.append(f"{path.name}: {ast.unparse(node)}")
    assert found == ["clock.py: datetime.now(UTC)"]


@pytest.mark.parametrize("jump", [timedelta(hours=1), timedelta(hours=-1), timedelta(days=-400)])
def test_a_wall_clock_that_jumps_makes_no_age(tmp_path: Path, host: Host, jump: timedelta) -> None:
    check = {"at": NOON, "age": 2.0, "divergences": {}, "last_difference": ""}
    found = status(tmp_path, uptime=70.0, self_check=check)
    host.passes(3)
    host.wall += jump
    assert age_of(found) == 3.0
    lines = status_lines(found, age_of(found))
    assert any(", up 1 min 10 s, " in line for line in lines)
    assert "check     every worker answered 5 s ago, no difference found" in lines
    assert not any("s old" in line for line in lines)


@pytest.mark.parametrize("jump", [timedelta(hours=1), timedelta(hours=-1)])
def test_a_silent_agent_is_recognised_by_the_true_age_of_its_status(
    tmp_path: Path, host: Host, jump: timedelta
) -> None:
    found = status(tmp_path)
    host.passes(8)
    host.wall += jump
    assert "this is 8 s old: the agent does not report" in status_lines(found, age_of(found))


def test_a_status_of_an_earlier_boot_is_as_old_as_this_boot_at_least(tmp_path: Path, host: Host) -> None:
    found = status(tmp_path, clock={"boot": "another", "seconds": 1e9})
    assert age_of(found) == host.seconds


def test_an_older_agents_time_in_the_future_is_no_negative_age(host: Host) -> None:
    found = msgspec.json.decode(OLD.read_bytes())
    assert "clock" not in found
    host.wall = datetime.fromisoformat(found["at"]) - timedelta(hours=1)
    assert age_of(found) == 0.0
    assert "s old" not in "\n".join(status_lines(found, age_of(found)))


def test_a_time_that_is_shown_follows_the_wall_clock_as_it_is_set_now(host: Host) -> None:
    """If a clock is an hour ahead when a difference is found, its time is corrected once the clock is."""
    found = SelfCheck()
    host.wall += timedelta(hours=1)
    found.differs(DifferenceKind.WORKER, "the worker does not answer")
    host.passes(10)
    host.wall -= timedelta(hours=1)
    assert found.last_difference == "2026-06-01T12:00:00Z worker: the worker does not answer"


def test_the_real_stamp_is_of_this_boot_and_grows() -> None:
    stamp = clock.Stamp.now()
    first, second = stamp.age(), stamp.age()
    assert first is not None
    assert second is not None
    assert 0 <= first <= second
    assert msgspec.convert(msgspec.to_builtins(stamp), clock.Stamp) == stamp


# The unit runs the agent like this: in /proc it sees only processes.
HARDENED = "mount -t proc -o hidepid=invisible,subset=pid proc /proc && exec "
STAMP = "from portward.base.clock import Stamp; made = Stamp.now(); print(made.boot == '', made.age() < 60)"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_an_agent_that_may_not_read_the_boots_id_makes_stamps_all_the_same() -> None:
    """Without stamps the agent could never write its status."""
    asked = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{HARDENED} "$@"', "sh", sys.executable, "-c", STAMP],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (asked.stdout, asked.stderr) == ("True True\n", "")


def test_a_stamp_without_a_boot_is_of_this_one(host: Host) -> None:
    assert clock.Stamp("", 4_990.0).age() == 10.0


def test_ages_in_the_metrics_go_on_while_the_thread_that_makes_the_numbers_is_stuck(host: Host) -> None:
    """Otherwise the ages would stop growing exactly when an operator looks at them."""
    core = SimpleNamespace(
        dataplane=SimpleNamespace(enforced=7),
        intake=SimpleNamespace(store_read=host.seconds - 1),
        selfcheck=SimpleNamespace(answered=host.seconds - 2),
    )
    collector = MetricsCollector(cast(Any, core), (), cast(Any, None), StepRunner(), Heartbeat())
    reading, _ = collector._newest
    collector._newest = replace(reading, counted_at=host.seconds - 3), {"attachments": 5}
    host.passes(50)
    found = collector.newest()
    ages = found["store_age_seconds"], found["self_check_age_seconds"], found["counters_age_seconds"]
    assert ages == (51.0, 52.0, 53.0)
    assert (found["enforced_revision"], found["attachments"]) == (7, 5)
