"""What other programs have in the kernel that can turn a packet into one that portward has not judged: address
translation, rewrites without state, and chains at the priority of portward's own.

`screen` judges destination and port as the tenant wrote them. If something behind it can change them, the ruleset
needs the forward guard. It costs every forwarded packet a hook, so it is loaded only then. The kernel is asked
when it says that a ruleset has changed, and every ten seconds: legacy iptables says nothing.

Not found here: IPVS, and programs of tc and BPF. Found, but behind the guard: rewrites in hook postrouting.
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
from portward.dataplane.names import HOOKS, TABLE
from portward.dataplane.namespacelock import LOCK_TABLE
from portward.dataplane.nfnetlink import Chain, Expression, NfNetlink
from portward.errors import KernelError

_OWN_TABLES: Final = (TABLE, f"{TABLE}_closed", LOCK_TABLE)
# linux/netfilter.h: NFPROTO_…, the families in which packets meet our chains, and NF_INET_PRE_ROUTING.
_FAMILIES: Final = {0: "unspec", 1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_ROUTED: Final = (1, 2, 10)
_PREROUTING: Final = 0
# xtables targets that change addresses or ports, by nft_compat (a rule of iptables-nft).
_TARGETS: Final = frozenset({"DNAT", "SNAT", "MASQUERADE", "NETMAP", "REDIRECT", "TPROXY"})
# The tables of legacy iptables that are in use, root's to read, or the group's that the unit gives them to.
_LEGACY: Final = (Path("/proc/thread-self/net/ip_tables_names"), Path("/proc/thread-self/net/ip6_tables_names"))
# nft_payload: attributes base, offset, length, source register; bases link, network and transport header.
_BASE, _OFFSET, _LENGTH, _SOURCE_REGISTER = 2, 3, 4, 5
_LINK, _NETWORK, _TRANSPORT = 0, 1, 2
_LINK_END: Final = 14
# Where the destination begins in an IPv4 header; before it are type of service, length, time to live and source.
_DESTINATION: Final = 16
# The ports are the first bytes of the transport header.
_PORTS_END: Final = 4
_TARGET_NAME: Final = 1
# Bytes of which a rule that writes has at least one: names of expressions, and the header of a source register.
WRITING: Final = (b"nat\0", b"redir\0", b"tproxy\0", b"target\0", ATTRIBUTE.pack(8, _SOURCE_REGISTER))

_T = TypeVar("_T")

_log = logging.getLogger("portward")


class Others(NamedTuple):
    """What was found, each as a line for the operator."""

    translating: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()  # chains at the priority of portward's own

    @property
    def guard(self) -> bool:
        """Whether the ruleset needs the forward guard."""
        return bool(self.translating or self.beside)

    @property
    def why(self) -> tuple[str, ...]:
        """The lines that say why."""
        return self.translating + self.beside


NO_OTHERS: Final = Others()


def look(netlink: NfNetlink, legacy: Iterable[Path] | None = None) -> Others:
    """What others have in the network namespace of the calling thread; raises OSError. The rules are read only if
    no chain says enough: a host with kube-proxy has tens of thousands of them, and chains for address translation.
    """
    read, whole = _read(netlink.chains())
    chains = [chain for chain in read if not _ours(chain)]
    translating = [*_nat(chains), *_legacy(_LEGACY if legacy is None else legacy)]
    if not translating:
        expressions, all_rules = _read(netlink.expressions(WRITING))
        translating, whole = list(dict.fromkeys(_rewriting(expressions))), whole and all_rules
    found = Others(tuple(translating), tuple(_beside(chains)))
    # What was found is there, whatever was missed.
    if not whole and not found.guard:
        raise InterruptedError(errno.EINTR, "the rulesets change faster than they can be read")
    return found


def _read(rows: Iterable[_T]) -> tuple[list[_T], bool]:
    """The rows, and whether they are all that there are: others may change their rules faster than they can be
    read."""
    found: list[_T] = []
    try:
        for row in rows:
            found.append(row)  # what was read before an error counts
    except InterruptedError:
        return found, False
    return found, True


def seen(netlink: NfNetlink) -> Others:
    """As `look`; if the kernel does not say, the guard is needed."""
    try:
        return look(netlink)
    except (OSError, KernelError) as error:
        return Others((f"the kernel does not say what others have loaded ({error})",))


class OthersMonitor:
    """What others have in the kernel, as it was last found. Each line is logged when it is new. `found`, and
    `looked_at` (when that was, by the monotonic clock), may be read on any thread."""

    def __init__(self, netlink: NfNetlink) -> None:
        """`netlink` belongs to the thread that calls `look`."""
        self._netlink = netlink
        self.found, self.looked_at = NO_OTHERS, 0.0
        # For the files of legacy iptables: what cannot be read counts as in use.
        self._reserve = Reserve(2)

    def look(self) -> bool:
        """Looks again; whether the ruleset needs the forward guard."""
        self.looked_at = time.monotonic()
        with self._reserve.lent():
            found = seen(self._netlink)
        for line in found.why:
            if line not in self.found.why:
                _log.warning("%s: what is forwarded is judged again (forward guard)", line)
        for line in self.found.why:
            if line not in found.why:
                _log.info("no more so: %s", line)
        if self.found.guard and not found.guard:
            _log.info("nobody else translates packets any more: the forward guard is taken out")
        self.found = found
        return found.guard


def _ours(found: Chain | Expression) -> bool:
    return _FAMILIES.get(found.family) == "inet" and found.table in _OWN_TABLES


def _nat(chains: list[Chain]) -> Iterator[str]:
    """The first such chain of each table. Also one that translates only sources: answers to what it let in are
    translated back, to an address that `screen` has not seen."""
    tables = {(chain.family, chain.table): chain for chain in reversed(chains) if chain.type == "nat"}
    for chain in reversed(tables.values()):
        yield f"{_called(chain)} translates addresses"


def _beside(chains: list[Chain]) -> Iterator[str]:
    places = set(HOOKS.values())
    for chain in chains:
        if chain.family in _ROUTED and (chain.hook, chain.priority) in places:
            yield f"{_called(chain)} stands at portward's own priority ({chain.priority} in prerouting)"


def _legacy(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        try:
            if "nat" in file.read_text("utf-8").split():
                yield f"legacy iptables has a table nat ({file.name})"
        except FileNotFoundError:
            continue
        except OSError as error:  # it is in use, and what it does cannot be known
            yield f"legacy iptables is in use, and {file} cannot be read ({error.strerror})"


def _rewriting(expressions: Iterable[Expression]) -> Iterator[str]:
    for found in expressions:
        if not _ours(found) and (what := _written(found)):
            family = _FAMILIES.get(found.family, str(found.family))
            yield f"a rule in table {family} {found.table}, chain {found.chain}, writes {what}"


def _written(found: Expression) -> str:
    """What an expression writes into a packet; empty if neither address nor port."""
    if found.name in ("nat", "redir", "tproxy"):
        return "addresses"
    if found.name == "target":
        target = found.attributes.get(_TARGET_NAME, b"").rstrip(b"\0").decode(errors="replace")
        return f"addresses (target {target})" if target in _TARGETS else ""
    if found.name != "payload" or _SOURCE_REGISTER not in found.attributes:
        return ""
    base, offset, length = (_number(found.attributes, kind) for kind in (_BASE, _OFFSET, _LENGTH))
    if base == _NETWORK:
        return "addresses" if offset + length > _DESTINATION else ""
    if base == _TRANSPORT:
        return "ports" if offset < _PORTS_END else ""
    # An offset can lead out of the link header.
    return "bytes of any header" if base != _LINK or offset + length > _LINK_END else ""


def _number(attributes: dict[int, bytes], kind: int) -> int:
    return int.from_bytes(attributes.get(kind, b""), "big")


def _called(chain: Chain) -> str:
    return f"table {_FAMILIES.get(chain.family, chain.family)} {chain.table}, chain {chain.name},"
