"""Reads the kernel's statistics of the queues from /proc/net/netfilter/nfnetlink_queue. That takes root, or the
group to which the unit gives the file.

Columns (net/netfilter/nfnetlink_queue.c, seq_show): queue, peer, waiting, copy mode, copy range, dropped since
the queue was full, dropped since the listener's socket was, id of the last packet, 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

# The unit mounts the second one for an agent whose /proc shows only processes.
_FILES: Final = (Path("/proc/self/net/netfilter/nfnetlink_queue"), Path("/run/portward-queues"))


class QueueStatistics(NamedTuple):
    """One queue: packets that wait, and packets that were dropped because the queue or the socket was full."""

    number: int
    waiting: int
    dropped_full: int
    dropped_socket: int


def states() -> list[QueueStatistics]:
    """The queues of this network namespace that have a listener; none if the file cannot be read."""
    for file in _FILES:
        try:
            rows = [[int(column) for column in line.split()] for line in file.read_text("utf-8").splitlines()]
        except OSError:
            continue
        return [QueueStatistics(row[0], row[2], row[5], row[6]) for row in rows]
    return []
