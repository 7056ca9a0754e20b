"""What a running gateway tells: the numbers for Prometheus, and the status for `portward status`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from portward import __version__
from portward.base import clock
from portward.base.interfaces import shown
from portward.daemon.core import Core
from portward.daemon.runtime import STATUS_FORMAT
from portward.daemon.workers import Worker
from portward.dataplane.accounting import NAMES
from portward.dataplane.queue_statistics import states
from portward.ipc.counters import PacketOutcome, WorkerEvent
from portward.metrics.server import MetricsServer
from portward.metrics.snapshot import Labels, Snapshot
from portward.model import Mode
from portward.store.unreadable import KNOWN

# Records and rows that `status` names.
_NAMED: Final = 5
# How outcomes are called in metrics and status.
_OUTCOMES: Final = {
    PacketOutcome.PASSED: "passed",
    PacketOutcome.DROPPED: "dropped",
    PacketOutcome.RESET: "reset",
    PacketOutcome.OBSERVED: "would_deny",
    PacketOutcome.DEFERRED: "deferred",
}


def snapshot(core: Core, workers: list[Worker], server: MetricsServer, *, reload_failed: bool) -> Snapshot:
    """The numbers of this moment. To be called on the thread that counts."""
    judged: Counter[tuple[str, ...]] = Counter()
    attempts: Counter[tuple[str, ...]] = Counter()
    events: Counter[tuple[str, ...]] = Counter({(event.name.lower(),): 0 for event in WorkerEvent})
    for worker in workers:
        for reason, outcome, packets, tries in worker.counters.verdicts():
            judged[reason.value, _OUTCOMES[outcome]] += packets
            attempts[reason.value, _OUTCOMES[outcome]] += tries
        events.update({(event.name.lower(),): count for event, count in worker.counters.events().items()})
    events["foreign_line",] = sum(worker.foreign_lines for worker in workers)
    numbers = {worker.queue for worker in workers}
    queues = [state for state in states() if state.number in numbers]
    attachments, subscriptions = core.sizes()
    counts = core.counting.counts
    return Snapshot(
        judged=judged,
        attempts=attempts,
        worker_events=events,
        worker_restarts=sum(worker.restarts for worker in workers),
        segment_packets=_plain(counts.segments),
        subscription_packets=_plain(counts.subscriptions) if core.config.metrics.subscriptions else {},
        counters_age=core.counting.age(),
        remembered={(NAMES[verdict],): number for verdict, number in core.counting.remembered.items()},
        screen={(name,): packets for name, packets in sorted(core.screen().items())},
        limited={(name,): packets for name, packets in sorted(core.limited().items())},
        queue_dropped={
            (str(state.number), cause): number
            for state in queues
            for cause, number in (("full", state.dropped_full), ("socket", state.dropped_socket))
        },
        queue_waiting={(str(state.number),): state.waiting for state in queues},
        ruleset_repairs=core.reconciler.repairs,
        ruleset_repair_tries=core.reconciler.repair_tries,
        policy_changes=core.changes,
        policy_held=core.held is not None,
        history_replaced=core.histories,
        records_refused=core.refused,
        records_unreadable=len(core.unreadable),
        table_rows_damaged=core.damaged,
        store_errors=core.store_errors,
        divergence={(kind.value,): count for kind, count in core.selfcheck.divergences.items()},
        self_check_age=_since(core.selfcheck.answered),
        ruleset_broken=bool(core.broken),
        guard_loaded=core.guarded,
        chains_between=len(core.others.beside),
        reload_failed=reload_failed,
        store_age=_since(core.store_read),
        enforced_revision=core.enforced,
        table_revision=core.revision,
        attachments=attachments,
        subscriptions=subscriptions,
        observing=core.config.mode is Mode.OBSERVE,
        segments=len(core.segments()),
        stacked_devices=len(core.lookout.warnings),
        metrics_refused={(cause,): number for cause, number in server.refused.items()},
        metrics_retries=server.retries,
    )


def refreshed(numbers: Snapshot, core: Core, made: float) -> Snapshot:
    """The numbers, with those brought up to this moment that must be right also if the thread that makes them is
    stuck. `made` is when they were made, by `clock.monotonic`. Any thread."""
    return replace(
        numbers,
        enforced_revision=core.enforced,
        store_age=_since(core.store_read),
        self_check_age=_since(core.selfcheck.answered),
        counters_age=numbers.counters_age + clock.monotonic() - made,
    )


def status(
    core: Core, workers: list[Worker], numbers: Snapshot, server: MetricsServer, *, config: str, began: float
) -> dict[str, Any]:
    """The status, for msgspec's JSON: times in UTC, `store_age` in seconds."""
    seen: Counter[str] = Counter()
    for (segment, _), packets in numbers.segment_packets.items():
        seen[segment] += int(packets)
    return {
        "format": STATUS_FORMAT,
        "version": __version__,
        "pid": os.getpid(),
        # Times are for people, by the wall clock as it is set now; ages come from a clock that nobody can set.
        "at": clock.utc_now(),
        "started": clock.at(began),
        "clock": clock.Stamp.now(),
        "uptime": clock.monotonic() - began,
        "config": config,
        "mode": core.config.mode.value,
        "preset": core.preset.name,
        "queue_path": "nft queue" if core.native else "xtables NFQUEUE",
        "revision": core.revision,
        "enforced_revision": core.enforced,
        "generation": core.generation,
        "store": core.config.store,
        "store_error": core.store_error,
        "store_waits": core.store_waits,
        "working": None if core.work is None else {"what": core.work.what, "seconds": core.work.seconds()},
        "counted_since": datetime.fromtimestamp(core.counting.counts.since, UTC),
        "counters_age": numbers.counters_age,
        "in_step": core.in_step,
        "history_replaced": numbers.history_replaced,
        "held": _held(core),
        "store_age": numbers.store_age,
        "records_refused": numbers.records_refused,
        "records_unreadable": _unreadable(core.unreadable),
        "table_rows_damaged": numbers.table_rows_damaged,
        "table_rows_damaged_first": core.damaged_rows[:_NAMED],
        "attachments": numbers.attachments,
        "subscriptions": numbers.subscriptions,
        "segments": [
            {
                "name": shown(name),
                "index": index,
                "observed": core.config.observes(name),
                "packets": seen[shown(name)],
            }
            for index, name in sorted(core.segments().items(), key=lambda item: item[1])
        ],
        "workers": [
            {
                "queue": worker.queue,
                "pid": worker.process.pid if worker.process else None,
                "running": worker.running,
                **worker.standing()._asdict(),
                "restarts": worker.restarts,
            }
            for worker in workers
        ],
        "self_check": {
            "at": None if core.selfcheck.answered is None else clock.at(core.selfcheck.answered),
            "age": None if core.selfcheck.answered is None else _since(core.selfcheck.answered),
            "divergences": {kind.value: count for kind, count in core.selfcheck.divergences.items()},
            "last_difference": core.selfcheck.last_difference,
        },
        "guard": {"loaded": core.guarded, "why": core.others.why},
        "stacked": core.lookout.warnings,
        "tunnels_dropped": int(numbers.screen.get(("tunnels",), 0)),
        "ruleset_error": core.broken,
        "ruleset_repairs": numbers.ruleset_repairs,
        "reload_failed": bool(numbers.reload_failed),
        "metrics_error": server.problem,
        "remembered": {labels[0]: int(number) for labels, number in numbers.remembered.items()},
    }


def _unreadable(records: list[str]) -> dict[str, Any]:
    """The records that cannot be read. `more`: perhaps there are more than this number, which are not known."""
    return {"number": len(records), "more": len(records) >= KNOWN, "first": records[:_NAMED]}


def _held(core: Core) -> dict[str, Any] | None:
    """The change that waits for confirmation. `ahead` is the revision up to which denials behind it are enforced;
    `whole` says that it is all that the store holds, which has another history than the policy in force."""
    held = core.held
    if held is None:
        return None
    ahead = max(core.ahead, held.revision)
    return {"revision": held.revision, **held.flips._asdict(), "whole": held.whole, "ahead": ahead}


def _plain(sums: Mapping[tuple[str, str], int]) -> dict[Labels, float]:
    """A copy that does not change while it is scraped."""
    return dict[Labels, float](sums.items())


def _since(moment: float | None) -> float:
    return float("inf") if moment is None else clock.monotonic() - moment
