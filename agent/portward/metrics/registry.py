"""Every metric that Prometheus scrapes, with its help text.

The daemon keeps a `Snapshot` of numbers up to date; a scrape turns the newest one into metrics, and so never
waits for the kernel or holds a packet up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from portward import __version__
from portward.metrics.http import Answer, Request
from portward.metrics.snapshot import Labels, Snapshot

# (field of Snapshot, name without prefix and `_total`, counter?, labels, help)
_FAMILIES: Final[tuple[tuple[str, str, bool, Labels, str], ...]] = (
    ("judged", "judged_packets", True, ("reason", "outcome"),
     "Packets that a worker judged, by reason and by what became of them (passed, dropped, reset, would_deny)."),
    ("attempts", "judged_attempts", True, ("reason", "outcome"),
     "Connection attempts (SYN) among the judged packets."),
    ("worker_events", "worker_events", True, ("event",),
     "What workers met besides verdicts: packets dropped since they could not be read, placed or judged, "
     "resets that could not be sent, and lines of foreign output that the daemon skipped (foreign_line)."),
    ("worker_restarts", "worker_restarts", True, (), "Worker processes that ended and were started again."),
    ("segment_packets", "packets", True, ("segment", "verdict"),
     "Packets to the judged ports that were acted on by a remembered verdict or made the kernel remember it. "
     "Packets of an allowed source to internal destinations are among the allowed ones."),
    ("subscription_packets", "subscription_packets", True, ("subscription", "verdict"),
     "The same by subscription; the label is empty for sources of no known subscription."),
    ("counters_age", "counters_age_seconds", False, (),
     "Seconds since the kernel's counters were last read: packets since then are not counted by segment and "
     "subscription yet."),
    ("remembered", "remembered_sources", False, ("verdict",), "Sources whose verdict the kernel holds now."),
    ("screen", "screen_packets", True, ("rule",),
     "Packets by named rule of the ruleset: passed to an internal destination, asked of a worker, over a limit, "
     "dropped without a verdict, and so on; each counter's comment in the ruleset says what it counts."),
    ("limited", "limited_packets", True, ("segment",),
     "Packets of unremembered sources beyond the segment's rate, refused without a verdict."),
    ("queue_dropped", "queue_dropped_packets", True, ("queue", "cause"),
     "Packets that the kernel dropped since the queue was full (full) or the worker's socket was (socket)."),
    ("queue_waiting", "queue_waiting_packets", False, ("queue",), "Packets that wait for a verdict now."),
    ("ruleset_repairs", "ruleset_repairs", True, (),
     "Times the ruleset was put back: another program had changed it, or the kernel had refused a change."),
    ("ruleset_repair_tries", "ruleset_repair_tries", True, (),
     "Times it was tried to put the ruleset back, also in vain."),
    ("divergence", "divergence", True, ("kind",),
     "Differences that the self-check found between what should be enforced and what was, by kind: ruleset, "
     "remembered (a verdict), worker (did not answer), answer (not under the policy in the kernel)."),
    ("self_check_age", "self_check_age_seconds", False, (),
     "Seconds since every worker last answered a query of the self-check under the policy in the kernel."),
    ("ruleset_broken", "ruleset_broken", False, (),
     "1 where the kernel refuses the ruleset that should be there: port 25 may be open."),
    ("guard_loaded", "guard_loaded", False, (),
     "1 while the forward guard is loaded, which judges again what others may have translated (see `status`)."),
    ("chains_between", "chains_between", False, (),
     "Chains of others at the priority of portward's own in prerouting: because of them the guard is loaded."),
    ("policy_changes", "policy_changes", True, (), "Changes of policy taken into the table."),
    ("policy_held", "policy_held", False, (),
     "1 where a change would flip more than max_flip_share of all subscriptions and waits for confirmation."),
    ("history_replaced", "store_history_replaced", True, (),
     "Times the store had another history than the policy table (a backup was restored, a copy took its place): "
     "everything was read anew."),
    ("records_refused", "records_refused", True, (),
     "Records of the store that could not be read; the record in force before stays."),
    ("records_unreadable", "records_unreadable", False, (),
     "Records of the store, of those read since the start, that cannot be read now, up to 1,000: `status` names "
     "the first."),
    ("table_rows_damaged", "table_rows_damaged", True, (),
     "Rows of the policy table that cannot be read, each counted once; the sources concerned are denied."),
    ("store_errors", "store_errors", True, (), "Failed readings of the store; the last known policy stays."),
    ("step_failures", "step_failures", True, ("step",),
     "Errors that nobody expects, by the step of the daemon that they stopped: it is tried again; see the log."),
    ("reload_failed", "reload_failed", False, (),
     "1 where the last reload of the configuration was refused and the older one is in force."),
    ("store_age", "store_age_seconds", False, (), "Seconds since the store was last read."),
    ("enforced_revision", "enforced_revision", False, (),
     "Revision of the store that the kernel enforces: all that it remembered of older ones is forgotten."),
    ("table_revision", "table_revision", False, (),
     "Revision of the store that the policy table stands at; the kernel follows within milliseconds."),
    ("attachments", "attachments", False, (), "Attachments in the policy table."),
    ("subscriptions", "subscriptions", False, (), "Subscriptions in the policy table."),
    ("observing", "observing", False, (), "1 where the whole gateway only observes."),
    ("segments", "segments", False, (), "Interfaces that are segments now."),
    ("metrics_refused", "metrics_connections_refused", True, ("cause",),
     "Connections to the metrics that ended without metrics: idle ones that gave way to new ones (crowded), those "
     "that took too long (slow), those that spoke no HTTP (malformed), and times without a descriptor."),
    ("metrics_retries", "metrics_listen_retries", True, (),
     "Failed tries to listen at metrics.address; each is tried again."),
    ("stacked_devices", "stacked_devices", False, (),
     "Pairs of a segment and a device that takes its packets unjudged (a bridge, a macvlan, a VLAN on it), and "
     "bridges between a segment and an uplink. Each one is a mistake in the network's setup: `status` names it."),
    ("step_seconds", "thread_step_seconds", False, ("thread",),
     "Seconds that the thread (policy, kernel, counting) has been at one step without getting further; 0 while "
     "it is idle. The watchdog is not fed while this is beyond 60 (policy) or 30 (the others)."),
)  # fmt: skip


class Exporter(Collector):
    """Turns the newest snapshot into metrics at each scrape."""

    def __init__(self, newest: Callable[[], Snapshot]) -> None:
        self._newest = newest

    def collect(self) -> Iterator[Metric]:
        """The metrics of the newest snapshot."""
        snapshot = self._newest()
        info = GaugeMetricFamily("portward_build_info", "Version of the agent.", labels=("version",))
        info.add_metric((__version__,), 1)
        yield info
        for name, metric, counts, labels, text in _FAMILIES:
            family = CounterMetricFamily if counts else GaugeMetricFamily
            yield _filled(family(f"portward_{metric}", text, labels=labels), getattr(snapshot, name))


def _filled(
    family: CounterMetricFamily | GaugeMetricFamily, numbers: Mapping[Labels, float] | float
) -> CounterMetricFamily | GaugeMetricFamily:
    pairs: Iterable[tuple[Labels, float]] = numbers.items() if isinstance(numbers, Mapping) else [((), numbers)]
    for labels, number in pairs:
        family.add_metric(labels, number)
    return family


def answering(newest: Callable[[], Snapshot]) -> Callable[[Request], Answer]:
    """What answers a scrape with the metrics of the newest snapshot, in the format that the request prefers."""
    registry = CollectorRegistry()
    registry.register(Exporter(newest))
    application = make_wsgi_app(registry)

    def answer(request: Request) -> Answer:
        said: list[Answer] = []
        environment = {
            "REQUEST_METHOD": "GET", "PATH_INFO": "/metrics", "QUERY_STRING": request.query,
            "HTTP_ACCEPT": request.accept, "HTTP_ACCEPT_ENCODING": request.accept_encoding,
        }  # fmt: skip

        def begin(status: str, headers: list[tuple[str, str]], *_: object) -> Callable[[bytes], object]:
            said.append(Answer(status, tuple(headers), b""))
            return lambda _: None

        body = b"".join(application(environment, begin))
        return said[-1]._replace(body=body)

    return answer
