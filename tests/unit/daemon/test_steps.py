"""An unexpected error stops one step of the daemon for a while. It ends the daemon only if a vital step keeps
failing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from portward.base.clock import Clock
from portward.cli.status_text import failing
from portward.config.keys import Config
from portward.daemon.intake import Intake, answers
from portward.daemon.linkfeed import followed
from portward.daemon.steps import LONGEST_PAUSE_S, VITAL_TRIES, Step, StepRunner
from portward.dataplane.links import Links
from portward.dataplane.pending import PendingChanges
from portward.dataplane.plane import Dataplane
from portward.model import Record
from portward.store.codec import encode, key_of
from portward.store.values import Put
from portward.table.database import TableError
from portward.table.edit import Edit
from portward.table.writer import Writer
from unit.store.samples import ALL, FABRIKAM, MACHINE, opened, write
from unit.table.test_table import AZURE


class Time:
    """A monotonic clock that moves only when a test moves it."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


async def fails() -> str:
    raise OverflowError("int too large\x1b[2J")


async def works() -> str:
    return "done"


def test_a_step_that_fails_is_counted_and_shown_and_tried_again_ever_more_seldom() -> None:
    time = Time()
    steps = StepRunner(time)

    async def life() -> list[float]:
        pauses = []
        for _ in range(9):
            assert await steps.run(Step.STORE, fails, "before") == "before"
            pauses.append(steps.seconds_to_retry(Step.STORE))
            # During its pause, the step does not run.
            assert await steps.run(Step.STORE, works, "waits") == "waits"
            assert await steps.run(Step.COUNT, works, "") == "done", "another step goes on"
            time.now += pauses[-1]
        return pauses

    assert asyncio.run(life()) == [1, 2, 4, 8, 16, 32, *[LONGEST_PAUSE_S] * 3]
    assert steps.failures[Step.STORE] == 9
    (told,) = steps.failing_now()
    assert (told["step"], told["times"], told["seconds"]) == ("store", 9, time.now - 1_000.0)
    assert told["error"].startswith("OverflowError: int too large\\x1b[2J (test_steps.py:")


def test_a_success_ends_it_and_the_next_failure_begins_with_a_second() -> None:
    time = Time()
    steps = StepRunner(time)

    async def life() -> None:
        for _ in range(4):
            await steps.run(Step.COUNT, fails, "", anyway=True)
        assert await steps.run(Step.COUNT, works, "", anyway=True) == "done"
        assert steps.failing_now() == []
        assert not steps.seconds_to_retry(Step.COUNT)
        await steps.run(Step.COUNT, fails, "")

    asyncio.run(life())
    assert steps.seconds_to_retry(Step.COUNT) == 1
    assert steps.failures[Step.COUNT] == 5, "what was counted stays"


def test_a_traceback_is_logged_once_for_each_error(caplog: pytest.LogCaptureFixture) -> None:
    steps = StepRunner(Time())

    async def other() -> str:
        raise ValueError("another one")

    async def life() -> None:
        for work in (fails, fails, fails, other, fails):
            await steps.run(Step.STATUS, work, "", anyway=True)

    with caplog.at_level(logging.ERROR, "portward"):
        asyncio.run(life())
    assert [record.exc_info is not None for record in caplog.records] == [True, False, False, True, True]
    assert all("step status failed" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("step", [Step.SETTLE, Step.RULESET, Step.OWNERS, Step.DEVICES])
def test_what_keeps_closed_ends_the_agent_if_it_fails_on_and_on(step: Step) -> None:
    steps = StepRunner(Time())

    async def life() -> None:
        for _ in range(VITAL_TRIES - 1):
            await steps.run(step, fails, "", anyway=True)
        with pytest.raises(OverflowError):
            await steps.run(step, fails, "", anyway=True)

    asyncio.run(life())


def test_a_table_that_cannot_be_read_ends_the_agent_at_once() -> None:
    async def unreadable() -> str:
        raise TableError("MDB_CORRUPTED")

    with pytest.raises(TableError):
        asyncio.run(StepRunner(Time()).run(Step.COUNT, unreadable, ""))


def test_a_job_that_fails_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portward.daemon.steps.FIRST_PAUSE_S", 0.001)
    steps = StepRunner()
    began = 0

    async def job() -> None:
        nonlocal began
        began += 1
        if began < 4:
            raise OverflowError(began)
        await asyncio.Event().wait()

    async def life() -> None:
        keeping = asyncio.create_task(steps.keep_running(Step.WORKER, job))
        async with asyncio.timeout(60):
            while began < 4 or steps.is_failing(Step.WORKER):
                await asyncio.sleep(0.001)  # pause: of a poll
        keeping.cancel()
        await asyncio.wait({keeping})
        assert keeping.cancelled()

    asyncio.run(life())
    assert steps.failures[Step.WORKER] == 3


def test_a_job_whose_step_fails_meanwhile_does_not_count_as_working(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portward.daemon.steps.FIRST_PAUSE_S", 0.01)
    steps, began = StepRunner(), 0
    waited = asyncio.Event()

    async def job() -> None:
        nonlocal began
        began += 1
        if began == 1:
            raise OverflowError("outside of a step")
        await steps.run(Step.COUNT, fails, "", anyway=True)
        await asyncio.sleep(0.1)  # pause: ten times as long as the job must run to count as working
        waited.set()
        await asyncio.Event().wait()

    async def life() -> None:
        keeping = asyncio.create_task(steps.keep_running(Step.COUNT, job))
        async with asyncio.timeout(60):
            await waited.wait()
        assert steps.is_failing(Step.COUNT)
        keeping.cancel()
        await asyncio.wait({keeping})

    asyncio.run(life())


def test_interfaces_are_read_anew_after_an_error_and_none_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portward.daemon.steps.FIRST_PAUSE_S", 0.001)

    async def first() -> AsyncIterator[Links]:
        yield Links({7: "vni7"}, frozenset())
        raise IndexError("a message that is too short")

    async def second() -> AsyncGenerator[Links]:
        yield Links({7: "vni8", 9: "up0"}, frozenset())
        yield Links({7: "vni8"}, frozenset({9}))

    async def life() -> list[Links]:
        steps = StepRunner()
        changes = followed(first(), second, steps)
        found = [await anext(changes) for _ in range(3)]
        assert steps.failures[Step.INTERFACES] == 1
        assert not steps.is_failing(Step.INTERFACES)
        return found

    assert asyncio.run(life()) == [
        Links({7: "vni7"}, frozenset()),
        Links({7: "vni8", 9: "up0"}, frozenset({7, 9})),
        Links({7: "vni8"}, frozenset({9})),
    ]


class Policy:
    """The policy side on a real store and a real table, whose kernel takes everything."""

    def __init__(self, folder: Path, *records: Record) -> None:
        self.store = opened(folder / "portward.db")
        write(self.store, *(Put(key_of(record), encode(record)) for record in records))
        config = Config(
            segments=("vni*",), uplinks=("up0",), store=f"sqlite:{folder / 'portward.db'}", table=folder / "table"
        )
        self.writer = Writer(config.table, AZURE, answers(config))
        kernel = cast("Dataplane", SimpleNamespace(enforce=lambda *_: None))
        pending_changes = PendingChanges(lambda: 0)
        self.pending_changes = pending_changes

        def at_once(work: Callable[[], Any]) -> Any:
            work()
            return SimpleNamespace(result=lambda: None)

        self.intake = Intake(config, self.writer, Clock(None), kernel, pending_changes, at_once)

    def close(self) -> None:
        self.intake.close()
        self.store.close()
        self.writer.close()


def test_an_error_in_the_midst_of_a_change_leaves_the_table_as_it_was_and_the_next_try_takes_it_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Policy(tmp_path, *ALL)) as policy:
        assert policy.intake.sync()
        head = policy.writer.head()
        write(policy.store, Put(key_of(MACHINE), None))
        with monkeypatch.context() as patched:

            def broken(*arguments: Any) -> None:
                apply(*arguments)
                raise OverflowError("in the midst")

            apply = Edit.apply
            patched.setattr(Edit, "apply", broken)
            with pytest.raises(OverflowError):
                policy.intake.sync()
        assert policy.writer.head() == head
        assert policy.intake.store_error == "OverflowError: in the midst"
        assert not policy.intake.in_step
        assert not policy.pending_changes.any, "nothing is taken for a change on its way"
        assert policy.intake.sync()
        assert policy.intake.store_error == ""
        assert policy.intake.in_step
        changed = policy.writer.head()
        assert changed is not None
        assert changed.revision == 2


def test_interfaces_that_failed_by_any_error_are_due_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Policy(tmp_path, FABRIKAM)) as policy:
        policy.intake.sync()
        with monkeypatch.context() as patched:

            def broken(*_: object, **__: object) -> None:
                raise OverflowError

            patched.setattr(Writer, "put_links", broken)
            with pytest.raises(OverflowError):
                policy.intake.links_changed(Links({7: "vni7"}, frozenset({7})), 3)
        assert policy.intake.links_failed
        policy.intake.retry_links()
        assert not policy.intake.links_failed
        assert [link.name for link in policy.writer.reader().links().values()] == ["vni7"]


def test_a_reload_that_failed_is_said_to_wait_for_the_next_one(caplog: pytest.LogCaptureFixture) -> None:
    """It is not retried by itself."""
    steps = StepRunner(Time())
    steps.record_failure(Step.RELOAD, OverflowError("too large"))
    assert "step reload failed and is retried at the next reload" in caplog.text
    (told,) = steps.failing_now()
    assert "`systemctl reload portward` tries it again, see the log" in failing(told)
