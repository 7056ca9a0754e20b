"""Every number of a snapshot is exported, and names and help texts follow the Prometheus conventions."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from portward.daemon.metrics import FAMILIES
from portward.metrics.exporter import Exporter
from portward.metrics.family import Numbers, Snapshot


def exported(snapshot: Snapshot) -> dict[str, object]:
    """Metric families by name, as a scrape reads them."""
    registry = CollectorRegistry()
    registry.register(Exporter(FAMILIES, lambda: snapshot))
    text = generate_latest(registry).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_every_number_of_a_snapshot_is_exported() -> None:
    marked: dict[str, Numbers] = {
        family.name: {tuple("a" * len(family.labels)): 1000.0 + place} if family.labels else 1000.0 + place
        for place, family in enumerate(FAMILIES)
    }
    samples = {
        sample.value
        for family in exported(marked).values()
        for sample in family.samples  # type: ignore[attr-defined] # a Metric
    }
    assert {1000.0 + place for place in range(len(FAMILIES))} <= samples


def test_no_two_metrics_have_the_same_name() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_names_and_help_hold_to_the_rules() -> None:
    for name, family in exported({}).items():
        assert name.startswith("portward_")
        assert len(family.documentation) > 15  # type: ignore[attr-defined] # a Metric


def test_counters_end_in_total() -> None:
    registry = CollectorRegistry()
    registry.register(Exporter(FAMILIES, dict))
    lines = generate_latest(registry).decode().splitlines()
    counters = [line.split()[2] for line in lines if line.startswith("# TYPE") and line.endswith(" counter")]
    assert counters
    assert all(name.endswith("_total") for name in counters)
