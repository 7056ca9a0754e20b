"""A queue of the kernel (NFQUEUE): who can bind it, its settings, and verdicts on packets that are gone."""

from __future__ import annotations

import errno
import select
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kernel.conftest import lab_name
from portward.dataplane.queue_statistics import states
from portward.lab import namespaces
from portward.worker.messages import ACCEPT, Refused, Verdicts, read
from portward.worker.nfqueue import SLOT, Queue


@pytest.fixture
def queue() -> Iterator[Queue]:
    """Queue 7 of a network namespace of its own, which this thread has entered."""
    name = lab_name()
    namespaces.make(name)
    try:
        with namespaces.inside(name):
            found = Queue(7, 100, 8)
            yield found
            found.close()
    finally:
        namespaces.remove(name)


def test_a_second_socket_is_refused(queue: Queue) -> None:
    with pytest.raises(PermissionError):
        Queue(7, 100, 8)
    queue.close()
    Queue(7, 100, 8).close()


def test_the_kernel_has_the_queue_as_asked(queue: Queue) -> None:
    with open("/proc/self/net/netfilter/nfnetlink_queue") as file:  # noqa: PTH123 # as `states` reads it
        number, _, _, mode, copied, *_ = map(int, file.read().split())
    assert (number, mode, copied) == (7, 2, 512)
    assert [state.number for state in states()] == [7]


def test_verdicts_on_packets_that_are_gone_are_refused_one_by_one(queue: Queue) -> None:
    verdicts = Verdicts(7, 8)
    for id_ in (1, 2, 3):
        verdicts.give(ACCEPT, id_, 0)
    queue.send(verdicts.take())
    assert select.select([queue], [], [], 1)[0]
    lengths = queue.receive()
    datagrams = [bytes(queue.buffer[place * SLOT :][:length]) for place, (length,) in enumerate(lengths)]
    assert [answer for datagram in datagrams for answer in read(datagram)] == [Refused(errno.ENOENT)] * 3
    assert queue.receive() == []


def test_a_batch_without_packets_needs_no_verdicts(queue: Queue) -> None:
    """The queue must not send an empty message, because netlink answers it with an error."""
    queue.send(Verdicts(7, 8).take())
    assert queue.receive() == []


def test_a_queue_can_be_had_within_a_user_namespace() -> None:
    """There CAP_NET_ADMIN holds for the namespace only, so the socket's buffer must keep to the limit for ordinary
    users."""
    program = "from portward.worker.nfqueue import Queue; Queue(7, 100, 8).close(); print('bound')"
    argv = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", program]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("bound\n", "")
