"""`portward explain` says what happens to a packet now, and a real packet agrees, in every state of the
gateway."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from kernel.conftest import ALLOWED, DENIED, Gateway, source_records
from kernel.test_rates import customer, known
from portward.dataplane.names import VERDICT_SETS
from portward.lab import namespaces
from portward.lab.agent import PROGRAM, until
from portward.lab.topology import CONTOSO, FABRIKAM

MAY, MAY_NOT = (CONTOSO, "10.0.0.4"), (FABRIKAM, "10.0.0.4")
PASSES, DROPPED = ("passes", True), ("dropped", False)
MakeGateway = Callable[..., Gateway]


def agrees(gateway: Gateway, who: Any, effect: tuple[str, bool], *words: str, as_policy: bool = True) -> None:
    """Checks that `explain` gives this present effect for the source `who` and says these words, and that a real
    packet has the same effect. `effect` is its name, and whether a packet passes."""
    tenant, address = who
    found = gateway.agent.explain(tenant.segment, address)["now"]
    assert (found["effect"], found["as_policy"]) == (effect[0], as_policy), found
    for word in words:
        assert word in found["why"]
    assert gateway.passes(tenant, address) is effect[1], found


def forget(gateway: Gateway) -> None:
    """Deletes every cached verdict from the kernel."""
    for name in VERDICT_SETS.values():
        for family in "46":
            done = gateway.lab.run(
                gateway.lab.gateway, "nft", "flush", "set", "inet", "portward", f"{name}{family}"
            )
            assert done.returncode == 0, done.stderr


def flush(gateway: Gateway) -> None:
    """Deletes portward's table."""
    gateway.lab.run(gateway.lab.gateway, "nft", "delete", "table", "inet", "portward")


def test_while_the_agent_runs(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    agrees(gateway, MAY, PASSES, "nothing is cached for it: its next packet asks a worker")
    agrees(gateway, MAY, PASSES, "the kernel has cached 'allow' for")
    agrees(gateway, MAY_NOT, DROPPED, "its next packet asks a worker")
    agrees(gateway, MAY_NOT, DROPPED, "the kernel has cached 'deny' for")
    found = gateway.agent.explain(FABRIKAM.segment, "10.0.0.4", "--to", "10.1.2.3")["now"]
    assert (found["effect"], found["as_policy"]) == ("passes", True)


@pytest.mark.parametrize("settings", [{}, {"on_agent_down": "open"}, {"mode": "observe"}])
def test_while_no_agent_runs(make_gateway: MakeGateway, settings: dict[str, Any]) -> None:
    gateway = make_gateway(**settings)
    assert gateway.passes(*MAY)
    assert gateway.agent.stop() == 0
    agrees(gateway, MAY, PASSES, "the kernel has cached 'allow'", "no agent runs here")
    remedy = gateway.agent.explain(CONTOSO.segment, "10.0.0.4")["remedy"]
    assert ("But this gateway may soon drop it" in remedy) is (not settings), "the cached verdict ends"
    forget(gateway)
    if settings:
        as_policy = "mode" in settings
        agrees(gateway, MAY, PASSES, "no agent runs here, so no worker answers: it passes because")
        agrees(gateway, MAY_NOT, PASSES, as_policy=as_policy)
    else:
        agrees(gateway, MAY, DROPPED, "no agent runs here, so no worker answers", as_policy=False)
        agrees(gateway, MAY_NOT, DROPPED)
        printed = gateway.agent.portward("explain", CONTOSO.segment, "10.0.0.4").stdout
        assert (
            "10.0.0.4: ALLOW\n  now       DROPPED here, which is NOT what the policy says: nothing is" in printed
        )
        assert "customer  Nothing: the policy allows it, and it is this gateway that drops it" in printed


@pytest.mark.parametrize(
    "settings", [{"on_agent_down": "open"}, {"mode": "observe"}, {"verdicts": {"observe": ["vni*"]}}]
)
def test_a_file_that_was_edited_while_no_agent_runs_changes_no_packet(
    make_gateway: MakeGateway, settings: dict[str, Any]
) -> None:
    """Only the loaded ruleset decides; the edited file is not in force yet."""
    gateway = make_gateway(**settings)
    gateway.agent.stop(signal.SIGKILL)
    written, edited = (
        gateway.agent.config.read_text(),
        {"on_agent_down": "closed", "mode": "enforce", "verdicts": {}},
    )
    gateway.agent.configure(**edited)
    agrees(
        gateway, MAY_NOT, PASSES, "no agent runs here, so no worker answers: it passes because", as_policy=False
    )
    agrees(gateway, MAY, PASSES)
    remark = gateway.agent.explain(CONTOSO.segment, "10.0.0.4")["remarks"][0]
    assert f"not what the agent had in force that ran here last ({next(iter(settings))})" in remark
    flush(gateway)
    assert gateway.agent.portward("rules", "baseline").returncode == 0
    gateway.agent.config.write_text(written)
    agrees(
        gateway,
        MAY_NOT,
        DROPPED,
        "no agent runs here, so no worker answers",
        as_policy="on_agent_down" in settings,
    )
    agrees(gateway, MAY, DROPPED, as_policy=False)


def test_a_ruleset_without_its_rules_is_not_said_to_block_a_source(make_gateway: MakeGateway) -> None:
    """Another program's `nft flush` leaves the table and its sets, and no agent is there to repair it."""
    gateway = make_gateway()
    gateway.agent.stop(signal.SIGKILL)
    gateway.lab.run(gateway.lab.gateway, "nft", "flush", "table", "inet", "portward")
    assert gateway.passes(*MAY_NOT)
    found = gateway.agent.explain(FABRIKAM.segment, "10.0.0.4")["now"]
    assert (found["effect"], found["as_policy"]) == ("unknown", None)
    assert "another program has taken rules out of the loaded ruleset" in found["why"]
    assert "PORT 25 MAY BE OPEN" in gateway.agent.portward("status").stderr  # once: no agent runs
    printed = gateway.agent.portward("diagnose", FABRIKAM.segment, "10.0.0.4").stdout
    assert "whether it is in force at this moment, we could not see" in printed


def test_a_segment_added_to_the_file_since_the_load_has_no_known_effect(make_gateway: MakeGateway) -> None:
    """The loaded ruleset still treats the interface as one that is not a segment."""
    gateway = make_gateway(segments=[FABRIKAM.segment])
    gateway.agent.stop(signal.SIGKILL)
    gateway.agent.configure(segments=["vni*"])
    found = gateway.agent.explain(CONTOSO.segment, "10.0.0.7")["now"]
    assert (found["effect"], found["as_policy"]) == ("unknown", None)
    assert f"has {CONTOSO.segment} among the interfaces that are no segments" in found["why"]
    assert gateway.passes(CONTOSO, "10.0.0.7")
    printed = gateway.agent.portward("diagnose", CONTOSO.segment, "10.0.0.4").stdout
    assert f"not known: the ruleset that is loaded has {CONTOSO.segment} among" in printed
    agrees(gateway, MAY_NOT, DROPPED, "no agent runs here, so no worker answers")


def test_without_agent_and_store_the_table_that_was_left_says_whose_a_source_is(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    left = gateway.agent.revision()
    gateway.agent.stop(signal.SIGKILL)
    for file in gateway.agent.folder.glob("portward.db*"):
        file.rename(file.with_name(f"gone-{file.name}"))
    agrees(gateway, MAY, DROPPED, "no agent runs here, so no worker answers", as_policy=False)
    found = gateway.agent.explain(CONTOSO.segment, "10.0.0.4")
    assert (found["verdict"], found["revision"]) == ("allow", left)
    printed = gateway.agent.portward("explain", CONTOSO.segment, "10.0.0.4").stdout
    assert f"  from      the table as an agent left it, revision {left}; sqlite:" in printed


def test_while_workers_stay_they_go_by_the_table_that_was_left(
    make_gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store gets newer revisions that these workers do not see."""
    monkeypatch.setenv("PORTWARD_WORKERS_STAY", "60")
    gateway = make_gateway()
    limited, records = customer(FABRIKAM, "10.0.0.77")
    exempt = gateway.source(CONTOSO, "10.0.0.78", ALLOWED)
    gateway.agent.apply(*records)
    left = gateway.agent.revision()
    gateway.agent.stop(signal.SIGKILL)
    by_table = f"by the policy table as it was left, at revision {left} (no agent runs here; whether"
    agrees(gateway, MAY_NOT, DROPPED, by_table)
    gateway.lab.run(gateway.lab.gateway, "nft", "flush", "map", "inet", "portward", "rates4")
    agrees(gateway, (FABRIKAM, "10.0.0.77"), DROPPED, "which only an agent writes", as_policy=False)
    gateway.agent.process = None
    gateway.agent.apply(*source_records(CONTOSO, "10.0.0.78", DENIED, exempt))
    agrees(gateway, (CONTOSO, "10.0.0.78"), PASSES, by_table, as_policy=False)
    assert gateway.agent.portward("exemption", "revoke", str(limited), "--reason", "spam").returncode == 0
    agrees(gateway, (FABRIKAM, "10.0.0.77"), DROPPED, "which only an agent writes")


def test_while_nothing_or_everything_is_closed(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    assert gateway.agent.stop() == 0
    flush(gateway)
    agrees(gateway, MAY_NOT, PASSES, "NOTHING IS ENFORCED", "no agent runs here", as_policy=False)
    agrees(gateway, MAY, PASSES, "NOTHING IS ENFORCED")
    assert gateway.agent.portward("rules", "baseline").returncode == 0
    agrees(gateway, MAY, DROPPED, "no agent runs here", as_policy=False)
    flush(gateway)
    kept = gateway.agent.config.read_text()
    gateway.agent.config.write_text("segments = [\n")
    assert gateway.agent.portward("rules", "baseline").returncode == 1
    gateway.agent.config.write_text(kept)
    agrees(gateway, MAY, DROPPED, "table inet portward_closed is loaded", as_policy=False)


def test_while_the_agent_does_not_answer(make_gateway: MakeGateway) -> None:
    """A stopped worker still owns its queue, so packets wait there and do not pass, whatever is configured."""
    gateway = make_gateway(on_agent_down="open")
    assert gateway.agent.process is not None
    parent = str(gateway.agent.process.pid)
    pid = gateway.lab.run(gateway.lab.gateway, "pgrep", "-P", parent).stdout.split()[0]
    gateway.agent.process.send_signal(signal.SIGSTOP)
    namespaces.run(gateway.lab.gateway, ["kill", "-STOP", pid])
    try:
        until(
            lambda: "does not report" in gateway.agent.explain(CONTOSO.segment, "10.0.0.4")["now"]["why"],
            "the agent is seen as silent",
        )
        assert not gateway.passes(*MAY)
    finally:
        namespaces.run(gateway.lab.gateway, ["kill", "-CONT", pid])
        gateway.agent.process.send_signal(signal.SIGCONT)


def test_from_another_network_namespace_nothing_is_said_of_the_agents_gateway(make_gateway: MakeGateway) -> None:
    """No ruleset is loaded there, and that is no reason for an alarm."""
    gateway = make_gateway()
    agent = gateway.agent
    assert agent.process is not None
    there = f"the agent (process {agent.process.pid}) runs in another network namespace: ask there (`nsenter -t"

    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [*PROGRAM, *words, "--config", str(agent.config)]
        return namespaces.run(gateway.lab.internet, argv)

    found = json.loads(ask("explain", FABRIKAM.segment, "10.0.0.4", "--json").stdout)
    assert (found["now"]["effect"], found["now"]["as_policy"]) == ("unknown", None)
    assert found["now"]["why"].startswith(there)
    assert found["kernel"] == "not asked: the agent runs in another network namespace"
    for words in (
        ["status"],
        ["explain", FABRIKAM.segment, "10.0.0.4"],
        ["diagnose", FABRIKAM.segment, "10.0.0.4"],
    ):
        done = ask(*words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"WARNING   {there}")
        assert "is enforced" not in done.stdout.lower()
    for words in (["top"], ["rules", "show"]):
        assert f"no ruleset of portward is loaded in this network namespace: {there}" in ask(*words).stderr
    assert "WARNING" not in agent.portward("status").stdout  # once: no refresh says it


@pytest.mark.parametrize("verb", ["explain", "diagnose", "status", "top"])
def test_a_mistake_in_the_configuration_blinds_no_verb(gateway: Gateway, verb: str) -> None:
    kept = gateway.agent.config.read_text()
    arguments = {
        "explain": ("explain", FABRIKAM.segment, "10.0.0.4"),
        "diagnose": ("diagnose", FABRIKAM.segment, "10.0.0.4"),
        "status": ("status",),
        "top": ("top", "--count", "1", "--interval", "0.2"),
    }
    gateway.agent.config.write_text(kept + 'mode = "watch"\n')
    line = len(gateway.agent.config.read_text().splitlines())
    try:
        result = gateway.agent.portward(*arguments[verb])
    finally:
        gateway.agent.config.write_text(kept)
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[0]
    assert first.startswith(f"WARNING   {gateway.agent.config}:{line}: mode: 'watch' is not a valid value")
    assert first.endswith("the agent runs with the configuration that it read before")
    assert len(result.stdout.splitlines()) > 1


def test_in_step_is_said_of_this_moment(make_gateway: MakeGateway) -> None:
    """The agent writes its status once a second at most, so the verbs compare it with the store themselves."""
    gateway = make_gateway()
    id_ = gateway.source(FABRIKAM, "10.0.0.78", DENIED)
    assert gateway.agent.process is not None
    until(lambda: ", in step" in gateway.agent.portward("status").stdout, "it is in step")
    gateway.agent.process.send_signal(signal.SIGSTOP)
    try:
        printed = gateway.agent.portward("exemption", "request", str(id_), "--json").stdout
        revision = json.loads(printed)["revision"]
        found = gateway.agent.portward("status").stdout
        assert f", NOT in step: the store is at revision {revision}, not loaded yet" in found
        remarks = gateway.agent.explain(FABRIKAM.segment, "10.0.0.4")["remarks"]
        assert remarks == [
            f"the store is at revision {revision}, which this gateway has not taken in: see `portward status`"
        ]
    finally:
        gateway.agent.process.send_signal(signal.SIGCONT)
    until(lambda: ", in step" in gateway.agent.portward("status").stdout, "it is in step again")


def test_a_revoked_limit_is_gone_from_top_and_status_at_once(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    id_, records = customer(FABRIKAM, "10.0.0.77")
    gateway.agent.apply(*records)
    known(gateway, FABRIKAM, "10.0.0.77")
    found = gateway.agent.explain(FABRIKAM.segment, "10.0.0.77")
    assert (found["now"]["effect"], found["now"]["as_policy"]) == ("limited", True)
    assert "Nothing is blocked" not in found["remedy"]
    assert gateway.passes(FABRIKAM, "10.0.0.77")

    def rows() -> list[str]:
        lines = gateway.agent.portward("top", "--count", "1", "--interval", "0.2").stdout.splitlines()
        return [line.split()[2] for line in lines if "10.0.0.77" in line]

    until(lambda: rows() == ["rated"], "it is counted under its limit")
    revoked = gateway.agent.portward("exemption", "revoke", str(id_), "--reason", "spam", "--wait")
    assert revoked.returncode == 0, revoked.stderr
    assert "10.0.0.77" in gateway.listing("rated4"), "its counter lives on"
    assert "rated" not in rows()
    until(lambda: "rated" not in gateway.agent.portward("status").stdout, "the status follows within its count")


def test_devices_on_a_segment_are_named(make_gateway: MakeGateway) -> None:
    gateway = make_gateway()
    namespaces.batch(
        gateway.lab.gateway,
        ["link add br9 type bridge", f"link set {FABRIKAM.segment} master br9", "link set br9 up"],
    )
    begin = f"bridge br9 takes the packets of segment {FABRIKAM.segment}"
    until(lambda: "STACKED" in gateway.agent.portward("status").stdout, "the agent has seen the bridge")
    agrees(gateway, MAY_NOT, DROPPED, begin)
    agrees(gateway, MAY, PASSES)
    printed = gateway.agent.portward("diagnose", FABRIKAM.segment, "10.0.0.4").stdout
    assert any(line.strip().startswith("STACKED") and begin in line for line in printed.splitlines())


def test_an_allowed_source_behind_a_bridge_is_dropped_and_the_answer_does_not_send_its_customer_elsewhere(
    make_gateway: MakeGateway,
) -> None:
    gateway = make_gateway()
    assert gateway.passes(*MAY)
    namespaces.batch(
        gateway.lab.gateway,
        ["link add br9 type bridge", f"link set {CONTOSO.segment} master br9", "link set br9 up"],
    )
    until(lambda: "STACKED" in gateway.agent.portward("status").stdout, "the agent has seen the bridge")
    agrees(gateway, MAY, DROPPED, f"bridge br9 takes the packets of segment {CONTOSO.segment}", as_policy=False)
    remedy = gateway.agent.explain(CONTOSO.segment, "10.0.0.4")["remedy"]
    assert remedy.startswith("Nothing: the policy allows it, and it is this gateway that drops it")
