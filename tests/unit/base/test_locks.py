"""The kernel names the holder of a lock, also to an agent that sees only a part of /proc."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from portward.base import locks

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "r+")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""
# The unit starts the agent like this: in /proc it sees only processes, and only those of its own user.
HARDENED = (
    "mount -t proc -o hidepid=invisible,subset=pid proc /proc && exec setpriv --reuid 65534 --regid 65534 "
    "--clear-groups --inh-caps=-all,+net_admin,+net_raw --ambient-caps=-all,+net_admin,+net_raw "
    "--bounding-set=-all,+net_admin,+net_raw --no-new-privs "
)
ASK = """
import os, sys
from portward.base import locks
descriptor = os.open(sys.argv[1], os.O_RDONLY)
print(locks.try_lock(descriptor), locks.holder(descriptor), locks.signal_holder(descriptor, 15))
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """An open file without a lock."""
    (tmp_path / "lock").touch()
    descriptor = os.open(tmp_path / "lock", os.O_RDWR)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def other(tmp_path: Path, file: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("text", ["", "no number", "-5", "0", "99999999999999999999", "1"])
def test_it_is_found_whatever_the_file_says(file: int, other: subprocess.Popen[bytes], text: str) -> None:
    os.pwrite(file, f"{text}\n".encode(), 0)
    assert not locks.try_lock(file)
    assert locks.holder(file) == other.pid
    assert locks.signal_holder(file, signal.SIGTERM)
    assert other.wait(60) == -signal.SIGTERM
    assert locks.try_lock(file)


def test_a_free_lock_has_no_holder(file: int, tmp_path: Path) -> None:
    """This also holds if this process, or another one, has the file open."""
    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    with (tmp_path / "lock").open("rb"):
        assert locks.holder(file) is None
        assert not locks.signal_holder(file, signal.SIGKILL)


def test_no_process_sends_a_signal_to_itself(file: int, tmp_path: Path) -> None:
    with (tmp_path / "lock").open("rb") as another:
        fcntl.flock(another, fcntl.LOCK_EX)
        assert locks.holder(file) == os.getpid()
        assert not locks.signal_holder(file, signal.SIGKILL)


def test_readers_do_not_keep_each_other_out(file: int, tmp_path: Path) -> None:
    with (tmp_path / "lock").open("rb") as another:
        assert locks.try_lock(another.fileno(), shared=True)
        assert locks.try_lock(file, shared=True)
        assert not locks.try_lock(file)


@pytest.mark.kernel
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts, and becomes another user")
def test_it_is_found_under_the_hardening_of_the_unit(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    os.chown(lock, 65534, 65534)
    folders = [*reversed(tmp_path.parents)][1:]  # pytest's own are closed to other users
    modes = {folder: folder.stat().st_mode for folder in [*folders, tmp_path]}
    environment = {**os.environ, "PYTHONPATH": os.fspath(Path(locks.__file__).parents[2])}
    script = f"""
{HARDENED} "$0" -c "$HOLD" "$1" > "$2" & first=$!
while ! [ -s "$2" ]; do kill -0 $first || exit 1; done
({HARDENED} "$0" -c "$ASK" "$1")
wait $first; echo "$? $first"
"""
    try:
        for folder, mode in modes.items():
            folder.chmod(mode | 0o011)
        ran = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", script, sys.executable,
             os.fspath(lock), os.fspath(tmp_path / "said")],
            env={**environment, "HOLD": HOLD, "ASK": ASK},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    finally:
        for folder, mode in modes.items():
            folder.chmod(mode)
    code, pid = ran.stdout.splitlines()[1].split()
    assert ran.stdout.splitlines()[0] == f"False {pid} True", ran.stderr
    assert int(code) == 128 + signal.SIGTERM
