"""`python -m tests.faults --rounds N [--only NAME]`: runs each fault N times, and prints a table.

The exit code is 1 if a packet leaked that must not, if a verdict was wrong afterwards, if an acknowledged record
was lost, or if removed rules were not back in time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults.faults import FAULTS  # the path above must be there first
from faults.ground import Ground, Outcome  # as above

# The documents promise that rules which another program removed are back within this time.
_BACK_SECONDS = 1.0


def main() -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", choices=sorted(FAULTS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", file=sys.stderr)
    outcomes: list[Outcome] = []
    for name in arguments.only or FAULTS:
        with (
            tempfile.TemporaryDirectory(prefix="portward-faults-") as folder,
            Ground(Path(folder), arguments.seed) as ground,
        ):
            for outcome in FAULTS[name](ground, arguments.rounds):
                outcomes.append(outcome)
                print(f"{name}: {line(outcome)}", file=sys.stderr, flush=True)
    print(table(outcomes))
    late = [outcome for outcome in outcomes if outcome.back is not None and outcome.back > _BACK_SECONDS]
    for outcome in late:
        print(f"{outcome.name}: the ruleset was back only after {outcome.back:.2f} s", file=sys.stderr)
    return int(bool(late) or any(outcome.violations for outcome in outcomes))


def line(outcome: Outcome) -> str:
    """An outcome as one line of the log."""
    summary = f"{outcome.name}: {len(outcome.figures.leaked)} leaked, {outcome.figures.without:.2f} s without"
    return "; ".join(filter(None, (summary, outcome.note, *outcome.violations)))


def table(outcomes: list[Outcome]) -> str:
    """A Markdown table with a row for each name of a fault: sums over its rounds, and for the seconds without
    connections their mean and maximum."""
    rows = ["| fault | rounds | leaked (of sent) | seconds without, new / usual source | wrong after | lost | |",
            "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name in dict.fromkeys(outcome.name for outcome in outcomes):
        same = [outcome for outcome in outcomes if outcome.name == name]
        leaked, sent = sum(len(one.figures.leaked) for one in same), sum(one.figures.sent for one in same)
        fresh, known = (
            f"{sum(found) / len(found):.2f} (max {max(found):.2f})"
            for found in ([one.figures.without for one in same], [one.figures.without_known for one in same])
        )
        wrong, lost = sum(len(one.wrong) for one in same), sum(len(one.lost) for one in same)
        notes = "; ".join(dict.fromkeys(one.note for one in same if one.note))
        rows.append(
            f"| {name} | {len(same)} | {leaked} of {sent} | {fresh} / {known} | {wrong} | {lost} | {notes} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
