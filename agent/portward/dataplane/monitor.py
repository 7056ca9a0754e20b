"""Receives the kernel's notices of changed rulesets, and picks out the changes that matter to portward.

kube-proxy and CrowdSec change their own tables hundreds of times a second. A notice names the table and the
address of the socket that made the transaction, so most changes need no reading of the ruleset.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Collection
from enum import Enum, auto
from typing import Final, NamedTuple

from portward.base.netlink import HEADER, NETLINK_NETFILTER, NFGEN, attributes_of, messages_of, string
from portward.dataplane import monitor_filter
from portward.dataplane.nf_tables import (
    NFNL_SUBSYS_NFTABLES,
    NFNLGRP_NFTABLES,
    NFT_MSG_DELCHAIN,
    NFT_MSG_DELRULE,
    NFT_MSG_DELTABLE,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWGEN,
    NFT_MSG_NEWRULE,
    NFTA_CHAIN_HOOK,
    NFTA_TABLE_NAME,
)

_MAX_DATAGRAM_BYTES: Final = 65_536
_SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h
_DELETIONS: Final = frozenset((NFT_MSG_DELTABLE, NFT_MSG_DELCHAIN, NFT_MSG_DELRULE))


class NoticeFilter(Enum):
    """The notices that the kernel drops before they are queued. NONE: it drops none. FOREIGN_ELEMENTS: those about
    sets, elements and objects in tables of other programs. FOREIGN_TABLES: all those about tables of other
    programs. A table whose name begins with `portward` is never foreign."""

    NONE = auto()
    FOREIGN_ELEMENTS = auto()
    FOREIGN_TABLES = auto()


class RulesetChanges(NamedTuple):
    """The changes of other programs since the last reading. `ours`: something in the tables of the monitor.
    `gained`: a chain with a hook, or a rule that writes into packets, was added to another table. `gone`: a table,
    chain or rule was deleted from another table. `others`: anything at all. `lost`: the kernel has dropped
    notices, so all of the above may have happened."""

    ours: bool = False
    gained: bool = False
    gone: bool = False
    others: bool = False
    lost: bool = False

    def __or__(self, more: tuple[bool, ...]) -> RulesetChanges:
        return RulesetChanges(*(one or other for one, other in zip(self, more, strict=True)))


NOTHING: Final = RulesetChanges()
LOST: Final = RulesetChanges(True, True, True, True, True)


class RulesetMonitor:
    """Receives the notices of the network namespace of the thread that makes it. `read` is for one thread."""

    def __init__(
        self,
        tables: Collection[tuple[int, str]],
        own: Callable[[], Collection[int]] = tuple,
        *,
        writing: Collection[bytes] = (),
        receive_bytes: int = 0,
        notice_filter: NoticeFilter = NoticeFilter.NONE,
    ) -> None:
        """`tables` are the tables that belong to portward: family (NFPROTO_…) and name. `own` returns the
        addresses of sockets whose transactions do not count. `writing`: a rule with any of these byte strings may
        write into packets. `receive_bytes` is the size of the receive buffer; 0: the kernel's default. Raises
        OSError if the kernel has no such socket."""
        self._tables = {(family, string(name)) for family, name in tables}
        self._own, self._writing = own, tuple(writing)
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_NETFILTER
        )
        if receive_bytes:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_bytes)
        # Before `bind`, so that the filter sees the first notice.
        if notice_filter is not NoticeFilter.NONE:
            # Without the filter the agent only wakes more often.
            with contextlib.suppress(OSError):
                monitor_filter.attach(self._socket, everything=notice_filter is NoticeFilter.FOREIGN_TABLES)
        self._socket.bind((0, 1 << (NFNLGRP_NFTABLES - 1)))

    def fileno(self) -> int:
        """A descriptor that is readable after a change."""
        return self._socket.fileno()

    def read(self) -> RulesetChanges:
        """The changes since the last call. Raises OSError."""
        changes, own = NOTHING, self._own()
        while True:
            try:
                data, sender = self._socket.recvfrom(_MAX_DATAGRAM_BYTES)
            except BlockingIOError:
                return changes
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                changes = LOST  # the socket still holds the notices after the dropped ones
                continue
            # Only the kernel has port 0: another process with CAP_NET_ADMIN can send messages too.
            if sender[0] == 0 and changes is not LOST:
                changes |= self._datagram(data, own)

    def _datagram(self, data: bytes, own: Collection[int]) -> RulesetChanges:
        changes, start = NOTHING, 0
        for kind, _, _, body in messages_of(data):
            # `messages_of` leaves out the port of the socket that made the transaction.
            length, *_, port = HEADER.unpack_from(data, start)
            start += (length + 3) & ~3
            if port not in own and kind >> 8 == NFNL_SUBSYS_NFTABLES and kind & 0xFF != NFT_MSG_NEWGEN:
                changes |= self._message(kind & 0xFF, body)
        return changes

    def _message(self, kind: int, body: bytes) -> RulesetChanges:
        """The changes in one message. It is about a table, or about something in a table."""
        first, table = next(attributes_of(body, NFGEN.size), (0, b""))
        if first != NFTA_TABLE_NAME:  # every message begins with the table's name, so this one is not understood
            return LOST
        if (body[0], table) in self._tables:
            return RulesetChanges(ours=True, others=True)
        gained = (kind == NFT_MSG_NEWCHAIN and NFTA_CHAIN_HOOK in dict(attributes_of(body, NFGEN.size))) or (
            kind == NFT_MSG_NEWRULE and any(part in body for part in self._writing)
        )
        return RulesetChanges(gained=gained, gone=kind in _DELETIONS, others=True)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()
