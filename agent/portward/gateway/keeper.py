"""The ruleset is loaded, and stays what was loaded.

The kernel numbers the transactions of all rulesets of a namespace. Where the number has risen by more than
our own transactions, somebody else was there, and what is loaded is compared with what we left.
"""

from __future__ import annotations

import logging

from portward.errors import KernelError
from portward.gateway import mark, xtables
from portward.gateway.learned import Learned
from portward.gateway.nfnetlink import NfNetlink
from portward.gateway.nft import Nft
from portward.gateway.ruleset import FAMILY_TABLE, FIXED_SETS, TABLE, Wanted, replacement, xtables_rules

_log = logging.getLogger("portward.ruleset")


class Keeper:
    """Owner of the table `inet portward` and, without nft_queue, of the chain PORTWARD in the raw tables."""

    def __init__(self, nft: Nft, netlink: NfNetlink, learned: Learned) -> None:
        self._nft, self._netlink, self._learned = nft, netlink, learned
        self._want: Wanted | None = None
        self._fingerprint: bytes | None = None
        self._raw = ""
        self._seen = (0, 0)
        self.repairs = 0

    def load(self, want: Wanted) -> None:
        """Puts `want` in place of what is loaded, in one transaction; what is remembered stays where the sets
        allow it. Idempotent; raises KernelError, and then what was loaded before is still there."""
        have = self._netlink.sets(TABLE)
        text = replacement(want, have, same_definitions=self._learned.definitions() == want.definitions)
        if want.native:
            self._nft.load(text)
            if self._want is None or not self._want.native:
                xtables.remove()
        else:
            # The queue rules first: without a marked packet they do nothing.
            xtables.install(xtables_rules(want))
            self._nft.load(text)
        self._want = want
        self._remember()

    def intact(self) -> bool:
        """Whether what is loaded is what was loaded; costs one message where nobody has changed anything."""
        if self._ours_only():
            return True
        if self._netlink.fingerprint(TABLE, FIXED_SETS) != self._fingerprint:
            return False
        if self._want is not None and not self._want.native and xtables.installed() != self._raw:
            return False
        self._seen = (self._netlink.generation(), self._nft.commits)
        return True

    def repair(self, want: Wanted) -> None:
        """Loads the ruleset again and counts it; raises KernelError."""
        self.repairs += 1
        _log.warning("the ruleset was changed by somebody else: it is put back")
        self.load(want)

    def epoch_is(self, generation: int) -> bool:
        """Whether verdicts of this generation of the policy table are those that are remembered."""
        return self._learned.epoch() == mark.epoch_of(generation)

    def _ours_only(self) -> bool:
        generation, commits = self._seen
        return self._netlink.generation() == (generation + self._nft.commits - commits) % 2**32

    def _remember(self) -> None:
        self._seen = (self._netlink.generation(), self._nft.commits)
        self._fingerprint = self._netlink.fingerprint(TABLE, FIXED_SETS)
        self._raw = "" if self._want is None or self._want.native else xtables.installed()
        if self._fingerprint is None:
            raise KernelError("the ruleset was removed by somebody else while it was being loaded")


def loaded(netlink: NfNetlink) -> bool:
    """Whether portward's table is in this namespace."""
    return bool(netlink.sets(TABLE))


def remove(nft: Nft, netlink: NfNetlink) -> bool:
    """Stops enforcing: takes table and queue rules out. True where there was anything; raises KernelError."""
    found = loaded(netlink)
    if found:
        nft.load(f"delete table {FAMILY_TABLE}")
    return xtables.remove() or found
