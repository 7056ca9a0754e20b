"""The share of a core that a daemon and its worker use while nothing happens, on a gateway with two segments and a
policy of a hundred thousand attachments. Self-check and metrics run as they do by default."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from bench import inventory
from bench.apply import apply_file
from bench.figures import Figure
from kernel.conftest import lab_name
from portward.lab.agent import Agent
from portward.lab.topology import CONTOSO, FABRIKAM, Lab

_ATTACHMENTS = 100_000
_SETTLED = 5.0


def measure(folder: Path, seconds: float = 40.0) -> list[Figure]:
    """`idle_cpu_percent`."""
    inventory.write(folder / "inventory.json", _ATTACHMENTS)
    with Lab(lab_name(), (CONTOSO, FABRIKAM)) as lab:
        agent = Agent(lab, folder, segments=["vni1001", "vni1002"])
        apply_file(agent, folder / "inventory.json")
        agent.start(seconds=60)
        time.sleep(_SETTLED)  # pause: the work of the start is over
        parts = [cpu_percent(agent, seconds / 4) for _ in range(4)]
        agent.stop()
    share = sum(parts) / len(parts)
    return [Figure("idle_cpu_percent", share, min(parts), max(parts), "% of a core, daemon and worker", "<= 0.5")]


def cpu_percent(agent: Agent, seconds: float) -> float:
    """The share of a core that daemon and workers use during `seconds`, in percent, by the scheduler's own
    count."""
    began, before = time.monotonic(), _busy(agent)
    time.sleep(seconds)  # pause: how long it is watched
    return 100 * (_busy(agent) - before) / (time.monotonic() - began)


def _busy(agent: Agent) -> float:
    """Processor time so far, in seconds, of all threads of the daemon and of its children together."""
    if agent.process is None:
        raise ValueError("no agent runs")
    found = subprocess.run(["pgrep", "-P", str(agent.process.pid)], capture_output=True, text=True, check=True)
    threads = (
        task for pid in (agent.process.pid, *found.stdout.split()) for task in Path(f"/proc/{pid}/task").iterdir()
    )
    return sum(int((task / "schedstat").read_text().split()[0]) for task in threads) / 1e9
