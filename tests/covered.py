"""`make coverage`: which lines and branches the unit tests take, by room.

    python -m tests.covered build/coverage.json [--below PERCENT]

Reads the JSON report of coverage.py. A branch is one way out of a line that has several (`if`, `for`, `match`); a
room is a package of `agent/portward`. Code that a test runs in a process of its own is not counted. `--below` also
prints each file with a smaller share of branches.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any


def by_room(files: dict[str, dict[str, Any]]) -> dict[str, Counter[str]]:
    """Room → coverage.py's sums (`num_branches`, `covered_branches`, …) of its files; modules beside the rooms are
    in the room ""."""
    rooms: dict[str, Counter[str]] = {}
    for name, file in files.items():
        room = name.partition("portward/")[2].rpartition("/")[0].partition("/")[0]
        rooms.setdefault(room, Counter()).update(
            {key: value for key, value in file["summary"].items() if _counts(key)}
        )
    return rooms


def _counts(key: str) -> bool:
    return key in ("num_statements", "covered_lines", "num_branches", "covered_branches")


def percent(part: int, whole: int) -> float:
    """A share in percent, of nothing 100."""
    return 100 * part / whole if whole else 100.0


def row(name: str, sums: Counter[str]) -> str:
    """A line of the table."""
    lines = percent(sums["covered_lines"], sums["num_statements"])
    branches = percent(sums["covered_branches"], sums["num_branches"])
    return f"{name:<32} {lines:6.1f} % {branches:8.1f} %   {sums['covered_branches']} of {sums['num_branches']}"


def table(files: dict[str, dict[str, Any]], below: float) -> list[str]:
    """The lines that are printed."""
    rooms = by_room(files)
    lines = [f"{'unit tests: room':<32} {'lines':>8} {'branches':>10}"]
    lines += [row(room or "(beside the rooms)", rooms[room]) for room in sorted(rooms)]
    lines.append(row("all", sum(rooms.values(), Counter())))
    for name, file in sorted(files.items()):
        sums = Counter(file["summary"])
        if percent(sums["covered_branches"], sums["num_branches"]) < below:
            lines.append(row(name.partition("portward/")[2], sums))
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.covered")
    parser.add_argument("report", type=Path)
    parser.add_argument("--below", type=float, default=0, metavar="PERCENT")
    arguments = parser.parse_args()
    print(*table(json.loads(arguments.report.read_text())["files"], arguments.below), sep="\n")


if __name__ == "__main__":
    main()
