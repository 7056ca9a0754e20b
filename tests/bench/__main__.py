"""`make bench`: measures speed and scale, prints a table, writes bench.json and draws docs/bench/*.svg.

`python -m tests.bench NAME …` measures what is named, `--all` what takes longer too, and `--short` is the short
form for CI, which fails where a ratio falls below its floor.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import (  # the path above must be there first
    change,
    changes,
    counted,
    crowd,
    drain,
    fast_path,
    flush_during_load,
    growth,
    guard,
    held,
    idle,
    latency,
    million,
    neighbours,
    prefixes,
    rates,
    remembered,
    revoke,
    stacked,
    stale,
    start_denied,
    unknown,
)
from bench.figures import Curve, Figure, keep, tell  # as above
from bench.plots import draw  # as above

Measured: TypeAlias = Iterable[Figure | Curve]

_SPEED: Final[dict[str, Callable[[Path], Measured]]] = {
    "fast_path": fast_path.measure,
    "crowd": crowd.measure,
    "unknown": unknown.measure,
    "drain": drain.measure,
    "latency": latency.measure,
    "growth": growth.measure,
    "change": change.measure,
    "changes": changes.measure,
    "idle": idle.measure,
    "remembered": remembered.measure,
}
# What is promised elsewhere and takes its time.
_LONGER: Final[dict[str, Callable[[Path], Measured]]] = {
    "counted": counted.measure,
    "flush_during_load": flush_during_load.measure,
    "guard": guard.measure,
    "held": held.measure,
    "million": million.measure,
    "neighbours": neighbours.measure,
    "prefixes": prefixes.measure,
    "rates": rates.measure,
    "revoke": revoke.measure,
    "stacked": stacked.measure,
    "stale": stale.measure,
    "start_denied": start_denied.measure,
}
_SHORT: Final[dict[str, Callable[[Path], Measured]]] = {
    "fast_path": partial(fast_path.measure, rounds=60),
}
# A tenth below what was measured on a busy machine: below that something is broken, not slow.
_FLOORS: Final = {
    "remembered_deny_vs_static": ">= 0.75",
    "remembered_deny_vs_set": ">= 0.85",
    "remembered_deny_vs_forward_set": ">= 1.05",
    "remembered_allow_vs_empty": ">= 0.68",
    "bystander_vs_static_rule": ">= 0.87",
}
_RESULT: Final = Path("bench.json")
_CURVES: Final = Path("docs/bench")


def main() -> int:
    """Runs the measurements; 1 where a figure misses its goal or, in the short form, its floor."""
    arguments = _arguments()
    chosen = _SHORT if arguments.short else _SPEED | _LONGER if arguments.all or arguments.names else _SPEED
    found = [item for name in arguments.names or chosen for item in _measured(name, chosen[name])]
    figures = [item for item in found if isinstance(item, Figure)]
    tell(figures)
    if arguments.short:
        return _below_floor(figures)
    if not arguments.names:
        _RESULT.unlink(missing_ok=True)
    keep(figures, _RESULT)
    _draw([item for item in found if isinstance(item, Curve)])
    return 0 if all(figure.good for figure in figures) else 1


def _measured(name: str, measure: Callable[[Path], Measured]) -> Measured:
    with tempfile.TemporaryDirectory(prefix=f"portward-{name}-") as folder:
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        yield from measure(Path(folder))


def _draw(curves: list[Curve]) -> None:
    try:
        for curve in curves:
            print(f"drawn {draw(curve, _CURVES)}", file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"no curve is drawn: {error.name} is missing; `make bench` installs it", file=sys.stderr)


def _below_floor(figures: list[Figure]) -> int:
    below = [figure for figure in figures if figure.name in _FLOORS and not figure.meets(_FLOORS[figure.name])]
    for figure in below:
        print(f"{figure.name} is {figure.value:.3f}, and has to be {_FLOORS[figure.name]}", file=sys.stderr)
    missing = _FLOORS.keys() - {figure.name for figure in figures}
    if missing:
        print(f"not measured: {', '.join(sorted(missing))}", file=sys.stderr)
    return 1 if below or missing else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(_SPEED | _LONGER))
    parser.add_argument("--all", action="store_true", help=f"also {', '.join(_LONGER)}")
    parser.add_argument("--short", action="store_true", help="the short form, which fails below a floor")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in _SPEED | _LONGER]:
        parser.error(f"no measurement is called {', '.join(unknown)}: {', '.join(_SPEED | _LONGER)}")
    if arguments.short and arguments.names:
        parser.error("--short measures what it measures: no names")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
