"""Reads the state of this host: the agent, the loaded ruleset, the queues, and what is cached for a source.

The values are in `host_state`. `effect` decides from them what happens to a source's next packet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from portward.base.instance import command, unit
from portward.base.interfaces import covers, shown
from portward.config.keys import Config
from portward.daemon.runtime import age_of, hidden, in_another_network, read_status, running
from portward.daemon.settings import away, last
from portward.dataplane import loaded as opened
from portward.dataplane import namespacelock, reconciler, stacking
from portward.dataplane.links import Device
from portward.dataplane.names import LIMITED_SETS, RATE_LIMITS, TABLE, KernelTable, LimitResult
from portward.dataplane.namespacelock import NamespaceTakenError
from portward.dataplane.nfnetlink import KernelElements, NfNetlink
from portward.dataplane.queue_statistics import states
from portward.dataplane.rate_limits import Bucket
from portward.dataplane.verdict_cache import Source, VerdictCache
from portward.errors import KernelError, PortwardError
from portward.ipc.mark import PASSING, Class, PacketOutcome, classify
from portward.model import Address
from portward.ops.host_state import STALE_STATUS_S, Agent, CachedState, Host, Ruleset, TableVerdict, Workers
from portward.ops.segment_interfaces import behind
from portward.store.backends import open_store
from portward.table.database import DatabaseError
from portward.table.history import same_history
from portward.table.reader import Reader

# A worker gets a query every 2 s and has 2 s to answer. So it may have had no query yet for up to 5 s after it has
# bound its queue.
_UNASKED_S: Final = 5.0
# How many devices on top of a segment's interfaces are named.
_MAX_LINES: Final = 5


def look(config: Config, segments: Iterable[str]) -> Host:
    """The state of this host for these segments. `config` is the one in force (`settings`)."""
    if (process := in_another_network(config.table)) is not None:
        # Ruleset and cache of this namespace are not those of the agent's gateway.
        return Host(agent=Agent.AWAY, workers=Workers.NONE, elsewhere=away(process))
    agent, status = _agent(config)
    loaded, elsewhere = _ruleset(config)
    if elsewhere and agent is not Agent.HIDDEN:
        agent = Agent.ELSEWHERE
    segments = list(segments)
    opens, observed = _opens(config, segments) if loaded is Ruleset.LOADED else (False, False)
    broken = str(status.get("ruleset_error", ""))
    covered = loaded is Ruleset.LOADED and not elsewhere
    if covered and (other := _not_in_force(broken) or _not_covered(config, segments)):
        return Host(agent=agent, elsewhere=other, unclear=True)
    return Host(
        agent=agent,
        ruleset=loaded,
        workers=_workers(config, agent, status),
        opens=opens,
        observed=observed,
        ruleset_error=broken,
        elsewhere=elsewhere,
    )


def cached(interfaces: Mapping[str, int], address: Address) -> CachedState | None:
    """The verdict or rate limit that the kernel has cached for a source behind these interfaces (name → index) of
    one segment; None if there are none. If it has several, one that lets packets pass. Raises PortwardError or
    OSError if this user may not read it."""
    if not interfaces:
        return None
    with closing(NfNetlink()) as netlink:
        each = [one for table in KernelTable if (one := netlink.of(table)).sets(TABLE)]
        if not each:
            return CachedState(loaded=False)
        found = [
            replace(state, interface=name if len(interfaces) > 1 else "")
            for name, index in interfaces.items()
            if (state := _in_tables(each, Source(index, address.packed))) is not None
        ]
    return min(found, key=_stops, default=CachedState())


def _stops(state: CachedState) -> bool:
    return not state.limit and state.verdict not in PASSING


def _in_tables(each: list[NfNetlink], source: Source) -> CachedState | None:
    """The cached verdict or rate limit of a source behind one interface, from both tables; None if there is
    nothing. Both have something if the interface was taken into a bridge a moment ago, or out of one."""
    found = [state for one in each if (state := _cached(one, source)) is not None]
    if not found:
        return None
    best = max(found, key=lambda one: (bool(one.limit), one.verdict is not None, one.expires))
    return replace(best, packets=sum(one.packets for one in found))


def _cached(netlink: NfNetlink, source: Source) -> CachedState | None:
    """The verdict or rate limit that one table has cached for a source behind one interface; None if there is
    none."""
    limit = netlink.element(TABLE, RATE_LIMITS + source.family, source.key)
    if limit is not None:
        bucket = Bucket.named(limit.object)
        words = limit.object if bucket is None else f"{bucket.per_minute} a minute, {bucket.burst} at once"
        beyond = netlink.element(TABLE, LIMITED_SETS[LimitResult.OVER] + source.family, source.key)
        return CachedState(limit=words, packets=0 if beyond is None else beyond.packets)
    held = VerdictCache(KernelElements(netlink)).get(source)
    if held is None or not isinstance(held.verdict, Class):
        return None
    return CachedState(verdict=held.verdict, expires=held.expires, packets=held.packets)


def left(config: Config, interfaces: Mapping[str, int], address: Address) -> TableVerdict:
    """The verdict that workers find for a source in the policy table, by their own lookup. `interfaces` are those
    of the source's segment, which all have the same policy."""
    index = next(iter(interfaces.values()), None)
    try:
        with closing(Reader.open_left(config.table)) as reader, reader.view():
            head = reader.head()
            if head is None:
                return TableVerdict(error="the policy table holds no policy")
            finding = None if index is None else reader.lookup(index, address.packed)
    except (PortwardError, DatabaseError) as error:
        return TableVerdict(error=str(error))
    if finding is None:
        return TableVerdict(revision=head.revision)
    verdict, outcome = classify(finding)
    return TableVerdict(verdict=verdict, waits=outcome is PacketOutcome.DEFERRED, revision=head.revision)


def behind_store(config: Config) -> str:
    """The revision that the store has and the running agent's table has not, in words; empty if none, or if it is
    unknown."""
    try:
        with closing(Reader.open(config.table)) as reader, closing(open_store(config.store)) as store:
            head = reader.head()
            newest = store.revision()
            if head is None or (head.revision == newest and same_history(head, store)):
                return ""
            if head.revision >= newest or not same_history(head, store):
                return f"the store has another history, at revision {newest} (a restored backup?)"
    except PortwardError:
        return ""
    return f"the store is at revision {newest}"


def not_taken_in(what: str) -> str:
    """The remark for a text of `behind_store`."""
    return f"{what}, which this gateway has not taken in: see `{command('status')}`"


def in_words(taken: NamespaceTakenError) -> str:
    """Which process has this network namespace instead of an agent on the table in question, and what to do."""
    if taken.process is None:
        return str(taken)
    return (
        f"{taken}, with another table folder: name its configuration with --config; if that is this one, its "
        f"table folder was moved or removed, and `systemctl restart {unit()}` makes it anew"
    )


def nothing_loaded(folder: Path) -> KernelError:
    """The error if no ruleset is loaded here. `folder` is the policy table's."""
    if (process := in_another_network(folder)) is not None:
        return KernelError(f"no ruleset of portward is loaded in this network namespace: {away(process)}")
    process = running(folder)
    if process is None:
        return KernelError(f"{reconciler.NOT_LOADED} (start the agent: `systemctl start {unit()}`)")
    return KernelError(
        f"{reconciler.NOT_LOADED}, although an agent runs (process {process}): see `{command('status')}`"
    )


def at_interfaces(seen: Host, found: Iterable[Device], config: Config, interfaces: Collection[str]) -> Host:
    """The state of the host for packets from these interfaces of one segment. `found` are the devices of the
    host."""
    found = list(found)
    below = stacking.below(found, interfaces)
    if not below:
        return seen
    with_bridges = bridged()
    fates = {stacking.fate(found, config, name, bridged=with_bridges) for name in below}
    fates |= {stacking.Fate.FREE} if len(below) < len(interfaces) else set()
    lines = stacking.concerning(found, config, below, bridged=with_bridges)
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES:] = [f"and {len(lines) - _MAX_LINES} more devices like these"]
    return replace(seen, stacked=tuple(lines), fate=fates.pop() if len(fates) == 1 else stacking.Fate.UNCLEAR)


def _agent(config: Config) -> tuple[Agent, dict[str, Any]]:
    if hidden(config.table):
        return Agent.HIDDEN, {}
    if running(config.table) is None:
        return Agent.NONE, {}
    status = read_status(config.table)
    if status is None:
        return Agent.STARTING, {}
    return (Agent.SILENT if age_of(status) > STALE_STATUS_S else Agent.RUNS), status


def bridged() -> bool:
    """Whether portward's table `bridge` is loaded here; False if this user may not see that."""
    try:
        with closing(NfNetlink()) as netlink:
            return reconciler.loaded(netlink.of(KernelTable.BRIDGE))
    except (KernelError, OSError):
        return False


def _ruleset(config: Config) -> tuple[Ruleset, str]:
    """The loaded ruleset, and which process enforces here instead of an agent on this table; empty if none
    does."""
    try:
        with closing(NfNetlink()) as netlink:
            taken = None if running(config.table) is not None else namespacelock.holder(netlink)
            elsewhere = "" if taken is None else in_words(taken)
            if reconciler.closed(netlink):
                return Ruleset.CLOSED, elsewhere
            return (Ruleset.LOADED if reconciler.loaded(netlink) else Ruleset.NONE), elsewhere
    except (KernelError, OSError):
        return Ruleset.NOT_PERMITTED, ""


def _opens(config: Config, segments: list[str]) -> tuple[bool, bool]:
    """Whether all these segments are open while no worker answers, and whether that is because they are observed.
    It is read from the kernel, because an edited configuration is in force only after the next start."""
    try:
        with closing(NfNetlink()) as netlink:
            opens = all(_in_set(netlink, opened.OPEN, config, segment) for segment in segments)
            return opens, opens and all(_in_set(netlink, opened.OBSERVED, config, segment) for segment in segments)
    except (KernelError, OSError):  # another process has taken the ruleset out meanwhile
        return False, False


def _in_set(netlink: NfNetlink, set_: str, config: Config, segment: str) -> bool:
    """Whether all interfaces that a segment can have match a pattern in this set of the kernel."""
    if (group := config.group_named(segment)) is not None:
        return covers(opened.patterns(netlink, set_), group.interfaces)
    return opened.holds(netlink, set_, segment)


def _not_in_force(error: str) -> str:
    """Why it is unknown what the loaded ruleset does; empty if the agent reports no error with it."""
    if not error:
        return ""
    return f"the agent says that its ruleset is not in force, so what is loaded may let anything pass: {error}"


def _not_covered(config: Config, segments: list[str]) -> str:
    """Why it is unknown whether the ruleset covers these segments; empty if it does, or if none is loaded."""
    try:
        with closing(NfNetlink()) as netlink:
            each = [one for table in KernelTable if reconciler.loaded(one := netlink.of(table))]
            if not all(map(opened.has_rules, each)):
                return "another program has taken rules out of the loaded ruleset: it may let anything pass"
            for name, index in ((name, index) for one in segments for name, index in behind(config, one).items()):
                if opened.passed_by(netlink, index):
                    return (
                        f"the ruleset that is loaded has {shown(name)} among the interfaces that are no segments, "
                        "of which every packet passes: has the configuration changed since, or its name?"
                    )
    except (KernelError, OSError):
        pass
    return ""


def _workers(config: Config, agent: Agent, status: dict[str, Any]) -> Workers:
    """How many queues are answered. A running agent reports that, because it queries its workers. Without one, it
    is only visible whether a process has bound a queue."""
    queue = last(config).queue  # workers that outlive an agent have the queues of its configuration
    queues = range(queue.first, queue.first + queue.workers)
    bound = {state.number for state in states()} & set(queues)
    answering = len(bound)
    if agent is Agent.RUNS:
        answering = sum(map(_answers, status["workers"]))
    if answering == len(queues):
        return Workers.ANSWER
    if answering:
        return Workers.PART
    return Workers.DEAF if bound else Workers.NONE


def _answers(worker: dict[str, Any]) -> bool:
    """Whether a worker answers, by the status. The status of an older version only says that its process
    exists."""
    if "state" not in worker:
        return bool(worker["running"])
    unasked = worker["state"] == "unanswered" and worker["seconds"] < _UNASKED_S
    return bool(worker["state"] == "answers" or unasked)
