"""If steps of the real agent raise unexpected errors, it goes on, reports them, and recovers by itself."""

from __future__ import annotations

import json
import os
import sys
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from portward.lab.agent import Agent, until
from portward.lab.demo import attachments, records
from portward.lab.topology import CONTOSO
from portward.model import Attachment

# The daemon's program in this test: the steps that a file names raise.
STARTER = """\
import sys
from pathlib import Path
from portward.daemon.counting import Counting
from portward.daemon.intake import Intake
from portward.dataplane.plane import Dataplane

armed = Path(sys.argv[1])

def failing(name, step):
    def wrapped(*arguments):
        if name in armed.read_text().split():
            raise OverflowError(f"{name} was made to fail")
        return step(*arguments)
    return wrapped

for part, names in {
    Intake: ("sync", "links_changed", "decide_due", "store_descriptor"),
    Dataplane: ("check", "sync_rate_limits"),
    Counting: ("count", "suspects", "screen"),
}.items():
    for name in names:
        setattr(part, name, failing(name, getattr(part, name)))
sys.argv = ["portward", *sys.argv[sys.argv.index("run"):]]
from portward.cli import main
main()
"""


def started(agent: Agent, folder: Path) -> Path:
    """Starts the agent. Returns the file that names the steps that must fail."""
    armed, starter = folder / "armed", folder / "starter.py"
    armed.write_text("")
    starter.write_text(STARTER)
    agent.start(within=[sys.executable, os.fspath(starter), os.fspath(armed)])
    return armed


def failures(agent: Agent, step: str) -> float:
    return agent.metrics().get(f'portward_step_failures_total{{step="{step}"}}', 0)


def failing(agent: Agent) -> dict[str, Any]:
    """The steps that fail now, by `status`."""
    result = agent.portward("status", "--json")
    return {one["step"]: one for one in json.loads(result.stdout)["failing"]} if result.returncode == 0 else {}


def test_steps_that_fail_are_survived_counted_shown_and_recover(agent: Agent, tmp_path: Path) -> None:
    agent.apply(*records())
    armed = started(agent, tmp_path)
    assert agent.process is not None
    pid = agent.process.pid
    assert failures(agent, "store") == 0
    armed.write_text("sync count suspects sync_rate_limits screen links_changed")
    mine = next(one for one in attachments(CONTOSO) if isinstance(one, Attachment))
    more = replace(mine, address=ip_network("10.9.9.9"))
    before = agent.revision()
    agent.portward("exemption", "list")
    steps = ("store", "count", "compare", "rates", "status", "self-check")
    # The step that writes the status fails too, so only the metrics' own numbers can show the failures.
    until(lambda: all(failures(agent, step) for step in steps), "each step has failed")
    armed.write_text("sync")
    until(lambda: failing(agent).keys() == {"store"}, "all others work again", seconds=120)
    found = failing(agent)["store"]
    assert found["error"].startswith("OverflowError: sync was made to fail (")
    until(lambda: "FAILING   step store: OverflowError" in agent.portward("status").stdout, "status says so")
    assert agent.revision() == before
    armed.write_text("")
    agent.apply(more)
    until(lambda: failing(agent) == {}, "it works again")
    assert agent.revision() > before
    assert agent.process.poll() is None
    assert agent.process.pid == pid
    log = agent.log.read_text()
    assert "step store works again" in log
    assert log.count("Traceback (most recent call last)") <= 2 * len(steps), (
        "once for each error, not for each try"
    )


def test_a_ruleset_that_cannot_be_checked_ends_the_agent(agent: Agent, tmp_path: Path) -> None:
    agent.apply(*records())
    armed = started(agent, tmp_path)
    assert agent.process is not None
    armed.write_text("check")
    agent.lab.run(agent.lab.gateway, "nft", "flush", "chain", "inet", "portward", "screen")
    until(lambda: agent.process is not None and agent.process.poll() is not None, "the agent ends")
    assert agent.process.poll() == 1
    assert "step ruleset failed 5 times in a row: the agent ends" in agent.log.read_text()
    armed.write_text("")
    agent.start()
    assert "@" in agent.lab.run(agent.lab.gateway, "nft", "list", "chain", "inet", "portward", "screen").stdout


def test_a_job_that_fails_outside_its_steps_begins_anew(agent: Agent, tmp_path: Path) -> None:
    """The job that reads the descriptor of the store runs outside the steps."""
    agent.apply(*records())
    armed = started(agent, tmp_path)
    assert agent.process is not None
    armed.write_text("store_descriptor")
    until(lambda: failures(agent, "settle") >= 1, "the job has failed")
    armed.write_text("")
    until(lambda: failing(agent) == {}, "it works again")
    mine = next(one for one in attachments(CONTOSO) if isinstance(one, Attachment))
    before = agent.revision()
    agent.apply(replace(mine, address=ip_network("10.9.9.8")))
    assert agent.revision() > before
    assert agent.process.poll() is None
