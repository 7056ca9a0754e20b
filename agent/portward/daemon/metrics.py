"""Every metric of the agent: its name, its help text, and how it is read. A new metric is one entry here, if
the daemon has its number. One that a worker counts also needs a place in `ipc.counters`.

The counting thread reads all of them once a second. A *live* metric is also read at each scrape, because it must
be right even if the counting thread is stuck.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from portward.base import clock
from portward.base.heartbeat import Heartbeat
from portward.base.interfaces import shown
from portward.daemon.core import Core
from portward.daemon.steps import StepRunner
from portward.daemon.workers import Worker
from portward.dataplane.accounting import NAMES
from portward.dataplane.queue_statistics import QueueStatistics, states
from portward.ipc.counters import WorkerEvent
from portward.ipc.mark import PacketOutcome
from portward.metrics.family import Family, Labels, Numbers, Snapshot
from portward.metrics.server import MetricsServer
from portward.model import Mode

# Values of the label `outcome`.
OUTCOMES: Final = {
    PacketOutcome.PASSED: "passed",
    PacketOutcome.DROPPED: "dropped",
    PacketOutcome.RESET: "reset",
    PacketOutcome.OBSERVED: "would_deny",
    PacketOutcome.DEFERRED: "deferred",
}


@dataclass(frozen=True)
class Reading:
    """The sources of one snapshot. `counted_at`: when the sums in it were last read from the kernel, by
    `clock.monotonic`; None: never yet."""

    core: Core
    workers: Sequence[Worker]
    server: MetricsServer
    steps: StepRunner
    heartbeat: Heartbeat
    # Attachments and subscriptions in the policy table.
    sizes: tuple[int, int] = (0, 0)
    queues: Sequence[QueueStatistics] = ()
    reload_failed: bool = False
    counted_at: float | None = None


class Metric(NamedTuple):
    """A metric and how to read it. `live`: it is read at each scrape, on the thread of the metrics server."""

    family: Family
    read: Callable[[Reading], Numbers]
    live: bool = False


class MetricsCollector:
    """The newest snapshot of all metrics."""

    def __init__(
        self, core: Core, workers: Sequence[Worker], server: MetricsServer, steps: StepRunner, heartbeat: Heartbeat
    ) -> None:
        first = Reading(core, workers, server, steps, heartbeat)
        # Both in one tuple, because they are replaced on one thread and read on another.
        self._newest: tuple[Reading, Snapshot] = first, {}

    def refresh(self, *, reload_failed: bool) -> tuple[Reading, Snapshot]:
        """Reads all metrics; also returns what they were read from. Counting thread."""
        before, _ = self._newest
        numbers = {worker.queue for worker in before.workers}
        reading = replace(
            before,
            sizes=before.core.counting.sizes(),
            queues=[queue for queue in states() if queue.number in numbers],
            reload_failed=reload_failed,
            counted_at=before.core.counting.read,
        )
        self._newest = reading, {metric.family.name: metric.read(reading) for metric in METRICS}
        return self._newest

    def newest(self) -> Snapshot:
        """The numbers of the last `refresh`, with live metrics as they are now. Any thread."""
        reading, numbers = self._newest
        return {**numbers, **{metric.family.name: metric.read(reading) for metric in METRICS if metric.live}}


def seconds_since(moment: float | None) -> float:
    """The age of a moment of `clock.monotonic`; infinity for None."""
    return float("inf") if moment is None else clock.monotonic() - moment


def _verdicts(reading: Reading, *, attempts: bool) -> Counter[Labels]:
    """Packets with a verdict, or the connection attempts among them, by reason and outcome."""
    found: Counter[Labels] = Counter()
    for worker in reading.workers:
        for reason, outcome, packets, tried in worker.counters.verdicts():
            found[reason.value, OUTCOMES[outcome]] += tried if attempts else packets
    return found


def _worker_events(reading: Reading) -> Counter[Labels]:
    found: Counter[Labels] = Counter({(event.name.lower(),): 0 for event in WorkerEvent})
    for worker in reading.workers:
        found.update({(event.name.lower(),): count for event, count in worker.counters.events().items()})
    found["foreign_line",] = sum(worker.foreign_lines for worker in reading.workers)
    return found


def _subscription_packets(reading: Reading) -> Numbers:
    """Empty unless the configuration asks for them: there is one series for each subscription."""
    wanted = reading.core.dataplane.config.metrics.subscriptions
    return _copy(reading.core.counting.counts.subscriptions) if wanted else {}


def _group_interfaces(reading: Reading) -> Numbers:
    segments = reading.core.intake.by_segment()
    # A reload changes the configuration of the policy thread first.
    groups = [group.name for group in reading.core.dataplane.config.groups if group.name in segments]
    return {(shown(name),): len(segments[name]) for name in groups}


def _queue_drops(reading: Reading) -> Numbers:
    return {
        (str(queue.number), cause): number
        for queue in reading.queues
        for cause, number in (("full", queue.dropped_full), ("socket", queue.dropped_socket))
    }


def _by_name(numbers: Mapping[str, float]) -> Numbers:
    return {(name,): number for name, number in sorted(numbers.items())}


def _copy(sums: Mapping[tuple[str, str], int]) -> Numbers:
    """A copy, because the counting thread changes the sums while they are scraped."""
    return dict[Labels, float](sums.items())


def _counter(
    name: str, labels: Labels, text: str, read: Callable[[Reading], Numbers], *, live: bool = False
) -> Metric:
    return Metric(Family(name, counter=True, labels=labels, help=text), read, live)


def _gauge(
    name: str, labels: Labels, text: str, read: Callable[[Reading], Numbers], *, live: bool = False
) -> Metric:
    return Metric(Family(name, counter=False, labels=labels, help=text), read, live)


METRICS: Final[tuple[Metric, ...]] = (
    _counter(
        "judged_packets", ("reason", "outcome"),
        "Packets that a worker classified, by reason and by what happened to them (passed, dropped, reset, "
        "would_deny).",
        lambda reading: _verdicts(reading, attempts=False),
    ),
    _counter(
        "judged_attempts", ("reason", "outcome"),
        "Connection attempts (SYN) among the packets that a worker classified.",
        lambda reading: _verdicts(reading, attempts=True),
    ),
    _counter(
        "worker_events", ("event",),
        "Events in workers other than verdicts: packets dropped because they could not be read, located or "
        "classified, resets that could not be sent, and lines of foreign output that the daemon skipped "
        "(foreign_line).",
        _worker_events,
    ),
    _counter(
        "worker_restarts", (), "Worker processes that ended and were started again.",
        lambda reading: sum(worker.restarts for worker in reading.workers),
    ),
    _counter(
        "packets", ("segment", "verdict"),
        "Packets to the policy ports on which a cached verdict acted, or that made the kernel cache it. Packets "
        "of an allowed source to internal destinations count as allowed.",
        lambda reading: _copy(reading.core.counting.counts.segments),
    ),
    _counter(
        "subscription_packets", ("subscription", "verdict"),
        "The same by subscription; the label is empty for sources of unknown subscription.",
        _subscription_packets,
    ),
    _gauge(
        "counters_age_seconds", (),
        "Seconds since the kernel's counters were last read: later packets are not yet counted by segment and "
        "subscription.",
        lambda reading: seconds_since(reading.counted_at), live=True,
    ),
    _gauge(
        "remembered_sources", ("verdict",), "Sources whose verdict the kernel has cached now.",
        lambda reading: {(NAMES[verdict],): n for verdict, n in reading.core.counting.cached_sources.items()},
    ),
    _counter(
        "screen_packets", ("rule",),
        "Packets by named rule of the ruleset: passed to an internal destination, sent to a worker, over a limit, "
        "dropped without a verdict, and so on; the comment of each counter in the ruleset says what it counts.",
        lambda reading: _by_name(reading.core.counting.screen()),
    ),
    _counter(
        "limited_packets", ("segment",),
        "Packets of sources without a cached verdict that were refused without a verdict, because their segment "
        "is over its rate.",
        lambda reading: _by_name(reading.core.limited()),
    ),
    _counter(
        "queue_dropped_packets", ("queue", "cause"),
        "Packets that the kernel dropped because the queue was full (full) or the worker's socket was (socket).",
        _queue_drops,
    ),
    _gauge(
        "queue_waiting_packets", ("queue",), "Packets that wait for a verdict now.",
        lambda reading: {(str(queue.number),): queue.waiting for queue in reading.queues},
    ),
    _counter(
        "ruleset_repairs", (),
        "Times the ruleset was loaded again because another program had changed it, or the kernel had refused a "
        "change.",
        lambda reading: reading.core.dataplane.repairs,
    ),
    _counter(
        "ruleset_repair_tries", (), "Attempts to load the ruleset again, also those that failed.",
        lambda reading: reading.core.dataplane.repair_tries,
    ),
    _counter(
        "divergence", ("kind",),
        "Differences that the self-check found between what should be enforced and what was, by kind: `ruleset`, "
        "`remembered` (a cached verdict), `worker` (did not answer), `answer` (not under the kernel's policy).",
        lambda reading: {(kind.value,): n for kind, n in reading.core.selfcheck.divergences.items()},
    ),
    _gauge(
        "self_check_age_seconds", (),
        "Seconds since every worker last answered a query of the self-check under the policy in the kernel.",
        lambda reading: seconds_since(reading.core.selfcheck.answered), live=True,
    ),
    _gauge(
        "ruleset_broken", (), "1 if the kernel refuses the ruleset: port 25 may be open.",
        lambda reading: bool(reading.core.dataplane.broken),
    ),
    _gauge(
        "guard_loaded", (),
        "1 while the forward guard is loaded, which checks packets again that other programs may have translated "
        "(see `status`).",
        lambda reading: reading.core.dataplane.guarded,
    ),
    _gauge(
        "chains_between", (),
        "Chains of other programs in prerouting at priority raw - 2 (-302), which portward's own two have because "
        "it comes before connection tracking and before chains at raw. None can be between those two; the forward "
        "guard is loaded all the same, because such a chain may change packets after portward has seen them.",
        lambda reading: len(reading.core.dataplane.others.beside),
    ),
    _counter(
        "policy_changes", (), "Changes of policy written to the table.",
        lambda reading: reading.core.intake.changes,
    ),
    _gauge(
        "policy_held", (),
        "1 while a change waits for confirmation because it would flip more than max_flip_share of all "
        "subscriptions.",
        lambda reading: reading.core.intake.held is not None,
    ),
    _counter(
        "store_history_replaced", (),
        "Times the store had another history than the policy table (a backup was restored, a copy took its "
        "place), so that everything was read again.",
        lambda reading: reading.core.intake.histories,
    ),
    _counter(
        "records_refused", (),
        "Records of the store that could not be read. The record that was in force stays in force; if everything "
        "was read anew, its sources are denied.",
        lambda reading: reading.core.intake.refused,
    ),
    _gauge(
        "records_unreadable", (),
        "Records of the store, of those read since the start, that cannot be read now, up to 1,000: `status` "
        "names the first.",
        lambda reading: len(reading.core.unreadable),
    ),
    _counter(
        "table_rows_damaged", (),
        "Rows of the policy table that cannot be read, each counted once; their sources are denied.",
        lambda reading: reading.core.damaged,
    ),
    _counter(
        "store_errors", (),
        "Failed attempts to bring the store's changes into the table; the last policy stays in force.",
        lambda reading: reading.core.intake.store_errors,
    ),
    _counter(
        "step_failures", ("step",),
        "Unexpected errors, by the step of the daemon that failed: it is retried; see the log.",
        lambda reading: {(step.value,): times for step, times in reading.steps.failures.items()}, live=True,
    ),
    _gauge(
        "reload_failed", (),
        "1 if the last reload of the configuration was refused, so the one before is in force.",
        lambda reading: reading.reload_failed,
    ),
    _gauge(
        "store_age_seconds", (), "Seconds since the store was last read.",
        lambda reading: seconds_since(reading.core.intake.store_read), live=True,
    ),
    _gauge(
        "enforced_revision", (),
        "Revision of the store that the kernel enforces: no verdict of an older one is cached any more.",
        lambda reading: reading.core.dataplane.enforced, live=True,
    ),
    _gauge(
        "table_revision", (),
        "Revision of the store that the policy table has; the kernel follows within milliseconds.",
        lambda reading: reading.core.revision,
    ),
    _gauge("attachments", (), "Attachments in the policy table.", lambda reading: reading.sizes[0]),
    _gauge("subscriptions", (), "Subscriptions in the policy table.", lambda reading: reading.sizes[1]),
    _gauge(
        "observing", (), "1 if the whole gateway only observes.",
        lambda reading: reading.core.dataplane.config.mode is Mode.OBSERVE,
    ),
    _gauge(
        "segments", (), "Segments that have an interface now. An interface group is one segment.",
        lambda reading: len(set(reading.core.intake.segments().values())),
    ),
    _gauge(
        "group_interfaces", ("segment",), "Interfaces that an interface group has now.",
        _group_interfaces,
    ),
    _counter(
        "metrics_connections_refused", ("cause",),
        "Connections to the metrics that ended without metrics: idle ones that were closed for new ones "
        "(crowded), those that took too long (slow), those that did not speak HTTP (malformed), "
        "and times without a free descriptor (descriptors).",
        lambda reading: {(cause,): number for cause, number in reading.server.refused.items()},
    ),
    _counter(
        "metrics_listen_retries", (), "Failed attempts to listen at metrics.address; each is retried.",
        lambda reading: reading.server.retries,
    ),
    _gauge(
        "stacked_devices", (),
        "Pairs of a segment and a device that takes its packets before portward sees them (a bridge, a macvlan, a "
        "VLAN on it), and bridges between a segment and an uplink. Each one is a mistake in the network's setup: "
        "`status` names it.",
        lambda reading: len(reading.core.dataplane.lookout.warnings),
    ),
    _gauge(
        "thread_step_seconds", ("thread",),
        "Seconds that the thread (policy, kernel, counting) has spent at one step without progress; 0 while it is "
        "idle. The watchdog is not fed while this is above 60 (policy) or 30 (the others).",
        lambda reading: {(lane.name,): lane.silent_for() for lane in reading.heartbeat.lanes}, live=True,
    ),
)  # fmt: skip
FAMILIES: Final = tuple(metric.family for metric in METRICS)
