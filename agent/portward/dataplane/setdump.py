"""Reads the elements in one message of a set's dump. Pure; formats: linux/netfilter/nf_tables.h.

Integers in attributes are big-endian. An interface index in a key is in the byte order of the host.

The kernel gives all elements of a message the same layout, unless some of them have attributes that others lack.
So the layout is taken from the first element, one operation compares every header byte of all other elements with
it, and the values are then unpacked in C. A message with another layout is read attribute by attribute, which
takes ten times as long.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

from portward.base.netlink import ATTRIBUTE, TYPE_MASK, attributes_of
from portward.dataplane.nf_tables import (
    NFTA_COUNTER_BYTES,
    NFTA_COUNTER_PACKETS,
    NFTA_DATA_VALUE,
    NFTA_EXPR_DATA,
    NFTA_EXPR_NAME,
    NFTA_LIST_ELEM,
    NFTA_SET_ELEM_EXPIRATION,
    NFTA_SET_ELEM_EXPR,
    NFTA_SET_ELEM_EXPRESSIONS,
    NFTA_SET_ELEM_KEY,
    NFTA_SET_ELEM_OBJREF,
)

_U64: Final = struct.Struct(">Q")

# Types of nested attributes, from the outermost inwards. The kernel writes one expression of an element under
# NFTA_SET_ELEM_EXPR, and several under NFTA_SET_ELEM_EXPRESSIONS; a counter may be in either.
_Path: TypeAlias = tuple[int, ...]
_ELEMENT: Final[_Path] = (NFTA_LIST_ELEM,)
_KEY: Final[_Path] = (*_ELEMENT, NFTA_SET_ELEM_KEY)
_KEY_VALUE: Final[_Path] = (*_KEY, NFTA_DATA_VALUE)
_EXPIRATION: Final[_Path] = (*_ELEMENT, NFTA_SET_ELEM_EXPIRATION)
_EXPRESSIONS: Final[_Path] = (*_ELEMENT, NFTA_SET_ELEM_EXPRESSIONS)
_COUNTERS: Final[tuple[_Path, ...]] = ((*_ELEMENT, NFTA_SET_ELEM_EXPR), (*_EXPRESSIONS, NFTA_LIST_ELEM))
_COUNTER_NAMES: Final = tuple((*counter, NFTA_EXPR_NAME) for counter in _COUNTERS)
_COUNTER_DATA: Final = tuple((*counter, NFTA_EXPR_DATA) for counter in _COUNTERS)
_PACKETS: Final = tuple((*data, NFTA_COUNTER_PACKETS) for data in _COUNTER_DATA)
_BYTES: Final = tuple((*data, NFTA_COUNTER_BYTES) for data in _COUNTER_DATA)
# Attributes that hold attributes.
_NESTS: Final = frozenset((_ELEMENT, _KEY, _EXPRESSIONS, *_COUNTERS, *_COUNTER_DATA))

# Key, packets counted, milliseconds until the element expires.
SetRow: TypeAlias = tuple[bytes, int, int]


class SetElement(NamedTuple):
    """An element: its key as the kernel keeps it, packets counted, milliseconds until it expires (0: never), and
    the name of the object that a map assigns to it (empty: none)."""

    key: bytes
    packets: int
    expires_ms: int
    object: str = ""


class DeletedElement(NamedTuple):
    """An element that was deleted: its set, its key (empty: all elements of the set), and the packets that it had
    counted (None: the kernel was not asked to report them)."""

    set: str
    key: bytes
    packets: int | None


class _Layout(NamedTuple):
    """The layout of each element in a message. A byte of `header` is the same in every element if the same byte of
    `mask` is 0xff. `fields` unpacks a key, the packets if `counted`, and the milliseconds if `expiring`."""

    header: bytes
    mask: bytes
    fields: struct.Struct
    counted: bool
    expiring: bool


def rows(nest: bytes) -> list[SetRow]:
    """The elements of a nest NFTA_SET_ELEM_LIST_ELEMENTS, in the kernel's order. An element without a counter has
    0 packets, and one without an expiration has 0 milliseconds."""
    found = _uniform(nest)
    return [element[:3] for element in elements(nest)] if found is None else found


def elements(nest: bytes) -> Iterator[SetElement]:
    """The same as `rows`, with the objects of a map; ten times as slow."""
    for _, element in attributes_of(nest):
        yield _element(element)


def _element(data: bytes) -> SetElement:
    key, packets, expires, named = b"", 0, 0, ""
    for kind, value in attributes_of(data):
        if kind == NFTA_SET_ELEM_KEY:  # a nest with one NFTA_DATA_VALUE
            key = value[ATTRIBUTE.size :]
        elif kind == NFTA_SET_ELEM_EXPIRATION:
            (expires,) = _U64.unpack(value)
        elif kind == NFTA_SET_ELEM_OBJREF:
            named = value.rstrip(b"\0").decode()
        elif kind == NFTA_SET_ELEM_EXPR:
            packets = _packets(value)
        elif kind == NFTA_SET_ELEM_EXPRESSIONS:  # a list; a counter is the only expression that portward writes
            packets = _packets(value[ATTRIBUTE.size :])
    return SetElement(key, packets, expires, named)


def _packets(expression: bytes) -> int:
    """The packets of a counter expression, which is a nest of name and data; 0 for another expression."""
    for kind, value in attributes_of(expression):
        if kind == NFTA_EXPR_DATA:
            for inner, number in attributes_of(value):
                if inner == NFTA_COUNTER_PACKETS:
                    return int(_U64.unpack(number)[0])
    return 0


def _uniform(nest: bytes) -> list[SetRow] | None:
    """The rows of a message if all elements have the layout of the first one; None if not."""
    if len(nest) < 4:
        return []
    size = (ATTRIBUTE.unpack_from(nest)[0] + 3) & ~3
    if size < 8 or len(nest) % size:
        return None
    layout = _layout(nest[:size])
    if layout is None:
        return None
    mask, header = _repeated(layout.mask, layout.header, len(nest) // size)
    if int.from_bytes(nest, "little") & mask != header:
        return None
    found = layout.fields.iter_unpack(nest)
    if layout.counted and layout.expiring:
        return list(found)
    if layout.counted:
        return [(key, packets, 0) for key, packets in found]
    if layout.expiring:
        return [(key, 0, expires) for key, expires in found]
    return [(key, 0, 0) for (key,) in found]


@lru_cache(maxsize=64)
def _repeated(mask: bytes, header: bytes, times: int) -> tuple[int, int]:
    """Mask and header, repeated `times` times, as the numbers that `_uniform` compares."""
    return int.from_bytes(mask * times, "little"), int.from_bytes(header * times, "little")


def _layout(first: bytes) -> _Layout | None:
    """The layout of an element that has only a key and, in this order, a counter and an expiration, both optional;
    None for another one."""
    values = _values(first)
    if values is None:
        return None
    names = tuple(name for name, _, _ in values)
    if names not in (("key",), ("key", "packets"), ("key", "expires"), ("key", "packets", "expires")):
        return None
    text, at, mask = ">", 0, bytearray(b"\xff" * len(first))
    for name, start, length in values:
        text += f"{start - at}x" + (f"{length}s" if name == "key" else "Q")
        at = start + length
        mask[start:at] = bytes(length)
    # The counted bytes are not read, but they differ from element to element.
    for start in _bytes_counted(first):
        mask[start : start + 8] = bytes(8)
    text += f"{len(first) - at}x"
    header = bytes(byte & keep for byte, keep in zip(first, mask, strict=True))
    return _Layout(header, bytes(mask), struct.Struct(text), "packets" in names, "expires" in names)


def _values(first: bytes) -> list[tuple[str, int, int]] | None:
    """The values of an element: name, start and length in bytes; None if it holds any other attribute."""
    found = []
    for path, start, length in _leaves(first, 0, len(first), ()):
        if path == _KEY_VALUE and length > 0:
            found.append(("key", start, length))
        elif path in _PACKETS and length == _U64.size:
            found.append(("packets", start, length))
        elif path == _EXPIRATION and length == _U64.size:
            found.append(("expires", start, length))
        elif path not in _COUNTER_NAMES and path not in _BYTES:
            return None
    return found


def _bytes_counted(first: bytes) -> list[int]:
    leaves = _leaves(first, 0, len(first), ())
    return [start for path, start, length in leaves if path in _BYTES and length == _U64.size]


def _leaves(data: bytes, start: int, end: int, path: _Path) -> Iterator[tuple[_Path, int, int]]:
    """The attributes that hold no other attributes: path, start and length of the value in bytes. An attribute
    with an impossible length gets an empty path, and ends the iteration."""
    while start + 4 <= end:
        length, kind = ATTRIBUTE.unpack_from(data, start)
        if length < 4 or start + length > end:
            yield (), start, 0
            return
        here = (*path, kind & TYPE_MASK)
        if here in _NESTS:
            yield from _leaves(data, start + 4, start + length, here)
        else:
            yield here, start + 4, length - 4
        start += (length + 3) & ~3
