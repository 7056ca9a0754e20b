"""Agents in named network namespaces, started as their unit starts them, and the verbs that ask them from the
host's own namespace.

Two gateways have the same names of segments, addresses and queue numbers. The tenant that may send behind the
first one may not behind the second.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest

from kernel.conftest import ALLOWED, DENIED, Gateway, lab_name, source_records
from portward.base.resources import rules
from portward.lab import namespaces
from portward.lab.agent import PROGRAM, Agent, until
from portward.lab.topology import CONTOSO, FABRIKAM, Lab
from program.conftest import one_line

_ETC: Final = Path("/etc/portward")
_SCRIPT: Final = Path(__file__).resolve().parents[2] / "systemd" / "baseline"
# The unit's capabilities. Without CAP_SYS_ADMIN the agent cannot enter a namespace by itself.
_CAPABILITIES: Final = ("setpriv", "--bounding-set=-all,+net_admin,+net_raw")
# The subscription of each tenant is named after its gateway.
_NAMES: Final = ("east", "west")


class Host:
    """A host with two gateways, each in a namespace of its own. `folder` is mounted on /etc/portward for each
    process of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mounted = ("sh", "-ec", f'mount --bind {folder} {_ETC}; exec "$@"', "sh")
        self.gateways: list[Gateway] = []

    def add(self, name: str, allowed: int) -> Gateway:
        """Makes a gateway, and starts its agent. Only the tenant at the place `allowed` may send."""
        lab = Lab(lab_name())
        lab.up()
        agent = Agent(
            lab, self.folder, table=str(self.folder / name / "table"), store=f"sqlite:{self.folder / name}.db"
        )
        gateway = Gateway(lab, agent)
        self.gateways.append(gateway)
        agent.config.unlink()  # the name of the host's own
        agent.config, agent.log = self.folder / f"{lab.gateway}.toml", self.folder / f"{name}.log"
        agent.configure()
        agent.run_options = ("--instance", lab.gateway)
        (self.folder / name).mkdir()
        for place, tenant in enumerate(lab.tenants):
            offer = ALLOWED if place == allowed else DENIED
            found = source_records(tenant, "10.0.0.4", offer, uuid4())
            agent.apply(*found)
        agent.start(within=[*self._mounted, *_CAPABILITIES])
        gateway.open()
        return gateway

    def portward(self, *words: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Runs a verb in the network namespace of the machine."""
        return self.run(*before, *PROGRAM, *words)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the network namespace of the machine."""
        argv = ["unshare", "--mount", *self._mounted, *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)

    def baseline(self, name: str, program: str = " ".join(PROGRAM)) -> subprocess.CompletedProcess[str]:
        """Runs the script of the unit portward-baseline@NAME. If it did not enter the namespace, it would write
        the rules of the Internet side of the first gateway, and not those of the machine."""
        text = _SCRIPT.read_text().replace("/usr/bin/portward rules", f"{program} rules")
        text = text.replace("/usr/lib/portward/closed.nft", str(rules("nftables", "closed.nft")))
        argv = [*self._mounted, "sh", "-c", text, "baseline", name]
        return namespaces.run(self.gateways[0].lab.internet, argv, timeout=120)

    def close(self) -> None:
        """Ends all agents, and removes all gateways."""
        for gateway in self.gateways:
            for sender in gateway.senders.values():
                sender.close()
            gateway.agent.stop()
            gateway.lab.down()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The two gateways `east` and `west`, whose agents run."""
    made = not _ETC.exists()
    _ETC.mkdir(exist_ok=True)  # a place to mount on
    found = Host(tmp_path_factory.mktemp("etc"))
    try:
        for place, name in enumerate(_NAMES):
            found.add(name, place)
        yield found
    finally:
        found.close()
        if made:
            _ETC.rmdir()


def names(host: Host) -> list[str]:
    """The names of the two instances."""
    return [gateway.lab.gateway for gateway in host.gateways[: len(_NAMES)]]


def said(host: Host, *words: str) -> Any:
    """The JSON that a verb prints."""
    done = host.portward(*words, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def pid(gateway: Gateway) -> int:
    """The process id of the agent."""
    assert gateway.agent.process is not None
    return gateway.agent.process.pid


def test_each_gateway_enforces_its_own_policy_for_the_same_segment_and_address(host: Host) -> None:
    east, west = host.gateways[:2]
    assert east.passes(CONTOSO, "10.0.0.4")
    assert not east.passes(FABRIKAM, "10.0.0.4")
    assert not west.passes(CONTOSO, "10.0.0.4")
    assert west.passes(FABRIKAM, "10.0.0.4")


def test_each_has_the_same_queue_and_metrics_address_and_they_do_not_meet(host: Host) -> None:
    """The kernel counts queues and loopback addresses by namespace."""
    for name, gateway in zip(names(host), host.gateways, strict=False):
        until(lambda: _workers(host, name) == [(0, "answers")], "its worker has answered")  # noqa: B023 # at once
        until(lambda: gateway.agent.revision() == len(gateway.lab.tenants), "it is scraped")  # noqa: B023 # as above
        queues = namespaces.run(name, ["cat", "/proc/net/netfilter/nfnetlink_queue"]).stdout.splitlines()
        assert [line.split()[0] for line in queues] == ["0"]


def _workers(host: Host, name: str) -> list[tuple[int, str]]:
    """The queue and the state of each worker."""
    return [(one["queue"], one["state"]) for one in said(host, "status", "--instance", name)["workers"]]


def test_the_status_is_that_of_the_agent_in_the_namespace(host: Host) -> None:
    for name, gateway in zip(names(host), host.gateways, strict=False):
        found = said(host, "status", "-I", name)
        assert (found["pid"], found["remarks"]) == (pid(gateway), [])
        assert found["config"] == f"/etc/portward/{name}.toml"


def test_top_shows_the_verdicts_of_the_namespace(host: Host) -> None:
    for gateway in host.gateways[:2]:
        for tenant in gateway.lab.tenants:
            gateway.passes(tenant, "10.0.0.4")
    for name, allowed in zip(names(host), ("vni1001", "vni1002"), strict=True):
        shown = host.portward("top", "--instance", name, "--count", "1", "--interval", "0.2").stdout.splitlines()
        rows = {line.split()[0]: line.split()[2] for line in shown[1:]}
        assert rows == {"vni1001": "deny", "vni1002": "deny"} | {allowed: "allow"}


def test_explain_and_diagnose_ask_the_kernel_in_the_namespace(host: Host) -> None:
    for name, verdict in zip(names(host), ("allow", "deny"), strict=True):
        found = said(host, "explain", "vni1001", "10.0.0.4", "--instance", name)
        assert (found["verdict"], found["now"]["as_policy"], found["remarks"]) == (verdict, True, [])
        assert "10.0.0.4" in host.portward("diagnose", "vni1001", "10.0.0.4", "--instance", name).stdout


def test_check_is_well_beside_the_other_instance(host: Host) -> None:
    for name, gateway in zip(names(host), host.gateways, strict=False):
        done = host.portward("check", "--instance", name)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"the agent runs here with this table, as process {pid(gateway)}\n" in done.stdout
        assert "segments 'vni*': vni100" in done.stdout


def test_a_shown_ruleset_is_that_of_the_namespace_and_one_with_an_agent_is_not_removed(host: Host) -> None:
    name = names(host)[0]
    assert "table inet portward {" in host.portward("rules", "show", "--instance", name).stdout
    assert f"(process {pid(host.gateways[0])} by its own count)" in one_line(
        host.portward("rules", "remove", "--yes", "--instance", name)
    )


def test_another_configuration_can_be_named_for_the_namespace(host: Host, tmp_path: Path) -> None:
    """An operator checks a change before it is in place."""
    east, west = names(host)
    candidate = tmp_path / "candidate.toml"
    text = (host.folder / f"{east}.toml").read_text()
    candidate.write_text(text + 'mode = "observe"\n')
    done = host.portward("check", "--instance", east, "--config", str(candidate))
    assert (done.returncode, done.stderr) == (0, "")
    assert "mode observe\n" in done.stdout
    done = host.portward("check", "--instance", west, "--config", str(candidate))
    assert done.returncode == 2
    assert f"is the folder of /etc/portward/{east}.toml too: each agent needs its own" in done.stderr


def test_without_the_option_a_verb_names_it(host: Host) -> None:
    name = names(host)[0]
    for verb in (["status"], ["explain", "vni1001", "10.0.0.4"]):
        done = host.portward(*verb, "--config", f"/etc/portward/{name}.toml")
        assert done.stdout.startswith(
            f"WARNING   the agent (process {pid(host.gateways[0])}) runs in another network namespace: ask there "
            f"(`nsenter -t {pid(host.gateways[0])} -n`, or by `--instance {name}`)\n"
        )


def test_two_instances_with_one_table_folder_are_refused(host: Host) -> None:
    east, west = names(host)
    path = host.folder / f"{west}.toml"
    kept = path.read_text()
    table = f"{host.folder}/east/table"
    path.write_text(kept.replace(f"{host.folder}/west/table", table))
    try:
        done = host.portward("check", "--instance", west)
        other = host.portward("check", "--instance", east)
    finally:
        path.write_text(kept)
    line = 1 + next(number for number, one in enumerate(kept.splitlines()) if one.startswith("table"))
    assert done.stderr == (
        f"portward: /etc/portward/{west}.toml:{line}: table: '{table}' is the folder of /etc/portward/{east}.toml "
        "too: each agent needs its own\n"
    )
    assert done.returncode == other.returncode == 2


def test_the_folder_of_the_hosts_own_agent_is_refused_too(host: Host) -> None:
    east = names(host)[0]
    own = host.folder / "portward.toml"
    own.write_text(f'segments = ["vni*"]\nuplinks = ["up0"]\ntable = "{host.folder}/east/table"\n')
    try:
        done = host.portward("check", "--instance", east)
    finally:
        own.unlink()
    assert done.returncode == 2
    assert "is the folder of /etc/portward/portward.toml too" in done.stderr


@pytest.mark.parametrize("verb", ["check", "status", "top", "run"])
def test_each_mistake_is_one_line(host: Host, verb: str) -> None:
    east = names(host)[0]
    near = f"{east}w"
    assert one_line(host.portward(verb, "--instance", near)) == (
        f"portward: --instance: there is no network namespace {near!r}; did you mean {east!r}? (`ip netns list` "
        "shows all)"
    )
    for wrong in (f"../{east}", "..", "a/b", "portward"):
        assert one_line(host.portward(verb, "-I", wrong)).startswith(
            f"portward: --instance: {wrong!r} is no name of an instance"
        )
    other = host.gateways[0].lab.internet
    assert one_line(host.portward(verb, "--instance", other)) == (
        f"portward: /etc/portward/{other}.toml: No such file or directory"
    )
    nobody = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    assert one_line(host.portward(verb, "--instance", east, before=nobody)) == (
        f"portward: --instance: only root may enter the network namespace {east!r} (CAP_SYS_ADMIN): try sudo"
    )


def test_what_is_left_of_a_namespace_is_no_namespace(host: Host) -> None:
    """`ip netns add` makes the file first. If it is killed then, the file stays."""
    left = Path("/run/netns") / lab_name()
    left.touch()
    try:
        said = one_line(host.portward("status", "--instance", left.name))
    finally:
        left.unlink()
    assert said.endswith(f"{left} is no network namespace: `ip netns del {left.name}` removes what is left of one")


def test_an_agent_ends_when_its_namespace_is_made_anew_and_the_new_one_is_closed(host: Host) -> None:
    gateway = host.add("third", allowed=0)
    name, agent = gateway.lab.gateway, gateway.agent
    assert agent.process is not None
    namespaces.ip("netns", "del", name)
    namespaces.make(name)
    assert agent.process.wait(30) == 1
    last = agent.log.read_text().splitlines()[-1]
    assert last == (
        f"portward: network namespace {name!r} was removed or made anew: this agent ends, because it enforces in "
        "the one that had the name before"
    )
    done = host.baseline(name)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "closed until portward runs: ports 25 for vni*\n"
    tables = namespaces.run(name, ["nft", "list", "tables"]).stdout.split("\n")
    assert tables == ["table inet portward", ""], "what closes all ports at once is gone again"
    assert "WARNING: the loopback" not in host.portward("check", "--instance", name).stdout
    namespaces.ip("-n", name, "addr", "flush", "dev", "lo")
    assert "WARNING: the loopback of this network namespace has no address" in (
        host.portward("check", "--instance", name).stdout
    )
    namespaces.ip("-n", name, "addr", "add", "127.0.0.1/8", "dev", "lo")
    agent.start(within=[*host._mounted, *_CAPABILITIES])
    until(lambda: host.portward("status", "--instance", name).returncode == 0, "it reports")
    assert said(host, "status", "--instance", name)["pid"] == pid(gateway)


@pytest.mark.parametrize("configuration", ["good", "missing"])
def test_the_baseline_of_an_instance_closes_its_namespace_if_the_program_fails(
    host: Host, configuration: str
) -> None:
    name = lab_name()
    if configuration == "good":
        (host.folder / f"{name}.toml").write_text('segments = ["vni*"]\nuplinks = ["up0"]\npreset = "oracle"\n')
    namespaces.make(name)
    try:
        done = host.baseline(name, program="false")
        tables = namespaces.run(name, ["nft", "list", "ruleset"]).stdout
    finally:
        namespaces.remove(name)
    assert done.returncode != 0
    assert "table inet portward_closed" in tables
    assert "tcp dport 25 " in tables
    outside = namespaces.run(host.gateways[0].lab.internet, ["nft", "list", "ruleset"]).stdout
    assert outside == "", "nothing is written outside of the namespace"


def test_the_baseline_waits_for_a_namespace_whose_file_is_there_first(host: Host, tmp_path: Path) -> None:
    name = lab_name()
    (host.folder / f"{name}.toml").write_text('segments = ["vni*"]\nuplinks = ["up0"]\n')
    file = Path("/run/netns") / name
    file.touch()
    begun = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", 'echo "$$" > "$1"; exec sleep 60', "sh", str(tmp_path / "pid")]
    )
    try:
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "the namespace is there")
        mount = ["sh", "-c", f"sleep 1; mount --bind /proc/{begun.pid}/ns/net {file}"]
        with subprocess.Popen(mount):
            done = host.baseline(name)
        tables = namespaces.run(name, ["nft", "list", "tables"]).stdout
    finally:
        subprocess.run(["umount", str(file)], check=False)
        file.unlink()
        begun.kill()
        begun.wait()
    assert (done.returncode, done.stderr) == (0, "")
    assert tables == "table inet portward\n"
