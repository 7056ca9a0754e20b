"""Random packets, until N have come through the real queue: `python -m tests.fuzz.queue --packets N [--seed S]`.

The packets come from a segment of which no source may send. Afterwards, daemon and workers must be the same
processes as before, and this must hold:

- Packets that the kernel put into the queue = packets with a worker's verdict.
- Packets that the rules sent to the queue + queries of the self-check = packets that the kernel put there +
  packets that no rule of the queue took (fragments within fragments). The last are those that were dropped as
  `unjudged`, without those that a worker sent back without a verdict.
- No packet was dropped because the queue, or the worker's socket, was full. The worker failed at none.
- No packet of a source that may not send reached port 25. A source that may send gets the server's greeting.
- The workers' memory has grown by 4 MiB at most.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.packets import mutated  # the path above must be there first
from kernel.evasion.ground import BANNER, Ground, ground  # as above
from portward.config.keys import QueueReader
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import CONTOSO, FABRIKAM

_GROWTH: Final = 4 << 20
# Packets between two checks of the queue, which holds 4,096.
_BATCH: Final = 500
_KEPT: Final = 100_000


class Counted(NamedTuple):
    """Numbers of packets so far: sent to the queue by the rules, put there by the kernel, dropped by the kernel,
    waiting, handled by a worker, of these the self-check's queries; dropped without a verdict and without a
    worker; and those at which a worker failed."""

    missed: int
    queued: int
    dropped: int
    waiting: int
    handled: int
    probed: int
    unjudged: int
    errors: int


def fuzz(field: Ground, packets: int, seed: int) -> str:
    """Sends until this many packets have been queued. Returns the numbers as a line. Raises AssertionError if one
    of the conditions does not hold."""
    random, last, sent = Random(seed), deque[bytes](maxlen=_KEPT), 0
    processes, memory, before = _processes(field), _memory(field), _settled(field)
    began = time.monotonic()
    try:
        with namespaces.inside(field.lab.home(FABRIKAM)):
            out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        with out:
            out.bind(("eth0", 0))
            ether = bytes(field.gateway.senders[FABRIKAM].frame)[:12]
            while _queue(field)[0] < before.queued + packets:
                for _ in range(_BATCH):
                    packet = mutated(random)
                    last.append(packet)
                    version6 = bool(packet) and packet[0] >> 4 == 6
                    out.send(ether + (b"\x86\xdd" if version6 else b"\x08\x00") + packet)
                sent += _BATCH
                assert field.leaked() == (0, 0), f"{field.leaked()} came out"
                until(lambda: _queue(field)[1] < _BATCH, "the queue gets shorter", seconds=30)
        seconds = time.monotonic() - began
        after = _settled(field)
        since = Counted(*(new - old for new, old in zip(after, before, strict=True)))
        assert _processes(field) == processes, "daemon and workers are other processes now"
        assert since.dropped == 0, f"{since.dropped} dropped by the kernel"
        assert since.queued == since.handled, f"{since.queued} queued, {since.handled} answered"
        assert since.errors == 0, f"the worker met {since.errors} packets that it was not made for"
        assert since.missed + since.probed == since.queued + since.unjudged, f"{since}"
        assert since.unjudged <= packets // 1000, f"{since.unjudged} packets went past the queue"
        assert field.leaked() == (0, 0), f"{field.leaked()} came out"
        assert field.greeting(CONTOSO, field.source(CONTOSO, 4)) == BANNER
        growth = _memory(field) - memory
        assert growth <= _GROWTH, f"the workers have grown by {growth} bytes"
    except BaseException:
        path = Path(tempfile.gettempdir()) / f"portward-fuzz-{seed}.packets"
        path.write_text("".join(f"{packet.hex()}\n" for packet in last))
        print(f"the last {len(last)} packets are in {path}, one in a line", file=sys.stderr)
        raise
    return (
        f"{sent} packets in {seconds:.0f} s: {since.queued} through the queue, each answered; none came out; "
        f"workers' memory {growth / 1024:+.0f} KiB"
    )


def _counted(field: Ground) -> Counted:
    metrics = field.agent.metrics()
    classified = sum(value for name, value in metrics.items() if name.startswith("portward_judged_packets_total"))
    events = {
        name: metrics[f'portward_worker_events_total{{event="{name}"}}']
        for name in ("malformed", "no_segment", "error", "probed")
    }
    queued, waiting, dropped = _queue(field)
    handled = int(classified + sum(events.values()))
    return Counted(
        field.counter("missed"),
        queued,
        dropped,
        waiting,
        handled,
        int(events["probed"]),
        field.counter("unjudged") - int(events["malformed"] + events["no_segment"]),
        int(events["error"]),
    )


def _settled(field: Ground) -> Counted:
    """Waits until no packet is on its way, and the metrics, which may be a second old, count all of them."""
    found = _counted(field)
    deadline = time.monotonic() + 60
    while found.waiting or found.queued != found.handled:
        if time.monotonic() > deadline:
            return found
        time.sleep(0.1)  # pause: of a poll
        found = _counted(field)
    return found


def _queue(field: Ground) -> tuple[int, int, int]:
    """The number of the last packet, the packets that wait, and those dropped (see
    `portward.dataplane.queue_statistics`)."""
    printed = namespaces.run(field.lab.gateway, ["cat", "/proc/net/netfilter/nfnetlink_queue"]).stdout
    rows = [[int(column) for column in line.split()] for line in printed.splitlines()]
    return sum(row[7] for row in rows), sum(row[2] for row in rows), sum(row[5] + row[6] for row in rows)


def _processes(field: Ground) -> tuple[Any, ...]:
    printed = json.loads(field.agent.portward("status", "--json").stdout)
    return printed["pid"], [
        (worker["pid"], worker["restarts"], worker["running"]) for worker in printed["workers"]
    ]


def _memory(field: Ground) -> int:
    """The workers' private memory, in bytes."""
    lines = [
        line.split()
        for pid, _, _ in _processes(field)[1]
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    ]
    return sum(int(line[1]) * 1024 for line in lines if line[0] in ("Private_Clean:", "Private_Dirty:"))


def main() -> int:
    """The long form."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.queue", description=__doc__)
    parser.add_argument("--packets", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--reader", type=QueueReader, default=QueueReader.BATCH)
    asked = parser.parse_args()
    print(f"seed {asked.seed}", file=sys.stderr)
    with (
        tempfile.TemporaryDirectory() as folder,
        ground(Path(folder), conntrack=False, reader=asked.reader) as field,
    ):
        print(fuzz(field, asked.packets, asked.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
