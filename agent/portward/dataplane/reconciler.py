"""The ruleset is loaded, and stays what was loaded.

The kernel announces each transaction on any ruleset of a namespace, with the tables that it changed. Where
somebody else changed ours, what is loaded is compared with what we left. Without notices the number of
transactions is compared: where it has risen by more than our own did, somebody else was there."""

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
from portward.dataplane.names import COUNTING_SETS, FIXED_SETS, TABLE
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.nft import Nft
from portward.dataplane.others import WRITING
from portward.dataplane.ruleset import Wanted, head
from portward.dataplane.verdict_cache import VerdictCache
from portward.errors import KernelError
from portward.ipc import mark

# Seconds from a look to the next one without a reason: a transaction of somebody else between the two readings of
# the generation around one of ours that changed nothing would not show.
_LOOK_EVERY: Final = 10.0
_LOAD_TRIES: Final = 5
CLOSED: Final = "portward_closed"  # the table of rules/nftables/closed.nft
_CLOSED_PORTS: Final = re.compile(r"(?m)^define PORTWARD_CLOSED = .*$")
NOT_LOADED: Final = "no ruleset of portward is loaded here: nothing is enforced"

# What a load of ours announces, or some thousand changes of others, is not more than this. The kernel takes the
# memory when there are notices.
_NOTICE_BYTES: Final = 4 << 20

_log = logging.getLogger("portward.ruleset")


def hearing(
    own: Callable[[], Collection[int]],
    *,
    receive_bytes: int = _NOTICE_BYTES,
    notice_filter: NoticeFilter = NoticeFilter.FOREIGN_TABLES,
) -> RulesetMonitor:
    """Hears of what others change in our tables, or change in theirs that may turn packets into others, in the
    network namespace of the calling thread. Raises OSError."""
    return RulesetMonitor(
        (TABLE, CLOSED), own, writing=WRITING, receive_bytes=receive_bytes, notice_filter=notice_filter
    )


class RulesetReconciler:
    """Owner of the table `inet portward`."""

    def __init__(
        self,
        nft: Nft,
        netlink: NfNetlink,
        cache: VerdictCache,
        notices: Callable[[], RulesetChanges] | None = None,
    ) -> None:
        """`notices` gives what others have changed since the last call (`RulesetMonitor.read`). Without it each
        transaction of others, whatever it is about, is a reason to look."""
        self._nft, self._netlink, self._cache = nft, netlink, cache
        self._notices, self._touched = notices, False
        self._fingerprint: bytes | None = None
        self._looked = time.monotonic()
        self.repairs = self.repair_tries = 0
        self.loaded_at = 0.0  # when a ruleset was last put in place, by the monotonic clock

    def load(self, want: Wanted) -> None:
        """Puts `want` in place of what is loaded; what is remembered stays where the sets allow it. Idempotent;
        raises KernelError. It is one transaction, and then what was loaded before is still there; without
        nft_queue a second one writes the queue statements. Where that fails, unremembered sources are dropped and
        `intact` is False, so that it is tried again."""
        for _ in range(_LOAD_TRIES):
            self._load_once(want)
            complete = self._is_known(want)
            self._fingerprint = self._netlink.fingerprint(TABLE, FIXED_SETS)
            # What was read must be what was loaded: nobody else changed it in between.
            self._await_notices()
            if complete and not self._disturbed() and self._fingerprint is not None:
                # In a transaction after the one that made it needless. A process that dies in between leaves both,
                # and the next one lifts it.
                lift(self._nft, self._netlink)
                self.loaded_at = time.monotonic()
                return
        raise KernelError("the ruleset changes faster than it can be loaded: somebody else writes it all the time")

    def _is_known(self, want: Wanted) -> bool:
        """Writes the known interfaces. A process that dies before leaves those that were known before, and the
        next one writes them. False if another process has taken the table away."""
        try:
            self._cache.set_known_interfaces(want.known)
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
        # At a start, and not where somebody else has taken away what this process had loaded.
        first = self._fingerprint is None and not loaded(self._netlink)
        # Whatever others did until here is replaced; what they do from here on shows.
        self._settle()
        self._cache.forget_behind_gate()
        self._count_what_goes(want)
        # Before chain `stacked` is gone, which may have stopped what comes from them. At a start there is no set.
        with contextlib.suppress(KernelError):
            self._cache.retain_known_interfaces(want.known)
        try:
            self._nft.replace(self._head(want), want)
            if not want.native:
                # A transaction of its own. Until it is there, and if the process dies right here, what the kernel
                # does not remember is dropped as unjudged.
                with self._nft.committing():
                    xtables.install(self._netlink, want.statements)
        except KernelError:
            if first and loaded(self._netlink):
                # Nothing of a ruleset stays behind where there was none; CLOSED does.
                self._nft.delete(TABLE)
            self._nft.disturbed = self._touched = True
            raise

    def _count_what_goes(self, want: Wanted) -> None:
        """Deletes what is cached if the sets are about to be made anew, so that what they have counted is known.
        The load forgets it all anyway."""
        if self._cache.definitions() not in (None, want.definitions):
            with contextlib.suppress(KernelError):  # the sets are there no more, or were never of this kind
                self._cache.flush(COUNTING_SETS & self._netlink.sets(TABLE))

    def intact(self) -> bool:
        """Whether what is loaded is what was loaded, and CLOSED is not; costs one message where nobody has changed
        anything."""
        now = time.monotonic()
        if not self._disturbed() and now < self._looked + _LOOK_EVERY:
            return True
        self._looked = now
        # What others change from here on is a reason to look again.
        self._touched = False
        try:
            # Who closes the port (portward-baseline, nftables.service, a person) need not have touched our
            # ruleset.
            if self._netlink.fingerprint(TABLE, FIXED_SETS) != self._fingerprint or closed(self._netlink):
                return False
        except InterruptedError:  # others change their rules faster than ours can be read: nobody knows yet
            self._touched = True
            return True
        if self._hears is None:
            self._settle()
        return True

    def at_rest(self, netlink: NfNetlink, heard: RulesetChanges | None = None) -> bool:
        """Whether `intact` would find nothing to look at, by what the caller has `heard` since the last time. It
        may be asked on another thread, with a socket of that thread's own: without notices it takes one message,
        and a transaction of ours at work counts as one of somebody else's. Without `heard` the
        reconciler asks its own notices, on its own thread."""
        if time.monotonic() >= self._looked + _LOOK_EVERY or self._touched:
            return False
        if self._hears is None:
            return not self._nft.disturbed and netlink.generation() == self._nft.left_at
        # The number of transactions rises with each one of others, and says nothing that the notices do not.
        return not (self._disturbed() if heard is None else heard.ours)

    def repair(self, want: Wanted) -> None:
        """Loads the ruleset again, and counts and logs it once it is there; raises KernelError."""
        self.repair_tries += 1
        self.load(want)
        self.repairs += 1
        # Each time: an operator who looks for what removes the rules needs every moment at which it happened.
        _log.warning("the ruleset in the kernel was not as it should be: it is put back (repair %d)", self.repairs)

    def epoch_is(self, generation: int) -> bool:
        """Whether verdicts of this generation of the policy table are those that are remembered."""
        return self._cache.epoch() == mark.epoch_of(generation)

    @property
    def _hears(self) -> Callable[[], RulesetChanges] | None:
        """What hears of others. None if it does not know them from us: what libnftables loads by itself comes from
        a socket of its own."""
        return self._notices if self._nft.compiles else None

    def _disturbed(self) -> bool:
        """Whether others may have changed what is ours since `_settle`, or since it was last looked at."""
        if self._hears is None:
            return self._nft.disturbed or self._netlink.generation() != self._nft.left_at
        self._touched |= self._hears().ours
        return self._touched

    def _settle(self) -> None:
        self._nft.disturbed, self._nft.left_at = False, self._netlink.generation()
        if self._hears is not None:
            self._hears()
        self._touched = False

    def _await_notices(self) -> None:
        """Returns when the notices of all transactions are there that a reading before this can have seen. The
        kernel sends them before it lets the next transaction begin, and this is one, which changes nothing."""
        if self._hears is not None:
            self._netlink.barrier()


def loaded(netlink: NfNetlink) -> bool:
    """Whether portward's table is in this namespace; raises KernelError where the kernel may not be asked."""
    with _asking():
        return bool(netlink.sets(TABLE))


def closed(netlink: NfNetlink) -> bool:
    """Whether no packet to some ports is forwarded at all in this namespace, see `close`; raises KernelError where
    the kernel may not be asked."""
    with _asking():
        return netlink.fingerprint(CLOSED, ()) is not None


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise KernelError("asking the kernel for its rules takes root or CAP_NET_ADMIN") from error


def begin(nft: Nft, want: Wanted) -> None:
    """Loads `want` where portward's table is not there yet, without the xtables target: until an agent comes,
    whoever the kernel does not remember is dropped as unjudged, and it remembers nobody. Raises KernelError,
    also where the table is there (an agent may load it at this very moment), and then nothing has changed."""
    nft.create(TABLE, want.whole)


def close(nft: Nft, ports: Iterable[int]) -> None:
    """Drops every forwarded packet to these ports, in a table of its own; raises KernelError."""
    text = rules("nftables", "closed.nft").read_text("utf-8")
    text, count = _CLOSED_PORTS.subn(f"define PORTWARD_CLOSED = {{ {', '.join(map(str, ports))} }}", text)
    if count != 1:
        raise ValueError(f"closed.nft defines PORTWARD_CLOSED {count} times")
    nft.add(text)


def lift(nft: Nft, netlink: NfNetlink) -> bool:
    """Ends what `close` did. True where there was something to end; raises KernelError."""
    found = closed(netlink)
    if found:
        nft.delete(CLOSED)
    return found


def remove(nft: Nft, netlink: NfNetlink) -> bool:
    """Stops enforcing: takes both tables out. True where there was one; raises KernelError."""
    found = loaded(netlink)
    if found:
        nft.delete(TABLE)
    return lift(nft, netlink) or found
