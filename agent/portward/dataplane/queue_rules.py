"""The rules that send packets to the queues of the workers, as nft text for the table `inet`. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from portward.config.keys import Queue
from portward.dataplane.names import KernelTable


class QueueStatement(NamedTuple):
    """The only statement of a chain. It sends a packet to one of `queues` queues, from number `first` on, by a
    hash of the addresses. A packet that finds no listener is dropped, or with `bypass` continues."""

    chain: str
    first: int
    queues: int
    bypass: bool = False


def statements(queue: Queue, *, opens: bool) -> Iterator[QueueStatement]:
    """The statement of each chain that has one. `opens`: some segments pass while no worker answers."""
    yield QueueStatement("to_workers", queue.first, queue.workers)
    if opens:
        yield QueueStatement("to_workers_open", queue.first, queue.workers, bypass=True)
    for place in range(queue.workers):
        yield QueueStatement(_chain_of(place), queue.first + place, 1)


def probes(workers: int) -> Iterator[str]:
    """The rules that send a query of the self-check to its worker, by the query's source port."""
    for place in range(workers):
        yield f"add chain {KernelTable.INET} {_chain_of(place)}\n"
        yield f"add rule {KernelTable.INET} probe tcp sport {place + 1} goto {_chain_of(place)}\n"


def native(statement: QueueStatement) -> str:
    """The rule of a statement on a kernel with nft_queue."""
    # Without `fanout`, which would choose the queue by CPU instead of by the addresses.
    chain, first, queues, bypass = statement
    to = f"{first}-{first + queues - 1}" if queues > 1 else str(first)
    return f"add rule {KernelTable.INET} {chain} queue {'flags bypass ' if bypass else ''}to {to}\n"


def _chain_of(place: int) -> str:
    return f"to_worker_{place + 1}"
