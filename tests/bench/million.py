"""A million attachments of 100,000 subscriptions: applying them, loading them, starting with them, memory.

One after the other, so each has the machine's cores for itself, but for the packets that ask for a verdict.
"""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from pathlib import Path

from bench import apply, inventory
from bench.figures import Figure
from kernel.conftest import lab_name
from kernel.wire import Sender, same, seen, segment
from portward.lab.agent import Agent, until
from portward.lab.topology import CONTOSO, FABRIKAM, Lab

_STARTS = 5


def measure(folder: Path, attachments: int = 1_000_000) -> list[Figure]:
    """What `apply.measure` gives, and `first_load_1m_s`, `start_to_first_verdict_s_1m`, `worker_private_mb_1m`."""
    figures = apply.measure(folder, attachments)  # leaves the store in the folder
    with Lab(lab_name(), (CONTOSO, FABRIKAM)) as lab:
        agent = Agent(lab, folder, segments=["vni1001", "vni1002"])
        began = time.monotonic()
        agent.start(seconds=120)
        load_s = time.monotonic() - began
        agent.stop()
        starts = []
        for number in range(_STARTS):
            starts.append(_first_verdict(lab, agent, inventory.place(number * 100)[1]))
            memory = _worker_private_mb(agent)
            agent.stop()
    return [
        *figures,
        Figure("first_load_1m_s", load_s, load_s, load_s, "s from start to ready with an empty table", "<= 60"),
        Figure(
            "start_to_first_verdict_s_1m", statistics.median(starts), min(starts), max(starts),
            f"s, median of {_STARTS}", "<= 0.5",
        ),
        Figure("worker_private_mb_1m", memory, memory, memory, "MB", "<= 80"),
    ]  # fmt: skip


def _first_verdict(lab: Lab, agent: Agent, source: str) -> float:
    """Seconds from the start of the program to the first packet that a worker lets pass."""
    packet, sender, going = segment(source), Sender(lab, CONTOSO), True

    def send() -> None:
        while going:
            sender.send(packet)
            time.sleep(0.002)

    with seen(lab.internet) as view:
        thread = threading.Thread(target=send)
        thread.start()
        try:
            # What an earlier run left remembered is gone: only a worker can let this source pass.
            _forget(lab)
            until(lambda: view.first(same(packet), seconds=0.1) is None, "the source is quiet without an agent")
            began = time.monotonic()
            agent.start(wait=False)
            if view.first(same(packet), seconds=60) is None:
                raise TimeoutError("no verdict within 60 s")
            return time.monotonic() - began
        finally:
            going = False
            thread.join()
            sender.close()


def _forget(lab: Lab) -> None:
    """Empties the kernel's allow sets; the source of the measurement must ask."""
    lab.run(lab.gateway, "nft", "flush", "set", "inet", "portward", "allow4")


def _worker_private_mb(agent: Agent) -> float:
    assert agent.process is not None
    found = subprocess.run(
        ["pgrep", "-P", str(agent.process.pid), "-f", "gateway.worker"], capture_output=True, text=True, check=True
    )
    pid = int(found.stdout.split()[0])
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in rollup if line.startswith("Private_")) / 1024
