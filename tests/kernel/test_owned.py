"""The table with an owner, on a real kernel (Linux 6.9 and later): what other programs cannot do, and how the
owner outlives the agent.

The agent also owns its table here if the host's nft is older than 1.1: see `owning/sitecustomize.py`. The last
test leaves that to the agent.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import select
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kernel.conftest import Gateway, lab_name, running_gateway
from kernel.owner import COMMANDS, custodians, look, nft, owner, owning, state
from kernel.wire import meanwhile, seen, segment
from portward.base import netns
from portward.base.netlink import HEADER, NFGEN, NLM_F_DUMP, NLM_F_REQUEST, attribute, string
from portward.dataplane import compiled, nf_tables, tableowner
from portward.dataplane.elements import Add
from portward.dataplane.names import FIXED_SETS, TABLE
from portward.dataplane.nfnetlink import KernelElements, NfNetlink, TableState
from portward.dataplane.nft import Nft
from portward.dataplane.reconciler import CLOSED
from portward.dataplane.verdict_cache import Source
from portward.errors import KernelError
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM

KERNEL = tuple(int(part) for part in platform.release().split(".")[:2])
pytestmark = pytest.mark.skipif(KERNEL < (6, 9), reason=f"Linux {platform.release()}: 6.9 has such tables first")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway for the tests that leave it as it was."""
    with owning(tmp_path_factory.mktemp("owned")) as found:
        yield found


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Gateway]:
    """A gateway for one test."""
    with owning(tmp_path) as found:
        yield found


def fingerprint(gateway: Gateway) -> bytes | None:
    """A digest of the table's rules."""
    with closing(look(gateway)) as netlink:
        return netlink.fingerprint(TABLE, FIXED_SETS)


def status(gateway: Gateway) -> dict[str, Any]:
    """The output of `portward status --json`."""
    found: dict[str, Any] = json.loads(gateway.agent.portward("status", "--json").stdout)
    return found


def kill(gateway: Gateway, *, custodian: bool) -> None:
    """Ends the agent by SIGKILL, and its custodian if it should."""
    for pid in custodians(gateway) if custodian else ():
        os.kill(pid, signal.SIGSTOP)  # so that the agent cannot see its end
    gateway.agent.stop(signal.SIGKILL)
    for pid in custodians(gateway) if custodian else ():
        os.kill(pid, signal.SIGKILL)
    if custodian:
        until(lambda: not custodians(gateway), "the custodian has ended")


def test_status_metric_and_check_say_that_the_table_has_an_owner(gateway: Gateway) -> None:
    (custodian,) = custodians(gateway)
    until(lambda: status(gateway)["ownership"]["owned"], "status")
    expected = {"owned": True, "custodian": custodian, "why": ""}
    assert status(gateway)["ownership"] == expected  # once: it does not change
    said = gateway.agent.portward("status").stdout
    assert f"rules     owned: no other program can remove them; process {custodian} keeps that" in said
    until(lambda: gateway.agent.metrics().get("portward_ruleset_owned") == 1, "the metric")
    checked = gateway.agent.portward("check")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "no other program can remove the rules" in checked.stdout
    found = state(gateway)
    assert found is not None
    assert found.persists
    assert found.owner


@pytest.mark.parametrize("command", COMMANDS)
def test_no_other_program_changes_it(gateway: Gateway, command: str) -> None:
    before = fingerprint(gateway)
    assert "Operation not permitted" in nft(gateway, f"{command}\n")
    assert fingerprint(gateway) == before
    assert not gateway.passes(FABRIKAM, "10.0.0.4")
    assert gateway.passes(CONTOSO, "10.0.0.4")


def test_a_flush_of_all_rulesets_leaves_it_and_what_is_cached(own: Gateway) -> None:
    assert own.passes(CONTOSO, "10.0.0.4")
    assert "10.0.0.4" in own.listing("allow4")
    # The lab's own tables go, and with them the reason for the guard.
    assert nft(own, "flush ruleset\ntable inet theirs { }\n") == ""
    assert nft(own, "flush ruleset\n") == ""
    assert state(own, "theirs") is None
    until(lambda: status(own)["guard"]["loaded"] is False, "the agent has seen the flush")
    assert "10.0.0.4" in own.listing("allow4")
    assert status(own)["ruleset_repairs"] == 0  # once: a repair would have been counted before
    assert not own.passes(FABRIKAM, "10.0.0.4")


# --- the agent ends ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_while_no_agent_runs_and_when_the_next_one_does_the_owner_is_the_same(own: Gateway, number: int) -> None:
    assert own.passes(CONTOSO, "10.0.0.4")
    before, found, kept = owner(own), fingerprint(own), custodians(own)
    assert before
    own.agent.stop(number)
    assert owner(own) == before
    for command in COMMANDS:
        assert "Operation not permitted" in nft(own, f"{command}\n")
    assert nft(own, "flush ruleset\n") == ""
    assert fingerprint(own) == found
    own.agent.start()
    assert owner(own) == before
    assert custodians(own) == kept
    assert "10.0.0.4" in own.listing("allow4"), "what is cached stays"
    assert not own.passes(FABRIKAM, "10.0.0.4")


def test_a_custodian_that_is_killed_is_replaced_and_the_owner_stays(own: Gateway) -> None:
    before, (first,) = owner(own), custodians(own)
    os.kill(first, signal.SIGKILL)
    assert "Operation not permitted" in nft(own, "delete table inet portward\n")
    until(lambda: custodians(own) not in ([], [first]), "there is another custodian")
    assert owner(own) == before
    assert "another one is started" in own.agent.log.read_text()
    until(lambda: status(own)["ownership"]["custodian"] == custodians(own)[0], "status")
    own.agent.stop(signal.SIGKILL)
    assert owner(own) == before


def test_if_both_are_killed_the_table_stays_and_the_next_agent_adopts_it(own: Gateway) -> None:
    assert own.passes(CONTOSO, "10.0.0.4")
    found = owner(own)
    kill(own, custodian=True)
    left = state(own)
    assert left is not None
    assert (left.owner, left.persists) == (0, True)
    assert not own.passes(FABRIKAM, "10.0.0.4")
    own.agent.start()
    assert owner(own) not in (0, found)
    assert "10.0.0.4" in own.listing("allow4")
    assert len(custodians(own)) == 1


def test_a_custodian_ends_with_its_network_namespace(tmp_path: Path) -> None:
    """The namespace would live on in the custodian, with all its interfaces."""
    with owning(tmp_path) as found:
        found.agent.stop()
        (custodian,) = custodians(found)
        process = os.pidfd_open(custodian)
        namespaces.ip("netns", "del", found.lab.gateway)
        assert found.lab.gateway not in netns.names()
        until(lambda: ended(process), "the custodian has ended")
        os.close(process)
        namespaces.make(found.lab.gateway)  # for the end of the lab


def ended(process: int) -> bool:
    """Whether a process has ended, given its pidfd."""
    return bool(select.select([process], [], [], 0)[0])


# --- from one kind of table to the other ---


def test_a_reload_turns_it_into_a_plain_table_and_back_and_no_packet_comes_out(own: Gateway) -> None:
    """A plain table can be changed by an agent of an older release."""
    with seen(own.lab.internet) as view, blocked(own):
        for owned in ("never", "auto", "never"):
            own.agent.configure(ruleset={"owned": owned})
            own.agent.reload()
            until(lambda: bool(owner(own)) is (owned == "auto"), f"owned = {owned}")  # noqa: B023 # at once
            until(lambda: len(custodians(own)) == (owned == "auto"), f"owned = {owned}")  # noqa: B023 # at once
        leaked = [packet for packet in view.packets() if packet.haslayer("TCP") and packet["TCP"].dport == 25]
    assert not leaked
    assert state(own, CLOSED) is None
    assert status(own)["ruleset_repairs"] == 0  # once: a repair would have been counted before
    assert nft(own, "delete table inet portward\n") == ""
    until(lambda: status(own)["ruleset_repairs"] == 1, "the agent has put it back")
    until(lambda: 'not owned, another program can remove them: [ruleset] owned = "never"' in text(own), "status")


def text(gateway: Gateway) -> str:
    """The output of `portward status`."""
    return gateway.agent.portward("status").stdout


@contextlib.contextmanager
def blocked(gateway: Gateway) -> Iterator[None]:
    """The blocked tenant sends all the time."""
    packet = segment("10.0.0.4")
    with meanwhile(lambda: gateway.senders[FABRIKAM].send(packet)):
        yield


def test_an_agent_of_an_older_release_is_refused_and_changes_nothing(own: Gateway) -> None:
    """It loads a plain table over a socket of its own."""
    own.agent.stop()
    before = fingerprint(own)
    with namespaces.inside(own.lab.gateway), closing(NfNetlink()) as netlink:
        with pytest.raises(KernelError, match="Operation not permitted"):
            Nft(netlink).load("table inet portward { }\n")
        with pytest.raises(KernelError, match="Operation not permitted"):
            Nft(netlink, compiles=False).load("delete table inet portward\n")
    assert fingerprint(own) == before


def test_rules_remove_ends_the_custodian_and_opens_the_port(own: Gateway) -> None:
    assert own.agent.portward("rules", "remove", "--yes").returncode == 1, "an agent runs"
    own.agent.stop()
    said = own.agent.portward("rules", "remove", "--yes")
    assert (said.returncode, said.stderr) == (0, "")
    assert state(own) is None
    assert not custodians(own)
    assert own.passes(FABRIKAM, "10.0.0.4")


def test_the_baseline_leaves_a_table_that_the_agent_adopts(own: Gateway) -> None:
    own.agent.stop()
    assert own.agent.portward("rules", "remove", "--yes").returncode == 0
    said = own.agent.portward("rules", "baseline")
    assert (said.returncode, said.stderr) == (0, "")
    found = state(own)
    assert found is not None
    assert (found.owner, found.persists) == (0, True)
    assert not own.passes(FABRIKAM, "10.0.0.4")
    own.agent.start()
    assert owner(own)
    assert own.passes(CONTOSO, "10.0.0.4")


def test_the_script_of_nftables_service_closes_nothing_because_nothing_goes(own: Gateway) -> None:
    """nft 1.0.6 lists the flag `owner`, too."""
    script = Path(__file__).resolve().parents[2] / "systemd" / "nftables"
    assert own.passes(CONTOSO, "10.0.0.4")
    for word in ("start", "stop"):
        argv = ["sh", "-ec", 'mount --bind "$1" /etc/nftables.conf; exec sh "$2" "$3"', "sh"]
        rules = own.agent.folder / "nftables.conf"
        rules.write_text("flush ruleset\ntable inet theirs { }")
        done = namespaces.run(own.lab.gateway, ["unshare", "--mount", *argv, str(rules), str(script), word])
        assert (done.returncode, done.stderr) == (0, "")
        assert state(own, CLOSED) is None
    assert "10.0.0.4" in own.listing("allow4")
    own.agent.stop()
    assert not own.passes(FABRIKAM, "10.0.0.4")


# --- the socket of a process before ---


@pytest.fixture
def place() -> Iterator[str]:
    """An empty network namespace."""
    name = lab_name()
    namespaces.make(name)
    yield name
    namespaces.remove(name)


def test_what_the_process_before_left_unread_disturbs_no_request(place: str) -> None:
    """It was killed in the midst of a dump. The kernel would refuse the next one (EBUSY)."""
    keys = [Source(1, number.to_bytes(4, "big")).key for number in range(20_000)]
    with namespaces.inside(place), closing(NfNetlink()) as first:
        Nft(first).load("table inet portward { set allow4 { type iface_index . ipv4_addr; }; }\n")
        KernelElements(first).commit([Add("allow4", keys)])
        body = attribute(nf_tables.NFTA_SET_ELEM_LIST_TABLE, string(TABLE))
        body += attribute(nf_tables.NFTA_SET_ELEM_LIST_SET, string("allow4"))
        payload = NFGEN.pack(nf_tables.NFPROTO_INET, 0, 0) + body
        kind = nf_tables.NFNL_SUBSYS_NFTABLES << 8 | nf_tables.NFT_MSG_GETSETELEM
        dump = HEADER.pack(HEADER.size + len(payload), kind, NLM_F_REQUEST | NLM_F_DUMP, 1, 0) + payload
        first._socket.send(dump)
        first._socket.recv(1 << 17)
        with pytest.raises(OSError) as raised:  # noqa: PT011 # the number is what counts
            first.rows(TABLE, "allow4")
        assert raised.value.errno == errno.EBUSY
        with closing(NfNetlink(socket.socket(fileno=os.dup(first.fileno())))) as second:
            assert second.port == first.port
            assert len(second.rows(TABLE, "allow4")) == len(keys)
            second.commit([(nf_tables.NFT_MSG_NEWTABLE, attribute(nf_tables.NFTA_TABLE_NAME, string("more")))])


def test_owner_and_flags_of_each_kind_of_table_are_read(place: str) -> None:
    def made(flags: bytes | None) -> Callable[[NfNetlink], object]:
        body = attribute(nf_tables.NFTA_TABLE_NAME, string(TABLE))
        body += b"" if flags is None else attribute(nf_tables.NFTA_TABLE_FLAGS, flags)
        return lambda netlink: netlink.commit([(nf_tables.NFT_MSG_NEWTABLE, body)])

    with namespaces.inside(place), closing(NfNetlink()) as looking:
        assert looking.state(TABLE) is None
        first = NfNetlink()
        made(compiled.OWNED_FLAGS)(first)
        assert looking.state(TABLE) == TableState(first.port, "", persists=True)
        assert tableowner.owner(looking) == first.port
        first.close()
        assert looking.state(TABLE) == TableState(0, "", persists=True)
        looking.commit([(nf_tables.NFT_MSG_DELTABLE, attribute(nf_tables.NFTA_TABLE_NAME, string(TABLE)))])
        made(None)(looking)
        assert looking.state(TABLE) == TableState(0, "", persists=False)


# --- what the agent finds out by itself ---


def test_the_agent_owns_its_table_by_itself_if_the_host_can(tmp_path: Path) -> None:
    if why := tableowner._old_nft():
        pytest.skip(f"{why}; `make test-trixie` runs this test")
    with running_gateway(tmp_path, ruleset={"owned": "auto"}) as found:
        assert owner(found)
        until(lambda: status(found)["ownership"]["owned"], "status")
        listed = namespaces.run(found.lab.gateway, ["nft", "-t", "list", "table", "inet", "portward"]).stdout
        assert "flags owner,persist" in listed
        # nft can read its own listing again.
        bare = listed.replace("table inet portward ", "table inet another ")
        assert namespaces.run(found.lab.gateway, ["nft", "-c", "-f", "-"], text=bare).stderr == ""


def test_the_agent_owns_no_table_that_the_hosts_nft_cannot_name(tmp_path: Path) -> None:
    if not (why := tableowner._old_nft()):
        pytest.skip("this host's nft knows such tables; `make test` on Debian 12 runs this test")
    with running_gateway(tmp_path, ruleset={"owned": "auto"}) as found:
        assert owner(found) == 0
        assert not custodians(found)
        until(lambda: status(found)["ownership"] == {"owned": False, "custodian": None, "why": why}, "status")
