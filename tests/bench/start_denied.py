"""A denial that was written while no agent ran: the packets that still pass once the next agent is ready.

A tenant with a cached verdict sends a numbered segment every millisecond. The agent is stopped, the tenant is
denied, and the agent is started. A segment is a leak if it was sent after READY, and arrives.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from uuid import UUID

from bench.change import SOURCE, Stream
from bench.figures import Figure, percentile
from kernel.conftest import ALLOWED, running_gateway
from portward.lab.agent import until
from portward.lab.topology import CONTOSO
from portward.model import Standing, Subscription
from portward.store.backends import open_store
from portward.store.codec import decode, encode
from portward.store.values import Put

_EVERY = 0.001
_AFTERWARDS = 1.0


def measure(folder: Path, starts: int = 20) -> list[Figure]:
    """`start_denied_leaked_packets` and `start_to_ready_s` over all starts."""
    sys.setswitchinterval(0.0002)
    leaked, ready = 0, []
    with running_gateway(folder) as gateway:
        id_ = gateway.source(CONTOSO, SOURCE, ALLOWED)
        stream = Stream(gateway, SOURCE, every=_EVERY)
        try:
            for _ in range(starts):
                seen = len(stream.arrived)
                until(lambda seen=seen: len(stream.arrived) > seen + 10, "the tenant may send")  # type: ignore[misc]
                gateway.agent.stop()
                _write(folder, id_, Standing.DISABLED)
                began = time.monotonic()
                gateway.agent.start()
                returned = time.monotonic()
                ready.append(returned - began)
                time.sleep(_AFTERWARDS)  # pause: the denied tenant sends all this time
                leaked += sum(stream.sent.get(number, 0) > returned for number in stream.arrived)
                if stream.sent[max(stream.sent)] < returned:
                    raise RuntimeError("nothing was sent after READY")
                _write(folder, id_, Standing.GOOD)
        finally:
            stream.close()
    return [
        Figure(
            "start_denied_leaked_packets", leaked, leaked, leaked,
            f"packets sent after READY, {starts} starts", "<= 0",
        ),
        Figure(
            "start_to_ready_s", percentile(ready, 0.5), min(ready), max(ready),
            f"s, median of {starts}, with a small table",
        ),
    ]  # fmt: skip


def _write(folder: Path, id_: UUID, standing: Standing) -> None:
    """Writes another standing of a subscription to the store, without waiting for an agent."""
    store = open_store(f"sqlite:{folder / 'portward.db'}")
    try:
        key = f"subscriptions/{id_}"
        known = store.get(key)
        assert known is not None
        record = decode(key, known)
        assert isinstance(record, Subscription)
        other = Subscription(
            id=id_, name=record.name, offer=record.offer, created=record.created, standing=standing
        )
        now = store.written()
        assert now is not None
        store.write([Put(key, encode(other))], expected=store.revision(), actor="bench", at=now)
    finally:
        store.close()
