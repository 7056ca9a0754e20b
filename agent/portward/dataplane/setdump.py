"""The elements in one message of a set's dump. Pure; formats: linux/netfilter/nf_tables.h.

Integers in attributes are big-endian; an interface index in a key is in host order, as the kernel keeps it.

The kernel writes all elements of a message alike unless some carry attributes that others lack. So the layout is
taken from the first element, every header byte of all the others is compared with it in one operation, and the
values are then unpacked in C. Whatever is not laid out like that is walked attribute by attribute, which takes ten
times longer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

from portward.base.netlink import ATTRIBUTE, TYPE_MASK, attributes_of

_U64: Final = struct.Struct(">Q")
# Attributes of an element (NFTA_SET_ELEM_…), of an expression (NFTA_EXPR_DATA) and of a counter (NFTA_COUNTER_…).
_KEY, _EXPIRATION, _EXPRESSION, _OBJECT, _EXPRESSIONS = 1, 5, 7, 9, 11
_EXPRESSION_DATA: Final = 2
_COUNTER_BYTES, _COUNTER_PACKETS = 1, 2

# Key, packets counted, milliseconds until the element expires.
SetRow: TypeAlias = tuple[bytes, int, int]


class SetElement(NamedTuple):
    """An element: its key as the kernel keeps it, packets counted, milliseconds until it expires (0: never), and
    the name of the object that a map gives for it."""

    key: bytes
    packets: int
    expires_ms: int
    object: str = ""


class _Layout(NamedTuple):
    """How each element of a message is written. In `header` and `mask`, 0xff in the mask marks a byte that is the
    same in every element. `fields` unpacks a key, the packets if `counted`, and the milliseconds if `expiring`."""

    header: bytes
    mask: bytes
    fields: struct.Struct
    counted: bool
    expiring: bool


def rows(nest: bytes) -> list[SetRow]:
    """The elements of a nest NFTA_SET_ELEM_LIST_ELEMENTS, in the kernel's order. An element without a counter or
    without an expiration has 0 there."""
    found = _uniform(nest)
    return [element[:3] for element in elements(nest)] if found is None else found


def elements(nest: bytes) -> Iterator[SetElement]:
    """The same as `rows`, element by element, with the objects of a map."""
    for _, element in attributes_of(nest):
        yield _element(element)


def _element(data: bytes) -> SetElement:
    key, packets, expires, named = b"", 0, 0, ""
    for kind, value in attributes_of(data):
        if kind == _KEY:  # a nest of NFTA_DATA_VALUE
            key = value[4:]
        elif kind == _EXPIRATION:
            (expires,) = _U64.unpack(value)
        elif kind == _OBJECT:
            named = value.rstrip(b"\0").decode()
        elif kind == _EXPRESSION:
            packets = _counted(value)
        elif kind == _EXPRESSIONS:  # a list of expressions
            packets = _counted(value[4:])
    return SetElement(key, packets, expires, named)


def _counted(expression: bytes) -> int:
    """Packets of a counter expression: a nest of name and data."""
    for kind, value in attributes_of(expression):
        if kind == _EXPRESSION_DATA:
            for inner, number in attributes_of(value):
                if inner == _COUNTER_PACKETS:
                    return int(_U64.unpack(number)[0])
    return 0


def _uniform(nest: bytes) -> list[SetRow] | None:
    """The rows of a message whose elements are all laid out like the first; None if they are not."""
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
    """Mask and header of so many elements, as the numbers that `_uniform` compares."""
    return int.from_bytes(mask * times, "little"), int.from_bytes(header * times, "little")


def _layout(first: bytes) -> _Layout | None:
    """The layout of an element that has nothing but a key and, in this order, a counter and an expiration."""
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
    # Counted bytes are of no use here, but differ from element to element.
    for start in _bytes_counted(first):
        mask[start : start + 8] = bytes(8)
    text += f"{len(first) - at}x"
    header = bytes(byte & keep for byte, keep in zip(first, mask, strict=True))
    return _Layout(header, bytes(mask), struct.Struct(text), "packets" in names, "expires" in names)


def _values(first: bytes) -> list[tuple[str, int, int]] | None:
    """The values of an element, by place: name, start, length; None if it holds anything else."""
    found = []
    for path, start, length in _leaves(first, 0, len(first), ()):
        match path:
            case (1, 1, 1) if length > 0:
                found.append(("key", start, length))
            case (1, 7, 2, 2) | (1, 11, 1, 2, 2) if length == 8:
                found.append(("packets", start, 8))
            case (1, 5) if length == 8:
                found.append(("expires", start, 8))
            case (1, 7, 1) | (1, 11, 1, 1) | (1, 7, 2, 1) | (1, 11, 1, 2, 1):
                pass  # the expression's name, the same in all, and the bytes counted
            case _:
                return None
    return found


def _bytes_counted(first: bytes) -> list[int]:
    leaves = _leaves(first, 0, len(first), ())
    return [start for path, start, length in leaves if path in ((1, 7, 2, 1), (1, 11, 1, 2, 1)) and length == 8]


# What holds attributes in an element: the element, its key, its expressions and their data.
_NESTS: Final = ((1,), (1, 1), (1, 7), (1, 7, 2), (1, 11), (1, 11, 1), (1, 11, 1, 2))


def _leaves(
    data: bytes, start: int, end: int, path: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """The attributes that hold no others: types from the outermost inwards, start and length of the value. What
    does not fit its surroundings is given with an empty path."""
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
