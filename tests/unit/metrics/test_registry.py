"""The metrics: every number of a snapshot is exported, under names and with help that hold to the rules."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from portward.metrics.registry import Exporter
from portward.metrics.snapshot import Snapshot


def exported(snapshot: Snapshot) -> dict[str, object]:
    """Metric families by name, as a scrape reads them."""
    registry = CollectorRegistry()
    registry.register(Exporter(lambda: snapshot))
    text = generate_latest(registry).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_every_number_of_a_snapshot_is_exported() -> None:
    marked = Snapshot()
    for place, field in enumerate(fields(Snapshot)):
        value = getattr(marked, field.name)
        number = 1000.0 + place
        new: Any = number if not isinstance(value, dict) else {("a", "b"): number}
        marked = replace(marked, **{field.name: new})
    samples = {
        sample.value
        for family in exported(marked).values()
        for sample in family.samples  # type: ignore[attr-defined] # a Metric
    }
    assert {1000.0 + place for place in range(len(fields(Snapshot)))} <= samples


def test_names_and_help_hold_to_the_rules() -> None:
    for name, family in exported(Snapshot()).items():
        assert name.startswith("portward_")
        assert len(family.documentation) > 15  # type: ignore[attr-defined] # a Metric


def test_counters_end_in_total() -> None:
    registry = CollectorRegistry()
    registry.register(Exporter(Snapshot))
    lines = generate_latest(registry).decode().splitlines()
    counters = [line.split()[2] for line in lines if line.startswith("# TYPE") and line.endswith(" counter")]
    assert counters
    assert all(name.endswith("_total") for name in counters)
