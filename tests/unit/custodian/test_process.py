"""The custodian process: to whom it gives the socket, and when it ends. Any socket stands for the netlink
socket."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from portward import __version__
from portward.base import netns
from portward.base.resources import PYTHON
from portward.ipc import custody
from portward.custodian import process as module
from portward.custodian.process import Custodian
from portward.lab.agent import until

_numbers = itertools.count(os.getpid() << 8)
_PATIENCE_S = 60.0


class Place:
    """An agent beside its custodian: a socket to keep, the listening socket, and the connection."""

    def __init__(self) -> None:
        self.port = next(_numbers)
        self.kept = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.kept.bind(("127.0.0.1", 0))
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(custody.address(self.port))
        self.listener.listen()
        self.agent, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *users: int) -> subprocess.Popen[bytes]:
        """Starts a custodian, which alone has the listening socket from then on."""
        passed = (self.kept.fileno(), self.listener.fileno(), self.theirs.fileno())
        argv = [*PYTHON, "-m", "portward.custodian.process", *map(str, (*passed, *(users or (os.geteuid(),))))]
        self.process = subprocess.Popen(argv, pass_fds=passed)
        self.theirs.close()
        self.listener.close()
        return self.process

    def connect(self) -> socket.socket:
        """A connection of a process that wants the socket."""
        found = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        found.settimeout(_PATIENCE_S)
        found.connect(custody.address(self.port))
        return found

    def take(self) -> tuple[custody.Greeting, list[socket.socket], socket.socket]:
        """The greeting, the sockets that come with it, and the connection."""
        connection = self.connect()
        text, descriptors, _, _ = socket.recv_fds(connection, custody.GREETING_BYTES, custody.DESCRIPTORS)
        return custody.read(text), [socket.socket(fileno=number) for number in descriptors], connection

    def close(self) -> None:
        """Ends what is left."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        for one in (self.kept, self.listener, self.agent, self.theirs):
            one.close()


@pytest.fixture
def place() -> Iterator[Place]:
    """A place without a custodian."""
    found = Place()
    yield found
    found.close()


def test_it_passes_the_socket_on_to_one_agent_after_the_other(place: Place) -> None:
    custodian = place.start()
    place.agent.send(custody.KEEP)
    place.agent.close()
    for _ in range(2):
        greeting, (kept, listener), connection = place.take()
        assert greeting == custody.Greeting(custodian.pid, __version__)
        assert kept.getsockname() == place.kept.getsockname()
        assert listener.getsockname() == custody.address(place.port).encode()
        for one in (kept, listener, connection):
            one.close()
    assert custodian.poll() is None


def test_it_ends_with_the_agent_that_started_it_unless_that_said_to_stay(place: Place) -> None:
    custodian = place.start()
    place.take()[2].close()  # another agent that comes and goes changes nothing
    assert custodian.poll() is None
    place.agent.close()
    assert custodian.wait(_PATIENCE_S) == 0


def test_a_user_who_is_not_named_gets_nothing(place: Place) -> None:
    place.start(os.geteuid() + 1)
    assert place.connect().recv(1) == b""


def test_it_ends_at_once_if_it_is_told_to(place: Place) -> None:
    custodian = place.start()
    place.agent.send(custody.KEEP)
    _, (kept, listener), connection = place.take()
    listener.close()
    connection.send(custody.END)
    assert connection.recv(1) == b"", "the end of the connection says so"
    assert custodian.wait(_PATIENCE_S) == 0
    with pytest.raises(ConnectionRefusedError):
        place.connect()
    kept.close()


def test_signals_of_a_terminal_and_of_a_reload_do_not_end_it_and_a_shutdown_does(place: Place) -> None:
    custodian = place.start()
    place.take()[2].close()  # from now on its signals are set
    for number in (signal.SIGINT, signal.SIGHUP):
        custodian.send_signal(number)
    place.take()[2].close()
    assert custodian.poll() is None
    custodian.send_signal(signal.SIGTERM)
    assert custodian.wait(_PATIENCE_S) == -signal.SIGTERM


def test_more_connections_than_there_can_be_agents_are_refused_and_it_goes_on(place: Place) -> None:
    place.start()
    most = [place.take()[2] for _ in range(module._MAX_PEERS - 1)]  # and the agent's
    assert place.connect().recv(1) == b""
    most.pop().close()
    until(lambda: place.connect().recv(1), "there is room again")


def test_a_peer_that_goes_before_it_is_greeted_does_not_end_it(place: Place) -> None:
    custodian = place.start()
    place.take()[2].close()
    custodian.send_signal(signal.SIGSTOP)
    for _ in range(3):
        place.connect().close()
    custodian.send_signal(signal.SIGCONT)
    assert place.take()[0].process == custodian.pid


def test_it_needs_no_file_after_its_start(place: Place) -> None:
    """An upgrade replaces the program's files, and a removal deletes them."""
    custodian = place.start()
    place.take()[2].close()
    before = loaded(custodian.pid)
    place.take()[2].close()
    assert loaded(custodian.pid) == before


def loaded(process: int) -> set[str]:
    """The files that a process has mapped."""
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) > 5}


@pytest.mark.parametrize("name", ["qrouter-1", ""])
def test_it_ends_if_its_network_namespace_loses_its_name(
    place: Place, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The machine's own namespace has no name, and none to lose."""
    has_name, asked = threading.Event(), threading.Event()
    has_name.set()

    def is_own(one: str) -> bool:
        assert one == name
        asked.set()
        return has_name.is_set()

    monkeypatch.setattr(netns, "name_of", lambda _: name)
    monkeypatch.setattr(netns, "is_own", is_own)
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    custodian = Custodian(place.kept.fileno(), place.listener, place.theirs, [os.geteuid()])
    thread = threading.Thread(target=custodian.serve)
    thread.start()
    if name:
        assert asked.wait(_PATIENCE_S)
        assert thread.is_alive()
        has_name.clear()
    else:
        place.take()[2].close()
        assert not asked.is_set()
        place.agent.send(custody.END)
    thread.join(_PATIENCE_S)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    "datagram",
    [b"", b"portward-custodian", *(b"portward-custodian " + end for end in (b"2 7 1.0", b"1 x 1.0", b"1 7 1 0"))],
)
def test_another_greeting_is_no_greeting(datagram: bytes) -> None:
    with pytest.raises(ValueError, match="no greeting of a custodian of version 1"):
        custody.read(datagram)


def test_a_greeting_is_read_as_it_was_written() -> None:
    assert custody.read(custody.greeting(4711, "1.2~3")) == custody.Greeting(4711, "1.2~3")
