"""A million attachments of 100,000 subscriptions: applying them, the first start with them, memory.

One after the other, so each has the machine's cores for itself.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from bench import apply
from bench.figures import Figure
from kernel.conftest import lab_name
from portward.lab.agent import Agent
from portward.lab.topology import CONTOSO, FABRIKAM, Lab


def measure(folder: Path, attachments: int = 1_000_000) -> list[Figure]:
    """The figures of `apply.measure`, `first_load_1m_s`, and `worker_private_mb_after_first_load_1m`."""
    figures = apply.measure(folder, attachments)  # leaves the store in the folder
    with Lab(lab_name(), (CONTOSO, FABRIKAM)) as lab:
        agent = Agent(lab, folder, segments=["vni1001", "vni1002"])
        began = time.monotonic()
        agent.start(seconds=120)
        load_s = time.monotonic() - began
        memory = _worker_private_mb(agent)
        agent.stop()
    return [
        *figures,
        Figure("first_load_1m_s", load_s, load_s, load_s, "s from start to ready with an empty table", "<= 60"),
        Figure("worker_private_mb_after_first_load_1m", memory, memory, memory, "MB", "<= 80"),
    ]


def _worker_private_mb(agent: Agent) -> float:
    assert agent.process is not None
    found = subprocess.run(
        ["pgrep", "-P", str(agent.process.pid), "-f", "portward.worker.process"],
        capture_output=True,
        text=True,
        check=True,
    )
    pid = int(found.stdout.split()[0])
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in rollup if line.startswith("Private_")) / 1024
