"""Interfaces as they come, go, change their index, and are put on top of each other, followed over rtnetlink.

An interface index can be used again by another tenant's interface, so a link that was deleted or renamed is
reported as touched even when everything looks as before by the time it is reported.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncGenerator, Iterator
from typing import Final, NamedTuple

from portward.base.descriptors import Reserve
from portward.base.interfaces import decoded
from portward.base.netlink import attributes_of, messages_of
from portward.dataplane.conversation import BUFFER, Conversation
from portward.dataplane.links import Device, Links
from portward.dataplane.tunnels import ports_of

_NETLINK_ROUTE: Final = 0
_GROUP_LINK: Final = 1  # RTMGRP_LINK
_NEW_LINK, _DEL_LINK, _GET_LINK = 16, 17, 18
# linux/if_link.h
_NAME, _LOWER, _MASTER, _INFO, _LOWER_NAMESPACE = 3, 5, 10, 18, 37
_INFO_KIND, _INFO_DATA = 1, 2
# Both ends of these name the other one as what they stand on; packets that one sends come in at the other.
_PAIRS: Final = ("veth", "netkit", "vxcan")
# struct ifinfomsg: family, type of hardware, index, flags, change.
_LINK: Final = struct.Struct("=BxHiII")
_INDEX: Final = struct.Struct("=I")
# Some thousand interfaces that come at once are not more than this.
_RECEIVE_BYTES: Final = 8 << 20
_SO_RCVBUFFORCE: Final = 33
# Between a broken conversation with the kernel and the next, in seconds.
_PAUSE: Final = 0.1

_log = logging.getLogger("portward.links")


class _Event(NamedTuple):
    deleted: bool
    device: Device


def devices() -> tuple[Device, ...]:
    """The interfaces that are there now, in this thread's network namespace. Raises OSError."""
    with Conversation(_NETLINK_ROUTE) as kernel:
        found = kernel.dump(_GET_LINK, _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
    return tuple(event.device for kind, body in found if (event := _event(kind, body)) is not None)


async def follow() -> AsyncGenerator[Links, None]:
    """Yields the interfaces there are, then again after each change; the first one touches nothing.

    If the kernel dropped messages (it does so to slow readers), everything is read anew and every index known
    before counts as touched. Raises OSError if rtnetlink cannot be used at all."""
    known: dict[int, Device] = {}
    first, said = True, ""
    # While interfaces are not followed, an index may get another owner unseen.
    reserve = Reserve(3)
    while True:
        try:
            async for links in _follow_once(known, reserve, first=first):
                first, said = False, ""
                known = {device.ifindex: device for device in links.devices}
                yield links
        except (OSError, ValueError, struct.error) as error:
            if first:
                raise
            if str(error) != said:
                _log.warning("interfaces are read anew: %s", error)
            said = str(error)
        await asyncio.sleep(_PAUSE)


async def _follow_once(before: dict[int, Device], reserve: Reserve, *, first: bool) -> AsyncGenerator[Links, None]:
    with reserve.lent():
        opened = _events()
    with opened as events:
        # Events first, then the list: what changes in between is seen in both.
        with reserve.lent():
            known = {device.ifindex: device for device in devices()}
        yield _links(known, frozenset() if first else frozenset(before))
        while True:
            yield await _next(known, events)


def _events() -> socket.socket:
    events = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_ROUTE
    )
    with contextlib.suppress(PermissionError):  # it takes CAP_NET_ADMIN; without it events are lost earlier
        events.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BYTES)
    events.bind((0, _GROUP_LINK))
    return events


async def _next(known: dict[int, Device], events: socket.socket) -> Links:
    """Waits for a change, takes all that have come by then into `known`, and says what they touched."""
    loop = asyncio.get_running_loop()
    touched: set[int] = set()
    before = dict(known)
    while known == before and not touched:
        data, sender = await loop.sock_recvfrom(events, BUFFER)
        for event in _all_of(data, sender, events):
            _take(event, known, touched)
    return _links(known, frozenset(touched))


def _all_of(data: bytes, sender: tuple[int, int], events: socket.socket) -> Iterator[_Event]:
    """The events in `data`, and those that wait behind it. `sender` is an address of netlink: port and groups.
    What does not come from port 0, the kernel, says nothing: another process with CAP_NET_ADMIN has sent it."""
    while True:
        for kind, _, _, body in messages_of(data) if sender[0] == 0 else ():
            if (event := _event(kind, body)) is not None:
                yield event
        try:
            data, sender = events.recvfrom(BUFFER)
        except BlockingIOError:
            return


def _event(kind: int, body: bytes) -> _Event | None:
    """What a message says of an interface; None for what says nothing of one.

    A bridge announces its ports by messages of its own family: one that a port has left says RTM_DELLINK, and the
    interface is still there.
    """
    if kind not in (_NEW_LINK, _DEL_LINK):
        return None
    family, _, index, _, _ = _LINK.unpack_from(body)
    if family != socket.AF_UNSPEC:
        return None
    found = dict(attributes_of(body, _LINK.size))
    if _NAME not in found:  # a wireless driver's own news
        return None
    info = dict(attributes_of(found.get(_INFO, b"")))
    driver = _text(info.get(_INFO_KIND, b""))
    # A number of another namespace names no interface here.
    other = 0 if _LOWER_NAMESPACE in found else _index(found.get(_LOWER))
    lower, peer = (0, other) if driver in _PAIRS else (other, 0)
    return _Event(
        kind == _DEL_LINK,
        Device(
            index,
            _text(found.get(_NAME, b"")),
            driver,
            _index(found.get(_MASTER)),
            0 if lower == index else lower,
            ports_of(driver, dict(attributes_of(info.get(_INFO_DATA, b"")))),
            peer,
        ),
    )


def _take(event: _Event, known: dict[int, Device], touched: set[int]) -> None:
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
