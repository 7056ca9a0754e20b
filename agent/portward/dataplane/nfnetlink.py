"""What is asked of the kernel by raw netlink, since nft cannot: the elements of a set with their counters,
one element, the generation of the rulesets, a fingerprint of a table, and rules for which nft has no words.

nft 1.0.6 reads every element of every set before it lists or gets one (120 ms at 20,000 elements); these
requests read just what they are about. Message formats: linux/netfilter/nf_tables.h and nfnetlink.h.
Integers in attributes are big-endian; an interface index in a key is in host order, as the kernel keeps it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Container, Iterable, Iterator
from hashlib import blake2b
from typing import Final, NamedTuple

from portward.base.netlink import (
    HEADER,
    NETLINK_NETFILTER,
    NFGEN,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_ECHO,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    attribute,
    attributes_of,
    messages_of,
    nest,
    string,
)
from portward.dataplane import setdump
from portward.dataplane.compiled import Message
from portward.dataplane.setdump import SetElement, SetRow
from portward.errors import KernelError

_SUBSYS_NFTABLES: Final = 10
_NFPROTO_UNSPEC, _NFPROTO_INET = 0, 1
_GET_TABLE, _GET_CHAIN, _GET_RULE, _GET_SET, _GET_ELEMENT, _GET_GENERATION, _GET_OBJECT = 1, 4, 7, 10, 13, 16, 19
_NEW_TABLE: Final = 0
_DELETE_ELEMENT: Final = 14
_OBJECT_COUNTER, _OBJECT_LIMIT = 1, 4
_BATCH_BEGIN, _BATCH_END = 16, 17
# A base chain has one of these types; other chains have none.
_CHAIN_TYPES: Final = (b"filter\0", b"nat\0", b"route\0")
# Messages that change something: what they are about, and the attribute that names it.
_ABOUT: Final = {
    0: ("table", 1), 2: ("table", 1), 3: ("chain", 3), 5: ("chain", 3), 6: ("a rule in chain", 2),
    8: ("a rule in chain", 2), 9: ("set", 2), 11: ("set", 2), 12: ("an element of set", 2),
    14: ("an element of set", 2), 18: ("object", 2), 20: ("object", 2),
}  # fmt: skip
_DUMP_INTERRUPTED = 0x10
_OWNER_FLAG: Final = 2  # NFT_TABLE_F_OWNER
_DUMP_TRIES: Final = 20
_DUMP_SECONDS: Final = 0.5
# asm-generic/socket.h and linux/netlink.h; Python does not name them.
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _SOL_NETLINK, _NETLINK_CAP_ACK = 32, 33, 270, 10
# A report takes some 130 bytes, and the kernel counts the buffers that they lie in.
_REPORT_BYTES: Final = 1_024

_U32 = struct.Struct(">I")
_I32 = struct.Struct(">i")
_U64 = struct.Struct(">Q")


class Chain(NamedTuple):
    """A base chain of any table: address family (NFPROTO_…), type as nft calls it, hook and priority."""

    family: int
    table: str
    name: str
    type: str
    hook: int
    priority: int


class Expression(NamedTuple):
    """One expression of a rule of any table: its name and its attributes."""

    family: int
    table: str
    chain: str
    name: str
    attributes: dict[int, bytes]


class NfNetlink:
    """A netlink socket to nf_tables in the network namespace of the thread that makes it."""

    def __init__(self) -> None:
        """Raises KernelError where the kernel has no nfnetlink."""
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
        # An error names the message that was refused, without a copy of all of it.
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._sequence = 0
        self._room = 1 << 20
        self._largest = 100_000  # bytes of a transaction that the send buffer takes for sure

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    @property
    def port(self) -> int:
        """The socket's address, by which the kernel's notices name whose transaction it was."""
        port: int = self._socket.getsockname()[0]
        return port

    def generation(self) -> int:
        """The number of ruleset transactions, by anyone, in this namespace so far (wraps at 2**32)."""
        for reply in self._request(_GET_GENERATION, b"", 0):
            return int.from_bytes(dict(attributes_of(reply))[1], "big")
        raise KernelError("nfnetlink: no generation in the kernel's reply")

    def owned_table(self, table: str) -> str | None:
        """The comment of an inet table that belongs to a netlink socket (`flags owner`); None if there is no such
        table, or it has no owner. Raises PermissionError without CAP_NET_ADMIN."""
        try:
            for reply in self._request(_GET_TABLE, attribute(1, string(table)), 0):
                attributes = dict(attributes_of(reply))
                if _U32.unpack(attributes[2])[0] & _OWNER_FLAG:
                    return _comment(attributes.get(6, b""))
        except FileNotFoundError:
            pass
        return None

    def sets(self, table: str) -> set[str]:
        """The names of the sets of an inet table, without those that nft made for itself; none where there
        is no such table."""
        found = set()
        try:
            for reply in self._request(_GET_SET, attribute(1, string(table)), NLM_F_DUMP):
                found.add(dict(attributes_of(reply))[2].rstrip(b"\0").decode())
        except FileNotFoundError:
            return set()
        return {name for name in found if not name.startswith("__")}

    def hooks(self, table: str) -> dict[str, tuple[int, int]]:
        """The base chains of an inet table, each with its hook and priority, in the order in which they were
        made."""
        found = {}
        for name, chain, _ in self._own_chains(table):
            if chain:
                hook = dict(attributes_of(chain))
                found[_name(name)] = (*_U32.unpack(hook[1]), *_I32.unpack(hook[2]))
        return found

    def _own_chains(self, table: str) -> list[tuple[bytes, bytes, bytes]]:
        """Name, hook and policy of each chain of an inet table, in the order in which they were made. The kernel
        gives the chains of all inet tables, and 20,000 of others take so long that a transaction interrupts each
        reading. So only our own are compared. Two readings can skip the same one, if somebody else removes and
        adds a chain all the time; then the ruleset is put back once too often. Raises OSError."""
        named = string(table)
        replies, whole = self._replies(_GET_CHAIN, b"", NLM_F_DUMP, _NFPROTO_INET, NFGEN.size, holding=named)
        if not whole:
            raise _interrupted()
        found = {}
        for attributes in (dict(attributes_of(reply)) for reply in replies):
            if attributes.get(1) == named:
                found[attributes[2]] = (attributes[3], attributes.get(4, b""), attributes.get(5, b""))
        return [found[handle] for handle in sorted(found)]

    def chains(self) -> Iterator[Chain]:
        """The base chains of all tables of all families. Raises InterruptedError behind the last one if
        transactions of others have interrupted each reading: then some may be missing."""
        for family, attributes in self._of_all_families(_GET_CHAIN, _CHAIN_TYPES):
            if 4 in attributes:
                hook = dict(attributes_of(attributes[4]))
                table, name, type_ = (_name(attributes.get(kind, b"")) for kind in (1, 3, 7))
                number, priority = int.from_bytes(hook.get(1, b""), "big"), *_I32.unpack(hook.get(2, bytes(4)))
                yield Chain(family, table, name, type_, number, priority)

    def expressions(self, holding: tuple[bytes, ...]) -> Iterator[Expression]:
        """The expressions of all rules of all families, rule by rule, that hold any of these bytes. Raises as
        `chains` does."""
        for family, attributes in self._of_all_families(_GET_RULE, holding):
            table, chain = _name(attributes.get(1, b"")), _name(attributes.get(2, b""))
            for _, item in attributes_of(attributes.get(4, b"")):
                found = dict(attributes_of(item))
                yield Expression(
                    family, table, chain, _name(found.get(1, b"")), dict(attributes_of(found.get(2, b"")))
                )

    def _of_all_families(self, message: int, holding: tuple[bytes, ...]) -> Iterator[tuple[int, dict[int, bytes]]]:
        """Address family and attributes of each reply to a dump of all families that holds any of these bytes. A
        host can have tens of thousands of chains and rules: to take one apart costs 20 times as much as this."""
        replies, whole = self._replies(message, b"", NLM_F_DUMP, _NFPROTO_UNSPEC, 0)
        for reply in replies:
            if any(part in reply for part in holding):
                yield reply[0], dict(attributes_of(reply, NFGEN.size))
        if not whole:
            raise _interrupted()

    def rules_on(self, table: str, chain: str, set_: str) -> list[int]:
        """The handles of the rules in a chain of an inet table that look a set up, in their order. Raises OSError,
        also if the table or the chain is missing."""
        body = attribute(1, string(table)) + attribute(2, string(chain))
        lookup = attribute(1, string(set_))  # NFTA_LOOKUP_SET
        return [
            int.from_bytes(attributes[3], "big")
            for attributes in map(dict, map(attributes_of, self._request(_GET_RULE, body, NLM_F_DUMP)))
            if attributes.get(1) == string(table)
            and attributes.get(2) == string(chain)
            and lookup in attributes.get(4, b"")
        ]

    def counters(self, table: str) -> dict[str, int]:
        """The named counters of an inet table: name → packets."""
        found = self._objects(table, _OBJECT_COUNTER)
        return {name: _U64.unpack(dict(attributes_of(data))[2])[0] for name, data in found}

    def limits(self, table: str) -> list[str]:
        """The names of the named limits of an inet table; none where there is no such table."""
        return [name for name, _ in self._objects(table, _OBJECT_LIMIT)]

    def _objects(self, table: str, type_: int) -> Iterator[tuple[str, bytes]]:
        """Name and data of the objects of a type (NFT_OBJECT_…)."""
        body = attribute(1, string(table)) + attribute(3, _U32.pack(type_))
        for reply in self._request(_GET_OBJECT, body, NLM_F_DUMP):
            attributes = dict(attributes_of(reply))
            if attributes.get(1) == table.encode() + b"\0" and attributes.get(3) == _U32.pack(type_):
                yield attributes[2].rstrip(b"\0").decode(), attributes[4]

    def elements(self, table: str, set_: str) -> list[SetElement]:
        """All elements of a set of an inet table. Raises OSError, also where set or table is missing."""
        found: list[SetElement] = []
        for nest_ in self._nests(table, set_):
            found.extend(setdump.elements(nest_))
        return found

    def rows(self, table: str, set_: str) -> list[SetRow]:
        """All elements of a set of an inet table, without the objects of a map: ten times as fast. Raises OSError
        as `elements` does."""
        found: list[SetRow] = []
        for nest_ in self._nests(table, set_):
            found += setdump.rows(nest_)
        return found

    def _nests(self, table: str, set_: str) -> Iterator[bytes]:
        body = attribute(1, string(table)) + attribute(2, string(set_))
        for reply in self._request(_GET_ELEMENT, body, NLM_F_DUMP):
            yield from _nests_of(reply)

    def element(self, table: str, set_: str, key: bytes) -> SetElement | None:
        """The element with this key, or None."""
        item = nest(1, nest(1, attribute(1, key)))
        body = attribute(1, string(table)) + attribute(2, string(set_)) + nest(3, item)
        try:
            for reply in self._request(_GET_ELEMENT, body, NLM_F_ACK):
                for nest_ in _nests_of(reply):
                    return next(setdump.elements(nest_), None)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
        return None

    def fingerprint(self, table: str, fixed_sets: tuple[str, ...]) -> bytes | None:
        """A digest of flags, chains, the rules in their order and the sets of an inet table, with the elements of
        `fixed_sets`; None where the table or one of them is missing. Equal digests: nobody has changed it."""
        digest = blake2b(digest_size=16)
        try:
            for reply in self._request(_GET_TABLE, attribute(1, string(table)), 0):
                digest.update(dict(attributes_of(reply)).get(2, b"-"))  # a dormant table has no hooks
            self._digest_rules(digest, table)
            for name in fixed_sets:
                digest.update(b"".join(sorted(element.key for element in self.elements(table, name))))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return digest.digest()

    def _digest_rules(self, digest: blake2b, table: str) -> None:
        # Chains: name, hook and policy. Rules: chain and expressions (attributes 2, 4). Sets: name, flags, key
        # length, timeout (2, 3, 5, 11). The rest changes by itself (handles, use).
        for chain in self._own_chains(table):
            digest.update(b"".join(part or b"-" for part in chain))
        for message, wanted in ((_GET_RULE, (2, 4)), (_GET_SET, (2, 3, 5, 11))):
            for reply in self._request(message, attribute(1, string(table)), NLM_F_DUMP):
                attributes = dict(attributes_of(reply))
                if attributes.get(1) == table.encode() + b"\0":
                    for kind in wanted:
                        digest.update(attributes.get(kind, b"-"))

    def commit(
        self, messages: Iterable[tuple[int, bytes]], *, dry_run: bool = False, reported: Container[int] = ()
    ) -> list[bytes]:
        """Makes changes (message type, attributes; at least one) to inet tables in one transaction, or with
        `dry_run` only asks whether the kernel would. A new rule goes to the head of its chain. Raises OSError with
        the kernel's errno, and then nothing has changed.

        Gives the attributes of what the kernel reports of the messages at the places `reported` (from 0): each
        element that they delete, with its counter."""
        made = [
            Message(message, _NFPROTO_INET, NLM_F_CREATE | (NLM_F_ECHO if place in reported else 0), body)
            for place, (message, body) in enumerate(messages)
        ]
        return self.transact(made, dry_run=dry_run)

    def expect(self, messages: int) -> None:
        """Makes room for so many reports of one transaction. What finds no room ends in ENOBUFS."""
        wanted = messages * _REPORT_BYTES
        if wanted > self._room:
            self._room = wanted
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, wanted)

    def barrier(self) -> None:
        """Returns once each transaction that was at work has ended, and its notices were sent."""
        with contextlib.suppress(OSError):
            self.commit([(_NEW_TABLE, attribute(1, string("portward_probe")))], dry_run=True)

    def transact(self, messages: Iterable[Message], *, dry_run: bool = False) -> list[bytes]:
        """Makes changes (at least one) to any tables, like `commit`; gives what NLM_F_ECHO asks for."""
        begin = self._sequence + 1
        batch = [self._message(_BATCH_BEGIN, NLM_F_REQUEST, NFGEN.pack(0, 0, _SUBSYS_NFTABLES))]
        changes = list(messages)
        for number, (kind, family, own_flags, body) in enumerate(changes, 1):
            # What is refused is answered in any case, so it is enough to ask for the answer to the last.
            flags = NLM_F_REQUEST | own_flags | (NLM_F_ACK if number == len(changes) else 0)
            payload = NFGEN.pack(family, 0, 0) + body
            batch.append(self._message(_SUBSYS_NFTABLES << 8 | kind, flags, payload))
        last = self._sequence
        if not dry_run:  # what does not come to an end is taken back
            batch.append(self._message(_BATCH_END, NLM_F_REQUEST, NFGEN.pack(0, 0, _SUBSYS_NFTABLES)))
        self._send(b"".join(batch))
        return self._wait(begin, last, changes)

    def _send(self, data: bytes) -> None:
        """Sends a transaction, which goes in one piece, however large; the default buffer takes some 200 kB."""
        if len(data) > self._largest:
            self._largest = 2 * len(data)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, self._largest)
        self._socket.send(data)

    def _message(self, kind: int, flags: int, payload: bytes) -> bytes:
        self._sequence += 1
        return HEADER.pack(16 + len(payload), kind, flags, self._sequence, 0) + payload

    def _wait(self, begin: int, last: int, messages: list[Message]) -> list[bytes]:
        """Waits for the kernel's answer to a transaction, and gives what it reports before that; raises OSError
        for the first message that it refused."""
        refused = place = 0
        reports: list[bytes] = []
        while True:
            for kind, _, sequence, content in messages_of(self._socket.recv(1 << 17)):
                # Linux 6.18 gives reports no sequence number.
                if kind == _SUBSYS_NFTABLES << 8 | _DELETE_ELEMENT:
                    reports.append(content[NFGEN.size :])
                if kind != NLMSG_ERROR or sequence < begin:
                    continue
                code = -struct.unpack_from("=i", content)[0]
                if code and not refused:
                    refused, place = code, sequence - begin
                # An answer to the beginning is about the batch as a whole.
                if sequence in (begin, last):
                    if refused:
                        raise _refusal(refused, messages[place - 1] if place else None)
                    return reports

    def _request(
        self, message: int, body: bytes, flags: int, family: int = _NFPROTO_INET, *, skip: int = NFGEN.size
    ) -> Iterator[bytes]:
        """Sends one request; yields each reply message without its first `skip` bytes, so its attributes if
        nothing else is said. Raises OSError with the kernel's errno."""
        replies, whole = self._replies(message, body, flags, family, skip)
        if not whole:
            raise _interrupted()
        yield from replies

    def _replies(
        self, message: int, body: bytes, flags: int, family: int, skip: int, *, holding: bytes = b""
    ) -> tuple[list[bytes], bool]:
        """The replies that hold these bytes, and whether they are all there. A dump that a transaction interrupts
        is asked for again, 20 times or for half a second."""
        until, before = time.monotonic() + _DUMP_SECONDS, None
        for _ in range(_DUMP_TRIES):
            replies, whole = self._reply(message, body, flags, family, skip)
            found = [reply for reply in replies if holding in reply]
            # The kernel goes on at the place that it had reached. If an entry before that place has gone, it skips
            # one that is still there. Two readings that are equal lack nothing: the entry that went is in the
            # first one, and what takes its place has another handle.
            whole = whole or found == before
            if whole or time.monotonic() > until:
                break
            before = found
        return found, whole

    def _reply(self, message: int, body: bytes, flags: int, family: int, skip: int) -> tuple[list[bytes], bool]:
        """Each reply message without its first `skip` bytes; False if a transaction interrupted the dump, so that
        it mixes what was before and after, and may lack what was there all the time."""
        payload = NFGEN.pack(family, 0, 0) + body
        self._socket.send(self._message(_SUBSYS_NFTABLES << 8 | message, NLM_F_REQUEST | flags, payload))
        many = bool(flags & (NLM_F_DUMP | NLM_F_ACK))
        replies: list[bytes] = []
        interrupted = False
        while True:
            for kind, flags_in, sequence, content in messages_of(self._socket.recv(1 << 17)):
                if sequence != self._sequence:
                    continue
                interrupted |= bool(flags_in & _DUMP_INTERRUPTED)
                if kind in (NLMSG_ERROR, NLMSG_DONE):
                    # A dump that fails half-way says so in its last message.
                    code = -struct.unpack_from("=i", content)[0]
                    if code > 0:
                        raise OSError(code, os.strerror(code))
                    return replies, not interrupted
                replies.append(content[skip:])
                if not many:
                    return replies, True


def _interrupted() -> OSError:
    return InterruptedError(errno.EINTR, "the rulesets change faster than they can be read")


def _refusal(code: int, message: Message | None) -> OSError:
    """The kernel's refusal of a transaction; a note names the message that it refused."""
    error = OSError(code, os.strerror(code))
    if message is not None:
        what, name = _ABOUT.get(message.kind, (f"message {message.kind}", 2))
        error.add_note(f"{what} {_name(dict(attributes_of(message.body)).get(name, b''))}".rstrip())
    return error


def _comment(userdata: bytes) -> str:
    """The comment in a table's user data: entries of type, length and value, of which type 0 is the comment."""
    while len(userdata) > 2:
        kind, length = userdata[:2]
        if kind == 0:
            return userdata[2 : 2 + length].rstrip(b"\0").decode(errors="replace")
        userdata = userdata[2 + length :]
    return ""


def _name(value: bytes) -> str:
    """A name as an attribute holds it."""
    return value.rstrip(b"\0").decode(errors="replace")


def _nests_of(reply: bytes) -> Iterator[bytes]:
    """The lists of elements in a reply (NFTA_SET_ELEM_LIST_ELEMENTS)."""
    return (value for kind, value in attributes_of(reply) if kind == 3)
