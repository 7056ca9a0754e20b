"""Reads the interfaces over rtnetlink, and follows their changes.

An operator, or another network namespace, can bring the index of a deleted interface back with an interface of
another tenant. The kernel itself reuses no index. So an interface that was
deleted or renamed is reported as touched, even if everything looks as before when the report is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import AsyncGenerator, Iterator
from typing import Final, NamedTuple

from portward.base.descriptors import Reserve
from portward.base.interfaces import decoded, encoded
from portward.base.netlink import attributes_of, messages_of
from portward.dataplane.dumpsocket import BUFFER_BYTES, DumpSocket
from portward.dataplane.links import Device, Links
from portward.dataplane.tunnels import ports_of

_NETLINK_ROUTE: Final = 0
_GROUP_LINK: Final = 1  # RTMGRP_LINK
# linux/rtnetlink.h
_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK = 16, 17, 18
# linux/if_link.h
_IFLA_IFNAME, _IFLA_LINK, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_LINK_NETNSID = 3, 5, 10, 18, 37
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
# IFLA_LINK of these kinds names the other end of a pair, at which packets come in that this end sends. IFLA_LINK
# of all other kinds names the interface on which they stand.
_PAIRS: Final = ("veth", "netkit", "vxcan")
# struct ifinfomsg: family, type of hardware, index, flags, change.
_LINK: Final = struct.Struct("=BxHiII")
_INDEX: Final = struct.Struct("=I")
# Enough for the events of some thousand interfaces that come at once.
_RECEIVE_BYTES: Final = 8 << 20
_SO_RCVBUFFORCE: Final = 33
# After rtnetlink has failed, before it is tried again.
_RETRY_S: Final = 0.1

_log = logging.getLogger("portward.links")


class _Event(NamedTuple):
    deleted: bool
    device: Device


def devices() -> tuple[Device, ...]:
    """The interfaces that are in this thread's network namespace now. Raises OSError."""
    with DumpSocket(_NETLINK_ROUTE) as kernel:
        found = kernel.dump(_RTM_GETLINK, _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
    return tuple(event.device for kind, body in found if (event := _event(kind, body)) is not None)


def index_of(name: str) -> int | None:
    """The index of an interface; None if no interface has this name now."""
    try:
        # With LC_ALL of another charset Python decodes file names in another way than `decoded`.
        return socket.if_nametoindex(os.fsdecode(encoded(name)))
    except (OSError, ValueError):
        return None


async def follow() -> AsyncGenerator[Links, None]:
    """Yields the interfaces, then yields them again after each change. The first `Links` has nothing touched.

    If the kernel has dropped messages, because the reader was slow, everything is read anew and every index from
    before counts as touched. Raises OSError if rtnetlink cannot be used at all."""
    known: dict[int, Device] = {}
    first, logged = True, ""
    # Descriptors are kept free, because while interfaces are not followed an index may change its owner unnoticed.
    reserve = Reserve(3)
    while True:
        try:
            async for links in _follow_once(known, reserve, first=first):
                first, logged = False, ""
                known = {device.ifindex: device for device in links.devices}
                yield links
        except (OSError, ValueError, struct.error) as error:
            if first:
                raise
            if str(error) != logged:
                _log.warning("rtnetlink failed, the interfaces are read anew: %s", error)
            logged = str(error)
        await asyncio.sleep(_RETRY_S)


async def _follow_once(before: dict[int, Device], reserve: Reserve, *, first: bool) -> AsyncGenerator[Links, None]:
    with reserve.lent():
        opened = _events()
    with opened as events:
        # Events first, then the list, so that a change in between is in both.
        with reserve.lent():
            known = {device.ifindex: device for device in devices()}
        yield _links(known, frozenset() if first else frozenset(before))
        while True:
            yield await _next(known, events)


def _events() -> socket.socket:
    events = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_ROUTE
    )
    with contextlib.suppress(PermissionError):  # without CAP_NET_ADMIN the buffer is smaller
        events.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BYTES)
    events.bind((0, _GROUP_LINK))
    return events


async def _next(known: dict[int, Device], events: socket.socket) -> Links:
    """Waits for a change, applies all events that have come by then to `known`, and returns the result."""
    loop = asyncio.get_running_loop()
    touched: set[int] = set()
    before = dict(known)
    while known == before and not touched:
        data, sender = await loop.sock_recvfrom(events, BUFFER_BYTES)
        for event in _all_of(data, sender, events):
            _apply(event, known, touched)
    return _links(known, frozenset(touched))


def _all_of(data: bytes, sender: tuple[int, int], events: socket.socket) -> Iterator[_Event]:
    """The events in `data`, and those that wait in the socket. `sender` is a netlink address: port and groups.
    Only the kernel, which has port 0, is believed: another process with CAP_NET_ADMIN can send messages too."""
    while True:
        for kind, _, _, body in messages_of(data) if sender[0] == 0 else ():
            if (event := _event(kind, body)) is not None:
                yield event
        try:
            data, sender = events.recvfrom(BUFFER_BYTES)
        except BlockingIOError:
            return


def _event(kind: int, body: bytes) -> _Event | None:
    """The event of an interface in a message; None if the message is about something else.

    A bridge announces its ports by messages of its own address family. When a port leaves the bridge, the message
    is an RTM_DELLINK although the interface is still there. So only AF_UNSPEC counts.
    """
    if kind not in (_RTM_NEWLINK, _RTM_DELLINK):
        return None
    family, _, index, _, _ = _LINK.unpack_from(body)
    if family != socket.AF_UNSPEC:
        return None
    found = dict(attributes_of(body, _LINK.size))
    if _IFLA_IFNAME not in found:  # an event of a wireless driver
        return None
    info = dict(attributes_of(found.get(_IFLA_LINKINFO, b"")))
    driver = _text(info.get(_IFLA_INFO_KIND, b""))
    # With IFLA_LINK_NETNSID the index is of another namespace, and names no interface here.
    other = 0 if _IFLA_LINK_NETNSID in found else _index(found.get(_IFLA_LINK))
    lower, peer = (0, other) if driver in _PAIRS else (other, 0)
    return _Event(
        kind == _RTM_DELLINK,
        Device(
            index,
            _text(found[_IFLA_IFNAME]),
            driver,
            _index(found.get(_IFLA_MASTER)),
            0 if lower == index else lower,
            ports_of(driver, dict(attributes_of(info.get(_IFLA_INFO_DATA, b"")))),
            peer,
        ),
    )


def _apply(event: _Event, known: dict[int, Device], touched: set[int]) -> None:
    device = event.device
    before = known.get(device.ifindex)
    if event.deleted:
        if known.pop(device.ifindex, None) is not None:
            touched.add(device.ifindex)
        return
    if before is not None and before.name != device.name:
        touched.add(device.ifindex)
    known[device.ifindex] = device


def _links(known: dict[int, Device], touched: frozenset[int]) -> Links:
    return Links({index: device.name for index, device in known.items()}, touched, tuple(known.values()))


def _text(value: bytes) -> str:
    return decoded(value.split(b"\0", 1)[0])


def _index(value: bytes | None) -> int:
    return 0 if value is None else int(_INDEX.unpack_from(value)[0])
