"""Compiles an nftables text to the netlink messages that libnftables would send, without a request to the kernel.
Pure: the caller gives what libnftables has printed.

By default libnftables first fetches the tables, chains, sets and objects of all programs, and starts again each
time that a transaction of any program comes in between. With 20,000 chains of kube-proxy, which changes them all
the time, it never ends. It fetches nothing for a text that begins with `flush ruleset`. So that command is put
first, for family arp and in a dry run, which changes nothing, and libnftables prints its messages (debug level
`mnl`). The message of that command is dropped, and `NfNetlink.transact` sends the others.

libmnl prints a table of words of four bytes (`mnl_nlmsg_fprintf`): a header of five words for each message, one
line for the header of each attribute, and the data as hexadecimal bytes. Lengths are checked, so a message that is
not understood is an error, and never another ruleset.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from portward.base.netlink import (
    ATTRIBUTE,
    HEADER,
    NFGEN,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    attribute,
    string,
)
from portward.dataplane.names import KernelTable
from portward.dataplane.nf_tables import (
    NFNL_SUBSYS_NFTABLES,
    NFT_MSG_DELCHAIN,
    NFT_MSG_DELRULE,
    NFT_MSG_DELSET,
    NFT_MSG_DELSETELEM,
    NFT_MSG_DELTABLE,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWTABLE,
    NFTA_CHAIN_NAME,
    NFTA_SET_ELEM_LIST_SET,
    NFTA_SET_NAME,
    NFTA_TABLE_NAME,
)

# Makes libnftables fetch nothing. It flushes nothing, because it is used in dry runs and its message is dropped.
# It has no line of its own, so that errors have the right line numbers.
FETCH_NOTHING: Final = "flush ruleset arp; "
_NESTED, _NET_ORDER = 0x8000, 0x4000
_HEADER_BYTES: Final = HEADER.size + NFGEN.size
_FAMILY_OFFSET: Final = HEADER.size

# The rows of libmnl's table that hold values, without colours: the length of a message; its type; its family and
# the rest of nfgenmsg; an attribute's length, flags and type; data.
_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")
_ROW: Final = re.compile(
    r"^\|  (?P<length>\d{10})  \|\t\| message length \|$"
    r"|^\| (?P<type>\d{5}) \| .{4} \|\t\|  type \| flags  \|$"
    r"|^\| (?P<extra>(?:[0-9a-f]{2} ){4}) \|\t\|  extra header  \|$"
    r"|^\|(?P<size>\d{5})\|(?P<nested>[N-])(?P<order>[B-])\|(?P<kind>\d{5})\|\t"
    r"|^\| (?P<data>(?:[0-9a-f]{2} ){4}) \|\t\|      data      \|",
    re.MULTILINE,
)


class Message(NamedTuple):
    """One message of a transaction: type (NFT_MSG_…), family (NFPROTO_…), flags in addition to NLM_F_REQUEST, and
    attributes."""

    kind: int
    family: int
    flags: int
    body: bytes


class UnreadableError(ValueError):
    """libmnl printed messages in a form that this module does not understand."""


def messages(printed: str) -> list[Message]:
    """The messages that libnftables printed at debug level `mnl`, without the message of FETCH_NOTHING and without
    begin and end of the transaction. Raises UnreadableError."""
    found = []
    for number, words in enumerate(_words(_COLOUR.sub("", printed))):
        length, kind = struct.unpack_from("=II", words)
        if length != len(words):
            raise UnreadableError(f"message {number} of libnftables has {len(words)} bytes, and not {length}")
        if kind >> 8 == NFNL_SUBSYS_NFTABLES:
            flags = NLM_F_CREATE | (NLM_F_APPEND if kind & 0xFF == NFT_MSG_NEWRULE else 0)
            found.append(Message(kind & 0xFF, words[_FAMILY_OFFSET], flags, words[_HEADER_BYTES:]))
    return _without_flush(found)


def _without_flush(found: list[Message]) -> list[Message]:
    """The messages after that of FETCH_NOTHING. libnftables also prints its request for the generation before
    it."""
    for place, message in enumerate(found):
        if message.kind == NFT_MSG_DELTABLE and not message.body:  # of all tables of a family
            return found[place + 1 :]
    raise UnreadableError("libnftables has not printed the messages of the transaction")


def _words(printed: str) -> Iterator[bytes]:
    """The bytes of each message. The second word has the type alone, as 32 bits, and the next two are zeros."""
    words: list[bytes] = []
    for row in _ROW.finditer(printed):
        kind, value = row.lastgroup, row[row.lastgroup or 0]
        if kind == "length":
            if words:
                yield b"".join(words)
            words = [struct.pack("=I", int(value))]
        elif kind == "type":
            words.append(struct.pack("=III", int(value), 0, 0))
        elif kind == "kind":
            nested = (row["nested"] == "N") * _NESTED | (row["order"] == "B") * _NET_ORDER
            words.append(ATTRIBUTE.pack(int(row["size"]), int(value) | nested))
        else:
            words.append(bytes.fromhex(value))
    if words:
        yield b"".join(words)


# Commands that need no libnftables: verb and object → message type, and the attribute that names the object. The
# attribute that names the table is the same in all of them. `flush table` deletes the table's rules.
_PLAIN: Final = {
    ("add", "table"): (NFT_MSG_NEWTABLE, NFTA_TABLE_NAME),
    ("create", "table"): (NFT_MSG_NEWTABLE, NFTA_TABLE_NAME),
    ("delete", "table"): (NFT_MSG_DELTABLE, NFTA_TABLE_NAME),
    ("flush", "table"): (NFT_MSG_DELRULE, NFTA_TABLE_NAME),
    ("add", "chain"): (NFT_MSG_NEWCHAIN, NFTA_CHAIN_NAME),
    ("delete", "chain"): (NFT_MSG_DELCHAIN, NFTA_CHAIN_NAME),
    ("delete", "set"): (NFT_MSG_DELSET, NFTA_SET_NAME),
    ("delete", "map"): (NFT_MSG_DELSET, NFTA_SET_NAME),
    ("flush", "set"): (NFT_MSG_DELSETELEM, NFTA_SET_ELEM_LIST_SET),
}
_FAMILIES: Final = {table.family: table.value for table in KernelTable}
_FLAGS: Final = {"add": NLM_F_CREATE, "create": NLM_F_CREATE | NLM_F_EXCL}


def making(table: KernelTable, messages: list[tuple[int, bytes]]) -> list[Message]:
    """Messages that make objects in a table, or change its elements."""
    return [Message(kind, table.value, NLM_F_CREATE, body) for kind, body in messages]


def plain(text: str) -> list[Message]:
    """The messages of commands that only name a table, a chain or a set of the families of portward's tables, one
    command in each line. Raises KeyError or ValueError for other commands."""
    found = []
    for line in text.splitlines():
        verb, what, family, table, *names = line.split()
        if len(names) != (what != "table"):
            raise ValueError(line)
        kind, naming = _PLAIN[verb, what]
        body = attribute(NFTA_TABLE_NAME, string(table)) + b"".join(attribute(naming, string(n)) for n in names)
        found.append(Message(kind, _FAMILIES[family], _FLAGS.get(verb, 0), body))
    return found
