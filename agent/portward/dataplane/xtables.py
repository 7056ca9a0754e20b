"""The queue step on kernels without nft_queue: the xtables target NFQUEUE, in our own chains.

The kernel's nft_compat runs an xtables target as an expression of an nftables rule; that is how iptables works on
Debian. nft itself has no words for it, so the rules are written by netlink. They stand where nft's own `queue`
would, and a packet meets no hook more.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from portward.base.netlink import attribute, nest, string
from portward.dataplane.names import TABLE
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.ruleset import QueueStatement
from portward.errors import KernelError

_PROBE_TABLE: Final = "portward_probe"
_PROBE: Final = (
    f"table inet {_PROBE_TABLE} {{ chain probe {{ type filter hook prerouting priority 0; queue to 0; }}; }}\n"
)
_NEW_TABLE, _NEW_CHAIN, _NEW_RULE = 0, 3, 6  # linux/netfilter/nf_tables.h
# struct xt_NFQ_info_v3 (linux/netfilter/xt_NFQUEUE.h): first queue, how many, flags; padded as xtables aligns it.
_INFO = struct.Struct("=HHH2x")
_REVISION: Final = 3
_BYPASS: Final = 1


def has_native_queue(nft: Nft) -> bool:
    """Whether the kernel takes nft's own `queue` statement; nothing is loaded to find out."""
    try:
        nft.check(_PROBE)
    except KernelError:
        return False
    return True


def require(netlink: NfNetlink) -> None:
    """Raises KernelError where the kernel does not take the xtables target either; changes nothing."""
    table = attribute(1, string(_PROBE_TABLE))
    messages = [
        (_NEW_TABLE, table),
        (_NEW_CHAIN, table + attribute(3, string("probe"))),
        (_NEW_RULE, _rule(_PROBE_TABLE, QueueStatement("probe", 0, 1))),
    ]
    try:
        netlink.commit(messages, dry_run=True)
    except OSError as error:
        raise KernelError(
            f"this kernel has no way to a queue: neither nft_queue nor xt_NFQUEUE by nft_compat ({error.strerror})"
        ) from error


def install(netlink: NfNetlink, statements: Iterable[QueueStatement]) -> None:
    """Adds each statement to its chain of the loaded table, in one transaction; raises KernelError."""
    try:
        netlink.commit([(_NEW_RULE, _rule(TABLE, statement)) for statement in statements])
    except OSError as error:
        raise KernelError(f"the kernel does not take the target NFQUEUE: {error.strerror}") from error


def _rule(table: str, statement: QueueStatement) -> bytes:
    """The attributes of a rule whose one expression is the target."""
    info = _INFO.pack(statement.first, statement.queues, _BYPASS if statement.bypass else 0)
    target = attribute(1, string("NFQUEUE")) + attribute(2, struct.pack(">I", _REVISION)) + attribute(3, info)
    expression = attribute(1, string("target")) + nest(2, target)
    return attribute(1, string(table)) + attribute(2, string(statement.chain)) + nest(4, nest(1, expression))
