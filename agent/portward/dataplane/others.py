"""Finds rules of other programs that can change a packet after portward has classified it: address translation,
stateless rewrites, and chains at the priority of portward's own.

`screen` classifies destination and port as the tenant wrote them. If a later rule can change them, the ruleset
needs the forward guard. The guard costs every forwarded packet one hook, so it is loaded only then. The agent
looks when the kernel reports a change of a ruleset, and every ten seconds, because legacy iptables reports
nothing.

Not found: IPVS, and programs of tc and BPF. Found, although the guard comes before them: rewrites in postrouting.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from portward.base.descriptors import Reserve
from portward.base.netlink import ATTRIBUTE
from portward.dataplane import nf_tables as nf
from portward.dataplane.names import CLOSED, HOOKS, TABLE, KernelTable
from portward.dataplane.namespacelock import LOCK_TABLE
from portward.dataplane.nfnetlink import Chain, Expression, NfNetlink
from portward.errors import KernelError

_OWN_TABLES: Final = (TABLE, CLOSED, LOCK_TABLE)
_OWN_FAMILIES: Final = frozenset(table.value for table in KernelTable)
_FAMILIES: Final = {
    nf.NFPROTO_UNSPEC: "unspec", nf.NFPROTO_INET: "inet", nf.NFPROTO_IPV4: "ip", nf.NFPROTO_ARP: "arp",
    nf.NFPROTO_NETDEV: "netdev", nf.NFPROTO_BRIDGE: "bridge", nf.NFPROTO_IPV6: "ip6",
}  # fmt: skip
# The families whose chains see the same packets as portward's chains.
_ROUTED: Final = (nf.NFPROTO_INET, nf.NFPROTO_IPV4, nf.NFPROTO_IPV6)
# xtables targets that change addresses or ports. A rule of iptables-nft has them by nft_compat.
_TARGETS: Final = frozenset({"DNAT", "SNAT", "MASQUERADE", "NETMAP", "REDIRECT", "TPROXY"})
# The names of the tables of legacy iptables in use. Root can read the files, and the group that the unit gives
# them.
_LEGACY: Final = (Path("/proc/thread-self/net/ip_tables_names"), Path("/proc/thread-self/net/ip6_tables_names"))
# Bytes of an Ethernet header.
_LINK_HEADER_BYTES: Final = 14
# The offset of the destination in an IPv4 header. Before it are type of service, length, time to live and source.
_DESTINATION_OFFSET: Final = 16
# The two ports are the first bytes of the transport header.
_PORTS_BYTES: Final = 4
# A rule that writes into packets contains one of these: the name of an expression, or the header of the attribute
# for the source register of a payload expression (eight bytes with its value).
WRITING: Final = (b"nat\0", b"redir\0", b"tproxy\0", b"target\0", ATTRIBUTE.pack(8, nf.NFTA_PAYLOAD_SREG))

_T = TypeVar("_T")

_log = logging.getLogger("portward")


class Others(NamedTuple):
    """The rules of other programs that matter, each as a line for the operator: `translating` are those that
    change packets, `beside` are chains at the priority of portward's own."""

    translating: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def guard(self) -> bool:
        """Whether the ruleset needs the forward guard."""
        return bool(self.translating or self.beside)

    @property
    def why(self) -> tuple[str, ...]:
        """The reasons for the forward guard."""
        return self.translating + self.beside


NO_OTHERS: Final = Others()


def look(netlink: NfNetlink, legacy: Iterable[Path] | None = None) -> Others:
    """The rules of other programs in the network namespace of the calling thread. Raises OSError. The rules are
    read only if no chain is a reason by itself: a host with kube-proxy has tens of thousands of rules, but also
    chains for address translation. `legacy` are the files of legacy iptables."""
    read, whole = _read(netlink.chains())
    chains = [chain for chain in read if not _ours(chain)]
    translating = [*_nat(chains), *_legacy(_LEGACY if legacy is None else legacy)]
    if not translating:
        expressions, all_rules = _read(netlink.expressions(WRITING))
        translating, whole = list(dict.fromkeys(_rewriting(expressions))), whole and all_rules
    found = Others(tuple(translating), tuple(_beside(chains)))
    # An incomplete reading is good enough if it has found a reason.
    if not whole and not found.guard:
        raise InterruptedError(errno.EINTR, "the rulesets change faster than they can be read")
    return found


def _read(rows: Iterable[_T]) -> tuple[list[_T], bool]:
    """The rows, and whether they are complete. They are not if other programs change their rules faster than they
    can be read."""
    found: list[_T] = []
    try:
        for row in rows:
            found.append(row)  # one by one, because the rows before an error count
    except InterruptedError:
        return found, False
    return found, True


def seen(netlink: NfNetlink) -> Others:
    """The same as `look`. If the kernel cannot be read, that is a reason for the guard."""
    try:
        return look(netlink)
    except (OSError, KernelError) as error:
        return Others((f"the kernel does not say what others have loaded ({error})",))


class OthersMonitor:
    """The rules of other programs, as they were last found. Each reason is logged when it is new. `found` and
    `looked_at` (the time by the monotonic clock, in seconds) may be read on any thread."""

    def __init__(self, netlink: NfNetlink) -> None:
        """`netlink` must belong to the thread that calls `look`."""
        self._netlink = netlink
        self.found, self.looked_at = NO_OTHERS, 0.0
        # Descriptors for the files of legacy iptables: a file that cannot be read counts as a reason.
        self._reserve = Reserve(2)

    def look(self) -> bool:
        """Looks again. Returns whether the ruleset needs the forward guard."""
        self.looked_at = time.monotonic()
        with self._reserve.lent():
            found = seen(self._netlink)
        for line in found.why:
            if line not in self.found.why:
                _log.warning("%s: forwarded packets are classified again (forward guard)", line)
        for line in self.found.why:
            if line not in found.why:
                _log.info("no longer: %s", line)
        if self.found.guard and not found.guard:
            _log.info("no other program translates packets any more: the forward guard is removed")
        self.found = found
        return found.guard


def _ours(found: Chain | Expression) -> bool:
    return found.family in _OWN_FAMILIES and found.table in _OWN_TABLES


def _nat(chains: list[Chain]) -> Iterator[str]:
    """The first nat chain of each table. A chain that translates only sources counts too: answers to packets that
    it let in are translated back, to an address that `screen` has not seen."""
    tables = {(chain.family, chain.table): chain for chain in reversed(chains) if chain.type == "nat"}
    for chain in reversed(tables.values()):
        yield f"{_called(chain)} translates addresses"


def _beside(chains: list[Chain]) -> Iterator[str]:
    own = set(HOOKS.values())
    for chain in chains:
        if chain.family in _ROUTED and (chain.hook, chain.priority) in own:
            yield f"{_called(chain)} stands at portward's own priority ({chain.priority} in prerouting)"


def _legacy(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        try:
            if "nat" in file.read_text("utf-8").split():
                yield f"legacy iptables has a table nat ({file.name})"
        except FileNotFoundError:
            continue
        except OSError as error:  # legacy iptables is in use, and may translate
            yield f"legacy iptables is in use, and {file} cannot be read ({error.strerror})"


def _rewriting(expressions: Iterable[Expression]) -> Iterator[str]:
    for found in expressions:
        if not _ours(found) and (what := _written(found)):
            family = _FAMILIES.get(found.family, str(found.family))
            yield f"a rule in table {family} {found.table}, chain {found.chain}, writes {what}"


def _written(found: Expression) -> str:
    """The part of a packet that an expression writes; empty if that is neither address nor port."""
    if found.name in ("nat", "redir", "tproxy"):
        return "addresses"
    if found.name == "target":
        target = found.attributes.get(nf.NFTA_TARGET_NAME, b"").rstrip(b"\0").decode(errors="replace")
        return f"addresses (target {target})" if target in _TARGETS else ""
    if found.name != "payload" or nf.NFTA_PAYLOAD_SREG not in found.attributes:
        return ""
    kinds = (nf.NFTA_PAYLOAD_BASE, nf.NFTA_PAYLOAD_OFFSET, nf.NFTA_PAYLOAD_LEN)
    base, offset, length = (_number(found.attributes, kind) for kind in kinds)
    if base == nf.NFT_PAYLOAD_NETWORK_HEADER:
        return "addresses" if offset + length > _DESTINATION_OFFSET else ""
    if base == nf.NFT_PAYLOAD_TRANSPORT_HEADER:
        return "ports" if offset < _PORTS_BYTES else ""
    # An offset can reach beyond the link header.
    beyond = base != nf.NFT_PAYLOAD_LL_HEADER or offset + length > _LINK_HEADER_BYTES
    return "bytes of any header" if beyond else ""


def _number(attributes: dict[int, bytes], kind: int) -> int:
    return int.from_bytes(attributes.get(kind, b""), "big")


def _called(chain: Chain) -> str:
    return f"table {_FAMILIES.get(chain.family, chain.family)} {chain.table}, chain {chain.name},"
