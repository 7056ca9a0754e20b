"""The one way in which a table of the kernel is brought in line: `KernelSync.apply` takes the desired state.

A start, a change of policy, a grant that ends, other interfaces, a reload, a repair and the periodic check all go
through `apply`. It compares the loaded state with the desired one, and writes only the differences. A change of
the policy table says what it reaches. That is an optimization: without it, or if an earlier change was lost,
everything is forgotten. After any failure the kernel counts as out of line, and everything is derived anew, at
once or, if that fails too, at the next `apply`.

The steps by name, and what holds if the process ends right after one of them:
- *unsettle*: an interface with a new owner goes into the set `unsettled`. Its packets are dropped.
- *close stacked*: chains for devices above segments are added. They only drop.
- *load*: the ruleset, if another one is wanted, in one transaction (see `RulesetReconciler.load`).
- *move the epoch*: from here on no verdict of the older policy is added to the cache. Those in it still act. The
  set `synced` still names the older generation, so the next start forgets everything.
- *delete*: the cached verdicts that the change reaches, and the last transaction writes the new generation into
  `synced`. If there is much to search, the gate (module `gate`) stops the sources before the search.
- *settle*: interfaces whose owner the table names now are no longer dropped.

Until *delete* is done the kernel may act on cached verdicts of the older policy. Together with *move the epoch* in
one transaction it would leave a verdict that is stored between the search and the commit.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from enum import Enum, auto
from itertools import islice
from typing import Final

from portward.dataplane import ruleset, templates
from portward.dataplane.desired import Desired, SegmentLinks
from portward.dataplane.names import KernelTable
from portward.dataplane.prefixes import Prefixes
from portward.dataplane.rate_limits import RateLimits
from portward.dataplane.reach import reach
from portward.dataplane.reconciler import RulesetReconciler
from portward.dataplane.ruleset import Wanted
from portward.dataplane.verdict_cache import Source, VerdictCache
from portward.errors import KernelError
from portward.table.commits import Committed

# Up to this many single sources are forgotten without reading the sets, by writing each into all of them: see
# `VerdictCache.forget`.
_UNREAD_SOURCES: Final = 4_096
# Up to this many sources found in changed prefixes get their rate limits at once: to look each up in the policy
# table takes 10 µs. The others are met by a worker when they send.
_LIMITED_SOURCES: Final = 4_096

_log = logging.getLogger("portward.ruleset")


class Found(Enum):
    """How `apply` found the kernel."""

    AS_LEFT = auto()  # as the `apply` before left it, or not looked at; at a start: as the table says, or empty
    STALE = auto()  # at a start: with cached verdicts of another policy, which are forgotten now
    CHANGED = auto()  # not as it was left, because of another program or a failure


class KernelSync:
    """Brings one of portward's tables in this network namespace in line. Only one thread may call it."""

    def __init__(
        self,
        reconciler: RulesetReconciler,
        cache: VerdictCache,
        rate_limits: RateLimits,
        limit: Callable[[Iterable[Source]], None],
        *,
        native: bool,
        table: KernelTable = KernelTable.INET,
    ) -> None:
        """`limit` writes the rate limits of those of the sources that have one. `native`: the kernel has
        nft_queue. `table` is the one that the other arguments are for."""
        self._table = table
        self._reconciler, self._cache, self._rate_limits = reconciler, cache, rate_limits
        self._limit, self._native = limit, native
        # The state of the kernel, unless `broken`; None before the first `apply`. All cached verdicts agree with
        # its `generation`. May be read on any thread.
        self.in_force: Desired | None = None
        # Why the kernel is out of line; empty if it is in line. May be read on any thread.
        self.broken = ""
        # Interfaces with another owner, of which the kernel does not know yet: see `InterfaceSets.renew`.
        self._renewed: frozenset[int] = frozenset()

    @property
    def generation(self) -> int | None:
        """The generation of the policy table that the kernel acts on; None before the first `apply`. May be asked
        on any thread."""
        return None if self.in_force is None else self.in_force.generation

    def apply(self, desired: Desired, change: Committed | None = None, *, pending: bool = False) -> Found:
        """Brings the kernel in line with `desired`. Idempotent.

        `change` is a change of the policy table, or several as one. It brings the kernel to `change.generation` by
        forgetting what it reaches. Without `change` the kernel is compared with what was left there, and it must
        be at `desired.generation`, unless changes up to that one are still to come (`pending`).

        The first `apply` raises KernelError or OSError if the kernel refuses it. It keeps what is cached if that
        agrees with the table. A later one says in `broken` and in the log what the kernel refused."""
        if self.in_force is None:
            return self._first(desired)
        self._renewed |= change.links if change else frozenset()
        try:
            return self._apply(desired, self.in_force, change, pending=pending)
        except Exception as error:
            # How far it got is not known: the next `apply` derives everything anew.
            self.broken = self.broken or f"{type(error).__name__}: {error}"
            raise

    def _first(self, desired: Desired) -> Found:
        """The first `apply`. If the kernel has taken the ruleset and then refuses a change of its sets, another
        program has removed the ruleset in between. It is loaded again at once: if the start failed instead, the
        policy ports would be open until the next start."""
        before = self._reconciler.loaded_at
        try:
            return self._derive(desired)
        except (KernelError, OSError):
            if self._reconciler.loaded_at == before:  # the kernel refuses the ruleset itself
                raise
        return self._derive(desired)

    def _apply(self, desired: Desired, before: Desired, change: Committed | None, *, pending: bool) -> Found:
        changed = False
        try:
            self._drop(desired.unsettled - before.unsettled)
            # A change must be quick, so it does not look. But to load would put a ruleset back that another
            # program has changed, uncounted, and keep what it cached.
            if change is None or not desired.same_ruleset(before):
                changed = not self._is_as_left(desired, comes=pending or change is not None)
            self._close_stacked(desired, before)
            if not (changed or self.broken):
                self._advance(desired, before, change)
                return Found.AS_LEFT
        except (KernelError, OSError) as error:
            _log.debug("everything is derived anew: %s", error)
        self._repair(desired)
        return Found.CHANGED if changed else Found.AS_LEFT

    # --- what differs, alone ---

    def _drop(self, indexes: frozenset[int]) -> None:
        """Drops what these interfaces send, also what waits for a worker now."""
        if indexes:
            self._cache.interfaces.unsettle(indexes)
            self._note(unsettled=self._in_force.unsettled | indexes)

    def _close_stacked(self, desired: Desired, before: Desired) -> None:
        """Adds the chains for devices above segments: the kernel takes them sooner than the whole ruleset."""
        if desired.surroundings.stacked - before.surroundings.stacked:
            with contextlib.suppress(KernelError):  # without a ruleset there is nothing to add to
                self._reconciler.add(
                    ruleset.stacked_alone(templates.read(), desired.config, desired.preset, desired.surroundings)
                )

    def _advance(self, desired: Desired, before: Desired, change: Committed | None) -> None:
        """Writes what differs. Raises KernelError or OSError."""
        self._forget_links(desired.unsettled - before.unsettled)
        if not desired.same_ruleset(before):
            self._load(desired, before)
        elif change is None or desired.surroundings != before.surroundings:
            self._write_known(desired.surroundings.known, before.surroundings.known)
        if change is not None and change.new and self._is_newer(change.generation):
            self._carry_out(desired.links, change)
        self._settle(desired.unsettled)
        # If a repair has gone further than the change, its revision is in force already.
        comes = desired if change is None else change
        revision = comes.revision if comes.generation == self.generation else before.revision
        self.in_force = desired._replace(generation=self._in_force.generation, revision=revision)

    def _write_known(self, known: frozenset[int], before: frozenset[int]) -> None:
        """Writes the set of known interfaces, which the reconciler does not check. If an interface is missing
        there, mail from it is dropped."""
        if self._cache.interfaces.set_known(known) and known == before:
            _log.warning("the set of known interfaces was changed by another program: it is put back")

    def _load(self, desired: Desired, before: Desired) -> None:
        """Loads another ruleset. Cached verdicts and the epoch stay."""
        held = self._in_force
        held = desired._replace(generation=held.generation, unsettled=held.unsettled)
        # Not read from the kernel: if that failed, nothing would write `synced` again before the next change.
        self._reconciler.load(self.wanted(held, synced=True))
        if desired.config != before.config:  # other sizes make the sets anew, and then they are empty
            self._rate_limits.reload()

    def _carry_out(self, links: SegmentLinks, change: Committed) -> None:
        self._cache.move_epoch(change.generation, self._renewed)
        self._renewed = frozenset()
        if change.everything or not self._follows(change):
            self._forget_everything(change.generation)
        else:
            self._forget_changed(links, change)
        self._note(generation=change.generation)

    def _settle(self, unsettled: frozenset[int]) -> None:
        """Ends `_drop` for all interfaces but these: the kernel stands at a generation that names the owners."""
        self._renew()
        if settled := self._in_force.unsettled - unsettled:
            self._cache.interfaces.settle(settled)
            self._note(unsettled=unsettled)

    def _renew(self) -> None:
        """Writes the interfaces with another owner into the kernel, if no change of the epoch has written them."""
        if self._renewed:
            self._cache.interfaces.renew(self._renewed)
            self._renewed = frozenset()

    # --- everything anew ---

    def _repair(self, desired: Desired) -> None:
        """Derives everything anew. If the kernel refuses, its message goes into `broken` and into the log."""
        try:
            self._derive(desired)
            self.broken = ""
        except (KernelError, OSError) as error:
            if str(error) != self.broken:
                _log.critical(
                    "THE RULESET CANNOT BE PUT BACK, port 25 may be open: table %s: %s", self._table, error
                )
            self.broken = str(error)
            # If the kernel refuses this too, the ruleset is not there, and with its chains went the packets that
            # waited for a verdict.
            with contextlib.suppress(KernelError, OSError):
                self._renew()

    def _derive(self, desired: Desired) -> Found:
        """Loads the ruleset and forgets everything: whatever changed the ruleset may have changed the sets too.
        At a start what agrees with the table is kept. Raises KernelError or OSError."""
        first, synced = self.in_force is None, self._cache.synced()
        # Interfaces that were unsettled before stay so until all cached verdicts are deleted.
        unsettled = desired.unsettled | (frozenset() if self.in_force is None else self.in_force.unsettled)
        held = desired._replace(unsettled=unsettled)
        # Behind an unsettled interface the owner before may be cached.
        kept = first and synced == desired.generation and not desired.unsettled
        (self._reconciler.load if first else self._reconciler.repair)(self.wanted(held, synced=kept))
        if not kept:
            self._forget_everything(desired.generation)
        self._rate_limits.reload()
        self.in_force = held
        self._settle(desired.unsettled)
        return Found.STALE if first and synced is not None and not kept else Found.AS_LEFT

    def wanted(self, desired: Desired, *, synced: bool = False) -> Wanted:
        """The ruleset for a desired state. `synced`: all that is cached agrees with `desired.generation`, and the
        kernel may say so before anything is forgotten."""
        state = ruleset.State(desired.generation, synced=synced, unsettled=desired.unsettled)
        return ruleset.wanted(
            templates.read(),
            desired.config,
            desired.preset,
            native=self._native,
            state=state,
            surroundings=desired.surroundings,
            table=self._table,
        )

    # --- comparing ---

    def _is_as_left(self, desired: Desired, *, comes: bool) -> bool:
        """Whether the kernel holds what the `apply` before left there, at the generation of the table; `comes`:
        the changes up to that one are still to come."""
        if self.broken or not (comes or self.generation == desired.generation):
            return False
        with contextlib.suppress(KernelError, OSError):
            return self._reconciler.intact() and self._reconciler.epoch_is(self._in_force.generation)
        return False

    def _follows(self, change: Committed) -> bool:
        """Whether the kernel stands at the generation from which a change began, or within the change."""
        return (change.generation - self._in_force.generation) % 2**32 <= change.steps

    def _is_newer(self, generation: int) -> bool:
        """Whether a generation comes after the kernel's. They wrap around at 2**32."""
        return 0 < (generation - self._in_force.generation) % 2**32 < 2**31

    @property
    def _in_force(self) -> Desired:
        assert self.in_force is not None  # noqa: S101 # set by the first `apply`
        return self.in_force

    def _note(self, *, generation: int | None = None, unsettled: frozenset[int] | None = None) -> None:
        """Notes what was written."""
        held = self._in_force
        self.in_force = held._replace(
            generation=held.generation if generation is None else generation,
            unsettled=held.unsettled if unsettled is None else unsettled,
        )

    # --- forgetting ---

    def forget(self, sources: Iterable[Source]) -> None:
        """Makes the kernel forget these sources, verdict and rate limit, at the generation that it stands at.
        Raises KernelError or OSError."""
        self._forget(list(sources), self._in_force.generation)

    def _forget(self, sources: list[Source], generation: int, *, opens: bool = True, closes: bool = True) -> None:
        """`opens` and `closes` as `Committed` has them."""
        if len(sources) <= _UNREAD_SOURCES:
            self._cache.forget(sources, generation, self._rate_limits.deletions(sources))
        else:
            prefixes = Prefixes()
            for source in sources:
                prefixes.add_source(source.key)
            limits = self._rate_limits.deletions(sources)
            self._cache.forget_within(prefixes, generation, limits, opens=opens, closes=closes)
        self._rate_limits.deleted(sources)

    def _forget_changed(self, links: SegmentLinks, change: Committed) -> None:
        """Makes the kernel forget what a change reaches, and writes the rate limits that now hold there: so
        sources with a limit need not send twice. In a group, a source has its limit only behind the interfaces at
        which it was met, because the map has no room for each source behind each interface."""
        single, grouped, prefixes = reach(links, change)
        if not len(prefixes):
            limited = [source for source in grouped if self._rate_limits.bucket(source) is not None]
            self._forget([*single, *grouped], change.generation, opens=change.opens, closes=change.closes)
            self._limit(self._settled([*single, *limited]))
            return
        for source in (*single, *grouped):
            prefixes.add_source(source.key)
        limited = self._rate_limits.within(prefixes)
        found = self._cache.forget_within(
            prefixes,
            change.generation,
            self._rate_limits.deletions(limited),
            opens=change.opens or bool(change.links),
            closes=change.closes or bool(change.links),
        )
        self._rate_limits.deleted(limited)
        self._limit(self._settled({*single, *limited, *islice(found, _LIMITED_SOURCES)}))

    def _forget_links(self, indexes: frozenset[int]) -> None:
        """Makes the kernel forget the cached verdicts and rate limits behind these interfaces."""
        if not indexes:
            return
        prefixes = Prefixes()
        for index in indexes:
            prefixes.add_link(index)
        limited = self._rate_limits.within(prefixes)
        self._cache.forget_within(prefixes, self._in_force.generation, self._rate_limits.deletions(limited))
        self._rate_limits.deleted(limited)

    def _forget_everything(self, generation: int) -> None:
        self._cache.forget_everything(generation)
        self._rate_limits.all_deleted()

    def _settled(self, sources: Iterable[Source]) -> list[Source]:
        """Behind an unsettled interface the table finds the limit of whoever had it before."""
        return [source for source in sources if source.link not in self._in_force.unsettled]
