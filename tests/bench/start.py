"""Seconds from the start of the agent, on an existing table, to the first packet that only a worker can let pass.
The program's bytecode is compiled already, as in an installed package.
"""

from __future__ import annotations

import compileall
import statistics
import threading
import time
from pathlib import Path

import portward
from bench import inventory
from bench.figures import Figure
from kernel.conftest import lab_name
from kernel.wire import Sender, same, seen, segment
from portward.lab.agent import Agent, until
from portward.lab.topology import CONTOSO, FABRIKAM, Lab

_STARTS = 7


def measure(folder: Path, name: str, table: Path) -> Figure:
    """`start_to_first_verdict_s_{name}` with the store `portward.db` of the folder, filled by `inventory`."""
    compileall.compile_dir(Path(portward.__file__).parent, quiet=1)
    with Lab(lab_name(), (CONTOSO, FABRIKAM)) as lab:
        agent = Agent(lab, folder, segments=["vni1001", "vni1002"], table=str(table))
        agent.start(seconds=120)
        agent.stop()
        starts = []
        for number in range(_STARTS):
            starts.append(first_verdict(lab, agent, inventory.place(number * 100)[1]))
            agent.stop()
    return Figure(
        f"start_to_first_verdict_s_{name}", statistics.median(starts), min(starts), max(starts),
        f"s, median of {_STARTS}", "<= 0.5",
    )  # fmt: skip


def first_verdict(lab: Lab, agent: Agent, source: str) -> float:
    """Seconds from the start of the program to the first packet that a worker lets pass."""
    packet, sender, going = segment(source), Sender(lab, CONTOSO), True

    def send() -> None:
        while going:
            sender.send(packet)
            time.sleep(0.002)  # pause: the pace of the sender

    with seen(lab.internet) as view:
        thread = threading.Thread(target=send)
        thread.start()
        try:
            # Without the cached verdicts of an earlier run, only a worker can let this source pass.
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
    """Empties the kernel's allow sets, so that the measurement's source needs a worker's verdict."""
    lab.run(lab.gateway, "nft", "flush", "set", "inet", "portward", "allow4")
