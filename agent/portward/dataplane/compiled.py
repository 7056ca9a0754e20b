"""An nftables text → the netlink messages that libnftables would send, without a question to the kernel.

Left to itself, libnftables first fetches the tables, chains, sets and objects of all programs, and begins again
each time that a transaction of anybody comes in between: with 20,000 chains of kube-proxy, which changes them
all the time, it never ends. It fetches nothing for a text that begins with `flush ruleset`. So that line is put
first, for family arp and in a dry run, which changes nothing, and libnftables is asked to print its messages
(the debug level `mnl`). The message of that line is left out, and `NfNetlink.transact` sends the others.

What libmnl prints is a table of words of four bytes, see `mnl_nlmsg_fprintf`: a header of five words for each
message, one line for each attribute's header, and the data as hexadecimal bytes. Lengths are checked, so what is
not understood is an error and not another ruleset."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from portward.base.netlink import ATTRIBUTE, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, attribute, string

# Makes libnftables fetch nothing. Nothing is flushed: it is used in dry runs, and its message is left out.
# Lines keep their numbers in errors.
FETCH_NOTHING: Final = "flush ruleset arp; "
_NESTED, _NET_ORDER = 0x8000, 0x4000
_SUBSYS_NFTABLES: Final = 10
_NEW_RULE: Final = 6
_HEADER_BYTES: Final = 20

# The rows of libmnl's table that hold something, without colours: length of a message; its type; its family and
# what follows; an attribute's length, flags and type; data.
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
    """One message of a transaction: type (without nf_tables' number), NFPROTO_…, flags beside NLM_F_REQUEST, and
    attributes."""

    kind: int
    family: int
    flags: int
    body: bytes


class UnreadableError(ValueError):
    """libmnl prints messages in another way than the one that is known here."""


def messages(printed: str) -> list[Message]:
    """The messages in what libnftables printed at debug level `mnl`, without that of FETCH_NOTHING and without
    begin and end of the transaction. Raises UnreadableError."""
    found = []
    for number, words in enumerate(_words(_COLOUR.sub("", printed))):
        length, kind = struct.unpack_from("=II", words)
        if length != len(words):
            raise UnreadableError(f"message {number} of libnftables has {len(words)} bytes, and not {length}")
        if kind >> 8 == _SUBSYS_NFTABLES:
            flags = NLM_F_CREATE | (NLM_F_APPEND if kind & 0xFF == _NEW_RULE else 0)
            found.append(Message(kind & 0xFF, words[16], flags, words[_HEADER_BYTES:]))
    return _without_flush(found)


def _without_flush(found: list[Message]) -> list[Message]:
    """The generation that is asked for first is printed, too."""
    for place, message in enumerate(found):
        if message.kind == 2 and not message.body:  # NFT_MSG_DELTABLE of all tables of a family
            return found[place + 1 :]
    raise UnreadableError("libnftables has not printed the messages of the transaction")


def _words(printed: str) -> Iterator[bytes]:
    """The bytes of each message, with the type, as 32 bits, in the second word, and zeros in the next two."""
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


# Commands that need no libnftables: the verb and what it is about → message type. `flush table` deletes its rules.
_PLAIN: Final = {
    ("add", "table"): 0,
    ("create", "table"): 0,
    ("delete", "table"): 2,
    ("add", "chain"): 3,
    ("delete", "chain"): 5,
    ("flush", "table"): 8,
    ("delete", "set"): 11,
    ("delete", "map"): 11,
    ("flush", "set"): 14,
}
_NFPROTO_INET: Final = 1
_FLAGS: Final = {"add": NLM_F_CREATE, "create": NLM_F_CREATE | NLM_F_EXCL}
# The attribute that names a chain; of sets and elements it is 2.
_CHAIN_NAME: Final = {3: 3, 5: 3}


def inet(message: tuple[int, bytes]) -> Message:
    """A message about family inet that makes something, or changes elements."""
    kind, body = message
    return Message(kind, _NFPROTO_INET, NLM_F_CREATE, body)


def plain(text: str) -> list[Message]:
    """The messages of commands that only name a table, a chain or a set of family inet, one in each line. Raises
    KeyError or ValueError for other commands."""
    found = []
    for line in text.splitlines():
        verb, what, family, table, *names = line.split()
        if family != "inet" or len(names) != (what != "table"):
            raise ValueError(line)
        kind = _PLAIN[verb, what]
        body = attribute(1, string(table)) + b"".join(
            attribute(_CHAIN_NAME.get(kind, 2), string(n)) for n in names
        )
        found.append(Message(kind, _NFPROTO_INET, _FLAGS.get(verb, 0), body))
    return found
