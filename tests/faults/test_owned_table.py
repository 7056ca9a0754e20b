"""Tables with an owner (`flags owner, persist`, Linux 6.9 and later): the kernel's guarantees, and how far
libnftables 1.0.6 can use such a table. `tests/kernel/test_owned.py` tests portward's own.

The owner of a table is a netlink socket. nft 1.0.6 knows `flags owner` but not `persist`. So these tests set the
flags by a raw netlink message; one test sends it on the socket of a libnftables context.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel.conftest import lab_name
from portward.dataplane.nft import Nft
from portward.errors import KernelError
from portward.lab import namespaces

_OWNER, _PERSIST = 0x2, 0x4  # linux/netfilter/nf_tables.h
_NETLINK_NETFILTER, _INET = 12, 1
_CHAIN = "chain c {\n type filter hook prerouting priority 0; tcp dport 25 drop\n }\n"


@pytest.fixture
def place() -> Iterator[str]:
    """An empty network namespace."""
    name = lab_name()
    namespaces.make(name)
    yield name
    namespaces.remove(name)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + b"\0" * (-len(value) % 4)


def message(kind: int, flags: int, sequence: int, family: int, subsystem: int, body: bytes) -> bytes:
    payload = struct.pack(">BBH", family, 0, subsystem) + body
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, sequence, 0) + payload


def own(netlink: socket.socket, table: str, flags: int = _OWNER | _PERSIST) -> int:
    """Makes a netlink socket the owner of a table, which is made if it is missing; gives the kernel's errno, or
    0."""
    body = attribute(1, table.encode() + b"\0") + attribute(2, struct.pack(">I", flags))
    netlink.send(
        message(0x10, 1, 1, 0, 10, b"")  # NFNL_MSG_BATCH_BEGIN, request, for nftables
        + message(10 << 8, 0x405, 2, _INET, 0, body)  # NFT_MSG_NEWTABLE, request, ack, create
        + message(0x11, 1, 3, 0, 10, b"")  # NFNL_MSG_BATCH_END
    )
    reply = netlink.recv(65_536)
    return -int(struct.unpack_from("=i", reply, 16)[0])


def netlink_socket() -> socket.socket:
    found = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    found.bind((0, 0))
    return found


def sockets() -> dict[str, int]:
    """The open sockets of this process: the kernel's name for each (`socket:[inode]`), and its descriptor."""
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found[os.fspath(path.readlink())] = int(path.name)
    return {name: number for name, number in found.items() if name.startswith("socket:")}


def nft(place: str, text: str) -> subprocess.CompletedProcess[str]:
    """Runs the program nft with `text`, so as another process."""
    return namespaces.run(place, ["nft", "-f", "-"], text=text)


def tables(place: str) -> str:
    return namespaces.run(place, ["nft", "list", "tables"]).stdout


def test_another_process_can_neither_flush_nor_change_it(place: str) -> None:
    nft(place, f"table inet plain {{\n {_CHAIN} }}\n")
    with namespaces.inside(place), netlink_socket() as owner:
        assert own(owner, "owned") == 0
        assert nft(place, "flush ruleset\n").returncode == 0
        assert tables(place) == "table inet owned\n"  # "plain" is gone, so the flush was a real one
        for command in ("delete table inet owned", "flush table inet owned", "add chain inet owned x"):
            assert "Operation not permitted" in nft(place, f"{command}\n").stderr
        with netlink_socket() as other:
            assert own(other, "owned") == errno.EPERM


@pytest.mark.parametrize(("flags", "left"), [(_OWNER, ""), (_OWNER | _PERSIST, "table inet owned\n")])
def test_when_its_owner_is_killed_it_stays_only_if_it_persists(place: str, flags: int, left: str) -> None:
    ready, answer = os.pipe()
    with namespaces.inside(place):
        child = os.fork()
        if child == 0:
            try:
                netlink = netlink_socket()
                os.write(answer, bytes([own(netlink, "owned", flags)]))
                signal.pause()
            finally:
                os._exit(1)
    assert os.read(ready, 1) == b"\0"
    assert tables(place) == "table inet owned\n"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready)
    os.close(answer)
    assert tables(place) == left


def test_a_table_that_persists_is_taken_over_by_the_next_owner_and_until_then_any_process_can_change_it(
    place: str,
) -> None:
    with namespaces.inside(place):
        with netlink_socket() as first:
            assert own(first, "owned") == 0
        with netlink_socket() as second:
            assert own(second, "owned") == 0
            assert "Operation not permitted" in nft(place, "delete table inet owned\n").stderr
        assert nft(place, "flush ruleset\n").returncode == 0
        assert tables(place) == ""


def test_a_table_without_owner_cannot_be_taken_over(place: str) -> None:
    nft(place, f"table inet plain {{\n {_CHAIN} }}\n")
    with namespaces.inside(place), netlink_socket() as owner:
        assert own(owner, "plain") == errno.EOPNOTSUPP


def test_libnftables_changes_its_own_table_by_commands_but_not_by_a_table_block(place: str) -> None:
    with namespaces.inside(place):
        before = set(sockets())
        nft_ = Nft()
        context = nft_._context()
        (number,) = (number for name, number in sockets().items() if name not in before)
        with socket.socket(fileno=os.dup(number)) as owner:
            assert own(owner, "owned") == 0
        nft_._run(context, "add set inet owned s { type ipv4_addr; }\nadd element inet owned s { 192.0.2.1 }")
        nft_._run(context, "flush table inet owned\nadd chain inet owned c")
        for text in ("add table inet owned", f"table inet owned {{\n flags owner;\n {_CHAIN} }}\n"):
            with pytest.raises(KernelError, match="not supported"):
                nft_._run(context, text)
        with pytest.raises(KernelError, match="not permitted"):
            nft_.load("add chain inet owned d")  # by another context, so by another socket
