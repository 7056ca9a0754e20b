"""Reads the netlink messages that portward sends, for the fake kernel (`fake`). The reverse of
`elements.messages`. Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from portward.base.netlink import attribute, attributes_of, nest, string
from portward.dataplane import nf_tables as nf
from portward.dataplane.elements import (
    Add,
    AddLimit,
    Change,
    Delete,
    DeleteLimit,
    DeleteRule,
    Draw,
    Flush,
    InsertRule,
)
from portward.dataplane.faketables import Draft


def read(messages: Iterable[tuple[int, bytes]]) -> Iterator[Change | str]:
    """The entry of the journal for these messages."""
    names = {
        nf.NFT_MSG_NEWTABLE: "add table", nf.NFT_MSG_DELTABLE: "delete table",
        nf.NFT_MSG_NEWCHAIN: "add chain", nf.NFT_MSG_NEWRULE: "add rule",
    }  # fmt: skip
    for kind, body in messages:
        attributes = dict(attributes_of(body))
        is_change = kind == nf.NFT_MSG_NEWRULE and b"NFQUEUE" not in attributes[nf.NFTA_RULE_EXPRESSIONS]
        if kind in names and not is_change:
            yield f"{names[kind]} {text_of(attributes[nf.NFTA_TABLE_NAME])}"
        else:
            yield change_of(kind, attributes)


def change_of(kind: int, attributes: dict[int, bytes]) -> Change:
    """The change that a message about elements or objects makes; the reverse of `elements.messages`."""
    name = text_of(attributes[nf.NFTA_SET_ELEM_LIST_SET])  # the same attribute as of chains and objects
    match kind:
        case nf.NFT_MSG_NEWRULE:
            return _inserted(name, attributes[nf.NFTA_RULE_EXPRESSIONS])
        case nf.NFT_MSG_DELRULE:
            return DeleteRule(name, int.from_bytes(attributes[nf.NFTA_RULE_HANDLE], "big"))
        case nf.NFT_MSG_NEWSETELEM:
            found = list(_elements(attributes[nf.NFTA_SET_ELEM_LIST_ELEMENTS]))
            if any(limit for _, limit in found):
                return Draw(name, dict(found))
            return Add(name, [key for key, _ in found])
        case nf.NFT_MSG_DELSETELEM:
            elements = attributes.get(nf.NFTA_SET_ELEM_LIST_ELEMENTS)
            return Flush(name) if elements is None else Delete(name, [key for key, _ in _elements(elements)])
        case nf.NFT_MSG_NEWOBJ:
            data = dict(attributes_of(attributes[nf.NFTA_OBJ_DATA]))
            rate, burst = data[nf.NFTA_LIMIT_RATE], data[nf.NFTA_LIMIT_BURST]
            return AddLimit(name, int.from_bytes(rate, "big"), int.from_bytes(burst, "big"))
        case nf.NFT_MSG_DELOBJ:
            return DeleteLimit(name)
    raise NotImplementedError(f"the fake knows no message {kind}")


def _inserted(chain: str, expressions: bytes) -> InsertRule:
    """The rule of the expressions meta, lookup and immediate."""
    _, lookup, immediate = (
        dict(attributes_of(dict(attributes_of(one))[nf.NFTA_EXPR_DATA])) for _, one in attributes_of(expressions)
    )
    verdict = dict(attributes_of(dict(attributes_of(immediate[nf.NFTA_IMMEDIATE_DATA]))[nf.NFTA_DATA_VERDICT]))
    return InsertRule(chain, text_of(lookup[nf.NFTA_LOOKUP_SET]), text_of(verdict[nf.NFTA_VERDICT_CHAIN]))


def reports_of(draft: Draft, key_: str, body: bytes) -> Iterator[bytes]:
    """The kernel's reports of the elements that a message deletes from the table with this key, as far as portward
    reads them."""
    attributes = dict(attributes_of(body))
    table, set_ = attributes[nf.NFTA_SET_ELEM_LIST_TABLE], attributes[nf.NFTA_SET_ELEM_LIST_SET]
    present = draft.set(key_, text_of(set_)).elements
    deleted = attributes.get(nf.NFTA_SET_ELEM_LIST_ELEMENTS)
    for key in [*present] if deleted is None else [key for key, _ in _elements(deleted)]:
        if key in present:
            element = nest(nf.NFTA_LIST_ELEM, _counted_element(key, present[key].packets))
            yield (
                attribute(nf.NFTA_SET_ELEM_LIST_TABLE, table)
                + attribute(nf.NFTA_SET_ELEM_LIST_SET, set_)
                + nest(nf.NFTA_SET_ELEM_LIST_ELEMENTS, element)
            )


def _counted_element(key: bytes, packets: int) -> bytes:
    counter = attribute(nf.NFTA_COUNTER_BYTES, bytes(8)) + attribute(
        nf.NFTA_COUNTER_PACKETS, struct.pack(">Q", packets)
    )
    expression = attribute(nf.NFTA_EXPR_NAME, string("counter")) + nest(nf.NFTA_EXPR_DATA, counter)
    return nest(nf.NFTA_SET_ELEM_KEY, attribute(nf.NFTA_DATA_VALUE, key)) + nest(nf.NFTA_SET_ELEM_EXPR, expression)


def _elements(nested: bytes) -> Iterator[tuple[bytes, str]]:
    """Key and object of each element in a message."""
    for _, element in attributes_of(nested):
        parts = dict(attributes_of(element))
        key = dict(attributes_of(parts[nf.NFTA_SET_ELEM_KEY]))[nf.NFTA_DATA_VALUE]
        yield key, text_of(parts.get(nf.NFTA_SET_ELEM_OBJREF, b""))


def text_of(value: bytes) -> str:
    """The value of an attribute that holds a name."""
    return value.rstrip(b"\0").decode()
