"""`portward apply` of a million attachments of 100,000 subscriptions: the first time, and again.

Needs no root. `python -m tests.bench.apply [ATTACHMENTS]` prints the figures alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import inventory
from bench.figures import Figure, print_table
from portward.lab.agent import Agent


class Run(NamedTuple):
    """One run of the program: its output, its seconds and its peak memory (MiB)."""

    printed: str
    seconds: float
    memory: float


def measure(folder: Path, attachments: int = 1_000_000) -> list[Figure]:
    """`apply_1m_s`, `apply_1m_again_s`, `apply_1m_mb`; raises RuntimeError if apply prints something else."""
    path, config = folder / "inventory.json", folder / "portward.toml"
    inventory.write(path, attachments)
    config.write_text(f'segments = ["vni*"]\nuplinks = ["up0"]\nstore = "sqlite:{folder}/portward.db"\n')
    total = attachments + attachments // 10
    made = f"made a new store: sqlite:{folder}/portward.db\n"
    first = _apply(path, config, f"{made}applied revision 1: {total} added, 0 changed, 0 removed")
    again = _apply(path, config, "nothing to change, the store stays at revision 1")
    memory = max(first.memory, again.memory)
    return [
        Figure("apply_1m_s", first.seconds, first.seconds, first.seconds, "s, one run", "<= 60"),
        Figure("apply_1m_again_s", again.seconds, again.seconds, again.seconds, "s, nothing to change", "<= 60"),
        Figure("apply_1m_mb", memory, first.memory, again.memory, "MB, peak", "<= 1500"),
    ]


def apply_file(agent: Agent, path: Path) -> None:
    """Applies an inventory to an agent's store, before the agent runs; raises RuntimeError with the output."""
    result = agent.portward("apply", str(path))
    if result.returncode:
        raise RuntimeError(f"apply: {result.stderr}")


def _apply(path: Path, config: Path, expected: str) -> Run:
    argv = [sys.executable, "-m", "portward", "apply", str(path), "--config", str(config)]
    began = time.monotonic()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read().strip()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or printed != expected:
        raise RuntimeError(f"apply gave {process.returncode} and said {printed!r}, not {expected!r}")
    return Run(printed, time.monotonic() - began, usage.ru_maxrss / 1024)  # ru_maxrss is in KiB on Linux


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="portward-apply-") as temporary:
        count = int(sys.argv[1]) if sys.argv[1:] else 1_000_000
        figures = measure(Path(temporary), count)
    print_table(figures)
    sys.exit(0 if all(figure.good for figure in figures) else 1)
