"""How the agent and its custodian find each other, and what they say (package `custodian`). Pure.

The custodian listens at a socket of the kernel's abstract namespace, which each network namespace has for itself,
as nftables' tables. The address has the number of the netlink socket that owns portward's table. The kernel
reports it to every process with CAP_NET_ADMIN, so no file has to lead to the custodian, and no other process can
stand in for it: the address is taken before the table has an owner, and as long as there is a custodian.

The custodian first sends each process that it admits a greeting with two descriptors: the netlink socket and the
listening socket. After that each byte is a command.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

# Raised if the meaning of anything here changes: an upgrade lets a new agent meet an old custodian.
VERSION: Final = 1
# The custodian stays when the process that started it ends. Without this command it ends with it.
KEEP: Final = b"k"
# The custodian ends at once. The end of its connection says that it has.
END: Final = b"e"
GREETING_BYTES: Final = 256
# The descriptors that come with the greeting.
DESCRIPTORS: Final = 2
_GREETING: Final = re.compile(rb"portward-custodian (\d+) (\d+) (\S*)")


class Greeting(NamedTuple):
    """`process` is the custodian's id in its own pid namespace, `release` portward's version that it was started
    with."""

    process: int
    release: str


def address(port: int) -> str:
    """The address of the custodian of the netlink socket with this number."""
    return f"\0portward-custodian-{port}"


def greeting(process: int, release: str) -> bytes:
    """A greeting as one datagram."""
    return f"portward-custodian {VERSION} {process} {release}".encode()


def read(datagram: bytes) -> Greeting:
    """The reverse of `greeting`. Raises ValueError if this is none, or one of another version."""
    found = _GREETING.fullmatch(datagram)
    if found is None or int(found[1]) != VERSION:
        raise ValueError(f"no greeting of a custodian of version {VERSION}: {datagram[:40]!r}")
    return Greeting(int(found[2]), found[3].decode())
