"""The owner's socket goes from agent to agent, and there is a custodian as long as the table has an owner. The
custodians are real processes, and the kernel's answers about the table are made up."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from portward.base import netns
from portward.base.netlink import NETLINK_NETFILTER
from portward.dataplane import tableowner
from portward.dataplane.fake import FakeKernel
from portward.dataplane.nfnetlink import TableState
from portward.dataplane.tableowner import CustodianError, TableOwner, _old_nft, obstacle
from portward.errors import KernelError
from portward.ipc import custody
from portward.lab.agent import until


class Netlink:
    """A netlink socket to a kernel whose table has the owner `owner`."""

    owner = 0
    sockets: list[socket.socket] = []  # noqa: RUF012 # of the class, so that the fixture closes them

    def __init__(self, inherited: socket.socket | None = None) -> None:
        self._socket = inherited or socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        if inherited is None:
            self._socket.bind((0, 0))
        self.sockets.append(self._socket)

    @property
    def port(self) -> int:
        """The socket's address."""
        return int(self._socket.getsockname()[0])

    def fileno(self) -> int:
        """The descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Closes it."""
        self._socket.close()

    def state(self, _: str) -> TableState | None:
        """The table, which has an owner or is not there."""
        return TableState(self.owner, "", persists=True) if self.owner else None


class Agents:
    """One agent after the other, with the custodians that they have started."""

    def __init__(self) -> None:
        self.made: list[TableOwner] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *users: int) -> TableOwner:
        """A new agent."""
        found = TableOwner(users or [os.geteuid()])
        self.made.append(found)
        return found

    def enforce(self) -> TableOwner:
        """A new agent that has loaded a table, and so owns it."""
        found = self.start()
        found.begin()
        Netlink.owner = found.netlink.port
        found.settle(owned=True)
        return found


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Iterator[Agents]:
    """A host without an agent."""
    found = Agents()
    popen = subprocess.Popen

    def started(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] = popen(*arguments, **options)
        found.processes.append(process)
        return process

    monkeypatch.setattr(tableowner, "NfNetlink", Netlink)
    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(tableowner, "_LEAST_LIFE_S", 0.0)
    yield found
    Netlink.owner = 0
    for process in found.processes:
        process.kill()
        process.wait()
    for agent in found.made:
        agent.close()
    while Netlink.sockets:
        Netlink.sockets.pop().close()


def ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended."""
    return process.poll() is not None


def test_the_next_agent_has_the_same_socket_and_the_same_custodian(agents: Agents) -> None:
    first = agents.enforce()
    port, custodian = first.netlink.port, first.custodian
    first.close()
    for _ in range(2):
        again = agents.start()
        assert (again.netlink.port, again.custodian) == (port, custodian)
        again.settle(owned=True)
        again.close()
    assert len(agents.processes) == 1
    assert not ended(agents.processes[0])


def test_a_custodian_of_an_agent_that_never_enforced_ends_with_it(agents: Agents) -> None:
    first = agents.start()
    first.begin()
    first.close()
    until(lambda: ended(agents.processes[0]), "the custodian has ended")


def test_without_an_owned_table_there_is_no_custodian(agents: Agents) -> None:
    first = agents.start()
    assert (first.has_custodian, first.custodian, first.descriptor) == (False, None, None)
    first.settle(owned=False)
    assert not agents.processes


def test_if_the_table_has_no_owner_any_more_the_custodian_ends(agents: Agents) -> None:
    first = agents.enforce()
    assert first.has_custodian
    first.settle(owned=False)
    assert not first.has_custodian
    until(lambda: ended(agents.processes[0]), "the custodian has ended")
    assert tableowner._connected(first.netlink.port) is None


def test_a_custodian_that_ends_is_seen_and_another_takes_its_place(
    agents: Agents, caplog: pytest.LogCaptureFixture
) -> None:
    first = agents.enforce()
    assert not first.has_ended
    agents.processes[0].kill()
    until(lambda: first.has_ended, "the agent sees it")
    first.settle(owned=True)
    assert not first.has_ended
    assert f"(process {agents.processes[0].pid}) has ended: another one is started" in caplog.text
    first.close()
    assert agents.start().custodian == agents.processes[1].pid


def test_a_custodian_that_ends_at_once_is_an_error_so_that_it_is_tried_less_often(
    agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = agents.enforce()
    monkeypatch.setattr(tableowner, "_LEAST_LIFE_S", 60.0)
    agents.processes[0].kill()
    until(lambda: first.has_ended, "the agent sees it")
    with pytest.raises(CustodianError, match="has ended at once"):
        first.settle(owned=True)
    assert (first.has_custodian, first.descriptor) == (False, None), "it must not be seen again and again"
    first.settle(owned=True)
    assert first.custodian == agents.processes[1].pid


def test_a_custodian_that_cannot_be_started_is_an_error(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refused)
    first = agents.start()
    with pytest.raises(CustodianError, match=r"cannot be started.*Resource temporarily unavailable"):
        first.begin()
    assert not first.has_custodian


def test_after_an_upgrade_the_custodian_is_one_of_the_new_release(
    agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents.enforce().close()
    monkeypatch.setattr(tableowner, "__version__", "9.9")
    second = agents.start()
    assert second.custodian == agents.processes[0].pid, "until it enforces"
    second.settle(owned=True)
    assert second.custodian == agents.processes[1].pid
    until(lambda: ended(agents.processes[0]), "the old one has ended")
    second.close()
    assert not ended(agents.processes[1])


def test_all_custodians_of_a_socket_end_also_one_that_a_killed_agent_left_beside_another(agents: Agents) -> None:
    first = agents.enforce()
    another = first._started()
    another.send(custody.KEEP)
    first.close()
    another.connection.close()
    last = agents.start()
    Netlink.owner = 0
    last.let_go()
    until(lambda: all(map(ended, agents.processes)), "both have ended")


def test_whoever_lets_the_table_go_has_another_socket(agents: Agents) -> None:
    first = agents.enforce()
    before = first.netlink
    threading.Timer(0.05, lambda: setattr(Netlink, "owner", 0)).start()  # as the kernel does when it is closed
    first.let_go()
    assert Netlink.owner == 0, "the kernel has taken note"
    assert first.netlink is not before
    assert not first.has_custodian


def test_a_namespace_without_its_name_gets_no_custodian(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would live on in the custodian."""
    monkeypatch.setattr(netns, "name_of", lambda _: "qrouter-1")
    monkeypatch.setattr(netns, "is_own", lambda _: False)
    first = agents.start()
    first.settle(owned=True)
    assert not first.has_custodian


# --- what stands in the way ---


def test_an_owner_that_is_about_to_end_is_waited_for(agents: Agents) -> None:
    """Agent and custodian were killed a moment ago."""
    Netlink.owner = 4711
    threading.Timer(0.05, lambda: setattr(Netlink, "owner", 0)).start()
    assert not agents.start().has_custodian


def test_a_table_of_another_program_is_named_as_such(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tableowner, "_ANSWER_S", 0.05)
    Netlink.owner = 4711
    with pytest.raises(KernelError, match=r"belongs to another program \(netlink socket 4711"):
        agents.start()


def test_a_user_to_whom_the_custodian_gives_nothing_is_told_who_may(agents: Agents) -> None:
    first = agents.start(os.geteuid() + 1)
    first.begin()
    Netlink.owner = first.netlink.port
    with pytest.raises(CustodianError, match="run this as root, or as the agent's user"):
        agents.start()


def test_a_custodian_that_does_not_answer_is_an_error_that_says_how_to_find_it(
    agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tableowner, "_ANSWER_S", 0.05)
    agents.enforce().close()
    agents.processes[0].send_signal(signal.SIGSTOP)
    with pytest.raises(CustodianError, match=r"does not answer .*pgrep -af portward\.custodian"):
        agents.start()


@pytest.mark.parametrize("sent", ["another socket", "too few", "no greeting"])
def test_whatever_is_no_custodian_of_this_table_is_not_taken_for_one(agents: Agents, sent: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, socket.socket() as other:
        listener.bind(custody.address(4711))
        listener.listen()
        number = [other.fileno()] * (1 if sent == "too few" else 2)
        text = b"hello" if sent == "no greeting" else custody.greeting(7, "1")

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                socket.send_fds(peer, [text], number)

        thread = threading.Thread(target=answer)
        thread.start()
        Netlink.owner = 4711
        with pytest.raises(CustodianError):
            agents.start()
        thread.join()


def test_an_address_that_another_process_has_is_an_error(agents: Agents) -> None:
    first = agents.start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as squatter:
        squatter.bind(custody.address(first.netlink.port))
        with pytest.raises(CustodianError, match=r"the address of the custodian .*Address already in use"):
            first.begin()


# --- whether a table can have an owner here ---


def test_an_old_kernel_says_so() -> None:
    kernel = FakeKernel(persists=False)
    netlink = kernel.netlink()
    found = obstacle(kernel.nft(netlink, compiles=True), netlink)
    assert found == (
        "the kernel takes no table that outlives its owner (Operation not supported): Linux 6.9 and later do"
    )


def test_an_old_libnftables_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel()
    netlink = kernel.netlink()
    nft = kernel.nft(netlink, compiles=True)

    def refused(_: str) -> None:
        raise KernelError("nft: 1:27-27: Error: syntax error, unexpected comma")

    assert obstacle(nft, netlink) == ""
    assert obstacle(kernel.nft(netlink), netlink) == "libnftables prints no messages that portward can read"
    monkeypatch.setattr(tableowner, "_old_nft", lambda: "nft is old")
    assert obstacle(nft, netlink) == "nft is old"
    monkeypatch.setattr(tableowner, "_old_nft", lambda: "")
    monkeypatch.setattr(nft, "check", refused)
    assert obstacle(nft, netlink).startswith("libnftables takes no table that outlives its owner (nft: 1:27-27: ")
    assert not kernel.journal, "it changes nothing"


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("nftables v1.0.6 (Lester Gooch #5)", "is of version 1.0, and tables that outlive their owner need 1.1"),
        ("nftables v1.0.9 (Old Doc Yak #3)", "is of version 1.0, and tables that outlive their owner need 1.1"),
        ("nftables v1.1.3 (Commodore Bullmoose #4)", ""),
        ("nftables v2.0 (?)", ""),
        ("usage: nft", "does not say its version"),
    ],
)
def test_the_program_nft_of_the_host_must_know_such_tables_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, found: str
) -> None:
    """An operator lists the tables with it."""
    program = tmp_path / "nft"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert _old_nft() == (f"{program} {found}" if found else "")


def test_a_host_without_the_program_has_nothing_that_could_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert _old_nft() == ""
