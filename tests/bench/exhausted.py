"""An agent with 256 file descriptors, whose metrics port gets 2,000 idle connections, opened anew all the time.

Measured is how long it takes until a revocation is enforced, until a killed worker's queue is bound again, until a
flushed ruleset is back, until a scrape is answered, and until SIGTERM has ended the agent.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Final
from uuid import UUID

from bench.figures import Figure, percentile
from bench.revoke import _exemption, _revoke, _write
from kernel.conftest import Gateway, running_gateway
from portward.daemon.runtime import read_status
from portward.dataplane.nfnetlink import NfNetlink
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import FABRIKAM
from portward.model import Attachment, Subscription

IDLE: Final = 2_000
LIMIT: Final = 256
_EVERY: Final = 0.005
_STARTS: Final = 3
_ROUNDS: Final = 10  # in each start
_GRANTED: Final = datetime(2026, 1, 9, 12, tzinfo=UTC)
_ONE: Final = UUID("33333333-0000-4000-8000-000000000001")
_QUEUES: Final = Path("/proc/thread-self/net/netfilter/nfnetlink_queue")


def measure(folder: Path) -> Iterator[Figure]:
    """The figures `exhausted_…`: each is the largest time, with the median and the smallest as its range."""
    names = ("revoke_ms", "worker_s", "ruleset_ms", "scrape_s", "sigterm_s")
    found: dict[str, list[float]] = {name: [] for name in names}
    with running_gateway(folder) as gateway:
        _prepare(gateway)
        for _ in range(_STARTS):
            gateway.agent.stop()
            gateway.agent.start(within=("prlimit", f"--nofile={LIMIT}:{LIMIT}"))
            with _crowd(gateway):
                for _ in range(_ROUNDS):
                    _round(gateway, found)
                began = time.monotonic()
                gateway.agent.stop()
                found["sigterm_s"].append(time.monotonic() - began)
    for name, goal in zip(names, ("<= 50", "<= 1", "<= 1000", "<= 5", "<= 2"), strict=True):
        values = found[name]
        unit = f"{name.rpartition('_')[2]}, largest of {len(values)} (from: smallest, to: median)"
        yield Figure(f"exhausted_{name}", max(values), min(values), percentile(values, 0.5), unit, goal)


def _prepare(gateway: Gateway) -> None:
    _write(
        gateway,
        Subscription(id=_ONE, offer="pay-as-you-go", created=date(2022, 6, 30)),
        Attachment(
            segment=FABRIKAM.segment, address=ip_network(FABRIKAM.address4), subscription=_ONE,
            started=_GRANTED + timedelta(days=1),
        ),
    )  # fmt: skip


def _round(gateway: Gateway, found: dict[str, list[float]]) -> None:
    _write(gateway, _exemption(_ONE))
    found["revoke_ms"].append(_revoke(gateway, str(_ONE))["enforced_after_ms"])
    found["worker_s"].append(_worker(gateway))
    found["ruleset_ms"].append(1000 * _ruleset(gateway))
    began = time.monotonic()
    gateway.agent.metrics()
    found["scrape_s"].append(time.monotonic() - began)


def _worker(gateway: Gateway) -> float:
    """Seconds from a worker's end until another worker has bound its queue."""
    with namespaces.inside(gateway.lab.gateway):
        until(_QUEUES.read_text, "the queue is bound")
        until(lambda: _running(gateway), "the status names the worker")
        pid, before = _running(gateway), _QUEUES.read_text().split()[1]
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        until(
            lambda: (bound := _QUEUES.read_text().split()) and bound[1] != before,
            "the queue is bound again",
            every_s=0.002,
        )
        return time.monotonic() - began


def _running(gateway: Gateway) -> int:
    """The worker's process id from the status, which may be a second old; 0 if that process is gone."""
    status = read_status(gateway.agent.folder / "table") or {}
    pid = next((worker["pid"] for worker in status.get("workers", ())), 0) or 0
    return pid if pid and Path(f"/proc/{pid}").exists() else 0


def _ruleset(gateway: Gateway) -> float:
    """Seconds from the end of `nft flush ruleset` until portward's chains are back."""
    with namespaces.inside(gateway.lab.gateway):
        netlink = NfNetlink()
    with contextlib.closing(netlink):
        namespaces.load(gateway.lab.gateway, "flush ruleset")
        began = time.monotonic()
        until(lambda: netlink.hooks("portward"), "the ruleset is back", every_s=0.001)
        return time.monotonic() - began


@contextlib.contextmanager
def _crowd(gateway: Gateway) -> Iterator[None]:
    """Idle clients. A thread closes the oldest connection and opens a new one, again and again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, IDLE + 500)), hard))
    clients: deque[socket.socket] = deque()
    full, ended = threading.Event(), threading.Event()

    def come_and_go() -> None:
        with namespaces.inside(gateway.lab.gateway):
            while not ended.is_set():
                clients.append(socket.socket())
                clients[-1].settimeout(5)
                with contextlib.suppress(OSError):
                    clients[-1].connect(("127.0.0.1", 9125))
                if len(clients) > IDLE:
                    full.set()
                    clients.popleft().close()
                    ended.wait(_EVERY)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        if not full.wait(60):
            raise TimeoutError("the clients could not connect")
        yield
    finally:
        ended.set()
        thread.join()
        for client in clients:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
