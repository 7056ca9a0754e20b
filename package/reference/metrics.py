"""The page on metrics. Names, types, labels and texts come from the registry, label values from their enums."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from package.reference.tables import code, meanings, sentence, table
from portward.base.resources import rules
from portward.daemon.metrics import FAMILIES, OUTCOMES
from portward.daemon.steps import Step
from portward.dataplane.accounting import NAMES
from portward.dataplane.selfcheck import DifferenceKind
from portward.ipc.counters import WorkerEvent
from portward.metrics.exporter import Exporter
from portward.model import Reason

# Label → its values, if the code has a list of them.
_VALUES: Final[Mapping[str, list[str]]] = {
    "reason": [reason.value for reason in Reason],
    "outcome": list(OUTCOMES.values()),
    "event": [*(event.name.lower() for event in WorkerEvent), "foreign_line"],
    "kind": [kind.value for kind in DifferenceKind],
    "step": [step.value for step in Step],
}
_COUNTER: Final = re.compile(r'(?m)^\s*counter (\w+) \{ comment "([^"]*)" \}')


def fills() -> dict[str, object]:
    """The values for the text of the page."""
    families = sorted(Exporter(FAMILIES, dict).collect(), key=lambda family: family.name)
    labels: dict[str, tuple[str, ...]] = {family.name: vars(family)["_labelnames"] for family in families}
    rows = (
        (
            code(family.name + ("_total" if family.type == "counter" else "")),
            family.type,
            ", ".join(map(code, labels[family.name])) or "–",
            sentence(family.documentation),
        )
        for family in families
    )
    said = meanings("label", dict.fromkeys(label for of in labels.values() for label in of))
    return {
        "metrics": table(("metric", "type", "labels", "meaning"), rows),
        "labels": table(("label", "meaning"), ((code(name), text + _values(name)) for name, text in said.items())),
        "verdicts": table(("verdict", "meaning"), map(_coded, meanings("verdict", NAMES.values()).items())),
        "rules": table(("rule", "meaning"), ((code(name), sentence(text)) for name, text in _rules().items())),
    }


def _coded(row: tuple[str, str]) -> tuple[str, str]:
    return code(row[0]), row[1]


def _values(label: str) -> str:
    return f" Values: {', '.join(map(code, _VALUES[label]))}." if label in _VALUES else ""


def _rules() -> dict[str, str]:
    """The named counters of the ruleset → their comments."""
    texts = (path.read_text() for path in sorted(rules("nftables").glob("*.nft")))
    return {name: comment for text in texts for name, comment in _COUNTER.findall(text)}
