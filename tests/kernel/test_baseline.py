"""`portward rules baseline` on a gateway that has booted and has no agent yet, and the agent's start after it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from faults.inject import points as inject
from kernel.conftest import ALLOWED, DENIED, Gateway, lab_name, running_gateway, source_records
from kernel.wire import same, seen, segment
from portward.base.resources import rules
from portward.dataplane.names import CLOSED, KernelTable
from portward.dataplane.namespacelock import LOCK_TABLE
from portward.dataplane.nfnetlink import KernelElements, NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.reconciler import RulesetReconciler
from portward.dataplane.ruleset import Wanted
from portward.dataplane.verdict_cache import VerdictCache
from portward.errors import KernelError
from portward.lab import namespaces
from portward.lab.agent import Agent, until
from portward.lab.topology import CONTOSO, FABRIKAM, MAIL6, Lab


@pytest.fixture
def booted(tmp_path: Path) -> Iterator[Gateway]:
    """A gateway that forwards, with a configuration and a store, and without an agent."""
    with Lab(lab_name()) as lab:
        agent = Agent(lab, tmp_path)
        agent.apply(
            *source_records(CONTOSO, "10.0.0.0/16", ALLOWED, uuid4()),
            *source_records(FABRIKAM, "10.0.0.0/16", DENIED, uuid4()),
        )
        found = Gateway(lab, agent)
        found.open()
        yield found
        agent.stop(signal.SIGKILL)
        for sender in found.senders.values():
            sender.close()


# A bridge forwards frames past the family inet, so a host that cannot have its ruleset is closed in both.
CLOSED_FOR_ALL = {CLOSED: {"inet", "bridge"}}


def families(gateway: Gateway) -> dict[str, set[str]]:
    """portward's tables in the kernel: name → families. The table that is only the lock of a running agent has no
    rules and is left out."""
    listed = namespaces.run(gateway.lab.gateway, ["nft", "list", "tables"]).stdout
    found: dict[str, set[str]] = {}
    for _, family, name in map(str.split, listed.splitlines()):
        if "portward" in name and name != LOCK_TABLE:
            found.setdefault(name, set()).add(family)
    return found


def tables(gateway: Gateway) -> list[str]:
    """The names of `families`."""
    return sorted(families(gateway))


def with_own_files(text: str) -> str:
    """A script of the package with the checkout's rulesets in the place of the installed ones."""
    for name in ("closed.nft", "closed-bridge.nft"):
        assert f"/usr/lib/portward/{name}" in text
        text = text.replace(f"/usr/lib/portward/{name}", str(rules("nftables", name)))
    return text


def test_no_tenant_sends_until_there_is_an_agent(booted: Gateway) -> None:
    assert booted.passes(FABRIKAM, "10.0.0.4"), "without rules port 25 is open, or the way is not"
    done = booted.agent.portward("rules", "baseline")
    assert (done.returncode, tables(booted)) == (0, ["portward"]), done.stderr
    for tenant in (CONTOSO, FABRIKAM):
        assert not booted.passes(tenant, "10.0.0.5")
        assert not booted.passes(tenant, tenant.address6, to=MAIL6)
        assert booted.passes(tenant, "10.0.0.5", port=587)
    booted.agent.start()
    assert booted.passes(CONTOSO, "10.0.0.6")
    assert not booted.passes(FABRIKAM, "10.0.0.6")


def test_the_status_distinguishes_an_open_port_from_a_closed_one(booted: Gateway) -> None:
    assert "NOTHING IS ENFORCED" in booted.agent.portward("status").stderr  # once: no agent runs
    booted.agent.portward("rules", "baseline")
    assert (
        "sources without a cached verdict are dropped" in booted.agent.portward("status").stderr
    )  # once: no agent runs


def test_it_needs_neither_store_nor_table(booted: Gateway) -> None:
    booted.agent.configure(store="sqlite:/nowhere/portward.db", table="/nowhere/table")
    assert booted.agent.portward("rules", "baseline").returncode == 0
    assert not booted.passes(CONTOSO, "10.0.0.5")


@pytest.fixture
def nftables(booted: Gateway, tmp_path: Path) -> Callable[[str], None]:
    """Runs the script that the package adds to nftables.service, with an operator's file that flushes all
    rules."""
    own, script = tmp_path / "own.nft", tmp_path / "nftables"
    own.write_text("flush ruleset\ntable inet own {\n  chain forward { type filter hook forward priority 0; }\n}")
    text = (Path(__file__).resolve().parents[2] / "systemd/nftables").read_text()
    text = text.replace("/etc/nftables.conf", str(own))
    script.write_text(with_own_files(text))

    def run(word: str) -> None:
        done = namespaces.run(booted.lab.gateway, ["sh", str(script), word])
        assert done.returncode == 0, done.stderr

    return run


@pytest.mark.parametrize("word", ["start", "stop"])
def test_nftables_service_closes_the_port_as_it_takes_the_rules(
    booted: Gateway, nftables: Callable[[str], None], word: str
) -> None:
    """Both happen in one transaction, so that nothing passes in between. The agent opens the port again."""
    assert booted.agent.portward("rules", "baseline").returncode == 0
    with namespaces.inside(booted.lab.gateway):
        netlink = NfNetlink()
    for _ in range(2):  # the second time portward's ruleset has not been put back
        before = netlink.generation()
        nftables(word)
        assert netlink.generation() == before + 1
        assert tables(booted) == ["portward_closed"]
        assert not booted.passes(FABRIKAM, "10.0.0.5")
        assert booted.passes(FABRIKAM, "10.0.0.5", port=587)
    netlink.close()
    booted.agent.start()
    assert tables(booted) == ["portward"]
    assert booted.passes(CONTOSO, "10.0.0.6")
    assert not booted.passes(FABRIKAM, "10.0.0.6")


@pytest.mark.parametrize("word", ["start", "stop"])
def test_nftables_service_closes_nothing_where_portward_does_not_enforce(
    booted: Gateway, nftables: Callable[[str], None], word: str
) -> None:
    nftables(word)
    assert tables(booted) == []
    assert booted.passes(FABRIKAM, "10.0.0.5")


def test_what_is_only_observed_passes(booted: Gateway) -> None:
    booted.agent.configure(mode="observe")
    done = booted.agent.portward("rules", "baseline")
    assert done.stdout.startswith('nothing is closed: mode = "observe", segments vni'), done
    assert booted.passes(FABRIKAM, "10.0.0.5")


@pytest.mark.parametrize("text", ["segments = 3\n", "", "nonsense", 'segments = ["vni*"]\nuplinks = ["vni1"]\n'])
def test_a_configuration_that_cannot_be_read_closes_port_25_for_all(booted: Gateway, text: str) -> None:
    good = booted.agent.config.read_text()
    booted.agent.config.write_text(text)
    done = booted.agent.portward("rules", "baseline")
    assert done.returncode == 1
    assert "no packet to port 25 is forwarded" in done.stderr
    assert families(booted) == CLOSED_FOR_ALL
    for tenant in (CONTOSO, FABRIKAM):
        assert not booted.passes(tenant, "10.0.0.5")
        assert not booted.passes(tenant, tenant.address6, to=MAIL6)
        assert booted.passes(tenant, "10.0.0.5", port=587)
    # With a mended configuration the agent removes the block when it enforces, and not before.
    booted.agent.config.write_text(good)
    booted.agent.start()
    assert tables(booted) == ["portward"]
    assert booted.passes(CONTOSO, "10.0.0.6")
    assert not booted.passes(FABRIKAM, "10.0.0.6")


# The ports that each preset filters.
PORTS = {"digitalocean": (25, 465, 587), "azure-2020": (25,)}


def closed_ports(gateway: Gateway) -> tuple[int, ...]:
    """The mail ports that a tenant's packet cannot reach."""
    return tuple(port for port in (25, 465, 587) if not reaches(gateway, port))


def reaches(gateway: Gateway, port: int) -> bool:
    """Whether a packet to this port comes out. A packet to port 2525, which always does, is sent after it."""
    packet = segment(FABRIKAM.address6, port=port)
    marker = segment(FABRIKAM.address6, port=2525)
    with seen(gateway.lab.internet) as view:
        for one in (packet, marker):
            gateway.senders[FABRIKAM].send(one)
        found = view.first(lambda other: same(packet)(other) or same(marker)(other))
    assert found is not None
    return same(packet)(found)


@pytest.mark.parametrize("preset", PORTS)
def test_the_ports_of_the_preset_are_closed_if_nothing_else_can_be_read(booted: Gateway, preset: str) -> None:
    booted.agent.config.write_text(f'segments = 3\npreset = "{preset}"\n')
    done = booted.agent.portward("rules", "baseline")
    assert done.returncode == 1
    ports = ", ".join(map(str, PORTS[preset]))
    assert f"no packet to port{'s' if ',' in ports else ''} {ports} is forwarded" in done.stderr
    assert closed_ports(booted) == PORTS[preset]


@pytest.mark.parametrize("preset", PORTS)
@pytest.mark.parametrize("table", ["portward", "portward_closed"])
def test_nftables_service_closes_the_ports_that_the_preset_filters(
    booted: Gateway, nftables: Callable[[str], None], preset: str, table: str
) -> None:
    booted.agent.configure(preset=preset)
    if table == "portward_closed":
        booted.agent.config.write_text(f'segments = 3\npreset = "{preset}"\n')
    booted.agent.portward("rules", "baseline")
    assert tables(booted) == [table]
    loaded = families(booted)[table]
    for _ in range(2):
        nftables("start")
        assert families(booted) == {CLOSED: loaded}
        assert closed_ports(booted) == PORTS[preset]


@pytest.mark.parametrize(
    ("line", "ports"),
    [
        ('preset = "digitalocean"', (25, 465, 587)),
        ("preset = 'hetzner' # mail", (25, 465)),
        ('preset = "/nowhere/preset.toml"', (25,)),
        ('preset = "$(reboot)"', (25,)),
        ("", (25,)),
    ],
)
def test_without_portwards_own_program_the_ports_of_the_preset_are_closed(
    booted: Gateway, tmp_path: Path, line: str, ports: tuple[int, ...]
) -> None:
    script = with_own_files((Path(__file__).resolve().parents[2] / "systemd/baseline").read_text())
    for path, ours in (
        ("timeout 60 /usr/bin/portward", "false"),
        ("/etc/portward/${name:-portward}.toml", str(tmp_path / "portward.toml")),
        ("/usr/lib/portward/lib/python3*/site-packages/portward/rules/policy", str(rules("policy"))),
    ):
        assert path in script
        script = script.replace(path, ours)
    (tmp_path / "portward.toml").write_text(f"segments = 3\n{line}\n")
    done = namespaces.run(booted.lab.gateway, ["sh", "-c", script])
    assert done.returncode == 1
    assert families(booted) == CLOSED_FOR_ALL
    assert closed_ports(booted) == ports


def test_a_preset_that_is_missing_closes_too(booted: Gateway) -> None:
    booted.agent.configure(preset="/nowhere/preset.toml")
    assert booted.agent.portward("rules", "baseline").returncode == 1
    assert not booted.passes(CONTOSO, "10.0.0.5")


def test_a_mended_configuration_takes_the_place_of_the_closed_port(booted: Gateway) -> None:
    good = booted.agent.config.read_text()
    booted.agent.config.write_text("")
    booted.agent.portward("rules", "baseline")
    booted.agent.config.write_text(good)
    assert booted.agent.portward("rules", "baseline").returncode == 0
    assert tables(booted) == ["portward"]
    assert not booted.passes(CONTOSO, "10.0.0.5")


def test_a_ruleset_that_the_kernel_refuses_leaves_the_closed_port(booted: Gateway) -> None:
    booted.agent.config.write_text("")
    assert booted.agent.portward("rules", "baseline").returncode == 1
    with namespaces.inside(booted.lab.gateway):
        nft, netlink = Nft(), NfNetlink()
        reconciler = RulesetReconciler(nft, netlink, VerdictCache(KernelElements(netlink)))
        with pytest.raises(KernelError):
            reconciler.load(
                Wanted(
                    KernelTable.INET,
                    "table inet portward { nonsense }\n",
                    definitions=0,
                    statements=(),
                    native=True,
                )
            )
        netlink.close()
    assert tables(booted) == ["portward_closed"]
    assert not booted.passes(FABRIKAM, "10.0.0.5")


def test_remove_takes_both_away(booted: Gateway) -> None:
    booted.agent.config.write_text("")
    booted.agent.portward("rules", "baseline")
    removed = booted.agent.portward("rules", "remove", "--yes")
    assert (removed.returncode, tables(booted)) == (0, [])


@pytest.mark.parametrize("broken", [False, True])
def test_beside_an_agent_nothing_is_changed(tmp_path: Path, broken: bool) -> None:
    with running_gateway(tmp_path) as gateway:
        assert gateway.passes(CONTOSO, "10.0.0.4")
        assert not gateway.passes(FABRIKAM, "10.0.0.4")
        listed = ["nft", "-s", "list", "chain", "inet", "portward", "to_workers"]
        before = namespaces.run(gateway.lab.gateway, listed).stdout
        repairs = gateway.agent.metrics()["portward_ruleset_repairs_total"]
        if broken:
            gateway.agent.config.write_text("nonsense")
        done = gateway.agent.portward("rules", "baseline")
        assert (done.returncode, tables(gateway)) == (0, ["portward"]), done.stderr
        assert "nothing is changed" in done.stdout
        assert namespaces.run(gateway.lab.gateway, listed).stdout == before
        gateway.agent.stop(signal.SIGKILL)
        # No worker answers any more, so only sources with a cached allow pass.
        until(lambda: not gateway.passes(CONTOSO, "10.0.0.77"), "the queue has no listener")
        gateway.agent.portward("rules", "baseline")
        assert gateway.passes(CONTOSO, "10.0.0.4")
        assert repairs == 0


def test_the_next_agents_worker_takes_the_queue_over(booted: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTWARD_WORKERS_STAY", "30")
    agent = booted.agent
    agent.start()
    for number in (signal.SIGTERM, signal.SIGKILL):
        workers = booted.workers()
        agent.stop(number)
        time.sleep(0.5)  # pause: a worker that ends with its daemon has ended by now
        assert booted.workers() == workers, "the worker stays"
        assert booted.passes(CONTOSO, f"10.0.1.{number}"), "… and answers for new sources"
        assert not booted.passes(FABRIKAM, f"10.0.1.{number}")
        agent.start()
        until(lambda workers=workers: not workers & booted.workers(), "the old worker is gone")  # type: ignore[misc]
        assert booted.passes(CONTOSO, f"10.0.2.{number}")
        assert not booted.passes(FABRIKAM, f"10.0.2.{number}")


def test_a_worker_that_was_stopped_does_not_keep_its_queue(
    booted: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORTWARD_WORKERS_STAY", "30")
    booted.agent.start()
    (worker,) = booted.workers()
    os.kill(worker, signal.SIGSTOP)
    booted.agent.stop(signal.SIGKILL)
    booted.agent.start()
    assert worker not in booted.workers()
    assert booted.passes(CONTOSO, "10.0.0.6")


def test_a_worker_that_stays_leaves_in_time(booted: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTWARD_WORKERS_STAY", "1")
    booted.agent.start()
    booted.agent.stop()
    until(lambda: not booted.workers(), "the worker has left")
    assert not booted.passes(CONTOSO, "10.0.0.6")


def test_a_worker_that_stays_leaves_when_its_table_is_deleted(
    booted: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A purge deletes the table, or an operator does while the agent is stopped."""
    monkeypatch.setenv("PORTWARD_WORKERS_STAY", "30")
    booted.agent.start()
    booted.agent.stop()
    shutil.rmtree(booted.agent.folder / "table")
    until(lambda: not booted.workers(), "the worker has left")
    booted.agent.start()
    assert booted.passes(CONTOSO, "10.0.0.6")


@pytest.mark.parametrize("where", ["RulesetReconciler.intact", "RulesetReconciler.load"])
def test_the_worker_of_an_agent_that_ends_by_an_error_stays(
    booted: Gateway, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """This also holds for an agent that fails at its start, after its workers have taken the queues over."""
    monkeypatch.setenv("PORTWARD_WORKERS_STAY", "30")
    monkeypatch.setenv("PYTHONPATH", str(Path(inject.__file__).parent))
    monkeypatch.setenv("PORTWARD_FAULTS", str(booted.agent.folder))
    agent = booted.agent
    agent.start()
    if where == "RulesetReconciler.load":
        agent.stop()
    (agent.folder / "armed").write_text(f"daemon|portward.dataplane.reconciler:{where}|before|1|table")
    if where == "RulesetReconciler.load":
        agent.start(wait=False)
    assert agent.process is not None
    assert agent.process.wait(60) == 1
    time.sleep(0.5)  # pause: a worker that ends with its daemon has ended by now
    assert len(booted.workers()) == 1
    assert booted.passes(CONTOSO, "10.0.0.6")
    assert not booted.passes(FABRIKAM, "10.0.0.6")
