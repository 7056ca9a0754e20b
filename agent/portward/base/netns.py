"""Network namespaces that have a name: a file in /run/netns, as `ip netns add` makes it (ip-netns(8)).

The kernel shows a namespace as a file, and no two namespaces have the same device and inode. `ip netns add` mounts
that file on /run/netns/NAME. The namespace lives on without the name as long as a process is in it.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

FOLDER: Final = Path("/run/netns")
_OWN: Final = Path("/proc/thread-self/ns/net")
_CLONE_NEWNET: Final = 0x40000000


def names() -> list[str]:
    """The names of all network namespaces of this host that have one; none if that cannot be read."""
    try:
        return sorted(path.name for path in FOLDER.iterdir())
    except OSError:
        return []


def is_own(name: str) -> bool:
    """Whether the calling thread is in the namespace that has this name now."""
    return _same(FOLDER / name, _OWN)


def name_of(process: int) -> str:
    """The name of the network namespace of a process. Empty if it has none, or if this user may not see it."""
    theirs = Path(f"/proc/{process}/ns/net")
    return next((name for name in names() if _same(FOLDER / name, theirs)), "")


def enter(name: str) -> None:
    """Moves the calling thread into a namespace. Sockets that it opens afterwards, and threads and processes that
    it starts, are in there. Raises OSError: PermissionError without CAP_SYS_ADMIN, EINVAL if the file is no
    network namespace."""
    descriptor = os.open(FOLDER / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        move(descriptor)
    finally:
        os.close(descriptor)


def move(descriptor: int) -> None:
    """Moves the calling thread into the namespace of an open file (setns(2)). Raises OSError."""
    # Python 3.11 has no os.setns.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
