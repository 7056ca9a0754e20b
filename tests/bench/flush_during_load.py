"""How long the ruleset is gone if another process runs `nft flush ruleset` while the agent loads a bulk change.

The agent enforces a small policy. `portward apply` writes an inventory with ten attachments of each subscription.
From its commit until the agent enforces it, the ruleset is flushed again and again. Between flush and repair port
25 is open, so this is the time that counts. It ends when chains, rules and fixed sets are those that were loaded
before.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from bench import inventory
from bench.figures import Figure, percentile
from kernel.conftest import Gateway, running_gateway
from portward.base.netlink import attribute, string
from portward.dataplane.names import FIXED_SETS, TABLE
from portward.dataplane.nfnetlink import NfNetlink
from portward.lab import namespaces
from portward.lab.agent import PROGRAM

# Seconds between two flushes, so that the work of one repair is over before the next flush.
_BETWEEN = 0.3
_PATIENCE = 30.0
_DELETE_TABLE = 2  # NFT_MSG_DELTABLE, linux/netfilter/nf_tables.h


def measure(folder: Path, attachments: int = 1_000_000) -> list[Figure]:
    """`flush_during_load_ms`: the largest time. `load_1m_while_flushed_s`: from the commit to enforced."""
    path = folder / "inventory.json"
    inventory.write(path, attachments)
    with running_gateway(folder, max_flip_share=1.0) as gateway:
        with namespaces.inside(gateway.lab.gateway):
            netlink = NfNetlink()
        idle = [_flush(netlink) for _ in range(10)]
        revision = gateway.agent.revision()
        _apply(gateway, path)
        began, times = time.monotonic(), []
        while gateway.agent.revision() == revision:
            times.append(_flush(netlink))
        load = time.monotonic() - began
        netlink.close()
    if not times:
        raise RuntimeError("the load was over before the ruleset could be flushed")
    return [
        Figure(
            "flush_during_load_ms", max(times), percentile(times, 0.5), max(times),
            f"ms until the ruleset is back, largest of {len(times)} (from: median)", "<= 100",
        ),
        Figure(
            "flush_while_idle_ms", max(idle), percentile(idle, 0.5), max(idle),
            f"ms, the same without a load, largest of {len(idle)} (from: median)",
        ),
        Figure("load_while_flushed_s", load, load, load, f"s from commit to enforced, {attachments} attachments"),
    ]  # fmt: skip


def _apply(gateway: Gateway, path: Path) -> None:
    verb = [*PROGRAM, "apply", str(path), "--confirm", "--config", str(gateway.agent.config)]
    subprocess.run(verb, check=True, capture_output=True)


def _flush(netlink: NfNetlink) -> float:
    """Milliseconds from the flush to the ruleset as it was."""
    before, generation = netlink.fingerprint(TABLE, FIXED_SETS), netlink.generation()
    began = time.monotonic()
    # `nft flush ruleset` deletes this table in the same way. The lab's own table stays, because without it the
    # agent would take the guard away.
    netlink.commit([(_DELETE_TABLE, attribute(1, string(TABLE)))])
    if netlink.generation() == generation:
        raise RuntimeError("the flush did nothing")
    while netlink.fingerprint(TABLE, FIXED_SETS) != before:
        if time.monotonic() > began + _PATIENCE:
            raise TimeoutError("the ruleset does not come back")
        time.sleep(0.0005)  # pause: of a poll
    took = time.monotonic() - began
    time.sleep(_BETWEEN)  # pause: the pace of the flushes
    return took * 1000
