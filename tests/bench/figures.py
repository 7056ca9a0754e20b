"""What a measurement gives: figures with their goals, and curves; how they are printed and kept."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Figure(NamedTuple):
    """A value with what spread was seen, its unit, and the goal as `<= 10` or `>= 0.9`; empty for none."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    goal: str = ""

    @property
    def good(self) -> bool:
        """Whether the value meets the goal."""
        return not self.goal or self.meets(self.goal)

    def meets(self, bound: str) -> bool:
        """Whether the value is on the right side of a bound such as `>= 0.9`."""
        sign, limit = bound.split()
        return self.value <= float(limit) if sign == "<=" else self.value >= float(limit)


class Curve(NamedTuple):
    """How something grows: `series` by name, each a list of (x, y). Both axes are logarithmic unless `linear`."""

    name: str
    title: str
    x: str
    y: str
    series: dict[str, list[tuple[float, float]]]
    linear: bool = False


def percentile(values: list[float], share: float) -> float:
    """The value below which this share of the values lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def tell(figures: Iterable[Figure]) -> None:
    """Prints the figures as a table."""
    table = Table(title="portward, measured", title_justify="left")
    for title in ("figure", "value", "from", "to", "unit", "goal", ""):
        table.add_column(title, justify="left" if title in ("figure", "unit", "goal") else "right")
    for figure in figures:
        numbers = (f"{number:.4g}" for number in (figure.value, figure.low, figure.high))
        verdict = ("ok" if figure.good else "MISSED") if figure.goal else ""
        table.add_row(figure.name, *numbers, figure.unit, figure.goal, verdict)
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)


def keep(figures: Iterable[Figure], path: Path) -> None:
    """Writes the figures as JSON: name → value, low, high, unit, goal. What other figures the file holds stays."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    for name, *fields in figures:
        kept[name] = dict(zip(Figure._fields[1:], fields, strict=True))
    path.write_text(json.dumps(kept, indent=1) + "\n")
