"""A process that outlives its daemon. The tests use real processes, which only `kill` ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from portward.daemon import children
from portward.daemon.children import Child
from portward.lab.agent import until

SLEEP = "import time; time.sleep(60)"
FAIL = """
import asyncio, sys
from portward.daemon import children

async def begin() -> None:
    child = await children.start((sys.executable, "-c", "import time; time.sleep(60)"))
    print(child.pid, flush=True)
    if sys.argv[1] == "left":
        child.leave()
    raise RuntimeError("an error")

asyncio.run(begin())
"""


def python(code: str) -> tuple[str, ...]:
    """The command line of a process that runs this code."""
    return sys.executable, "-I", "-c", code


def ran(work: Callable[[], Awaitable[None]]) -> None:
    """Runs `work` in a loop; afterwards as many descriptors are open as before."""

    async def run() -> None:
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 # counted
        await work()
        async with asyncio.timeout(60):
            while len(os.listdir("/proc/self/fd")) > before:  # noqa: PTH208 # counted
                await asyncio.sleep(0.01)  # pause: of a poll

    asyncio.run(run())


@pytest.mark.parametrize("way", ["left", "forgotten"])
def test_it_goes_on_when_the_program_that_started_it_ends_by_an_error(way: str) -> None:
    """The process survives although the loop and Python close and collect their objects."""
    ended = subprocess.run([sys.executable, "-c", FAIL, way], capture_output=True, timeout=60, check=False)
    number = int(ended.stdout)
    descriptor = os.pidfd_open(number)
    try:
        assert ended.stderr.rstrip().endswith(b"RuntimeError: an error")
        # A signal would have been sent before that program's end, and takes effect at once.
        assert b"time.sleep" in Path(f"/proc/{number}/cmdline").read_bytes()
    finally:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        os.close(descriptor)


@pytest.mark.parametrize(
    ("code", "code_or_signal"),
    [("raise SystemExit(7)", 7), ("pass", 0), ("import os, signal; os.kill(os.getpid(), 15)", -15)],
)
def test_its_end_is_seen_with_its_exit_code(code: str, code_or_signal: int) -> None:
    async def work() -> None:
        child = await children.start(python(code))
        async with asyncio.timeout(60):
            assert await child.wait() == code_or_signal
        assert child.returncode == code_or_signal
        child.kill()  # nothing happens
        child.leave()

    ran(work)


def test_what_it_prints_can_be_read_also_after_its_end() -> None:
    async def work() -> None:
        child = await children.start(python("import sys; print('out' * 50_000); print('err', file=sys.stderr)"))
        async with asyncio.timeout(60):
            out, err = await asyncio.gather(child.stdout.read(), child.stderr.read())
            await child.wait()
        assert (len(out), err) == (150_001, b"err\n")

    ran(work)


def test_it_gets_the_descriptors_that_it_is_given_and_no_others() -> None:
    ours, theirs = os.pipe()
    code = f"import os; os.write({theirs}, b'x'); os.fstat({ours})"

    async def work() -> None:
        child = await children.start(python(code), pass_fds=(theirs,))
        assert await child.wait() == 1
        assert b"Bad file descriptor" in await child.stderr.read()

    ran(work)
    assert os.read(ours, 1) == b"x"
    os.close(ours)
    os.close(theirs)


def test_it_is_ended_by_force() -> None:
    async def work() -> None:
        child = await children.start(python(SLEEP))
        assert child.returncode is None
        child.kill()
        child.kill()
        assert await child.wait() == -signal.SIGKILL

    ran(work)


def test_a_program_that_is_not_there_is_an_error() -> None:
    async def work() -> None:
        with pytest.raises(FileNotFoundError):
            await children.start(("/nowhere/program",))

    ran(work)


def test_one_that_cannot_be_watched_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a descriptor for it, the daemon could not see its end."""
    begun: list[Child] = []
    watch = Child.watch

    async def watched(child: Child) -> None:
        begun.append(child)
        await watch(child)

    def none_left(number: int) -> int:
        raise OSError(24, "Too many open files")

    async def work() -> None:
        monkeypatch.setattr(Child, "watch", watched)
        monkeypatch.setattr("portward.daemon.children.os.pidfd_open", none_left)
        with pytest.raises(OSError, match="Too many open files"):
            await children.start(python(SLEEP))
        until(lambda: not Path(f"/proc/{begun.pop().pid}").exists(), "it has ended")

    asyncio.run(work())
