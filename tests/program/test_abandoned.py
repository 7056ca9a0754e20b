"""If an agent ends while one of its threads still works, no other agent starts before that thread has ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.ground import INJECT
from portward.daemon.runtime import running
from portward.daemon.workers import STAY
from portward.dataplane.namespacelock import NamespaceLock, NamespaceTakenError
from portward.lab import namespaces
from portward.lab.agent import Agent, until
from portward.lab.demo import records
from program.test_run import refused, until_status

# A step of the kernel thread, and one of the counting thread. The process runs both again and again.
_REPAIR, _STATUS = (
    "portward.dataplane.reconciler:RulesetReconciler.repair",
    "portward.daemon.runtime:Runtime.write_status",
)


class Faults:
    """The harness that an agent runs with. It stops one of the agent's threads, or makes it fail."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        os.mkfifo(folder / "held")

    def environment(self) -> dict[str, str]:
        """The environment variables that load the harness into the agent."""
        path = os.pathsep.join(filter(None, (os.fspath(INJECT), os.environ.get("PYTHONPATH", ""))))
        return {"PYTHONPATH": path, "PORTWARD_FAULTS": os.fspath(self.folder)}

    def happen(self, where: str, action: str, made: Callable[[], object] = lambda: None) -> None:
        """Arms `action` at the place `where`, calls `made`, and waits until a thread of the daemon has met it
        there."""
        hit = self.folder / "hit"
        hit.unlink(missing_ok=True)
        new = self.folder / "new"
        new.write_text(f"daemon|{where}|before|1|{action}")
        new.rename(self.folder / "armed")
        made()
        until(hit.exists, f"{action} at {where}")

    def free(self) -> None:
        """Lets a held thread go on."""
        with contextlib.suppress(OSError):  # no thread is held
            os.close(os.open(self.folder / "held", os.O_WRONLY | os.O_NONBLOCK))


@pytest.fixture
def faults(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """The harness for the agents that the test starts."""
    found = Faults(agent.folder / "faults")
    start = namespaces.start

    def with_faults(*arguments: Any, environment: dict[str, str], **options: Any) -> subprocess.Popen[bytes]:
        return start(*arguments, environment={**environment, **found.environment()}, **options)

    monkeypatch.setattr(namespaces, "start", with_faults)
    yield found
    found.free()


def hold_the_kernel_thread(agent: Agent, faults: Faults) -> None:
    """Stops the kernel thread when it has seen that the ruleset is gone, and is about to write it."""
    faults.happen(_REPAIR, "hold", lambda: namespaces.load(agent.lab.gateway, "delete table inet portward"))


def claimed_once_it_is_gone(agent: Agent) -> int:
    """Claims the namespace again and again until that succeeds, which must be when the process ends. Returns how
    often the claim was refused. The folder's lock must be held for the same time."""
    assert agent.process is not None
    refusals = 0
    with namespaces.inside(agent.lab.gateway):
        while True:
            folder = running(agent.folder / "table")
            try:
                NamespaceLock(0.0).close()
            except NamespaceTakenError:
                assert folder is not None, "the namespace is taken, and the table is not"
                refusals += 1
                time.sleep(0.001)  # pause: of a poll
            else:
                # The kernel frees the lock a moment before it reports the end of the process to the parent.
                assert not with_descriptors(agent.process.pid), "a thread has not ended"
                agent.process.wait(60)
                return refusals


def with_descriptors(process: int) -> list[str]:
    """The threads of a process that still have its files and sockets, because they have not ended."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += [thread.name] if any((thread / "fd").iterdir()) else []
    return found


def test_no_other_agent_begins_while_the_kernel_thread_of_one_that_failed_may_write(
    agent: Agent, faults: Faults
) -> None:
    agent.apply(*records())
    agent.start()
    hold_the_kernel_thread(agent, faults)
    faults.happen(_STATUS, "table")
    assert claimed_once_it_is_gone(agent) > 0
    assert agent.process is not None
    assert agent.process.returncode == 1
    log = agent.log.read_text()
    assert "stopped in the midst of a step" in log
    assert log.rstrip().endswith("portward: the policy table cannot be read")
    agent.start()
    assert running(agent.folder / "table") == agent.process.pid


def test_no_other_agent_begins_while_the_kernel_thread_of_one_that_was_stopped_may_write(
    agent: Agent, faults: Faults
) -> None:
    """The service manager sees an agent that has ended normally."""
    agent.apply(*records())
    agent.start()
    hold_the_kernel_thread(agent, faults)
    assert agent.process is not None
    agent.process.send_signal(signal.SIGTERM)
    assert claimed_once_it_is_gone(agent) > 0
    assert agent.process.returncode == 0
    assert "Traceback" not in agent.log.read_text()


def test_workers_that_are_to_stay_outlive_an_agent_that_fails(
    agent: Agent, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STAY, "60")
    agent.apply(*records())
    agent.start()
    worker = json.loads(until_status(agent))["workers"][0]["pid"]
    faults.happen(_STATUS, "table")
    assert agent.process is not None
    assert agent.process.wait(60) == 1
    assert agent.log.read_text().rstrip().endswith("portward: the policy table cannot be read")
    # The agent does not wait for its children at its end, so it would have sent a signal to the worker before it.
    assert Path(f"/proc/{worker}").exists()
    monkeypatch.delenv(STAY)
    agent.start()
    until(lambda: not Path(f"/proc/{worker}").exists(), "the next agent's worker has taken its place")


def test_a_start_that_is_refused_says_the_same_if_workers_are_to_stay(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = refused(agent)
    monkeypatch.setenv(STAY, "60")
    assert refused(agent) == without
