"""The elements of portward's sets, maps and limits: what is read, and the changes of a transaction. Pure.

`Elements` is all that the verdict cache, the rate limits and the gate need of the kernel. `KernelElements`
(module `nfnetlink`) is the kernel; a test can put another implementation in its place.

Two facts of the kernel that every caller must know:
- `commit` is one transaction. A `Delete` of a key that is not in the set fails it, and so does an `Add` to a full
  set. Then nothing has changed.
- A reading of a set is a snapshot only if it fits into one message. Between two messages the kernel may collect
  expired elements or resize the set, and it continues by position. So elements that were there all the time can be
  missing (690 to 2,002 of 40,000 in 3 of 60 readings), or appear twice. Nothing in the reading shows it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol, TypeAlias

from portward.base.netlink import ATTRIBUTE, NESTED, attribute, nest, string
from portward.dataplane.names import TABLE
from portward.dataplane.nf_tables import (
    NFT_GOTO,
    NFT_LIMIT_PKTS,
    NFT_META_IIF,
    NFT_MSG_DELOBJ,
    NFT_MSG_DELRULE,
    NFT_MSG_DELSETELEM,
    NFT_MSG_NEWOBJ,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWSETELEM,
    NFT_OBJECT_LIMIT,
    NFT_REG_1,
    NFT_REG_VERDICT,
    NFTA_DATA_VALUE,
    NFTA_DATA_VERDICT,
    NFTA_EXPR_DATA,
    NFTA_EXPR_NAME,
    NFTA_IMMEDIATE_DATA,
    NFTA_IMMEDIATE_DREG,
    NFTA_LIMIT_BURST,
    NFTA_LIMIT_FLAGS,
    NFTA_LIMIT_RATE,
    NFTA_LIMIT_TYPE,
    NFTA_LIMIT_UNIT,
    NFTA_LIST_ELEM,
    NFTA_LOOKUP_SET,
    NFTA_LOOKUP_SREG,
    NFTA_META_DREG,
    NFTA_META_KEY,
    NFTA_OBJ_DATA,
    NFTA_OBJ_NAME,
    NFTA_OBJ_TABLE,
    NFTA_OBJ_TYPE,
    NFTA_RULE_CHAIN,
    NFTA_RULE_EXPRESSIONS,
    NFTA_RULE_HANDLE,
    NFTA_RULE_TABLE,
    NFTA_SET_ELEM_KEY,
    NFTA_SET_ELEM_LIST_ELEMENTS,
    NFTA_SET_ELEM_LIST_SET,
    NFTA_SET_ELEM_LIST_TABLE,
    NFTA_SET_ELEM_OBJREF,
    NFTA_VERDICT_CHAIN,
    NFTA_VERDICT_CODE,
)
from portward.dataplane.setdump import SetElement, SetRow
from portward.errors import KernelError

_SECONDS_PER_MINUTE: Final = 60
# The length of an attribute has 16 bits, so a message's list of elements must stay below 64 KiB with its headers.
_MAX_LIST_BYTES: Final = 60_000
# Headers of an element, and the name of its limit, beside the key.
_ELEMENT_BYTES: Final = 64


class Add(NamedTuple):
    """Puts keys into a set. A key that is already there keeps its counter and its time."""

    set: str
    keys: Sequence[bytes]


class Delete(NamedTuple):
    """Takes keys out of a set or map. A key that is not there fails the transaction with ENOENT."""

    set: str
    keys: Sequence[bytes]


class Flush(NamedTuple):
    """Takes every key out of a set or map."""

    set: str


class AddLimit(NamedTuple):
    """Makes a token bucket with this name, for `per_minute` packets and bursts of `burst`. A bucket that is
    already there keeps its fill level."""

    name: str
    per_minute: int
    burst: int


class DeleteLimit(NamedTuple):
    """Deletes a token bucket. One that a map still names fails the transaction with EBUSY."""

    name: str


class Draw(NamedTuple):
    """Lets each of these keys of a map draw on a limit: key → name of the limit. A key that is there with another
    limit fails the transaction with EEXIST."""

    map: str
    limits: Mapping[bytes, str]


class InsertRule(NamedTuple):
    """Puts the rule `iif @set goto target` at the head of a chain."""

    chain: str
    set: str
    target: str


class DeleteRule(NamedTuple):
    """Deletes the rule with this handle. A rule that is not there fails the transaction with ENOENT."""

    chain: str
    handle: int


Change: TypeAlias = Add | Delete | Flush | AddLimit | DeleteLimit | Draw | InsertRule | DeleteRule


class RefusedError(KernelError):
    """The kernel has refused a transaction with this errno. Nothing has changed."""

    def __init__(self, errno: int, reason: str) -> None:
        """`reason` is the kernel's text for the errno, or the reason of the code that did not even ask."""
        self.errno = errno
        super().__init__(f"the kernel refuses a change of cached verdicts: {reason}")


class Elements(Protocol):
    """The sets, maps and limits of the table `inet portward` in one network namespace. Keys are in the kernel's
    form: the interface index in the byte order of the host, then the address in network order."""

    def rows(self, set_: str) -> list[SetRow]:
        """A reading of a set: key, packets and milliseconds until it expires, of each element. Raises OSError,
        also if the set or the table is missing. The module's docstring says what a reading may miss."""

    def elements(self, set_: str) -> list[SetElement]:
        """A reading of a map, with the names of its objects. Raises OSError as `rows` does."""

    def element(self, set_: str, key: bytes) -> SetElement | None:
        """The element with this key; None if it is not there. Raises OSError for any other failure."""

    def limits(self) -> list[str]:
        """The names of the limits; none if there is no table. Raises OSError."""

    def rules_on(self, chain: str, set_: str) -> list[int]:
        """The handles of the rules in a chain that look a set up. Raises OSError, also if the chain is missing."""

    def commit(self, changes: Iterable[Change]) -> None:
        """Makes these changes, in this order, in one transaction. Raises RefusedError, and then nothing has
        changed."""

    def now(self) -> float:
        """The time of readings in seconds, by a clock that never goes back."""


def messages(change: Change) -> Iterator[tuple[int, bytes]]:
    """A change as netlink messages: type and attributes. Each is below 64 KiB."""
    match change:
        case Add(set_, keys):
            for part in _parts(keys):
                yield NFT_MSG_NEWSETELEM, _elements_of(set_, _keys(part))
        case Delete(set_, keys):
            for part in _parts(keys):
                yield NFT_MSG_DELSETELEM, _elements_of(set_, _keys(part))
        case Flush(set_):
            yield NFT_MSG_DELSETELEM, _set(set_)
        case AddLimit(name, per_minute, burst):
            yield NFT_MSG_NEWOBJ, _limit(name) + nest(NFTA_OBJ_DATA, _bucket(per_minute, burst))
        case DeleteLimit(name):
            yield NFT_MSG_DELOBJ, _limit(name)
        case Draw(map_, limits):
            for part in _parts(list(limits)):
                yield NFT_MSG_NEWSETELEM, _elements_of(map_, b"".join(_drawing(key, limits[key]) for key in part))
        case InsertRule(chain, set_, target):
            yield NFT_MSG_NEWRULE, _chain(chain) + nest(NFTA_RULE_EXPRESSIONS, _goto(set_, target))
        case DeleteRule(chain, handle):
            yield NFT_MSG_DELRULE, _chain(chain) + attribute(NFTA_RULE_HANDLE, struct.pack(">Q", handle))


def _set(name: str) -> bytes:
    return attribute(NFTA_SET_ELEM_LIST_TABLE, string(TABLE)) + attribute(NFTA_SET_ELEM_LIST_SET, string(name))


def _elements_of(set_: str, elements: bytes) -> bytes:
    return _set(set_) + nest(NFTA_SET_ELEM_LIST_ELEMENTS, elements)


def _chain(name: str) -> bytes:
    return attribute(NFTA_RULE_TABLE, string(TABLE)) + attribute(NFTA_RULE_CHAIN, string(name))


def _limit(name: str) -> bytes:
    return (
        attribute(NFTA_OBJ_TABLE, string(TABLE))
        + attribute(NFTA_OBJ_NAME, string(name))
        + _number(NFTA_OBJ_TYPE, NFT_OBJECT_LIMIT)
    )


def _goto(set_: str, target: str) -> bytes:
    """The expressions of `iif @set goto target`: meta, lookup and immediate, as nft writes them."""
    code = attribute(NFTA_VERDICT_CODE, struct.pack(">i", NFT_GOTO))
    goto = nest(NFTA_DATA_VERDICT, code + attribute(NFTA_VERDICT_CHAIN, string(target)))
    lookup = attribute(NFTA_LOOKUP_SET, string(set_)) + _number(NFTA_LOOKUP_SREG, NFT_REG_1)
    verdict = nest(NFTA_IMMEDIATE_DATA, goto)
    return (
        _expression("meta", _number(NFTA_META_DREG, NFT_REG_1) + _number(NFTA_META_KEY, NFT_META_IIF))
        + _expression("lookup", lookup)
        + _expression("immediate", _number(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT) + verdict)
    )


def _expression(name: str, data: bytes) -> bytes:
    return nest(NFTA_LIST_ELEM, attribute(NFTA_EXPR_NAME, string(name)) + nest(NFTA_EXPR_DATA, data))


def _bucket(per_minute: int, burst: int) -> bytes:
    """The data of a limit object that counts packets, and matches those within the limit (flags 0)."""
    return (
        attribute(NFTA_LIMIT_RATE, struct.pack(">Q", per_minute))
        + attribute(NFTA_LIMIT_UNIT, struct.pack(">Q", _SECONDS_PER_MINUTE))
        + _number(NFTA_LIMIT_BURST, burst)
        + _number(NFTA_LIMIT_TYPE, NFT_LIMIT_PKTS)
        + _number(NFTA_LIMIT_FLAGS, 0)
    )


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value))


def _drawing(key: bytes, limit: str) -> bytes:
    """An element of a map of limits."""
    element = nest(NFTA_SET_ELEM_KEY, attribute(NFTA_DATA_VALUE, key))
    return nest(NFTA_LIST_ELEM, element + attribute(NFTA_SET_ELEM_OBJREF, string(limit)))


def _parts(keys: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """The keys in parts that fit into one message each, with room for the name of a limit beside each key."""
    if keys:
        most = _MAX_LIST_BYTES // (len(keys[0]) + _ELEMENT_BYTES)
        for start in range(0, len(keys), most):
            yield keys[start : start + most]


def _keys(keys: Sequence[bytes]) -> bytes:
    """Elements that have only a key. All keys of a set have the same length, a multiple of four, so the same three
    headers stand before each key: those of the element, of its key, and of the key's value."""
    size = len(keys[0])
    headers = b"".join(
        ATTRIBUTE.pack(size + depth * ATTRIBUTE.size, kind)
        for depth, kind in ((3, NFTA_LIST_ELEM | NESTED), (2, NFTA_SET_ELEM_KEY | NESTED), (1, NFTA_DATA_VALUE))
    )
    return headers + headers.join(keys)
