"""The results of a measurement (figures with their goals, curves, failed parts), and how they are printed and
stored."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Figure(NamedTuple):
    """A value with its lowest and highest measured values, its unit, and the goal as `<= 10` or `>= 0.9`, or
    empty."""

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


class Missing(NamedTuple):
    """A part that failed: its name, the reason, and how many figures and curves it gave before."""

    part: str
    reason: str
    after: int = 0

    def __str__(self) -> str:
        rest = "the rest of it was " if self.after else ""
        return f"{self.part}: {rest}not measured: {self.reason}"


def percentile(values: list[float], share: float) -> float:
    """The value below which this share of the values lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def print_table(figures: Iterable[Figure], missing: Iterable[Missing] = ()) -> None:
    """Prints the figures as a table, and below it each part that failed, with the reason."""
    table = Table(title="portward, measured", title_justify="left")
    for title in ("figure", "value", "from", "to", "unit", "goal", ""):
        left = title in ("figure", "unit", "goal")
        table.add_column(title, justify="left" if left else "right", no_wrap=title == "figure")
    for figure in figures:
        numbers = (f"{number:.4g}" for number in (figure.value, figure.low, figure.high))
        verdict = ("ok" if figure.good else "MISSED") if figure.goal else ""
        table.add_row(figure.name, *numbers, figure.unit, figure.goal, verdict)
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)
    for part in missing:
        console.print(str(part), markup=False, highlight=False)


def keep(figures: Iterable[Figure], path: Path) -> None:
    """Writes the figures as JSON: name → value, low, high, unit, goal. Other figures in the file stay."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    for name, *fields in figures:
        kept[name] = dict(zip(Figure._fields[1:], fields, strict=True))
    path.write_text(json.dumps(kept, indent=1) + "\n")
