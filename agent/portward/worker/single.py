"""Reads packets from a queue one by one, through the library NetfilterQueue."""

from __future__ import annotations

import select
from collections.abc import Callable

import netfilterqueue

from portward.worker.nfqueue import COPY_BYTES, RECEIVE_BYTES
from portward.worker.slow_path import QueuedPacket


def serve(
    number: int, length: int, handle: Callable[[QueuedPacket], None], lifeline: int, ready: Callable[[], None]
) -> None:
    """Binds the queue `number` and answers its packets until the other end of the descriptor `lifeline` is closed
    or SIGTERM comes.

    `length` is how many packets may wait in the queue. `ready` is called when the queue is bound. Raises OSError:
    EPERM if another process has the queue, or without CAP_NET_ADMIN.
    """
    bound = netfilterqueue.NetfilterQueue()
    bound.bind(number, handle, max_len=length, mode=netfilterqueue.COPY_PACKET, range=COPY_BYTES,
               sock_len=RECEIVE_BYTES)  # fmt: skip
    try:
        ready()
        poll = select.poll()
        poll.register(bound.get_fd(), select.POLLIN)
        poll.register(lifeline, select.POLLIN)
        while all(descriptor != lifeline for descriptor, _ in poll.poll()):
            bound.run(block=False)
    finally:
        bound.unbind()
