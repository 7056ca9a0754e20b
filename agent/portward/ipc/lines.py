"""The lines that a worker writes to the daemon, through its stdout: both ends of them.

`ready` says that the queue is bound. Each other line names a source whose rate limit or verdict the kernel does
not know: the index of the interface in decimal, a space, and the address in lower-case hexadecimal, 4 or 16 bytes
in network byte order.
"""

from __future__ import annotations

import re
from typing import Final

READY: Final = b"ready"
# The kernel's interface indexes are positive and have 31 bits (include/uapi/linux/rtnetlink.h: an int).
_LARGEST_INDEX: Final = 2**31 - 1
_ASKED: Final = re.compile(rb"([1-9][0-9]{0,9}) ((?:[0-9a-f]{8}|[0-9a-f]{32}))")


def ask_line(index: int, address: bytes) -> bytes:
    """The line that asks about a source, with its end: interface `index`, `address` of 4 or 16 bytes."""
    return b"%d %s\n" % (index, address.hex().encode())


def asked_source(line: bytes) -> tuple[int, bytes] | None:
    """Interface index and address that a line asks about, given without its end; None if it is no such line."""
    found = _ASKED.fullmatch(line)
    if found is None or int(found[1]) > _LARGEST_INDEX:
        return None
    return int(found[1]), bytes.fromhex(found[2].decode())
