"""`make bench`: measures speed and scale, prints a table, writes bench.json, draws docs/explanation/bench/*.svg.

`python -m tests.bench NAME …` runs the parts with these names, `--all` also those that take long, and `--short`
the short form for CI. If a part fails, the table shows the reason, and the other parts still run. Each part's
figures are in bench.json as soon as it ends. The exit code is 1 if a figure is below its floor, or `--short` has
not measured it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import (  # the path above must be there first
    cached,
    change,
    changes,
    counted,
    crowd,
    drain,
    exhausted,
    fast_path,
    flush_during_load,
    foreign,
    growth,
    guard,
    held,
    idle,
    latency,
    million,
    neighbours,
    owned,
    prefixes,
    rates,
    refused,
    revoke,
    stacked,
    stale,
    start_denied,
    unknown,
)
from bench.figures import Curve, Figure, Missing, keep, print_table  # as above
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
    "cached": cached.measure,
}
# These take long, so only `--all` or their name runs them.
_LONGER: Final[dict[str, Callable[[Path], Measured]]] = {
    "counted": counted.measure,
    "exhausted": exhausted.measure,
    "flush_during_load": flush_during_load.measure,
    "foreign": foreign.measure,
    "guard": guard.measure,
    "held": held.measure,
    "million": million.measure,
    "neighbours": neighbours.measure,
    "owned": owned.measure,
    "prefixes": prefixes.measure,
    "rates": rates.measure,
    "refused": refused.measure,
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
    "cached_deny_vs_static": ">= 0.75",
    "cached_deny_vs_set": ">= 0.85",
    "cached_deny_vs_forward_set": ">= 1.05",
    "cached_allow_vs_empty": ">= 0.68",
    "bystander_vs_static_rule": ">= 0.87",
}
_RESULT: Final = Path("bench.json")
_CURVES: Final = Path("docs/explanation/bench")


def main() -> int:
    """Runs the measurements; 1 if a figure is below its floor."""
    arguments = _arguments()
    chosen = _SHORT if arguments.short else _SPEED | _LONGER if arguments.all or arguments.names else _SPEED
    if not arguments.names and not arguments.short:
        _RESULT.unlink(missing_ok=True)
    parts = {name: chosen[name] for name in arguments.names or chosen}
    found, missing = measure_all(parts, None if arguments.short else _RESULT)
    figures = [item for item in found if isinstance(item, Figure)]
    print_table(figures, missing)
    if not arguments.short:
        _draw([item for item in found if isinstance(item, Curve)])
    return _below_floor(figures, all_needed=arguments.short)


def measure_all(
    parts: dict[str, Callable[[Path], Measured]], result: Path | None
) -> tuple[list[Figure | Curve], list[Missing]]:
    """Runs the parts. Returns the figures and curves, and the parts that could not be measured, with the reason.

    Writes the figures to the file `result`, if one is given, after each part, so that none is lost if a later part
    fails or the run is interrupted."""
    found: list[Figure | Curve] = []
    missing: list[Missing] = []
    for name, measure in parts.items():
        of_part: list[Figure | Curve] = []
        try:
            for item in _measured(name, measure):
                of_part.append(item)
        except Exception as error:  # an error in one part must not end the others
            traceback.print_exc()
            missing.append(Missing(name, f"{type(error).__name__}: {error}", after=len(of_part)))
        found += of_part
        if result is not None:
            keep((item for item in of_part if isinstance(item, Figure)), result)
    return found, missing


def _measured(name: str, measure: Callable[[Path], Measured]) -> Iterator[Figure | Curve]:
    with tempfile.TemporaryDirectory(prefix=f"portward-{name}-") as folder:
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        yield from measure(Path(folder))


def _draw(curves: list[Curve]) -> None:
    try:
        for curve in curves:
            print(f"drawn {draw(curve, _CURVES)}", file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"no curve is drawn: {error.name} is missing; `make bench` installs it", file=sys.stderr)


def _below_floor(figures: list[Figure], *, all_needed: bool) -> int:
    """1 if a figure is below its floor or, if `all_needed`, was not measured; else 0."""
    below = [figure for figure in figures if figure.name in _FLOORS and not figure.meets(_FLOORS[figure.name])]
    for figure in below:
        print(f"{figure.name} is {figure.value:.3f}, and has to be {_FLOORS[figure.name]}", file=sys.stderr)
    missing = _FLOORS.keys() - {figure.name for figure in figures} if all_needed else ()
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
