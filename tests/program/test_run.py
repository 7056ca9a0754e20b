"""`portward run` as an operator meets it: starting, failing to start, reloading, stopping."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import msgspec
import pytest

from portward.config.documents import enc_hook
from portward.errors import PortwardError
from portward.lab import namespaces
from portward.lab.agent import PROGRAM, Agent, Place, until
from portward.lab.demo import attachments, records
from portward.lab.topology import CONTOSO, FABRIKAM


def ruleset(lab: Place) -> str:
    """portward's table as it is loaded in the gateway; empty if none is loaded."""
    return lab.run(lab.gateway, "nft", "-s", "list", "table", "inet", "portward").stdout


def refused(agent: Agent) -> str:
    """The one line with which the agent refuses to start. It must not load a ruleset then."""
    result = agent.portward("run")
    assert result.returncode in (1, 2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("portward: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert ruleset(agent.lab) == "", "nothing of a ruleset may be loaded"
    return lines[0]


def test_without_privilege_it_says_so(agent: Agent) -> None:
    agent.apply(*records())
    for path in (agent.folder, *agent.folder.iterdir()):
        os.chown(path, 65534, 65534)
    argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *PROGRAM, "run", "--config"]
    # pytest's folder is closed to other users, so the message may also be that the configuration cannot be read.
    result = namespaces.run(agent.lab.gateway, [*argv, str(agent.config)])
    assert result.returncode != 0
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert ruleset(agent.lab) == ""


def test_without_cap_net_admin_it_says_so(agent: Agent) -> None:
    agent.apply(*records())
    argv = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", *PROGRAM, "run", "--config"]
    result = namespaces.run(agent.lab.gateway, [*argv, str(agent.config)])
    assert result.returncode == 1
    line = result.stderr.strip()
    assert "CAP_NET_ADMIN" in line
    assert "\n" not in line


def test_check_without_cap_net_admin_says_so_too(agent: Agent) -> None:
    argv = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", *PROGRAM, "check", "--config"]
    result = namespaces.run(agent.lab.gateway, [*argv, str(agent.config)])
    assert result.returncode == 1
    assert result.stderr == "portward: asking the kernel for its rules takes root or CAP_NET_ADMIN\n"


def test_a_queue_that_is_taken_is_named(agent: Agent, tmp_path: Path) -> None:
    agent.apply(*records())
    holder = namespaces.start(
        agent.lab.gateway,
        [sys.executable, "-c",
         "import netfilterqueue as n, time; q = n.NetfilterQueue(); q.bind(0, print); print(1, flush=True); "
         "time.sleep(60)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert "queue 0 cannot be bound: another process has it" in refused(agent)
    finally:
        holder.kill()
        holder.wait()


def test_a_missing_store_is_named_and_how_to_make_it(agent: Agent) -> None:
    line = refused(agent)
    assert str(agent.folder / "portward.db") in line
    assert "portward apply" in line


def test_a_store_that_is_no_database_is_named(agent: Agent) -> None:
    (agent.folder / "portward.db").write_bytes(b"this is not a database, but it is long enough to look" * 50)
    assert "portward.db" in refused(agent)


def test_a_table_folder_that_cannot_be_written_is_named(agent: Agent) -> None:
    agent.apply(*records())
    (agent.folder / "table").write_text("a file where the folder should be")
    assert str(agent.folder / "table") in refused(agent)


def test_a_mistake_in_the_configuration_is_reported_with_its_line(agent: Agent) -> None:
    agent.config.write_text('segments = ["vni*"]\nuplinks = ["up0"]\nmode = "watch"\n')
    line = refused(agent)
    assert f"{agent.config}:3: mode:" in line
    assert "observe" in line


def test_an_unknown_preset_is_named_with_the_nearest(agent: Agent) -> None:
    agent.apply(*records())
    agent.configure(preset="azure-2021")
    assert "did you mean 'azure-20" in refused(agent)


def test_a_second_agent_on_the_same_table_is_refused(agent: Agent) -> None:
    agent.apply(*records())
    agent.start()
    result = agent.portward("run")
    assert result.returncode == 1
    assert agent.process is not None
    assert f"runs already, as process {agent.process.pid}" in result.stderr


def test_a_missing_interface_is_warned_of_and_followed_later(agent: Agent) -> None:
    agent.apply(*records())
    agent.configure(segments=["vni*", "tap77"])
    agent.start()
    assert "no interface 'tap77' is there now" in agent.log.read_text()
    namespaces.batch(agent.lab.gateway, ["link add tap77 type veth peer name tap77p"])
    try:
        until(lambda: "tap77" in agent.portward("status").stdout, "the new interface is a segment")
    finally:
        namespaces.batch(agent.lab.gateway, ["link del tap77"])
    until(lambda: "tap77" not in agent.portward("status").stdout, "the interface is gone")


def test_sigterm_leaves_rules_and_remove_takes_them(agent: Agent) -> None:
    agent.apply(*records())
    agent.start()
    assert "chain classify" in ruleset(agent.lab)
    refusal = agent.portward("rules", "remove", "--yes")
    assert refusal.returncode == 1
    assert "stop it first" in refusal.stderr
    assert agent.stop() == 0
    assert "chain classify" in ruleset(agent.lab)
    removed = agent.portward("rules", "remove", "--yes")
    assert removed.returncode == 0, removed.stderr
    assert ruleset(agent.lab) == ""
    assert agent.portward("rules", "remove", "--yes").returncode == 1


def test_rules_show_prints_what_is_loaded_and_what_would_be(agent: Agent) -> None:
    agent.apply(*records())
    assert agent.portward("rules", "show").returncode == 1
    wanted = agent.portward("rules", "show", "--wanted").stdout
    checked = namespaces.run(agent.lab.gateway, ["nft", "-c", "-f", "-"], text=wanted)
    assert checked.returncode == 0, checked.stderr
    agent.start()
    shown = agent.portward("rules", "show").stdout
    assert "chain classify" in shown
    assert "elements" not in shown.split("set allow4")[1].split("}")[0], "cached verdicts are left out"


def test_a_bad_reload_keeps_the_old_configuration_and_says_so(agent: Agent) -> None:
    agent.apply(*records())
    agent.start()
    before = ruleset(agent.lab)
    agent.configure(mode="watch")
    agent.reload()
    assert ruleset(agent.lab) == before
    assert "the configuration before stays in force" in agent.log.read_text()
    until(lambda: agent.metrics()["portward_reload_failed"] == 1, "the gauge says so")
    agent.configure(mode="enforce")
    agent.reload()
    until(lambda: agent.metrics()["portward_reload_failed"] == 0, "the gauge falls again")


def test_a_reload_that_needs_a_restart_is_refused(agent: Agent) -> None:
    agent.apply(*records())
    agent.start()
    agent.configure(queue={"first": 5})
    agent.reload()
    assert "queue cannot change while portward runs" in agent.log.read_text()


def test_a_reload_takes_another_preset(agent: Agent) -> None:
    agent.apply(*records())
    agent.start()
    assert agent.explain(FABRIKAM.segment, FABRIKAM.address4)["reason"] == "denied-not-exempt"
    agent.configure(preset="azure-2023")
    agent.reload()
    assert agent.explain(FABRIKAM.segment, FABRIKAM.address4)["reason"] == "denied-ineligible"


def test_a_reload_may_change_what_the_sets_are_like(agent: Agent) -> None:
    """The kernel refuses to change the size of a set, so the agent deletes the sets and makes them again."""
    agent.apply(*records())
    agent.start()
    agent.configure(verdicts={"sources": 1024, "allow_seconds": 5})
    agent.reload()
    assert "read again and in force" in agent.log.read_text()
    listing = agent.lab.run(agent.lab.gateway, "nft", "-s", "list", "set", "inet", "portward", "allow4").stdout
    assert "size 1024" in listing
    assert "timeout 5s" in listing


def test_a_restart_needs_no_store(agent: Agent) -> None:
    revision = agent.apply(*records())
    agent.start()
    agent.stop()
    for path in agent.folder.glob("portward.db*"):
        path.rename(path.with_name("away-" + path.name))
    agent.start()
    assert agent.revision() == revision
    until(lambda: "the last known policy stays in force" in agent.log.read_text(), "it says so")
    for path in agent.folder.glob("away-*"):
        path.rename(path.with_name(path.name.removeprefix("away-")))
    assert agent.apply(*records()[:1]) == revision
    agent.configure()
    until(lambda: json.loads(agent.portward("status", "--json").stdout)["store_error"] == "", "the store is back")


def test_a_restart_keeps_cached_verdicts(agent: Agent) -> None:
    agent.apply(*records())
    agent.start()
    # The table gives the same verdict; the self-check would remove any other.
    add = "add element inet portward allow4 { vni1001 . 10.0.0.4 timeout 60s }"
    namespaces.load(agent.lab.gateway, add)
    agent.stop()
    agent.start()
    kept = agent.lab.run(agent.lab.gateway, "nft", "list", "set", "inet", "portward", "allow4").stdout
    assert "10.0.0.4" in kept


def test_verdicts_cached_under_another_table_are_forgotten_at_the_start(agent: Agent) -> None:
    agent.apply(*records())
    agent.start()
    agent.stop()
    namespaces.load(
        agent.lab.gateway,
        "flush set inet portward synced\nadd element inet portward synced { 12345 }\n"
        "add element inet portward allow4 { 4242 . 192.0.2.77 timeout 60s }",
    )
    agent.start()
    kept = agent.lab.run(agent.lab.gateway, "nft", "list", "set", "inet", "portward", "allow4").stdout
    assert "192.0.2.77" not in kept


@pytest.mark.parametrize(
    "damage",
    [
        ["nft", "delete", "table", "inet", "portward"],
        ["nft", "flush", "chain", "inet", "portward", "cached6"],
        ["nft", "flush", "set", "inet", "portward", "internal4"],
        ["nft", "flush", "set", "inet", "portward", "epoch"],
        ["nft", "flush", "chain", "inet", "portward", "to_workers"],
        ["nft", "flush", "chain", "inet", "portward", "to_worker_1"],
        ["nft", "flush", "ruleset"],
    ],
    ids=lambda damage: " ".join(damage[:3] + damage[5:]),
)
def test_rules_changed_by_another_program_are_put_back(agent: Agent, damage: list[str]) -> None:
    agent.apply(*records())
    agent.start()
    lab = agent.lab

    before = without_elements(ruleset(lab))
    if damage[:3] == ["nft", "flush", "ruleset"]:
        # A reload of nftables.service restores the other tables too. Without the lab's translation the agent would
        # remove the guard.
        saved = lab.run(lab.gateway, "nft", "list", "table", "inet", "lab").stdout
        namespaces.load(lab.gateway, f"flush ruleset\n{saved}")
    else:
        assert lab.run(lab.gateway, *damage).returncode == 0
    until(lambda: without_elements(ruleset(lab)) == before, "the rules are back")
    until(lambda: agent.metrics()["portward_ruleset_repairs_total"] >= 1, "the repair is counted")


def without_elements(text: str) -> str:
    """A ruleset listing without the elements of the sets that packets fill."""
    return "\n".join(line for line in text.splitlines() if "expires" not in line and "packets" not in line)


def test_a_worker_that_dies_is_started_again(agent: Agent) -> None:
    agent.apply(*records())
    agent.start()
    worker = json.loads(until_status(agent))["workers"][0]
    os.kill(worker["pid"], signal.SIGKILL)
    until(lambda: agent.metrics()["portward_worker_restarts_total"] == 1, "the restart is counted")
    printed = json.loads(until_status(agent))["workers"][0]
    assert printed["running"]
    assert printed["pid"] != worker["pid"]


def until_status(agent: Agent) -> str:
    """The status as JSON, once there is one."""
    until(lambda: agent.portward("status", "--json").returncode == 0, "a status")
    return agent.portward("status", "--json").stdout


def test_status_prints_times_like_the_other_verbs(agent: Agent) -> None:
    agent.apply(*records())
    before = datetime.now(UTC)
    agent.start()
    until(lambda: json.loads(until_status(agent))["self_check"]["at"] is not None, "a worker answered")
    printed = json.loads(until_status(agent))
    times = printed["started"], printed["self_check"]["at"], printed["at"]
    assert all(re.fullmatch(r"[-0-9]{10}T[0-9:.]+Z", text) for text in times)
    started, answered, at = map(datetime.fromisoformat, times)
    assert before < started < answered <= at <= datetime.now(UTC)
    said = agent.portward("status").stdout
    assert re.search(r"(?m)^portward \S+, process \d+, up \d+ s, ", said)
    assert re.search(r"(?m)^check     every worker answered \d+ s ago, ", said)


def test_workers_end_with_a_daemon_that_is_killed(agent: Agent) -> None:
    agent.apply(*records())
    agent.start()
    worker = json.loads(until_status(agent))["workers"][0]["pid"]
    agent.stop(signal.SIGKILL)
    until(lambda: not Path(f"/proc/{worker}").exists(), "the worker is gone")
    assert agent.portward("status").returncode == 1
    agent.start()


def test_two_workers_share_the_queues(agent: Agent) -> None:
    agent.apply(*records())
    agent.configure(queue={"workers": 2, "first": 10})
    agent.start()
    queues = [worker["queue"] for worker in json.loads(until_status(agent))["workers"]]
    assert queues == [10, 11]
    # nft prints the xtables target in its own syntax.
    assert "queue num 10-11" in ruleset(agent.lab)


def test_start_without_ready_raises_what_it_said(agent: Agent) -> None:
    with pytest.raises(PortwardError, match="no such file"):
        agent.start()


def test_a_table_on_a_full_disk_keeps_the_policy_in_force_and_says_so(agent: Agent) -> None:
    agent.apply(*records())
    table = agent.folder / "table"
    table.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(table)], check=True)
    try:
        agent.start()
        agent.apply(*records())
        store = agent.folder / "portward.db"
        many = [
            msgspec.structs.replace(
                attachments(CONTOSO)[0], segment="vni9", address=ip_network((0x0A000000 + number, 32))
            )
            for number in range(8_000)
        ]
        inventory = agent.folder / "many.json"
        inventory.write_bytes(msgspec.json.encode({"attachments": many}, enc_hook=enc_hook))
        assert agent.portward("apply", str(inventory)).returncode == 0
        assert store.exists()
        until(lambda: "the policy table cannot be written" in agent.log.read_text(), "it says so")
        assert agent.process is not None
        assert agent.process.poll() is None, "it goes on"
        assert agent.explain(FABRIKAM.segment, FABRIKAM.address4)["reason"] == "denied-not-exempt"
        subprocess.run(["mount", "-o", "remount,size=64m", str(table)], check=True)
        until(lambda: agent.revision() == 2, "the change is taken in once there is room")
    finally:
        agent.stop()
        subprocess.run(["umount", str(table)], check=True)


def test_it_needs_no_other_program(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent calls nftables as a library. If the kernel has no nft_queue, it sets the target by netlink."""
    agent.apply(*records())
    start = namespaces.start

    def without_programs(namespace: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        return start(namespace, ["/usr/bin/env", "PATH=/nonexistent", *argv], **options)

    monkeypatch.setattr(namespaces, "start", without_programs)
    agent.start()
    assert "queue num 0" in ruleset(agent.lab)
