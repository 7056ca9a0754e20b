"""A socket filter for notices of nftables, so that changes of other programs in their tables do not wake the
agent.

The reading of 200 notices a second takes some percent of a core; their filtering takes next to nothing. The filter
is a program of classic BPF (linux/filter.h), which the kernel runs for each datagram before it is queued. A
datagram holds up to some dozen messages of one transaction. It is dropped if all of them are about tables of other
programs and, unless `everything`, only about sets, elements, objects, flowtables and generations. A datagram that
the filter does not understand is kept.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
from typing import Final

from portward.dataplane.nf_tables import (
    NFNL_SUBSYS_NFTABLES,
    NFT_MSG_DELFLOWTABLE,
    NFT_MSG_DELOBJ,
    NFT_MSG_DELSET,
    NFT_MSG_DELSETELEM,
    NFT_MSG_NEWFLOWTABLE,
    NFT_MSG_NEWGEN,
    NFT_MSG_NEWOBJ,
    NFT_MSG_NEWSET,
    NFT_MSG_NEWSETELEM,
)

_SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h
_INSTRUCTION: Final = struct.Struct("=HBBI")
_PROGRAM: Final = struct.Struct("@HP")
# This many messages of a datagram are examined; a datagram with more is kept. A longer program would not fit into
# the 20 KB for filters that kernels before 6.7 give a socket.
_MAX_MESSAGES: Final = 16
# Messages that cannot redirect packets.
_HARMLESS: Final = (
    NFT_MSG_NEWSET, NFT_MSG_DELSET, NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM,
    NFT_MSG_NEWOBJ, NFT_MSG_DELOBJ, NFT_MSG_NEWFLOWTABLE, NFT_MSG_DELFLOWTABLE,
)  # fmt: skip
# Offsets in a message: struct nlmsghdr and nfgenmsg, then the first attribute, which is the table's name.
_LENGTH, _TYPE, _SUBSYSTEM, _ATTRIBUTE_TYPE, _NAME = 0, 4, 5, 22, 24
# Opcodes: load byte, half word and word at X + k; length of the datagram; jumps; arithmetic; registers.
_BYTE, _HALF, _WORD, _DATAGRAM = 0x50, 0x48, 0x40, 0x80
_EQUAL, _GREATER_X = 0x15, 0x2D
_ADD, _ADD_X, _AND, _SHIFT = 0x04, 0x0C, 0x54, 0x64
_STORE, _STORE_X, _LOAD_X, _TO_X, _LOAD_X_NUMBER, _RETURN = 0x02, 0x03, 0x61, 0x07, 0x01, 0x06
_KEEP, _DROP = 0xFFFFFFFF, 0


def attach(listening: socket.socket, *, everything: bool) -> None:
    """Lets the kernel drop notices about tables of any family whose name does not begin with `portward`: with
    `everything` all of them, else only those that cannot redirect packets. Raises OSError."""
    if sys.byteorder != "little":  # the program reads lengths and types byte by byte in this order
        return
    program = b"".join(_INSTRUCTION.pack(*one) for one in _program(everything=everything))
    buffer = ctypes.create_string_buffer(program)
    count = len(program) // _INSTRUCTION.size
    listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _PROGRAM.pack(count, ctypes.addressof(buffer)))


def _program(*, everything: bool) -> list[tuple[int, int, int, int]]:
    """The instructions: opcode, number of instructions to skip if true and if false, operand."""
    code = [(_LOAD_X_NUMBER, 0, 0, 0)]
    for _ in range(_MAX_MESSAGES):
        code += _message(everything=everything)
    return [*code, (_RETURN, 0, 0, _KEEP)]


def _message(*, everything: bool) -> list[tuple[int, int, int, int]]:
    """The instructions that examine the message at X and advance X to the next one. A load beyond the end drops
    the datagram, because a message that is too short for the name `portward` is not about portward's tables."""
    keep = (_RETURN, 0, 0, _KEEP)
    if everything:
        kinds = [(_BYTE, 0, 0, _TYPE), (_EQUAL, 8, 0, NFT_MSG_NEWGEN)]
    else:
        kinds = [(_BYTE, 0, 0, _TYPE), (_EQUAL, len(_HARMLESS) + 9, 0, NFT_MSG_NEWGEN)]
        kinds += [(_EQUAL, len(_HARMLESS) - place, 0, kind) for place, kind in enumerate(_HARMLESS)]
        kinds += [keep]
    return [
        # X is behind the last message: every message was about other programs.
        (_DATAGRAM, 0, 0, 0), (_GREATER_X, 1, 0, 0), (_RETURN, 0, 0, _DROP),
        (_BYTE, 0, 0, _SUBSYSTEM), (_EQUAL, 1, 0, NFNL_SUBSYS_NFTABLES), keep,
        *kinds,
        (_HALF, 0, 0, _ATTRIBUTE_TYPE), (_EQUAL, 1, 0, 0x0100), keep,
        (_WORD, 0, 0, _NAME), (_EQUAL, 0, 3, int.from_bytes(b"port", "big")),
        (_WORD, 0, 0, _NAME + 4), (_EQUAL, 0, 1, int.from_bytes(b"ward", "big")), keep,
        # The next message is at X + length, rounded up to a multiple of four. A longer length than 64 KiB is kept.
        (_BYTE, 0, 0, _LENGTH + 2), (_EQUAL, 1, 0, 0), keep,
        (_STORE_X, 0, 0, 1), (_BYTE, 0, 0, _LENGTH + 1), (_SHIFT, 0, 0, 8), (_STORE, 0, 0, 0),
        (_BYTE, 0, 0, _LENGTH), (_LOAD_X, 0, 0, 0), (_ADD_X, 0, 0, 0), (_ADD, 0, 0, 3), (_AND, 0, 0, 0xFFFFFFFC),
        (_LOAD_X, 0, 0, 1), (_ADD_X, 0, 0, 0), (_TO_X, 0, 0, 0),
    ]  # fmt: skip
