"""Messages of the kernel after which an interface still exists: a bridge's messages about its ports, changes of
settings, and events in other network namespaces. The agent must not take any of them for a deletion or a change of
owner."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import TypeAlias

import pytest

from kernel.conftest import lab_name
from portward.dataplane import rtnetlink
from portward.dataplane.links import Links
from portward.lab import namespaces

PORT, END = 7001, "last"
Follow: TypeAlias = Callable[..., list[Links]]


@pytest.fixture
def places() -> Iterator[tuple[str, str]]:
    """Two namespaces. The first has a bridge, a port of it, and a segment that is not its port. The second has an
    interface with the segment's index."""
    name = lab_name()
    here, there = f"{name}a", f"{name}b"
    for place in (here, there):
        namespaces.make(place)
    try:
        namespaces.batch(
            here,
            [
                "link add br0 type bridge",
                "link set br0 up",
                f"link add vni1 index {PORT} type veth peer name x1",
                "link set vni1 up",
                "link add vni2 type veth peer name x2",
                "link set vni2 master br0",
            ],
        )
        namespaces.batch(there, [f"link add vni1 index {PORT} type veth peer name x1"])
        yield here, there
    finally:
        namespaces.remove(here)
        namespaces.remove(there)


@pytest.fixture
def follow(places: tuple[str, str]) -> Follow:
    """Gives a function that runs lines of `ip` in a namespace, one after the other. Its result is everything that
    was reported about the first namespace from before the first line until after the last one."""

    def run(*lines: str, where: int = 0, program: str = "ip") -> list[Links]:
        with namespaces.inside(places[0]):
            return asyncio.run(_followed(places, where, program, lines))

    return run


async def _followed(places: tuple[str, str], where: int, program: str, lines: tuple[str, ...]) -> list[Links]:
    found: list[Links] = []
    generator: AsyncGenerator[Links, None] = rtnetlink.follow()
    async with contextlib.aclosing(generator) as news:
        await anext(news)
        for line in lines:
            result = await asyncio.to_thread(namespaces.run, places[where], [program, *line.split()])
            assert not result.returncode, result.stderr
        # When this last interface has been reported, all messages before it have been read.
        await asyncio.to_thread(namespaces.ip, "-n", places[0], "link", "add", END, "type", "bridge")
        async with asyncio.timeout(10):
            async for links in news:
                found.append(links)
                if END in links.names.values():
                    return found
    return found


@pytest.mark.parametrize(
    "lines",
    [
        ("link set vni1 master br0",),
        ("link set vni1 master br0", "link set vni1 nomaster"),
        ("link set vni2 nomaster",),
        ("link set vni2 nomaster", "link set vni2 master br0", "link set vni2 nomaster"),
        ("link set vni1 mtu 1400",),
        ("link set vni1 down", "link set vni1 up"),
        ("link set vni1 alias some-words",),
        ("link property add dev vni1 altname another",),
        ("link set vni1 address 02:00:00:00:00:09",),
        ("link set br0 type bridge ageing_time 2000",),
        ("-6 addr add 2001:db8::7 dev vni1",),
    ],
    ids=" & ".join,
)
def test_interfaces_that_stay_are_neither_gone_nor_touched(follow: Follow, lines: tuple[str, ...]) -> None:
    for links in follow(*lines):
        assert {"vni1", "vni2", "br0"} <= set(links.names.values())
        assert not links.touched


def test_a_ports_settings_in_its_bridge_are_no_change_of_the_interface(follow: Follow) -> None:
    """The kernel announces them in the address family of bridges."""
    lines = [f"link set dev vni2 {name} {value}" for name in ("flood", "learning") for value in ("off", "on")]
    for links in follow(*lines, program="bridge"):
        assert {"vni1", "vni2"} <= set(links.names.values())
        assert not links.touched


def test_a_bridge_that_goes_leaves_its_ports(follow: Follow) -> None:
    last = follow("link del br0")[-1]
    assert {"vni1", "vni2"} <= set(last.names.values())
    assert not {PORT} & set().union(*(links.touched for links in [last]))


def test_what_happens_in_another_namespace_is_not_reported(follow: Follow) -> None:
    """In the other namespace an interface with the same index and name is deleted and made again."""
    lines = ("link set vni1 mtu 1400", "link del vni1", f"link add vni1 index {PORT} type veth peer name x1")
    for links in follow(*lines, where=1):
        assert links.names[PORT] == "vni1"
        assert not links.touched


def test_an_interface_that_moves_to_another_namespace_is_gone(follow: Follow, places: tuple[str, str]) -> None:
    reported = follow(f"link set vni1 netns {places[1]} name moved")
    assert "vni1" not in reported[-1].names.values()
    assert PORT in set().union(*(links.touched for links in reported))


def test_an_interface_that_goes_and_comes_back_under_its_index_is_touched(follow: Follow) -> None:
    reported = follow("link del vni1", f"link add vni1 index {PORT} type veth peer name x1")
    assert reported[-1].names[PORT] == "vni1"
    assert PORT in set().union(*(links.touched for links in reported))


def test_only_the_kernel_is_believed(places: tuple[str, str]) -> None:
    """Another process with CAP_NET_ADMIN can forge a message of the kernel. Some programs send such messages to
    groups of their own."""

    async def forged() -> list[Links]:
        found: list[Links] = []
        async with contextlib.aclosing(rtnetlink.follow()) as news:
            first = await anext(news)
            index = next(index for index, name in first.names.items() if name == "vni1")
            body = rtnetlink._LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0) + b"\x09\0\x03\0vni1\0\0\0\0"
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as forger:
                message = (16 + len(body)).to_bytes(4, "little") + b"\x11\0" + bytes(10) + body
                forger.sendto(message, (0, 1))
            await asyncio.to_thread(namespaces.ip, "-n", places[0], "link", "add", END, "type", "bridge")
            async with asyncio.timeout(10):
                async for links in news:
                    found.append(links)
                    if END in links.names.values():
                        return found
        return found

    with namespaces.inside(places[0]):
        for links in asyncio.run(forged()):
            assert "vni1" in links.names.values()
            assert not links.touched
