"""One writer for each network namespace: the lock that a process takes before it writes portward's rules.

The lock is an empty nftables table with an owner (`flags owner`). The kernel ties it to the netlink socket that
made it, refuses it to every other socket with EPERM, keeps it when `nft flush ruleset` runs, and removes it when
the socket closes, also after SIGKILL. So no process can leave it behind, and it belongs to the namespace whose
rules it guards. It takes CAP_NET_ADMIN to make it.

Other locks would not do: any local user can take an abstract Unix socket or a netlink port number, and a locked
file in /run is another file in each container and each sandbox.

The lock on the table folder (`runtime.Runtime`) guards the policy table; this one guards the kernel.
"""

from __future__ import annotations

import errno
import os
import re
import time
from types import TracebackType
from typing import Final

from portward.base.netlink import attribute, string
from portward.dataplane.nf_tables import (
    NFT_MSG_DELTABLE,
    NFT_MSG_NEWTABLE,
    NFT_TABLE_F_OWNER,
    NFTA_TABLE_FLAGS,
    NFTA_TABLE_NAME,
    NFTA_TABLE_USERDATA,
    NFTNL_UDATA_TABLE_COMMENT,
)
from portward.dataplane.nfnetlink import NfNetlink
from portward.errors import KernelError

LOCK_TABLE: Final = "portward_lock"
# A new agent waits this long for one that is still ending.
PATIENCE_S: Final = 2.0
_RETRY_S: Final = 0.02
_HOLDER: Final = re.compile(r"portward, process (\d+)")


class NamespaceTakenError(KernelError):
    """Another process writes portward's rules in this network namespace. `process` is its process id in its own
    pid namespace; None if the holder is not portward."""

    def __init__(self, process: int | None) -> None:
        self.process = process
        super().__init__(
            f"this network namespace: another program owns table inet {LOCK_TABLE}: end it"
            if process is None
            else f"this network namespace: portward runs already, as process {process} by its own count"
        )


class NamespaceLock:
    """The right to write portward's rules in the network namespace of the thread that makes this object. It ends
    with `close`, with the `with` block, or with the process; child processes do not inherit it."""

    def __init__(self, patience: float = PATIENCE_S) -> None:
        """Waits at most `patience` seconds for the holder to end. Raises NamespaceTakenError if it does not end.
        Raises KernelError without CAP_NET_ADMIN, and on a kernel older than Linux 5.12. Then nothing has
        changed."""
        self._netlink = NfNetlink()
        try:
            self._take(time.monotonic() + patience)
        except BaseException:
            self._netlink.close()
            raise

    def _take(self, deadline: float) -> None:
        while not _commit(self._netlink):
            # If the holder has ended by now, there is none, and the next try gets the lock.
            if (taken := holder(self._netlink)) is not None and time.monotonic() >= deadline:
                raise taken
            time.sleep(_RETRY_S)

    def close(self) -> None:
        """Releases the lock. Idempotent."""
        self._netlink.close()

    def __enter__(self) -> NamespaceLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()


def holder(netlink: NfNetlink) -> NamespaceTakenError | None:
    """The holder of the lock of this network namespace, as the error that `NamespaceLock` would raise; None if the
    lock is free. Raises KernelError without CAP_NET_ADMIN."""
    try:
        comment = netlink.owned_table(LOCK_TABLE)
    except PermissionError as error:
        raise KernelError(
            f"the kernel takes no ruleset from this process (root or CAP_NET_ADMIN?): {error.strerror}"
        ) from error
    if comment is None:
        return None
    named = _HOLDER.fullmatch(comment)
    return NamespaceTakenError(int(named[1]) if named else None)


def lasting_holder(netlink: NfNetlink, patience: float = PATIENCE_S) -> NamespaceTakenError | None:
    """Waits at most `patience` seconds for the holder to end, as `NamespaceLock` does. Returns and raises like
    `holder`."""
    deadline = time.monotonic() + patience
    while (taken := holder(netlink)) is not None and time.monotonic() < deadline:
        time.sleep(_RETRY_S)
    return taken


def require(netlink: NfNetlink) -> None:
    """Raises KernelError if this process could not take the lock even if it was free. Changes nothing."""
    if not _commit(netlink, dry_run=True):
        # Raises without CAP_NET_ADMIN. Otherwise another process has the lock, so this kernel has such tables.
        holder(netlink)


def _commit(netlink: NfNetlink, *, dry_run: bool = False) -> bool:
    """Makes the owned table; False if another socket owns it, or without CAP_NET_ADMIN. Raises KernelError."""
    name = attribute(NFTA_TABLE_NAME, string(LOCK_TABLE))
    comment = string(f"portward, process {os.getpid()}")
    owned = name + attribute(NFTA_TABLE_FLAGS, NFT_TABLE_F_OWNER.to_bytes(4, "big"))
    owned += attribute(NFTA_TABLE_USERDATA, bytes((NFTNL_UDATA_TABLE_COMMENT, len(comment))) + comment)
    # A table of this name without an owner is not a lock: a saved ruleset that was loaded again leaves one. The
    # kernel gives no owner to a table that exists, so the same transaction deletes it first.
    messages = [(NFT_MSG_NEWTABLE, name), (NFT_MSG_DELTABLE, name), (NFT_MSG_NEWTABLE, owned)]
    try:
        netlink.commit(messages, dry_run=dry_run)
    except PermissionError:
        return False
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            raise KernelError(
                "this kernel has no tables with an owner: portward needs Linux 5.12 or newer"
            ) from error
        raise KernelError(f"table inet {LOCK_TABLE}: {error.strerror}") from error
    return True
