"""The daemon's threads, and how they end."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest

from portward.daemon.threads import Threads

NAMES = ("policy", "counting", "kernel")


def test_the_kernel_thread_ends_after_what_the_policy_thread_has_handed_to_it() -> None:
    done: list[str] = []

    async def run() -> None:
        threads = Threads()
        begun, ending = threading.Event(), threading.Event()

        def change() -> None:
            begun.set()
            ending.wait()
            threads.on_kernel(lambda: done.append("carried out"))

        change_made = asyncio.ensure_future(threads.policy(change))
        await asyncio.to_thread(begun.wait)
        asyncio.get_running_loop().call_soon(ending.set)
        await threads.end(*(partial(done.append, f"{name} ends") for name in NAMES))
        await change_made

    asyncio.run(run())
    assert sorted(done[:2]) == ["carried out", "policy ends"]
    assert done[2:] == ["counting ends", "kernel ends"], "it counts what the kernel thread has deleted last"


def test_no_step_begins_after_the_last_ones() -> None:
    async def run() -> None:
        threads = Threads()
        await threads.end(lambda: None, lambda: None, lambda: None)
        for step in (threads.policy, threads.kernel, threads.counting):
            with pytest.raises(RuntimeError):
                await step(lambda: None)
        with pytest.raises(RuntimeError):
            threads.on_kernel(lambda: None)

    asyncio.run(run())


def test_a_last_step_behind_one_that_does_not_end_is_never_run() -> None:
    """It would close objects that the step before it still uses."""
    done: list[str] = []
    begun, free = threading.Semaphore(0), threading.Event()

    def hold() -> None:
        begun.release()
        free.wait()

    async def run() -> Threads:
        threads = Threads()
        steps = [asyncio.ensure_future(begin(hold)) for begin in (threads.policy, threads.kernel)]
        for _ in steps:
            await asyncio.to_thread(begun.acquire)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await threads.end(*(partial(done.append, f"{name} ends") for name in NAMES))
        threads.close()
        return threads

    threads = asyncio.run(run())
    free.set()
    for thread in threads.all:
        thread.shutdown()
    assert done == []
