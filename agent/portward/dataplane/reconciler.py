"""Loads portward's ruleset, and finds out whether another program has changed it since.

The kernel announces each transaction on any ruleset of a network namespace, with the tables that it changed. If
another program has changed ours, what is loaded is compared with what was left. Without these notices the number
of transactions is compared: if it has risen by more than our own transactions, another program has made some."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final

from portward.base.resources import rules
from portward.dataplane import xtables
from portward.dataplane.monitor import NoticeFilter, RulesetChanges, RulesetMonitor
from portward.dataplane.names import CLOSED, COUNTING_SETS, FIXED_SETS, TABLE, KernelTable
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.others import WRITING
from portward.dataplane.ruleset import Wanted, head
from portward.dataplane.verdict_cache import VerdictCache
from portward.errors import KernelError
from portward.ipc import mark

# Seconds from one look at the ruleset to the next one without a reason. If a transaction of ours changes nothing,
# one of another program between the two readings of the generation around ours does not show.
_LOOK_INTERVAL_S: Final = 10.0
# A load that another program disturbs is made again. One that writes so often that it disturbs all of them is no
# accident, and is reported.
_LOAD_TRIES: Final = 5
# The files of the tables CLOSED.
_CLOSED_FILES: Final = {KernelTable.INET: "closed.nft", KernelTable.BRIDGE: "closed-bridge.nft"}
_CLOSED_PORTS: Final = re.compile(r"(?m)^define PORTWARD_CLOSED = .*$")
NOT_LOADED: Final = "no ruleset of portward is loaded here: nothing is enforced"

# A load of ours announces less than this, and so do some thousand changes of others. The kernel takes the memory
# only when there are notices.
_NOTICE_BYTES: Final = 4 << 20

_log = logging.getLogger("portward.ruleset")


def hearing(
    own: Callable[[], Collection[int]],
    tables: Collection[KernelTable] = tuple(KernelTable),
    *,
    receive_bytes: int = _NOTICE_BYTES,
    notice_filter: NoticeFilter = NoticeFilter.FOREIGN_TABLES,
) -> RulesetMonitor:
    """Receives notices of what other programs change in these tables and those that stand in for them, and of what
    they change in theirs that may rewrite packets, in the network namespace of the calling thread. `own` gives the
    addresses of the sockets whose transactions are ours. Raises OSError."""
    ours = [(table.value, name) for table in tables for name in (TABLE, CLOSED)]
    return RulesetMonitor(ours, own, writing=WRITING, receive_bytes=receive_bytes, notice_filter=notice_filter)


class RulesetReconciler:
    """Loads the table that `netlink` is for and notes what it left there. Only one thread may call it, except for
    `at_rest`. Each load is one transaction, so the old ruleset or the new one is in force, and never none."""

    def __init__(
        self,
        nft: Nft,
        netlink: NfNetlink,
        cache: VerdictCache,
        notices: Callable[[], RulesetChanges] | None = None,
        closed_too: Collection[KernelTable] = (),
    ) -> None:
        """`notices` gives what other programs have changed since the last call (`RulesetMonitor.read`). Without it
        each transaction of another program is a reason to look, whatever it is about. `closed_too` are further
        tables whose stand-ins (CLOSED) a load lifts, because no ruleset will be loaded in their place."""
        self._nft, self._netlink, self._cache = nft, netlink, cache
        self._stand_ins = [netlink, *map(netlink.of, closed_too)]
        self._notices, self._touched = notices, False
        self._fingerprint: bytes | None = None
        self._looked = time.monotonic()
        self.repairs = self.repair_tries = 0
        self.loaded_at = 0.0  # when a ruleset was last put in place, by the monotonic clock

    def load(self, want: Wanted) -> None:
        """Loads `want` in place of what is loaded. Cached verdicts stay, unless the definitions of the sets
        differ. Idempotent. Raises KernelError, and then what was loaded before is still there. Without nft_queue a
        second transaction writes the queue statements. If only that one fails, sources without a cached verdict
        are dropped, and `intact` is False, so that it is tried again."""
        for _ in range(_LOAD_TRIES):
            self._load_once(want)
            complete = self._is_known(want)
            self._fingerprint = self._netlink.fingerprint(TABLE, FIXED_SETS)
            # The fingerprint must be of the ruleset that was loaded: no other program may have changed it in
            # between.
            self._await_notices()
            if complete and not self._disturbed() and self._fingerprint is not None:
                # In a transaction of its own, after the one that made it needless. If the process dies in between,
                # both are left, and the next start lifts this one.
                for stand_in in self._stand_ins:
                    lift(self._nft, stand_in)
                self.loaded_at = time.monotonic()
                return
        raise KernelError(
            "the ruleset changes faster than it can be loaded: another program writes it all the time"
        )

    def _is_known(self, want: Wanted) -> bool:
        """Writes the known interfaces. If the process dies before, those that were known before are left, and the
        next start writes them. False if another program has taken the table away."""
        try:
            self._cache.interfaces.set_known(want.known)
        except KernelError as error:
            _log.warning("the known interfaces are written again: %s", error)
            return False
        return True

    def add(self, text: str) -> None:
        """Adds chains to what is loaded, so that they act at once; `load` must follow. Raises KernelError."""
        self._nft.add(text)

    def check(self, want: Wanted) -> None:
        """Asks the kernel whether it would take `want` in place of what is loaded; raises KernelError."""
        self._nft.check_replacement(self._head(want), want)

    def _head(self, want: Wanted) -> str:
        same = self._cache.definitions() == want.definitions
        hooks = self._netlink.hooks(TABLE)
        return head(want, self._netlink.sets(TABLE), hooks, same_definitions=same)

    def _load_once(self, want: Wanted) -> None:
        # At a start, and not if another program has taken away what this process had loaded.
        first = self._fingerprint is None and not loaded(self._netlink)
        # This load replaces all changes of other programs up to here. Later changes count as a disturbance.
        self._note_generation()
        self._cache.forget_behind_gate()
        self._count_what_goes(want)
        # Before the chain `stacked` is gone, which may have stopped what comes from these interfaces. At a start
        # there is no set.
        with contextlib.suppress(KernelError):
            self._cache.interfaces.retain_known(want.known)
        try:
            self._nft.replace(self._head(want), want)
            if not want.native:
                self._install(want)
        except KernelError:
            if first and loaded(self._netlink):
                # If there was no ruleset before, nothing of ours stays behind; CLOSED does.
                self._nft.delete(str(want.table))
            self._netlink.disturb()
            self._touched = True
            raise

    def _install(self, want: Wanted) -> None:
        """Writes the queue statements in a transaction of their own. Until they are there, and also if the process
        dies right here, packets without a cached verdict are dropped. Raises KernelError, unless another program
        has removed the ruleset: then `load` finds no fingerprint, and loads it again."""
        try:
            with self._netlink.committing():
                xtables.install(self._netlink, want.statements)
        except KernelError:
            if loaded(self._netlink):
                raise

    def _count_what_goes(self, want: Wanted) -> None:
        """Deletes what is cached if the sets are about to be made anew, so that the kernel reports what they have
        counted. The load would delete it anyway."""
        if self._cache.definitions() not in (None, want.definitions):
            with contextlib.suppress(KernelError):  # the sets are there no more, or were never of this kind
                self._cache.flush(COUNTING_SETS & self._netlink.sets(TABLE))

    def intact(self) -> bool:
        """Whether the ruleset is the one that was loaded, and CLOSED is not loaded. Costs at most one message if
        no other program has changed anything."""
        now = time.monotonic()
        if not self._disturbed() and now < self._looked + _LOOK_INTERVAL_S:
            return True
        self._looked = now
        # A change of another program from here on is a reason to look again.
        self._touched = False
        try:
            # Whatever closes the port (portward-baseline, nftables.service, a person) need not have touched our
            # ruleset.
            if self._netlink.fingerprint(TABLE, FIXED_SETS) != self._fingerprint:
                return False
            if any(map(closed, self._stand_ins)):
                return False
        except InterruptedError:  # others change their rules faster than ours can be read: not known yet
            self._touched = True
            return True
        if self._hears is None:
            self._note_generation()
        return True

    def at_rest(self, netlink: NfNetlink, heard: RulesetChanges | None = None) -> bool:
        """Whether `intact` would find nothing to look at, by what the caller has `heard` since the last time. It
        may be asked on another thread, with that thread's own socket `netlink`. Without notices it takes one
        message, and a transaction of ours that is under way counts as another program's. Without `heard` the
        reconciler reads its own notices, so it must be asked on the reconciler's thread."""
        if time.monotonic() >= self._looked + _LOOK_INTERVAL_S or self._touched:
            return False
        if self._hears is None:
            return not self._netlink.disturbed and netlink.generation() == self._netlink.left_at
        # The number of transactions says nothing that the notices do not say.
        return not (self._disturbed() if heard is None else heard.ours)

    def repair(self, want: Wanted) -> None:
        """Loads the ruleset again. Counts and logs it once it is there. Raises KernelError."""
        self.repair_tries += 1
        self.load(want)
        self.repairs += 1
        # Logged each time: an operator who looks for what removes the rules needs every moment at which it
        # happened.
        _log.warning("the ruleset in the kernel was not as it should be: it is put back (repair %d)", self.repairs)

    def epoch_is(self, generation: int) -> bool:
        """Whether verdicts of this generation of the policy table are those that are cached."""
        return self._cache.epoch() == mark.epoch_of(generation)

    @property
    def _hears(self) -> Callable[[], RulesetChanges] | None:
        """The function that receives notices of other programs' changes. None if libnftables loads our rulesets
        itself: it uses a socket of its own, so our transactions would look like those of others."""
        return self._notices if self._nft.compiles else None

    def _disturbed(self) -> bool:
        """Whether another program may have changed our tables since `_note_generation`, or since the last look."""
        if self._hears is None:
            return self._netlink.disturbed or self._netlink.generation() != self._netlink.left_at
        self._touched |= self._hears().ours
        return self._touched

    def _note_generation(self) -> None:
        """From now on, earlier changes of other programs do not count."""
        self._netlink.note_generation()
        if self._hears is not None:
            self._hears()
        self._touched = False

    def _await_notices(self) -> None:
        """Returns when the notices of all transactions are there that a reading before this can have seen. The
        kernel sends them before it lets the next transaction begin. This is a transaction that changes nothing."""
        if self._hears is not None:
            self._netlink.barrier()


def loaded(netlink: NfNetlink) -> bool:
    """Whether the table that `netlink` is for is in this namespace. Raises KernelError if the process may not ask
    the kernel."""
    with _asking():
        return bool(netlink.sets(TABLE))


def closed(netlink: NfNetlink) -> bool:
    """Whether the table CLOSED of the family that `netlink` is for is in this namespace: nothing to some ports is
    forwarded, see `close`. Raises KernelError if the process may not ask the kernel."""
    with _asking():
        return netlink.fingerprint(CLOSED, ()) is not None


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise KernelError("asking the kernel for its rules takes root or CAP_NET_ADMIN") from error


def begin(nft: Nft, want: Wanted) -> None:
    """Loads `want` if its table is not there yet, without the xtables target. Nothing is cached then, so
    until an agent starts every packet that would be asked about is dropped. Raises KernelError, also if the table
    is there (an agent may load it at this very moment), and then nothing has changed."""
    nft.create(str(want.table), want.whole)


def close(nft: Nft, ports: Iterable[int], table: KernelTable = KernelTable.INET) -> None:
    """Drops every packet to these ports that is forwarded, for BRIDGE from one port of a bridge to another, in a
    table of its own. Raises KernelError."""
    file = _CLOSED_FILES[table]
    text = rules("nftables", file).read_text("utf-8")
    text, count = _CLOSED_PORTS.subn(f"define PORTWARD_CLOSED = {{ {', '.join(map(str, ports))} }}", text)
    if count != 1:
        raise ValueError(f"{file} defines PORTWARD_CLOSED {count} times")
    nft.add(text)


def lift(nft: Nft, netlink: NfNetlink) -> bool:
    """Ends what `close` did for the table that `netlink` is for. True if there was something to end. Raises
    KernelError."""
    found = closed(netlink)
    if found:
        nft.delete(netlink.table.closed)
    return found


def remove(nft: Nft, netlink: NfNetlink) -> bool:
    """Stops enforcing: removes the table that `netlink` is for, and CLOSED. True if there was one. Raises
    KernelError."""
    found = loaded(netlink)
    if found:
        nft.delete(str(netlink.table))
    return lift(nft, netlink) or found
