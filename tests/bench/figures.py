"""A measured figure and its goal, and how a list of them is printed and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Figure(NamedTuple):
    """A value with what spread was seen, its unit, and the goal as `<= 10` or `>= 0.9`."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    goal: str

    @property
    def good(self) -> bool:
        """Whether the value meets the goal."""
        sign, limit = self.goal.split()
        return self.value <= float(limit) if sign == "<=" else self.value >= float(limit)


def percentile(values: list[float], share: float) -> float:
    """The value below which this share of the values lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def tell(figures: list[Figure], path: Path) -> bool:
    """Prints the figures and writes them to `path` as JSON; True where all meet their goals."""
    table = Table(title="portward, measured", title_justify="left")
    for title in ("figure", "value", "from", "to", "unit", "goal", ""):
        table.add_column(title, justify="left" if title in ("figure", "unit", "goal") else "right")
    for figure in figures:
        numbers = (f"{number:.6g}" for number in (figure.value, figure.low, figure.high))
        table.add_row(figure.name, *numbers, figure.unit, figure.goal, "ok" if figure.good else "MISSED")
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    told = {figure.name: figure._asdict() | {"name": figure.name} for figure in figures}
    path.write_text(json.dumps(told, indent=1) + "\n")
    return all(figure.good for figure in figures)
