"""The status of a running gateway, as `portward status` and its `--json` show it.

Keys are a contract (docs/reference/json.md). Times are in UTC by the wall clock as it is set now, for people. Ages
are in seconds by a clock that cannot be set, for programs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from portward import __version__
from portward.base import clock
from portward.base.interfaces import shown
from portward.daemon.core import Core
from portward.daemon.metrics import Reading, seconds_since
from portward.daemon.runtime import STATUS_FORMAT
from portward.metrics.family import Snapshot
from portward.store.unreadable import KNOWN

# Records and rows that the status names; it counts the others. An operator repairs them one by one.
_NAMED: Final = 5


def status(reading: Reading, numbers: Snapshot, *, config: str, began: float) -> dict[str, Any]:
    """The status, to be encoded as JSON by msgspec.

    `numbers` are the metrics of the same moment. `config` is the path of the configuration. `began` is when the
    agent started, by `clock.monotonic`. Counting thread.
    """
    return {
        **_process(config, began),
        **_policy(reading),
        **_store(reading),
        **_traffic(reading, numbers),
        **_health(reading),
        **_kernel(reading, numbers),
    }


def _process(config: str, began: float) -> dict[str, Any]:
    return {
        "format": STATUS_FORMAT,
        "version": __version__,
        "pid": os.getpid(),
        "at": clock.utc_now(),
        "started": clock.at(began),
        "clock": clock.Stamp.now(),
        "uptime": clock.monotonic() - began,
        "config": config,
    }


def _policy(reading: Reading) -> dict[str, Any]:
    core = reading.core
    attachments, subscriptions = reading.sizes
    return {
        "mode": core.dataplane.config.mode.value,
        "preset": core.dataplane.preset.name,
        "revision": core.revision,
        "enforced_revision": core.dataplane.enforced,
        "generation": core.generation,
        "attachments": attachments,
        "subscriptions": subscriptions,
        "reload_failed": reading.reload_failed,
    }


def _store(reading: Reading) -> dict[str, Any]:
    core = reading.core
    return {
        "store": core.dataplane.config.store,
        "store_error": core.intake.store_error,
        "store_waits": core.intake.store_waits,
        "store_age": seconds_since(core.intake.store_read),
        "working": None if core.work is None else {"what": core.work.what, "seconds": core.work.seconds()},
        "in_step": core.intake.in_step,
        "history_replaced": core.intake.histories,
        "held": _held(core),
        "records_refused": core.intake.refused,
        "records_unreadable": _unreadable(core.unreadable),
        "table_rows_damaged": core.damaged,
        "table_rows_damaged_first": core.damaged_rows[:_NAMED],
    }


def _traffic(reading: Reading, numbers: Snapshot) -> dict[str, Any]:
    core, counts, config = reading.core, reading.core.counting.counts, reading.core.dataplane.config
    packets: Counter[str] = Counter()
    for (segment, _), number in counts.segments.items():
        packets[segment] += number
    return {
        "counted_since": datetime.fromtimestamp(counts.since, UTC),
        "counters_age": seconds_since(reading.counted_at),
        "segments": [
            {
                "name": shown(name),
                "index": None if config.group_named(name) else next(iter(indexes), None),
                "interfaces": len(indexes),
                "observed": config.observes(name),
                "packets": packets[shown(name)],
            }
            for name, indexes in sorted(core.intake.by_segment().items())
        ],
        "tunnels_dropped": int(_labelled(numbers, "screen_packets").get("tunnels", 0)),
        "remembered": {name: int(number) for name, number in _labelled(numbers, "remembered_sources").items()},
    }


def _health(reading: Reading) -> dict[str, Any]:
    selfcheck = reading.core.selfcheck
    return {
        "workers": [
            {
                "queue": worker.queue,
                "pid": worker.process.pid if worker.process else None,
                "running": worker.running,
                **worker.standing()._asdict(),
                "restarts": worker.restarts,
            }
            for worker in reading.workers
        ],
        "self_check": {
            "at": None if selfcheck.answered is None else clock.at(selfcheck.answered),
            "age": None if selfcheck.answered is None else seconds_since(selfcheck.answered),
            "divergences": {kind.value: count for kind, count in selfcheck.divergences.items()},
            "last_difference": selfcheck.last_difference,
        },
        "failing": reading.steps.failing_now(),
        "stuck": reading.heartbeat.stuck(),
        "metrics_error": reading.server.problem,
    }


def _kernel(reading: Reading, numbers: Snapshot) -> dict[str, Any]:
    core = reading.core
    return {
        "queue_path": "nft queue" if core.native else "xtables NFQUEUE",
        "bridged": core.dataplane.bridged,
        "guard": {"loaded": core.dataplane.guarded, "why": core.dataplane.others.why},
        "stacked": core.dataplane.lookout.warnings,
        "ruleset_error": core.dataplane.broken,
        "ruleset_repairs": numbers["ruleset_repairs"],
    }


def _unreadable(records: list[str]) -> dict[str, Any]:
    """The records that cannot be read. `more`: there may be more, because no more are recorded."""
    return {"number": len(records), "more": len(records) >= KNOWN, "first": records[:_NAMED]}


def _held(core: Core) -> dict[str, Any] | None:
    """The change that waits for confirmation; None if no change does.

    `ahead` is the revision up to which denials behind the held change are enforced. `whole`: the change is all
    that the store has, because its history is not that of the policy in force.
    """
    held = core.intake.held
    if held is None:
        return None
    ahead = max(core.ahead, held.revision)
    return {"revision": held.revision, **held.flips._asdict(), "whole": held.whole, "ahead": ahead}


def _labelled(numbers: Snapshot, name: str) -> dict[str, float]:
    """The numbers of a metric with one label: its value → number."""
    found = numbers[name]
    return {labels[0]: number for labels, number in found.items()} if isinstance(found, Mapping) else {}


# The functions whose keys make up a status.
PARTS: Final = (_process, _policy, _store, _traffic, _health, _kernel)
