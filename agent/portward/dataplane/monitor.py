"""The kernel says when a ruleset has changed: what matters here is told from what other programs do among
themselves.

kube-proxy and CrowdSec change their own tables hundreds of times a second. A notice names the table, and the
address of the socket whose transaction it was, so neither needs a look at the ruleset."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Collection
from enum import Enum, auto
from typing import Final, NamedTuple

from portward.base.netlink import HEADER, NETLINK_NETFILTER, attributes_of, messages_of, string
from portward.dataplane import monitor_filter

_NFNLGRP_NFTABLES: Final = 7  # linux/netfilter/nfnetlink.h
_LARGEST: Final = 65_536
_SUBSYS_NFTABLES: Final = 10
_SO_RCVBUFFORCE: Final = 33
# linux/netfilter/nf_tables.h
_NEW_CHAIN, _NEW_RULE, _NEW_GENERATION = 3, 6, 15
_DELETE_TABLE, _DELETE_CHAIN, _DELETE_RULE = 2, 5, 8
_NFGEN_SIZE: Final = 4
_INET: Final = 1  # NFPROTO_INET
_CHAIN_HOOK: Final = 4


class NoticeFilter(Enum):
    """What the kernel does not even queue: nothing; what others do with sets, elements and objects of their own;
    all that they do in tables of their own. For the last two, ours are those whose name begins with
    `portward`."""

    NONE = auto()
    FOREIGN_ELEMENTS = auto()
    FOREIGN_TABLES = auto()


class RulesetChanges(NamedTuple):
    """What was changed by others since the last time. `ours`: something of the tables that were asked for.
    `gained`: a chain at a hook, or a rule that writes into packets. `gone`: a table, chain or rule was deleted,
    perhaps one of these. `others`: anything at all. `lost`: the kernel has dropped notices, so all of it may
    have happened."""

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
    """Hears of the changes of rulesets in the network namespace of the thread that makes it. `read` may be
    called on one thread."""

    def __init__(
        self,
        tables: Collection[str],
        own: Callable[[], Collection[int]] = tuple,
        *,
        writing: Collection[bytes] = (),
        receive_bytes: int = 0,
        notice_filter: NoticeFilter = NoticeFilter.NONE,
    ) -> None:
        """`tables` of family inet are those that matter; transactions by sockets with the addresses `own` do not
        count. `writing`: a rule with any of these bytes may write into packets. `receive_bytes`: how much the
        kernel keeps for us; 0: what it usually does. Raises OSError if the kernel gives no such socket."""
        self._tables = {string(table) for table in tables}
        self._own, self._writing = own, tuple(writing)
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_NETFILTER
        )
        if receive_bytes:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_bytes)
        # Before the first notice can come.
        if notice_filter is not NoticeFilter.NONE:
            # Without it the agent only wakes more often.
            with contextlib.suppress(OSError):
                monitor_filter.attach(self._socket, everything=notice_filter is NoticeFilter.FOREIGN_TABLES)
        self._socket.bind((0, 1 << (_NFNLGRP_NFTABLES - 1)))

    def fileno(self) -> int:
        """A descriptor that can be read after a change."""
        return self._socket.fileno()

    def read(self) -> RulesetChanges:
        """What the notices say that have come since the last time."""
        heard, own = NOTHING, self._own()
        while True:
            try:
                data, sender = self._socket.recvfrom(_LARGEST)
            except BlockingIOError:
                return heard
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                heard = LOST  # the rest is still to be read
                continue
            if sender[0] == 0 and heard is not LOST:  # only the kernel is believed
                heard |= self._datagram(data, own)

    def _datagram(self, data: bytes, own: Collection[int]) -> RulesetChanges:
        heard, start = NOTHING, 0
        for kind, _, _, body in messages_of(data):
            # Not in what `messages_of` gives: whose transaction it was.
            length, *_, port = HEADER.unpack_from(data, start)
            start += (length + 3) & ~3
            if port not in own and kind >> 8 == _SUBSYS_NFTABLES and kind & 0xFF != _NEW_GENERATION:
                heard |= self._message(kind & 0xFF, body)
        return heard

    def _message(self, kind: int, body: bytes) -> RulesetChanges:
        """What one message about a table, or about something in it, says."""
        first, table = next(attributes_of(body, _NFGEN_SIZE), (0, b""))
        if first != 1:  # each begins with the table's name
            return LOST
        if body[0] == _INET and table in self._tables:
            return RulesetChanges(ours=True, others=True)
        gained = (kind == _NEW_CHAIN and _CHAIN_HOOK in dict(attributes_of(body, _NFGEN_SIZE))) or (
            kind == _NEW_RULE and any(part in body for part in self._writing)
        )
        return RulesetChanges(
            gained=gained, gone=kind in (_DELETE_TABLE, _DELETE_CHAIN, _DELETE_RULE), others=True
        )

    def close(self) -> None:
        """Stops listening."""
        self._socket.close()
