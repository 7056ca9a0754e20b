"""A netlink socket to nf_tables: transactions, dumps and single requests, whatever they are about."""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import socket
import time
from collections.abc import Container, Iterable, Iterator
from typing import Final, Self

from portward.base.netlink import (
    HEADER,
    NETLINK_NETFILTER,
    NFGEN,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_ECHO,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    attribute,
    attributes_of,
    errno_of,
    messages_of,
    string,
)
from portward.dataplane import nf_tables as nf
from portward.dataplane.compiled import Message
from portward.errors import KernelError

# Messages that change something: what they change, and the attribute that names it.
_ABOUT: Final = {
    nf.NFT_MSG_NEWTABLE: ("table", nf.NFTA_TABLE_NAME),
    nf.NFT_MSG_DELTABLE: ("table", nf.NFTA_TABLE_NAME),
    nf.NFT_MSG_NEWCHAIN: ("chain", nf.NFTA_CHAIN_NAME),
    nf.NFT_MSG_DELCHAIN: ("chain", nf.NFTA_CHAIN_NAME),
    nf.NFT_MSG_NEWRULE: ("a rule in chain", nf.NFTA_RULE_CHAIN),
    nf.NFT_MSG_DELRULE: ("a rule in chain", nf.NFTA_RULE_CHAIN),
    nf.NFT_MSG_NEWSET: ("set", nf.NFTA_SET_NAME),
    nf.NFT_MSG_DELSET: ("set", nf.NFTA_SET_NAME),
    nf.NFT_MSG_NEWSETELEM: ("an element of set", nf.NFTA_SET_ELEM_LIST_SET),
    nf.NFT_MSG_DELSETELEM: ("an element of set", nf.NFTA_SET_ELEM_LIST_SET),
    nf.NFT_MSG_NEWOBJ: ("object", nf.NFTA_OBJ_NAME),
    nf.NFT_MSG_DELOBJ: ("object", nf.NFTA_OBJ_NAME),
}
# A dump that a transaction interrupts is repeated this many times, or for this long.
_DUMP_TRIES: Final = 20
_DUMP_TIMEOUT_S: Final = 0.5
# asm-generic/socket.h and linux/netlink.h; Python does not name them.
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _SOL_NETLINK, _NETLINK_CAP_ACK = 32, 33, 270, 10
# A report has some 130 bytes, but the kernel counts the buffers that hold them.
_REPORT_BYTES: Final = 1_024
# The kernel fills a message of a dump up to the size of the buffer.
_RECEIVE_BYTES: Final = 1 << 17


class _Shared:
    """The state that all users of one socket share: the number of the last message sent, the size of the receive
    buffer in bytes, and how many bytes of a transaction fit into the send buffer."""

    def __init__(self, *, sequence: int = 0, receive_buffer: int = 1 << 20, max_sent: int = 100_000) -> None:
        self.sequence, self.receive_buffer, self.max_sent = sequence, receive_buffer, max_sent


class NfSocket:
    """A netlink socket to nf_tables in the network namespace of the thread that makes it."""

    # The family (NFPROTO_…) of the tables that requests and changes are about.
    family = nf.NFPROTO_INET

    def __init__(self) -> None:
        """Raises KernelError if the kernel has no nfnetlink."""
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER
            )
            self._socket.bind((0, 0))
        except OSError as error:
            raise KernelError(
                f"nfnetlink: {error.strerror}: this kernel lacks CONFIG_NETFILTER_NETLINK"
            ) from error
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        # An error then has only the header of the refused message, not a copy of the whole message.
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._shared = _Shared()

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def of_family(self, family: int) -> Self:
        """The same socket for tables of another family (NFPROTO_…). It is closed with this object."""
        other = copy.copy(self)
        other.family = family
        return other

    @property
    def port(self) -> int:
        """The socket's address. The kernel's notices have the address of the socket that made the transaction."""
        port: int = self._socket.getsockname()[0]
        return port

    def commit(
        self, messages: Iterable[tuple[int, bytes]], *, dry_run: bool = False, reported: Container[int] = ()
    ) -> list[bytes]:
        """Makes changes (message type and attributes; at least one) to tables of `family` in one transaction. With
        `dry_run` it only asks whether the kernel would make them. A new rule goes to the head of its chain. Raises
        OSError with the kernel's errno, and then nothing has changed.

        The kernel reports each element, with its counter, that the messages at the places `reported` (from 0)
        delete. Returns the attributes of these reports."""
        made = [
            Message(message, self.family, NLM_F_CREATE | (NLM_F_ECHO if place in reported else 0), body)
            for place, (message, body) in enumerate(messages)
        ]
        return self.transact(made, dry_run=dry_run)

    def expect(self, reports: int) -> None:
        """Makes the receive buffer large enough for this many reports of one transaction. Without room the reading
        would fail with ENOBUFS."""
        wanted = reports * _REPORT_BYTES
        if wanted > self._shared.receive_buffer:
            self._shared.receive_buffer = wanted
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, wanted)

    def barrier(self) -> None:
        """Returns when every transaction that was under way has ended, and its notices were sent."""
        with contextlib.suppress(OSError):
            self.commit(
                [(nf.NFT_MSG_NEWTABLE, attribute(nf.NFTA_TABLE_NAME, string("portward_probe")))], dry_run=True
            )

    def transact(self, messages: Iterable[Message], *, dry_run: bool = False) -> list[bytes]:
        """Makes changes (at least one) to any tables, like `commit`. Returns the reports that NLM_F_ECHO asks
        for."""
        begin = self._shared.sequence + 1
        batch = [self._message(nf.NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, NFGEN.pack(0, 0, nf.NFNL_SUBSYS_NFTABLES))]
        changes = list(messages)
        for number, (kind, family, own_flags, body) in enumerate(changes, 1):
            # The kernel answers a refused message in any case, so only the last message has to ask for an answer.
            flags = NLM_F_REQUEST | own_flags | (NLM_F_ACK if number == len(changes) else 0)
            payload = NFGEN.pack(family, 0, 0) + body
            batch.append(self._message(nf.NFNL_SUBSYS_NFTABLES << 8 | kind, flags, payload))
        last = self._shared.sequence
        if not dry_run:  # the kernel rolls a batch without an end back
            batch.append(
                self._message(nf.NFNL_MSG_BATCH_END, NLM_F_REQUEST, NFGEN.pack(0, 0, nf.NFNL_SUBSYS_NFTABLES))
            )
        self._send(b"".join(batch))
        return self._wait(begin, last, changes)

    def _send(self, data: bytes) -> None:
        """Sends a transaction, which must be one datagram. The default send buffer takes some 200 kB."""
        if len(data) > self._shared.max_sent:
            self._shared.max_sent = 2 * len(data)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, self._shared.max_sent)
        self._socket.send(data)

    def _message(self, kind: int, flags: int, payload: bytes) -> bytes:
        self._shared.sequence += 1
        return HEADER.pack(16 + len(payload), kind, flags, self._shared.sequence, 0) + payload

    def _wait(self, begin: int, last: int, messages: list[Message]) -> list[bytes]:
        """Waits for the kernel's answer to a transaction. Returns the reports before it. Raises OSError for the
        first message that the kernel refused."""
        refused = place = 0
        reports: list[bytes] = []
        while True:
            for kind, _, sequence, content in messages_of(self._socket.recv(_RECEIVE_BYTES)):
                # Recognised by their type, because Linux 6.18 gives reports no sequence number.
                if kind == nf.NFNL_SUBSYS_NFTABLES << 8 | nf.NFT_MSG_DELSETELEM:
                    reports.append(content[NFGEN.size :])
                if kind != NLMSG_ERROR or sequence < begin:
                    continue
                code = errno_of(kind, content)
                if code and not refused:
                    refused, place = code, sequence - begin
                # An answer to the first message is about the whole batch.
                if sequence in (begin, last):
                    if refused:
                        raise _refusal(refused, messages[place - 1] if place else None)
                    return reports

    def _request(self, message: int, body: bytes, flags: int, *, skip: int = NFGEN.size) -> Iterator[bytes]:
        """Sends one request about tables of `family`. Yields each reply without its first `skip` bytes: by default
        its attributes. Raises OSError with the kernel's errno."""
        replies, whole = self._replies(message, body, flags, self.family, skip)
        if not whole:
            raise interrupted()
        yield from replies

    def _replies(
        self, message: int, body: bytes, flags: int, family: int, skip: int, *, holding: bytes = b""
    ) -> tuple[list[bytes], bool]:
        """The replies that contain these bytes, and whether they are complete. A dump that a transaction
        interrupts is repeated."""
        until, before = time.monotonic() + _DUMP_TIMEOUT_S, None
        for _ in range(_DUMP_TRIES):
            replies, whole = self._reply(message, body, flags, family, skip)
            found = [reply for reply in replies if holding in reply]
            # After an interruption the kernel continues by position. If an entry before that position has gone, it
            # skips one that is still there. Two equal readings are complete: the entry that went would be in the
            # first one only, and an entry that replaces it has another handle.
            whole = whole or found == before
            if whole or time.monotonic() > until:
                break
            before = found
        return found, whole

    def _reply(self, message: int, body: bytes, flags: int, family: int, skip: int) -> tuple[list[bytes], bool]:
        """Each reply without its first `skip` bytes, and whether they are complete. They are not if a transaction
        interrupted the dump: then it mixes the states before and after, and may lack entries that did not
        change."""
        payload = NFGEN.pack(family, 0, 0) + body
        self._socket.send(self._message(nf.NFNL_SUBSYS_NFTABLES << 8 | message, NLM_F_REQUEST | flags, payload))
        many = bool(flags & (NLM_F_DUMP | NLM_F_ACK))
        replies: list[bytes] = []
        interrupted = False
        while True:
            for kind, flags_in, sequence, content in messages_of(self._socket.recv(_RECEIVE_BYTES)):
                if sequence != self._shared.sequence:
                    continue
                interrupted |= bool(flags_in & NLM_F_DUMP_INTR)
                if kind in (NLMSG_ERROR, NLMSG_DONE):
                    if (code := errno_of(kind, content)) > 0:
                        raise OSError(code, os.strerror(code))
                    return replies, not interrupted
                replies.append(content[skip:])
                if not many:
                    return replies, True


def interrupted() -> OSError:
    """The error of a dump that transactions have interrupted at each try."""
    return InterruptedError(errno.EINTR, "the rulesets change faster than they can be read")


def _refusal(code: int, message: Message | None) -> OSError:
    """The kernel's refusal of a transaction, with a note that names the object of the refused message."""
    error = OSError(code, os.strerror(code))
    if message is not None:
        what, name = _ABOUT.get(message.kind, (f"message {message.kind}", 2))
        error.add_note(f"{what} {name_of(dict(attributes_of(message.body)).get(name, b''))}".rstrip())
    return error


def name_of(value: bytes) -> str:
    """The value of an attribute that holds a name."""
    return value.rstrip(b"\0").decode(errors="replace")
