"""One writer for each network namespace: the lock that everything takes that writes portward's rules.

The lock is an empty nftables table with an owner (`flags owner`): the kernel ties it to the netlink socket that
made it, refuses it to every other socket with EPERM, leaves it out of `nft flush ruleset`, and removes it when the
socket closes, also after SIGKILL. So it cannot be left behind, and it is of the namespace whose rules it guards.
Making it takes CAP_NET_ADMIN. Any local user could take an abstract Unix socket or a netlink port number instead,
and a locked file in /run is another file for each container and each sandbox.

The lock on the table folder (`runtime.Runtime`) stays: it guards the policy table, this one guards the kernel.
"""

from __future__ import annotations

import errno
import os
import re
import time
from types import TracebackType
from typing import Final

from portward.base.netlink import attribute, string
from portward.dataplane.nfnetlink import NfNetlink
from portward.errors import KernelError

LOCK_TABLE: Final = "portward_lock"
# How long a new agent waits for one that is still ending, in seconds.
PATIENCE_S: Final = 2.0
_PAUSE_S: Final = 0.02

# linux/netfilter/nf_tables.h: messages, attributes of a table, and its flag.
_NEW_TABLE, _DELETE_TABLE = 0, 2
_TABLE_NAME, _TABLE_FLAGS, _TABLE_USERDATA = 1, 2, 6
_OWNER: Final = 2
_COMMENT: Final = 0  # NFTNL_UDATA_TABLE_COMMENT: nft lists it as the table's comment
_HOLDER: Final = re.compile(r"portward, process (\d+)")


class NamespaceTakenError(KernelError):
    """Another process writes portward's rules in this network namespace. `process` is its id, as that process
    itself counts (it may live in another pid namespace); None if the holder is not portward."""

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
        """Waits at most `patience` seconds for the holder to end. Raises NamespaceTakenError if it does not, and
        KernelError without CAP_NET_ADMIN or on a kernel older than Linux 5.12; then nothing has changed."""
        self._netlink = NfNetlink()
        try:
            self._take(time.monotonic() + patience)
        except BaseException:
            self._netlink.close()
            raise

    def _take(self, deadline: float) -> None:
        while not _commit(self._netlink):
            # A holder that is gone by now leaves None: then the next try gets the lock.
            if (taken := holder(self._netlink)) is not None and time.monotonic() >= deadline:
                raise taken
            time.sleep(_PAUSE_S)

    def close(self) -> None:
        """Gives the lock back. Idempotent."""
        self._netlink.close()

    def __enter__(self) -> NamespaceLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()


def holder(netlink: NfNetlink) -> NamespaceTakenError | None:
    """Who has the lock of this network namespace, as the error that `NamespaceLock` would raise; None if it is
    free. Raises KernelError if the kernel may not be asked."""
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
    """Like `holder`, after waiting at most `patience` seconds for the holder to end, as `NamespaceLock` does."""
    deadline = time.monotonic() + patience
    while (taken := holder(netlink)) is not None and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
    return taken


def require(netlink: NfNetlink) -> None:
    """Raises KernelError if this process could not take the lock even if nobody held it; changes nothing."""
    if not _commit(netlink, dry_run=True):
        holder(netlink)  # raises without CAP_NET_ADMIN; else another process has it, so this kernel can do it


def _commit(netlink: NfNetlink, *, dry_run: bool = False) -> bool:
    """Makes the owned table; False if another socket owns it, or without CAP_NET_ADMIN."""
    name = attribute(_TABLE_NAME, string(LOCK_TABLE))
    comment = string(f"portward, process {os.getpid()}")
    owned = name + attribute(_TABLE_FLAGS, _OWNER.to_bytes(4, "big"))
    owned += attribute(_TABLE_USERDATA, bytes((_COMMENT, len(comment))) + comment)
    # A table of this name without an owner holds nothing back (a saved ruleset that was loaded again leaves one),
    # and the kernel gives no owner to a table that exists: so it goes first, in the same transaction.
    messages = [(_NEW_TABLE, name), (_DELETE_TABLE, name), (_NEW_TABLE, owned)]
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
