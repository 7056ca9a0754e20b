"""A new worker takes over a queue. The process that holds the queue's lock is asked to leave, or ended."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from portward.base import locks
from portward.lab.agent import until
from portward.worker import handover
from portward.worker.handover import GracePeriod, bound, take_over_queue

HOLD = """
import signal, sys, time
from pathlib import Path
from portward.worker.handover import take_over_queue
if sys.argv[2] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
take_over_queue(Path(sys.argv[1]), 3)
print("held", flush=True)
time.sleep(60)
"""

Hold = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Starts a worker that holds queue 3, and leaves when it is asked to, or does not."""
    processes = []

    def start(kind: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), kind], stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_queue_that_is_free_is_claimed_and_says_by_whom(tmp_path: Path) -> None:
    descriptor = take_over_queue(tmp_path, 3)
    assert descriptor >= 0
    assert int((tmp_path / "worker-3").read_text()) == os.getpid()
    os.close(descriptor)


@pytest.mark.parametrize(("kind", "ended_by"), [("polite", signal.SIGTERM), ("stubborn", signal.SIGKILL)])
def test_the_holder_is_asked_to_leave_and_then_ended(
    tmp_path: Path, hold: Hold, kind: str, ended_by: signal.Signals
) -> None:
    holder = hold(kind)
    descriptor = take_over_queue(tmp_path, 3)
    assert holder.wait(60) == -ended_by
    assert locks.holder(descriptor) == os.getpid()
    assert int((tmp_path / "worker-3").read_text()) == os.getpid()
    os.close(descriptor)


def test_a_holder_of_another_queue_is_left_alone(tmp_path: Path, hold: Hold) -> None:
    holder = hold("polite")
    os.close(take_over_queue(tmp_path, 4))
    assert holder.poll() is None


def test_a_number_left_in_an_unlocked_file_is_ignored(tmp_path: Path) -> None:
    """Without a lock, the number may belong to another program by now, which must not get a signal."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / "worker-3").write_text(f"{other.pid:<10}\n")
        os.close(take_over_queue(tmp_path, 3))
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_number_of_another_process_is_not_taken_for_the_holders(tmp_path: Path, hold: Hold) -> None:
    """This holds while the lock is held, too. An agent that could not take it may have written to the file."""
    holder = hold("polite")
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / "worker-3").write_text(f"{other.pid:<10}\n")
        os.close(take_over_queue(tmp_path, 3))
        assert holder.wait(60) == -signal.SIGTERM
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_nothing_is_written_without_the_lock(tmp_path: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the holder can neither be asked nor ended, its lock file is replaced by a new one. A worker leaves when
    it notices that, and no later claimer confuses the two process ids."""
    holder = hold("polite")
    before = os.open(tmp_path / "worker-3", os.O_RDONLY)
    monkeypatch.setattr(signal, "pidfd_send_signal", refused)
    descriptor = take_over_queue(tmp_path, 3)
    assert holder.poll() is None
    assert int(os.pread(before, 10, 0)) == holder.pid == locks.holder(before)
    assert os.fstat(before).st_nlink == 0
    assert int((tmp_path / "worker-3").read_text()) == os.getpid() == locks.holder(descriptor)
    os.close(before)
    os.close(descriptor)


def refused(process: int, number: int) -> None:
    """Raises the error of the kernel for a signal to another user's process."""
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_lock_of_another_program_keeps_no_worker_from_its_queue(tmp_path: Path) -> None:
    """The holder is no worker, and this user may not see which process it is."""
    script = (
        "import fcntl, os, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX);"
        "os.setuid(65534) if os.geteuid() == 0 else None; print('held', flush=True); time.sleep(60)"
    )
    argv = [sys.executable, "-c", script, str(tmp_path / "worker-3")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == b"held\n"
        descriptor = take_over_queue(tmp_path, 3)
        assert locks.holder(descriptor) == os.getpid()
        os.close(descriptor)
        stranger.kill()


@pytest.mark.parametrize("locked", [True, False], ids=["free", "held"])
@pytest.mark.parametrize(("times", "taken"), [(2, True), (3, False)])
def test_a_lock_file_that_another_worker_replaces_meanwhile_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: bool, times: int, taken: bool
) -> None:
    """A lock on a deleted file excludes no worker. If the file is replaced at every try, the worker gives up, and
    leaves no descriptor open."""
    path, replaced = tmp_path / "worker-3", list[int]()
    cleared = handover._cleared

    def slow(descriptor: int) -> bool:
        if len(replaced) == times:
            return cleared(descriptor)
        replaced.append(descriptor)
        path.unlink()
        path.touch()
        return locked

    monkeypatch.setattr(handover, "_cleared", slow)
    descriptor = take_over_queue(tmp_path, 3)
    assert (descriptor >= 0, len(replaced)) == (taken, times)
    assert path.exists(), "another worker's file is not deleted"
    if taken:
        assert os.path.samestat(path.stat(), os.fstat(descriptor))
        os.close(descriptor)
    for left in replaced:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(left)


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "worker-3").symlink_to(tmp_path / "other")
    assert take_over_queue(tmp_path, 3) == -1
    assert not (tmp_path / "other").exists()


def test_without_room_for_the_lock_the_queue_is_tried_all_the_same(tmp_path: Path) -> None:
    assert take_over_queue(tmp_path / "gone", 3) == -1


def refusing(*numbers: int) -> Callable[[], str]:
    """A function that is refused with these errnos, one a call, and then binds."""
    left = list(numbers)

    def bind() -> str:
        if left:
            raise OSError(left.pop(0), "refused")
        return "bound"

    return bind


def test_a_queue_that_is_not_free_yet_is_tried_again() -> None:
    assert bound(refusing(errno.EPERM, errno.EPERM, errno.EPERM)) == "bound"


def test_another_refusal_is_not_tried_again() -> None:
    with pytest.raises(OSError, match="refused") as raised:
        bound(refusing(errno.ENOMEM, errno.EPERM))
    assert raised.value.errno == errno.ENOMEM


def test_a_queue_that_does_not_come_free_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "_SIGNAL_TIMEOUT_S", 0.02)
    with pytest.raises(PermissionError):
        bound(refusing(*[errno.EPERM] * 10_000))


def test_without_a_stay_it_is_over_at_once() -> None:
    assert GracePeriod(0).over()


def test_a_stay_is_counted_from_the_first_question(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("portward.worker.handover.time.monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGTERM)
    try:
        stay = GracePeriod(5)
        now[0] = 200
        assert not stay.over()
        now[0] = 204.9
        assert not stay.over()
        now[0] = 205
        assert stay.over()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_who_is_asked_to_leave_leaves() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        stay = GracePeriod(60)
        assert not stay.over()
        signal.raise_signal(signal.SIGTERM)
        assert stay.over()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_stay_ends_when_its_lock_file_is_deleted(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    descriptor = take_over_queue(tmp_path, 3)
    try:
        stay = GracePeriod(60, descriptor)
        assert not stay.over()
        (tmp_path / "worker-3").unlink()
        assert stay.over()
    finally:
        os.close(descriptor)
        signal.signal(signal.SIGTERM, before)


def test_two_that_claim_at_once_do_not_both_have_the_queue(tmp_path: Path, hold: Hold) -> None:
    first, second = hold("polite"), hold("polite")
    assert first.wait(60) == -signal.SIGTERM
    assert second.poll() is None
    until(lambda: (tmp_path / "worker-3").read_text().strip() == str(second.pid), "the second has it")
