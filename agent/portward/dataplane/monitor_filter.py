"""A filter in the kernel for notices of nftables: what other programs do in their own tables does not wake the
agent.

To read 200 notices a second takes some percent of a core, to filter them next to nothing. It is a program of
classic BPF (linux/filter.h), which the kernel runs for each datagram before it is queued. A datagram holds up to
some dozen messages of one transaction. It is dropped if all of them are about tables of others and, unless
`everything`, about sets, elements, objects, flowtables and generations alone. What the filter does not
understand is not dropped."""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
from typing import Final

_SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h
_INSTRUCTION: Final = struct.Struct("=HBBI")
_PROGRAM: Final = struct.Struct("@HP")
# Messages of one datagram that are looked at. Kernels before 6.7 give a socket 20 KB for a filter.
_MESSAGES: Final = 16
_SUBSYS_NFTABLES, _INET = 10, 1
_GENERATION: Final = 15
# Messages about sets, elements, the generation, objects and flowtables: linux/netfilter/nf_tables.h.
_HARMLESS: Final = (9, 11, 12, 14, _GENERATION, 18, 20, 22, 24)
# Places in a message: struct nlmsghdr and nfgenmsg, then the first attribute, which is the table's name.
_LENGTH, _TYPE, _SUBSYSTEM, _FAMILY, _ATTRIBUTE_TYPE, _NAME = 0, 4, 5, 16, 22, 24
# Operations: load byte, half word and word at X + k; length of the datagram; jumps; arithmetic; registers.
_BYTE, _HALF, _WORD, _DATAGRAM = 0x50, 0x48, 0x40, 0x80
_EQUAL, _GREATER_X = 0x15, 0x2D
_ADD, _ADD_X, _AND, _SHIFT = 0x04, 0x0C, 0x54, 0x64
_STORE, _STORE_X, _LOAD_X, _TO_X, _LOAD_X_NUMBER, _RETURN = 0x02, 0x03, 0x61, 0x07, 0x01, 0x06
_KEEP, _DROP = 0xFFFFFFFF, 0


def attach(listening: socket.socket, *, everything: bool) -> None:
    """Drops notices of what others do in tables whose name does not begin with `portward`. With `everything` all
    of them; else those that cannot turn packets into others. Raises OSError."""
    if sys.byteorder != "little":  # lengths and types are read byte by byte in that order
        return
    program = b"".join(_INSTRUCTION.pack(*one) for one in _program(everything=everything))
    buffer = ctypes.create_string_buffer(program)
    count = len(program) // _INSTRUCTION.size
    listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _PROGRAM.pack(count, ctypes.addressof(buffer)))


def _program(*, everything: bool) -> list[tuple[int, int, int, int]]:
    """The instructions: operation, jump if true, jump if false (both over so many instructions), number."""
    code = [(_LOAD_X_NUMBER, 0, 0, 0)]
    for _ in range(_MESSAGES):
        code += _message(everything=everything)
    return [*code, (_RETURN, 0, 0, _KEEP)]


def _message(*, everything: bool) -> list[tuple[int, int, int, int]]:
    """Looks at the message at X, and brings X to the next one. A load behind the end drops the datagram: a
    message that is too short for our name is not about our tables."""
    keep = (_RETURN, 0, 0, _KEEP)
    if everything:
        kinds = [(_BYTE, 0, 0, _TYPE), (_EQUAL, 10, 0, _GENERATION)]
    else:
        others = [kind for kind in _HARMLESS if kind != _GENERATION]
        kinds = [(_BYTE, 0, 0, _TYPE), (_EQUAL, len(others) + 11, 0, _GENERATION)]
        kinds += [(_EQUAL, len(others) - place, 0, kind) for place, kind in enumerate(others)]
        kinds += [keep]
    return [
        # Behind the last message: nothing of interest.
        (_DATAGRAM, 0, 0, 0), (_GREATER_X, 1, 0, 0), (_RETURN, 0, 0, _DROP),
        (_BYTE, 0, 0, _SUBSYSTEM), (_EQUAL, 1, 0, _SUBSYS_NFTABLES), keep,
        *kinds,
        # A table of another family is none of ours.
        (_BYTE, 0, 0, _FAMILY), (_EQUAL, 0, 8, _INET),
        (_HALF, 0, 0, _ATTRIBUTE_TYPE), (_EQUAL, 1, 0, 0x0100), keep,
        (_WORD, 0, 0, _NAME), (_EQUAL, 0, 3, int.from_bytes(b"port", "big")),
        (_WORD, 0, 0, _NAME + 4), (_EQUAL, 0, 1, int.from_bytes(b"ward", "big")), keep,
        # The next message: X + length, a multiple of four. One of 64 KiB or more is not expected.
        (_BYTE, 0, 0, _LENGTH + 2), (_EQUAL, 1, 0, 0), keep,
        (_STORE_X, 0, 0, 1), (_BYTE, 0, 0, _LENGTH + 1), (_SHIFT, 0, 0, 8), (_STORE, 0, 0, 0),
        (_BYTE, 0, 0, _LENGTH), (_LOAD_X, 0, 0, 0), (_ADD_X, 0, 0, 0), (_ADD, 0, 0, 3), (_AND, 0, 0, 0xFFFFFFFC),
        (_LOAD_X, 0, 0, 1), (_ADD_X, 0, 0, 0), (_TO_X, 0, 0, 0),
    ]  # fmt: skip
