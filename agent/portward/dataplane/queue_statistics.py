"""What the kernel says of the queues: /proc/net/netfilter/nfnetlink_queue (root, or the group that the unit
gives it to).

Columns (net/netfilter/nfnetlink_queue.c, seq_show): queue, peer, waiting, copy mode, copy range, dropped since
the queue was full, dropped since the listener's socket was, id of the last packet, 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

# The second one is where the unit shows it to an agent whose /proc has nothing but processes.
_FILES: Final = (Path("/proc/self/net/netfilter/nfnetlink_queue"), Path("/run/portward-queues"))


class QueueStatistics(NamedTuple):
    """One queue: packets that wait, and packets dropped since queue or socket were full."""

    number: int
    waiting: int
    dropped_full: int
    dropped_socket: int


def states() -> list[QueueStatistics]:
    """The queues of this network namespace that have a listener; none where the file cannot be read."""
    for file in _FILES:
        try:
            rows = [[int(column) for column in line.split()] for line in file.read_text("utf-8").splitlines()]
        except OSError:
            continue
        return [QueueStatistics(row[0], row[2], row[5], row[6]) for row in rows]
    return []
