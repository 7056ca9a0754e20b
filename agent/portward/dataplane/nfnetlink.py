"""nf_tables over raw netlink, for all that nft cannot do or does too slowly: the elements of a set with their
counters, one element, the generation of the rulesets, a fingerprint of a table, and rules without nft syntax.

nft 1.0.6 reads every element of every set before it lists or gets one (120 ms at 20,000 elements). These requests
read only what they are about. Message formats: linux/netfilter/nf_tables.h and nfnetlink.h. Integers in attributes
are big-endian; an interface index in a key is in the byte order of the host.
"""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Final, NamedTuple

from portward.base.netlink import (
    NFGEN,
    NLM_F_ACK,
    NLM_F_DUMP,
    attribute,
    attributes_of,
    nest,
    string,
)
from portward.dataplane import nf_tables as nf
from portward.dataplane import setdump
from portward.dataplane.deletions import MAX_REPORTED_ELEMENTS, Deletions
from portward.dataplane.elements import Change, Delete, Flush, RefusedError, messages
from portward.dataplane.names import COUNTING_SETS, TABLE, KernelTable
from portward.dataplane.nfsocket import NfSocket, interrupted, name_of
from portward.dataplane.setdump import DeletedElement, SetElement, SetRow
from portward.errors import KernelError

# A base chain has one of these types; other chains have none.
_CHAIN_TYPES: Final = (b"filter\0", b"nat\0", b"route\0")
# The parts of a table that a fingerprint covers. The kernel changes the other attributes by itself (handles, use
# counts).
_FINGERPRINT: Final = (
    (nf.NFT_MSG_GETRULE, (nf.NFTA_RULE_CHAIN, nf.NFTA_RULE_EXPRESSIONS)),
    (nf.NFT_MSG_GETSET, (nf.NFTA_SET_NAME, nf.NFTA_SET_FLAGS, nf.NFTA_SET_KEY_LEN, nf.NFTA_SET_TIMEOUT)),
)
_U32: Final = struct.Struct(">I")
_I32: Final = struct.Struct(">i")
_U64: Final = struct.Struct(">Q")


class Chain(NamedTuple):
    """A base chain of any table: address family (NFPROTO_…), nft's name of the type, hook (NF_INET_…),
    priority."""

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


class NfNetlink(NfSocket):
    """The requests to nf_tables, in the network namespace of the thread that makes the socket. Methods that take a
    table mean the one of `family`."""

    # The object that `of` made this one from; None if there is none. Both count the same transactions.
    _first: NfNetlink | None = None
    # How often another program made a transaction before or within one of portward's, and how many of these times
    # `note_generation` has taken note of.
    _disturbances = _noted = 0
    _left_at: int | None = None

    def of(self, table: KernelTable) -> NfNetlink:
        """The same socket for a table of portward, and for other tables of its family. `disturbed` is its own."""
        other = self.of_family(table.value)
        other._first = self._first or self
        other._noted = other._first._disturbances
        return other

    @property
    def table(self) -> KernelTable:
        """The table of portward that this object is for."""
        return KernelTable(self.family)

    @property
    def left_at(self) -> int | None:
        """The generation after portward's last transaction, or the one that `note_generation` last read; None
        before."""
        return (self._first or self)._left_at

    @property
    def disturbed(self) -> bool:
        """Whether another program made a transaction before or within one of portward's, since the last
        `note_generation`. One after portward's last transaction shows only in `generation() != left_at`."""
        return (self._first or self)._disturbances != self._noted

    def disturb(self) -> None:
        """From now on `disturbed` is true, whatever table it is asked for."""
        (self._first or self)._disturbances += 1

    def note_generation(self) -> None:
        """From now on, earlier transactions of other programs do not count for this table."""
        first, now = self._first or self, self.generation()
        if now != first._left_at:  # for other tables they do
            self.disturb()
        first._left_at, self._noted = now, first._disturbances

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Stands around a transaction of portward, and sets `disturbed` if the generation rises by more than this
        transaction does. It raises the generation by one, or not at all if it changes nothing."""
        before = self.generation()
        if self.left_at is not None and before != self.left_at:
            self.disturb()
        yield
        after = self.generation()
        if (after - before) % 2**32 > 1:
            self.disturb()
        (self._first or self)._left_at = after

    def generation(self) -> int:
        """The number of ruleset transactions of all programs in this namespace so far. It wraps at 2**32."""
        for reply in self._request(nf.NFT_MSG_GETGEN, b"", 0):
            return int.from_bytes(dict(attributes_of(reply))[nf.NFTA_GEN_ID], "big")
        raise KernelError("nfnetlink: no generation in the kernel's reply")

    def owned_table(self, table: str) -> str | None:
        """The comment of a table that belongs to a netlink socket (`flags owner`). None if there is no such
        table, or if it has no owner. Raises PermissionError without CAP_NET_ADMIN."""
        try:
            for reply in self._request(nf.NFT_MSG_GETTABLE, attribute(nf.NFTA_TABLE_NAME, string(table)), 0):
                attributes = dict(attributes_of(reply))
                if _U32.unpack(attributes[nf.NFTA_TABLE_FLAGS])[0] & nf.NFT_TABLE_F_OWNER:
                    return _comment(attributes.get(nf.NFTA_TABLE_USERDATA, b""))
        except FileNotFoundError:
            pass
        return None

    def sets(self, table: str) -> set[str]:
        """The names of the sets of a table, without the anonymous ones; none if there is no such table."""
        found = set()
        try:
            for reply in self._request(nf.NFT_MSG_GETSET, attribute(nf.NFTA_SET_TABLE, string(table)), NLM_F_DUMP):
                found.add(name_of(dict(attributes_of(reply))[nf.NFTA_SET_NAME]))
        except FileNotFoundError:
            return set()
        return {name for name in found if not name.startswith("__")}

    def hooks(self, table: str) -> dict[str, tuple[int, int]]:
        """The base chains of a table with hook and priority, in the order of their registration."""
        found = {}
        for name, chain, _ in self._own_chains(table):
            if chain:
                hook = dict(attributes_of(chain))
                number, priority = (
                    _U32.unpack(hook[nf.NFTA_HOOK_HOOKNUM]),
                    _I32.unpack(hook[nf.NFTA_HOOK_PRIORITY]),
                )
                found[name_of(name)] = (*number, *priority)
        return found

    def _own_chains(self, table: str) -> list[tuple[bytes, bytes, bytes]]:
        """Name, hook and policy of each chain of a table, in the order in which they were made. Raises OSError.

        The kernel dumps the chains of all tables of the family. With 20,000 chains of other programs that takes so
        long that a transaction interrupts each reading, so only the chains of this table are compared. Two
        readings can skip the same chain if another program adds and deletes chains all the time. Then the ruleset
        is put back once too often."""
        named = string(table)
        replies, whole = self._replies(
            nf.NFT_MSG_GETCHAIN, b"", NLM_F_DUMP, self.family, NFGEN.size, holding=named
        )
        if not whole:
            raise interrupted()
        found = {}
        for attributes in (dict(attributes_of(reply)) for reply in replies):
            if attributes.get(nf.NFTA_CHAIN_TABLE) == named:
                hook, policy = attributes.get(nf.NFTA_CHAIN_HOOK, b""), attributes.get(nf.NFTA_CHAIN_POLICY, b"")
                found[attributes[nf.NFTA_CHAIN_HANDLE]] = (attributes[nf.NFTA_CHAIN_NAME], hook, policy)
        return [found[handle] for handle in sorted(found)]

    def chains(self) -> Iterator[Chain]:
        """The base chains of all tables of all families. Raises InterruptedError after the last one if
        transactions have interrupted each reading, because some chains may be missing then."""
        for family, attributes in self._of_all_families(nf.NFT_MSG_GETCHAIN, _CHAIN_TYPES):
            if nf.NFTA_CHAIN_HOOK in attributes:
                hook = dict(attributes_of(attributes[nf.NFTA_CHAIN_HOOK]))
                named = (nf.NFTA_CHAIN_TABLE, nf.NFTA_CHAIN_NAME, nf.NFTA_CHAIN_TYPE)
                table, name, type_ = (name_of(attributes.get(kind, b"")) for kind in named)
                number = int.from_bytes(hook.get(nf.NFTA_HOOK_HOOKNUM, b""), "big")
                priority = int.from_bytes(hook.get(nf.NFTA_HOOK_PRIORITY, b""), "big", signed=True)
                yield Chain(family, table, name, type_, number, priority)

    def expressions(self, holding: tuple[bytes, ...]) -> Iterator[Expression]:
        """The expressions of all rules of all families, rule by rule, if the rule contains any of these byte
        strings. Raises as `chains` does."""
        for family, attributes in self._of_all_families(nf.NFT_MSG_GETRULE, holding):
            table = name_of(attributes.get(nf.NFTA_RULE_TABLE, b""))
            chain = name_of(attributes.get(nf.NFTA_RULE_CHAIN, b""))
            for _, item in attributes_of(attributes.get(nf.NFTA_RULE_EXPRESSIONS, b"")):
                found = dict(attributes_of(item))
                name, data = name_of(found.get(nf.NFTA_EXPR_NAME, b"")), found.get(nf.NFTA_EXPR_DATA, b"")
                yield Expression(family, table, chain, name, dict(attributes_of(data)))

    def _of_all_families(self, message: int, holding: tuple[bytes, ...]) -> Iterator[tuple[int, dict[int, bytes]]]:
        """Address family and attributes of each reply to a dump of all families, if it contains any of these byte
        strings. A host can have tens of thousands of chains and rules, and parsing one takes 20 times as long as
        searching it."""
        replies, whole = self._replies(message, b"", NLM_F_DUMP, nf.NFPROTO_UNSPEC, 0)
        for reply in replies:
            if any(part in reply for part in holding):
                yield reply[0], dict(attributes_of(reply, NFGEN.size))
        if not whole:
            raise interrupted()

    def rules_on(self, table: str, chain: str, set_: str) -> list[int]:
        """The handles of the rules in a chain of a table that look a set up, in their order. Raises OSError,
        also if the table or the chain is missing."""
        body = attribute(nf.NFTA_RULE_TABLE, string(table)) + attribute(nf.NFTA_RULE_CHAIN, string(chain))
        lookup = attribute(nf.NFTA_LOOKUP_SET, string(set_))
        return [
            int.from_bytes(attributes[nf.NFTA_RULE_HANDLE], "big")
            for attributes in map(dict, map(attributes_of, self._request(nf.NFT_MSG_GETRULE, body, NLM_F_DUMP)))
            if attributes.get(nf.NFTA_RULE_TABLE) == string(table)
            and attributes.get(nf.NFTA_RULE_CHAIN) == string(chain)
            and lookup in attributes.get(nf.NFTA_RULE_EXPRESSIONS, b"")
        ]

    def counters(self, table: str) -> dict[str, int]:
        """The named counters of a table: name → packets."""
        found = self._objects(table, nf.NFT_OBJECT_COUNTER)
        return {name: _U64.unpack(dict(attributes_of(data))[nf.NFTA_COUNTER_PACKETS])[0] for name, data in found}

    def limits(self, table: str) -> list[str]:
        """The names of the named limits of a table; none if there is no such table."""
        return [name for name, _ in self._objects(table, nf.NFT_OBJECT_LIMIT)]

    def _objects(self, table: str, type_: int) -> Iterator[tuple[str, bytes]]:
        """Name and data of the objects of a type (NFT_OBJECT_…)."""
        wanted = {nf.NFTA_OBJ_TABLE: string(table), nf.NFTA_OBJ_TYPE: _U32.pack(type_)}
        body = b"".join(attribute(kind, value) for kind, value in wanted.items())
        for reply in self._request(nf.NFT_MSG_GETOBJ, body, NLM_F_DUMP):
            attributes = dict(attributes_of(reply))
            if wanted.items() <= attributes.items():
                yield name_of(attributes[nf.NFTA_OBJ_NAME]), attributes[nf.NFTA_OBJ_DATA]

    def elements(self, table: str, set_: str) -> list[SetElement]:
        """All elements of a set of a table. Raises OSError, also if set or table is missing."""
        found: list[SetElement] = []
        for nest_ in self._nests(table, set_):
            found.extend(setdump.elements(nest_))
        return found

    def rows(self, table: str, set_: str) -> list[SetRow]:
        """The same without the objects of a map, ten times as fast. Raises OSError as `elements` does."""
        found: list[SetRow] = []
        for nest_ in self._nests(table, set_):
            found += setdump.rows(nest_)
        return found

    def _nests(self, table: str, set_: str) -> Iterator[bytes]:
        for reply in self._request(nf.NFT_MSG_GETSETELEM, _set(table, set_), NLM_F_DUMP):
            yield from _nests_of(reply)

    def element(self, table: str, set_: str, key: bytes) -> SetElement | None:
        """The element with this key; None if it is not there. Raises OSError for any other failure."""
        item = nest(nf.NFTA_LIST_ELEM, nest(nf.NFTA_SET_ELEM_KEY, attribute(nf.NFTA_DATA_VALUE, key)))
        body = _set(table, set_) + nest(nf.NFTA_SET_ELEM_LIST_ELEMENTS, item)
        try:
            for reply in self._request(nf.NFT_MSG_GETSETELEM, body, NLM_F_ACK):
                for nest_ in _nests_of(reply):
                    return next(setdump.elements(nest_), None)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
        return None

    def fingerprint(self, table: str, fixed_sets: tuple[str, ...]) -> bytes | None:
        """A digest of flags, chains, rules in their order, and sets of a table, with the elements of
        `fixed_sets`. None if the table or one of these sets is missing. While the digest is the same, no program
        has changed the table. Raises OSError."""
        digest = blake2b(digest_size=16)
        try:
            for reply in self._request(nf.NFT_MSG_GETTABLE, attribute(nf.NFTA_TABLE_NAME, string(table)), 0):
                # A dormant table has no hooks.
                digest.update(dict(attributes_of(reply)).get(nf.NFTA_TABLE_FLAGS, b"-"))
            self._digest_rules(digest, table)
            for name in fixed_sets:
                digest.update(b"".join(sorted(element.key for element in self.elements(table, name))))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return digest.digest()

    def _digest_rules(self, digest: blake2b, table: str) -> None:
        for chain in self._own_chains(table):
            digest.update(b"".join(part or b"-" for part in chain))
        for message, wanted in _FINGERPRINT:
            # Messages about rules and about sets name the table in the same attribute.
            for reply in self._request(message, attribute(nf.NFTA_RULE_TABLE, string(table)), NLM_F_DUMP):
                attributes = dict(attributes_of(reply))
                if attributes.get(nf.NFTA_RULE_TABLE) == string(table):
                    for kind in wanted:
                        digest.update(attributes.get(kind, b"-"))


# --- the elements of portward's tables ---


class KernelElements:
    """The elements of the table of portward that `netlink` is for, in the network namespace of its socket. For one
    thread."""

    def __init__(self, netlink: NfNetlink, deletions: Deletions | None = None) -> None:
        """`deletions` takes what deleted elements had counted."""
        self._netlink, self._deletions = netlink, deletions

    def rows(self, set_: str) -> list[SetRow]:
        """See `Elements`."""
        return self._netlink.rows(TABLE, set_)

    def elements(self, set_: str) -> list[SetElement]:
        """See `Elements`."""
        return self._netlink.elements(TABLE, set_)

    def element(self, set_: str, key: bytes) -> SetElement | None:
        """See `Elements`."""
        return self._netlink.element(TABLE, set_, key)

    def limits(self) -> list[str]:
        """See `Elements`."""
        return self._netlink.limits(TABLE)

    def rules_on(self, chain: str, set_: str) -> list[int]:
        """See `Elements`."""
        return self._netlink.rules_on(TABLE, chain, set_)

    def now(self) -> float:
        """See `Elements`."""
        return time.monotonic()

    def commit(self, changes: Iterable[Change]) -> None:
        """See `Elements`."""
        parts = [(change, list(messages(change))) for change in changes]
        sent = [message for _, part in parts for message in part]
        if not sent:
            return
        deletions = self._deletions or Deletions()
        table = self._netlink.table
        plan = _ReportPlan(
            ((change, len(part)) for change, part in parts), lambda set_: deletions.size(table.qualified(set_))
        )
        try:
            with self._netlink.committing(), deletions.transaction(table) as deleted:
                self._netlink.expect(plan.elements)
                deleted.extend(self._netlink.commit(sent, reported=plan.places))
                deleted.extend(plan.unreported)
        except OSError as error:
            raise RefusedError(error.errno or errno.ENOENT, error.strerror or str(error)) from error


class _ReportPlan:
    """Which messages of a transaction the kernel must report: those that delete elements with a counter, up to
    `MAX_REPORTED_ELEMENTS` elements."""

    def __init__(self, changes: Iterable[tuple[Change, int]], size: Callable[[str], int]) -> None:
        """`changes` are in their order, each with the number of its messages. `size` returns the number of
        elements that a set may have."""
        # Places of the messages in the transaction, from 0.
        self.places: set[int] = set()
        # Elements that will be reported.
        self.elements = 0
        # Deletions without a report. A flush also ends all readings of the set, with or without a report.
        self.unreported: list[DeletedElement | bytes] = []
        place = 0
        for change, length in changes:
            after = place + length
            if isinstance(change, Delete | Flush) and change.set in COUNTING_SETS:
                self._take(change, range(place, after), size)
            place = after

    def _take(self, change: Delete | Flush, places: range, size: Callable[[str], int]) -> None:
        elements = len(change.keys) if isinstance(change, Delete) else size(change.set)
        fits = self.elements + elements <= MAX_REPORTED_ELEMENTS
        if fits:
            self.places.update(places)
            self.elements += elements
        if isinstance(change, Flush):
            self.unreported.append(DeletedElement(change.set, b"", None))
        elif not fits:
            self.unreported += [DeletedElement(change.set, key, None) for key in change.keys]


# --- parts of messages ---


def _comment(userdata: bytes) -> str:
    """The comment in a table's user data, which is a list of type, length (one byte each) and value."""
    while len(userdata) > 2:
        kind, length = userdata[:2]
        if kind == nf.NFTNL_UDATA_TABLE_COMMENT:
            return userdata[2 : 2 + length].rstrip(b"\0").decode(errors="replace")
        userdata = userdata[2 + length :]
    return ""


def _nests_of(reply: bytes) -> Iterator[bytes]:
    """The lists of elements in a reply."""
    return (value for kind, value in attributes_of(reply) if kind == nf.NFTA_SET_ELEM_LIST_ELEMENTS)


def _set(table: str, set_: str) -> bytes:
    return attribute(nf.NFTA_SET_ELEM_LIST_TABLE, string(table)) + attribute(
        nf.NFTA_SET_ELEM_LIST_SET, string(set_)
    )
