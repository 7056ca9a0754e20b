"""The numbers of one moment, as the daemon keeps them for Prometheus and for `portward status`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Mappings go from label values to numbers, in the order of `metrics`."""

    judged: Mapping[Labels, float] = field(default_factory=dict)
    attempts: Mapping[Labels, float] = field(default_factory=dict)
    worker_events: Mapping[Labels, float] = field(default_factory=dict)
    worker_restarts: float = 0
    counters_age: float = float("inf")
    segment_packets: Mapping[Labels, float] = field(default_factory=dict)
    subscription_packets: Mapping[Labels, float] = field(default_factory=dict)
    remembered: Mapping[Labels, float] = field(default_factory=dict)
    screen: Mapping[Labels, float] = field(default_factory=dict)
    limited: Mapping[Labels, float] = field(default_factory=dict)
    queue_dropped: Mapping[Labels, float] = field(default_factory=dict)
    queue_waiting: Mapping[Labels, float] = field(default_factory=dict)
    ruleset_repairs: float = 0
    ruleset_repair_tries: float = 0
    divergence: Mapping[Labels, float] = field(default_factory=dict)
    self_check_age: float = 0
    ruleset_broken: float = 0
    guard_loaded: float = 0
    chains_between: float = 0
    policy_changes: float = 0
    policy_held: float = 0
    history_replaced: float = 0
    records_refused: float = 0
    records_unreadable: float = 0
    table_rows_damaged: float = 0
    store_errors: float = 0
    step_failures: Mapping[Labels, float] = field(default_factory=dict)
    reload_failed: float = 0
    store_age: float = 0
    enforced_revision: float = 0
    table_revision: float = 0
    attachments: float = 0
    subscriptions: float = 0
    observing: float = 0
    segments: float = 0
    stacked_devices: float = 0
    step_seconds: Mapping[Labels, float] = field(default_factory=dict)
    metrics_refused: Mapping[Labels, float] = field(default_factory=dict)
    metrics_retries: float = 0
