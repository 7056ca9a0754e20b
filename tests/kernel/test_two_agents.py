"""Two agents in one network namespace, each with its own table, queue and segments. One of them enforces, and the
other one changes nothing in the kernel."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from faults.traffic import ALLOWED4, ALLOWED6, BLOCKED4, BLOCKED6, Traffic
from kernel.conftest import ALLOWED, DENIED, Gateway, lab_name, source_records
from portward.base.resources import rules
from portward.dataplane.namespacelock import NamespaceLock
from portward.lab import namespaces
from portward.lab.agent import PROGRAM, Agent, until
from portward.lab.topology import CONTOSO, FABRIKAM, Lab

STARTS = 8
HELD = "this network namespace: portward runs already, as process"


class Pair:
    """A gateway with two configurations. No agent runs until a test starts one."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.first = self._agent(lab, folder / "first")
        self.second = self._agent(
            lab, folder / "second",
            segments=["vni1001", "vni1002"], queue={"first": 8}, metrics={"address": "127.0.0.1:9126"},
        )  # fmt: skip
        self.gateway = Gateway(lab, self.first)
        self.gateway.open()

    @staticmethod
    def _agent(lab: Lab, folder: Path, **settings: Any) -> Agent:
        folder.mkdir()
        agent = Agent(lab, folder, **{"ruleset": {"owned": "never"}, **settings})
        agent.apply(
            *(
                record
                for prefix in ("10.0.0.0/16", str(ALLOWED4), str(ALLOWED6))
                for record in source_records(CONTOSO, prefix, ALLOWED, uuid4())
            ),
            *(
                record
                for prefix in ("10.0.0.0/16", str(BLOCKED4), str(BLOCKED6))
                for record in source_records(FABRIKAM, prefix, DENIED, uuid4())
            ),
        )
        return agent

    def kernel(self) -> str:
        """All rules of the gateway, without elements and counters."""
        return namespaces.run(self.gateway.lab.gateway, ["nft", "-s", "-t", "list", "ruleset"]).stdout

    def close(self) -> None:
        """Ends both agents."""
        for agent in (self.first, self.second):
            agent.stop(signal.SIGKILL)
        for sender in self.gateway.senders.values():
            sender.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """A gateway with both configurations, and without a running agent."""
    with Lab(lab_name()) as lab:
        found = Pair(lab, tmp_path)
        try:
            yield found
        finally:
            found.close()


def pid(agent: Agent) -> int:
    """The process id of an agent that was started."""
    assert agent.process is not None
    return agent.process.pid


def ended(agents: tuple[Agent, Agent]) -> list[Agent]:
    """The agents whose process has ended."""
    return [agent for agent in agents if agent.process is not None and agent.process.poll() is not None]


def test_of_two_agents_that_start_together_one_enforces_and_nothing_comes_out(pair: Pair) -> None:
    assert pair.first.portward("rules", "baseline").returncode == 0
    with Traffic(pair.gateway.lab) as traffic, traffic.measured() as figures:
        for start in range(STARTS):
            _start_together(pair, traffic, start)
    assert (figures.leaked, figures.missed) == ([], 0)
    assert figures.sent > 1_000
    assert figures.others > figures.sent // 8, "its packets to another port came out: the way was open and watched"


def _start_together(pair: Pair, traffic: Traffic, start: int) -> None:
    """Starts both agents at the same moment. One must enforce, and the other one must end."""
    agents = pair.first, pair.second
    for agent in agents:
        agent.start(wait=False)
    until(lambda: len(ended(agents)) == 1, "one of them gives up")
    (loser,) = ended(agents)
    (winner,) = set(agents) - {loser}
    assert loser.stop() == 1
    winner._wait_ready()
    said = loser.log.read_text().strip().splitlines()[-1]
    assert said.endswith(f"portward runs already, as process {pid(winner)} by its own count"), said
    allowed = traffic.allowed_frames.syn(ALLOWED4[1_000 + start].packed)
    traffic.allowed_frames.send(allowed.frame)
    until(lambda: allowed.sequence in traffic.seen, "a new source that may send passes")
    assert winner.stop() == 0
    for agent in agents:
        assert "put back" not in agent.log.read_text(), "they fought for the rules"


@pytest.mark.parametrize("configuration", ["good", "broken", "missing"])
@pytest.mark.parametrize("verb", [["rules", "remove", "--yes"], ["rules", "baseline"]], ids=["remove", "baseline"])
def test_beside_an_agent_with_another_table_no_verb_changes_the_kernel(
    pair: Pair, verb: list[str], configuration: str
) -> None:
    pair.first.start()
    if configuration == "broken":
        pair.second.config.write_text("nonsense")
    elif configuration == "missing":
        pair.second.config.unlink()
    before = pair.kernel()
    done = pair.second.portward(*verb)
    assert pair.kernel() == before
    assert pair.gateway.passes(CONTOSO, "10.0.0.4")
    assert not pair.gateway.passes(FABRIKAM, "10.0.0.4")
    if "remove" in verb:
        assert done.returncode == 1
        assert f"the agent runs (process {pid(pair.first)} by its own count)" in done.stderr
        pair.first.stop()
        assert pair.second.portward(*verb).returncode == 0, "the lock ends with the agent"
        assert "portward" not in pair.kernel()
    else:
        assert (done.returncode, done.stdout) == (
            0,
            "portward's ruleset is loaded already: nothing is changed\n",
        )


@pytest.mark.parametrize("verb", ["run", "check", "status"])
def test_a_refusal_names_the_process_that_has_the_namespace(pair: Pair, verb: str) -> None:
    pair.first.start()
    before = pair.kernel()
    done = pair.second.portward(verb)
    assert done.returncode == 1
    assert f"{HELD} {pid(pair.first)}" in done.stderr
    assert pair.kernel() == before
    assert not (pair.second.folder / "table" / "data.mdb").exists(), "the policy table is as it was: not there"


def test_while_an_agent_starts_the_baseline_changes_nothing_and_its_unit_closes_the_port(pair: Pair) -> None:
    """The starting agent holds the lock but has no ruleset yet. It may still fail, so the port must not stay
    open."""
    with namespaces.inside(pair.gateway.lab.gateway), NamespaceLock():
        before = pair.kernel()
        done = pair.first.portward("rules", "baseline")
        assert done.returncode == 1
        assert f"nothing is changed, and no ruleset is loaded yet: {HELD} {os.getpid()}" in done.stderr
        assert pair.kernel() == before
        text = (Path(__file__).resolve().parents[2] / "systemd/baseline").read_text()
        config = ("--config", str(pair.first.config))
        text = text.replace("/usr/bin/portward rules baseline", " ".join([*PROGRAM, "rules", "baseline", *config]))
        text = text.replace("/usr/lib/portward/closed.nft", str(rules("nftables", "closed.nft")))
        assert namespaces.run(pair.gateway.lab.gateway, ["sh", "-c", text]).returncode != 0
        assert not pair.gateway.passes(CONTOSO, "10.0.0.4")
    pair.first.start()
    assert pair.gateway.passes(CONTOSO, "10.0.0.4"), "the agent lifts it"


def test_beside_its_own_agent_a_check_is_well(pair: Pair) -> None:
    pair.first.start()
    done = pair.first.portward("check")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"the agent runs here with this table, as process {pid(pair.first)}\n" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_next_agent_takes_over_however_the_last_one_ended(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """A worker of the last agent may stay, and must not hold the lock."""
    monkeypatch.setenv("PORTWARD_WORKERS_STAY", "30")
    pair.first.start()
    pair.first.stop(number)
    pair.second.start()
    assert pair.gateway.passes(CONTOSO, "10.0.0.4")
    assert not pair.gateway.passes(FABRIKAM, "10.0.0.4")


def test_a_start_waits_for_an_agent_that_is_still_ending(pair: Pair) -> None:
    pair.first.start()
    pair.second.start(wait=False)
    pair.first.stop(signal.SIGKILL)
    pair.second._wait_ready()
    assert not pair.gateway.passes(FABRIKAM, "10.0.0.4")


def test_a_flush_of_all_rules_leaves_the_lock_and_the_agent_puts_its_rules_back(pair: Pair) -> None:
    pair.first.start()
    namespaces.load(pair.gateway.lab.gateway, "flush ruleset")
    until(lambda: pair.first.metrics()["portward_ruleset_repairs_total"] == 1, "the rules are put back")
    done = pair.second.portward("run")
    assert f"as process {pid(pair.first)}" in done.stderr


def test_a_saved_ruleset_with_the_lock_in_it_holds_no_agent_back(pair: Pair) -> None:
    pair.first.start()
    saved = pair.kernel()
    assert "table inet portward_lock" in saved
    pair.first.stop()
    namespaces.load(pair.gateway.lab.gateway, "flush ruleset\nadd table inet portward_lock\n")
    pair.second.start()
    assert not pair.gateway.passes(FABRIKAM, "10.0.0.4")


def test_another_program_that_owns_the_lock_is_named_by_its_table(pair: Pair) -> None:
    owner = subprocess.Popen(
        ["ip", "netns", "exec", pair.gateway.lab.gateway, "nft", "-i"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        assert owner.stdin is not None
        owner.stdin.write(b"add table inet portward_lock { flags owner; }\n")
        owner.stdin.flush()
        until(lambda: "flags owner" in pair.kernel(), "the table is there")
        done = pair.first.portward("run")
        assert done.returncode == 1
        assert "another program owns table inet portward_lock: end it" in done.stderr
    finally:
        owner.kill()
        owner.wait()
