"""`make bench`: measures and prints everything, or what is named: `python -m tests.bench change`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import (  # the path above must be there first
    change,
    counted,
    drain,
    latency,
    million,
    neighbours,
    stale,
    unknown,
)
from bench.figures import tell  # as above

_MEASUREMENTS = {
    "change": change,
    "counted": counted,
    "drain": drain,
    "latency": latency,
    "million": million,
    "neighbours": neighbours,
    "stale": stale,
    "unknown": unknown,
}


def main(names: list[str]) -> int:
    """Runs the named measurements; 1 where a figure misses its goal, 2 for a name that is none."""
    unknown = set(names) - _MEASUREMENTS.keys()
    if unknown:
        print(f"no measurement is called {', '.join(unknown)}: {', '.join(_MEASUREMENTS)}", file=sys.stderr)
        return 2
    figures = []
    for name in names or _MEASUREMENTS:
        with tempfile.TemporaryDirectory(prefix=f"portward-{name}-") as folder:
            print(f"measuring {name} …", file=sys.stderr)
            figures += _MEASUREMENTS[name].measure(Path(folder))
    return 0 if tell(figures, Path("bench.json")) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
