"""The queue statement on kernels without nft_queue: the xtables target NFQUEUE in portward's own chains.

The kernel's nft_compat runs an xtables target as an expression of an nftables rule. Debian's iptables works this
way. nft has no syntax for it, so these rules are written by netlink. They stand in the same place as nft's own
`queue` statement, so a packet passes no additional hook.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from portward.base.netlink import attribute, nest, string
from portward.dataplane.names import TABLE, KernelTable
from portward.dataplane.nf_tables import (
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWTABLE,
    NFTA_CHAIN_NAME,
    NFTA_CHAIN_TABLE,
    NFTA_EXPR_DATA,
    NFTA_EXPR_NAME,
    NFTA_LIST_ELEM,
    NFTA_RULE_CHAIN,
    NFTA_RULE_EXPRESSIONS,
    NFTA_RULE_TABLE,
    NFTA_TABLE_NAME,
    NFTA_TARGET_INFO,
    NFTA_TARGET_NAME,
    NFTA_TARGET_REV,
)
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.queue_rules import QueueStatement
from portward.errors import KernelError

_PROBE_TABLE: Final = "portward_probe"
_PROBE: Final = "table {} {{ chain probe {{ type filter hook prerouting priority 0; queue to 0; }}; }}\n"
# struct xt_NFQ_info_v3 (linux/netfilter/xt_NFQUEUE.h): first queue, number of queues, flags; padded to eight
# bytes, as xtables aligns it.
_INFO: Final = struct.Struct("=HHH2x")
_REVISION: Final = 3
_BYPASS: Final = 1  # NFQ_FLAG_BYPASS


def has_native_queue(nft: Nft, table: KernelTable = KernelTable.INET) -> bool:
    """Whether the kernel takes nft's own `queue` statement in a table of this family. A dry run finds out, so
    nothing is loaded. The statement is in a base chain, because the kernel examines no other one."""
    try:
        nft.check(_PROBE.format(f"{table.family} {_PROBE_TABLE}"))
    except KernelError:
        return False
    return True


def require(netlink: NfNetlink) -> None:
    """Raises KernelError if the kernel does not take the xtables target either. Changes nothing."""
    table = attribute(NFTA_TABLE_NAME, string(_PROBE_TABLE))
    chain = attribute(NFTA_CHAIN_TABLE, string(_PROBE_TABLE)) + attribute(NFTA_CHAIN_NAME, string("probe"))
    messages = [
        (NFT_MSG_NEWTABLE, table),
        (NFT_MSG_NEWCHAIN, chain),
        (NFT_MSG_NEWRULE, _rule(_PROBE_TABLE, QueueStatement("probe", 0, 1))),
    ]
    try:
        netlink.commit(messages, dry_run=True)
    except OSError as error:
        raise KernelError(
            f"this kernel has no way to a queue: neither nft_queue nor xt_NFQUEUE by nft_compat ({error.strerror})"
        ) from error


def install(netlink: NfNetlink, statements: Iterable[QueueStatement]) -> None:
    """Adds each statement to its chain of the loaded table, in one transaction. Raises KernelError."""
    try:
        netlink.commit([(NFT_MSG_NEWRULE, _rule(TABLE, statement)) for statement in statements])
    except OSError as error:
        raise KernelError(f"the kernel does not take the target NFQUEUE: {error.strerror}") from error


def _rule(table: str, statement: QueueStatement) -> bytes:
    """The attributes of a rule with the target as its only expression."""
    info = _INFO.pack(statement.first, statement.queues, _BYPASS if statement.bypass else 0)
    target = (
        attribute(NFTA_TARGET_NAME, string("NFQUEUE"))
        + attribute(NFTA_TARGET_REV, struct.pack(">I", _REVISION))
        + attribute(NFTA_TARGET_INFO, info)
    )
    expression = attribute(NFTA_EXPR_NAME, string("target")) + nest(NFTA_EXPR_DATA, target)
    return (
        attribute(NFTA_RULE_TABLE, string(table))
        + attribute(NFTA_RULE_CHAIN, string(statement.chain))
        + nest(NFTA_RULE_EXPRESSIONS, nest(NFTA_LIST_ELEM, expression))
    )
