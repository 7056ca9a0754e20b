"""The next daemon reports the crash of the one before."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from portward.base import locks
from portward.daemon.runtime import Runtime, hidden, read_status, running

CRASH = """
import ctypes, os, signal, sys
from pathlib import Path
from portward.daemon.runtime import Runtime
Runtime(Path(sys.argv[1]))
os.kill(os.getpid(), signal.Signals[sys.argv[2]])
"""


@pytest.mark.parametrize(
    ("signal", "said", "cut_off"),
    [
        ("SIGBUS", "Fatal Python error: Bus error", True),
        ("SIGSEGV", "Fatal Python error: Segmentation fault", False),
        ("SIGKILL", "", False),
    ],
)
def test_how_the_last_one_ended(tmp_path: Path, signal: str, said: str, cut_off: bool) -> None:
    result = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path), signal], check=False)
    assert result.returncode < 0
    program = (
        "import sys; from pathlib import Path; from portward.daemon.runtime import Runtime; "
        "r = Runtime(Path(sys.argv[1])); print(r.crashed, r.table_cut_off, sep='|'); r.close()"
    )
    for expected in (f"{said}|{cut_off}", "|False"):  # only the first start reports the crash
        told = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
        )
        assert told.stdout.strip() == expected


def test_a_folder_that_cannot_hold_the_file_does_not_keep_it_from_starting(tmp_path: Path) -> None:
    (tmp_path / "crash").mkdir()
    runtime = Runtime(tmp_path)
    assert not runtime.crashed
    runtime.close()


def test_a_start_that_is_refused_leaves_no_folder_behind(tmp_path: Path) -> None:
    """The folders above it that this start has made are removed too. Other folders stay."""
    Runtime(tmp_path / "typo" / "table").close()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "table").mkdir()
    Runtime(tmp_path / "table").close()
    assert (tmp_path / "table" / "daemon.lock").exists()


def test_a_lock_on_a_file_that_is_gone_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused start removes its folder while the next agent waits for the lock in that folder."""
    folder = tmp_path / "table"
    refused = Runtime(folder)
    taken = locks.try_lock

    def ends_first(descriptor: int, *, shared: bool = False) -> bool:
        monkeypatch.setattr(locks, "try_lock", taken)
        refused.close()
        return taken(descriptor, shared=shared)

    monkeypatch.setattr(locks, "try_lock", ends_first)
    runtime = Runtime(folder)
    assert running(folder) == os.getpid()
    runtime.close()


def test_the_folder_of_the_agent_after_it_stays(tmp_path: Path) -> None:
    """An operator has removed the folder of an agent, and another agent has made it again."""
    folder = tmp_path / "table"
    first = Runtime(folder)
    shutil.rmtree(folder)
    second = Runtime(folder)
    first.close()
    assert running(folder) == os.getpid()
    second.close()


def test_a_folder_that_cannot_be_reached_is_an_error_in_a_line() -> None:
    program = (
        "import os, sys; from pathlib import Path; from portward.errors import PortwardError; "
        "from portward.daemon.runtime import Runtime; os.setuid(65534)\n"
        "try: Runtime(Path(sys.argv[1]))\n"
        "except PortwardError as error: print(error)"
    )
    with tempfile.TemporaryDirectory() as folder:  # root's alone
        place = f"{folder}/table"
        told = subprocess.run([sys.executable, "-c", program, place], capture_output=True, text=True, check=False)
    assert told.stdout == f"table {place}: Permission denied\n", told.stderr


def test_a_folder_with_a_policy_stays(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path / "table")
    (tmp_path / "table" / "data.mdb").touch()
    runtime.close()
    assert (tmp_path / "table" / "data.mdb").exists()
    assert (tmp_path / "table" / "daemon.lock").exists()


def test_who_may_not_see_whether_a_daemon_runs_is_not_told_that_none_does() -> None:
    """`portward status` as another user, who may not read the agent's folder."""
    program = (
        "import os, sys; from pathlib import Path; from portward.daemon.runtime import hidden; "
        "os.setuid(65534); print(hidden(Path(sys.argv[1])))"
    )
    with tempfile.TemporaryDirectory() as folder:  # root's alone, in a folder that everybody may enter
        runtime = Runtime(Path(folder))
        assert not hidden(Path(folder))
        assert not hidden(Path(folder) / "nothing")
        told = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=False)
        runtime.close()
    assert told.stdout == "True\n", told.stderr


def test_what_a_killed_daemon_reported_is_not_taken_for_the_next_ones(tmp_path: Path) -> None:
    killed = (
        "import os, signal, sys; from pathlib import Path; from portward.daemon.runtime import Runtime; "
        "Runtime(Path(sys.argv[1])).write_status({'format': 1, 'pid': 7}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False)
    assert read_status(tmp_path) == {"format": 1, "pid": 7}
    runtime = Runtime(tmp_path)
    assert read_status(tmp_path) is None
    runtime.close()
