"""Changes a second: one commit after the other, and one commit with ten thousand changes.

Another process than the agent commits each change to SQLite, as `portward apply` does. A change ends when the set
`synced` in the kernel shows that all cached verdicts agree with it. The time includes the commits, each of which
is synced to the disk.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from datetime import UTC, date, datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from uuid import UUID

from bench.figures import Figure, percentile
from kernel.conftest import Gateway, running_gateway
from portward.dataplane.nfnetlink import KernelElements, NfNetlink
from portward.dataplane.verdict_cache import VerdictCache
from portward.lab import namespaces
from portward.lab.topology import FABRIKAM
from portward.model import Attachment, Record, Standing, Subscription
from portward.store.backends import open_store
from portward.store.codec import encode, key_of
from portward.store.values import Put

_SUBSCRIPTIONS = 10_000
_FIRST = int(ip_address("10.128.0.0"))
_PATIENCE = 60.0


class Bench:
    """Writes changes to a gateway's store, and reads from its kernel which revision is synced."""

    def __init__(self, gateway: Gateway) -> None:
        self._store = open_store(f"sqlite:{gateway.agent.folder / 'portward.db'}")
        with namespaces.inside(gateway.lab.gateway):
            self._cache = VerdictCache(KernelElements(NfNetlink()))

    def enforce(self, records: Sequence[Record]) -> tuple[float, float]:
        """Commits these records, each of which changes a verdict, and waits until the kernel has them.

        Returns the seconds that the commit took, and the seconds from there until the kernel had them."""
        puts = [Put(key_of(record), encode(record)) for record in records]
        before = self._cache.synced()
        began = time.monotonic()
        self._store.write(puts, expected=self._store.revision(), actor="bench", at=datetime.now(UTC))
        committed = time.monotonic()
        while self._cache.synced() in (before, None):
            if time.monotonic() > committed + _PATIENCE:
                raise TimeoutError("the change is not enforced")
            time.sleep(0.0002)  # pause: of a poll
        return committed - began, time.monotonic() - committed

    def close(self) -> None:
        """Closes the store."""
        self._store.close()


def subscription(number: int, standing: Standing) -> Subscription:
    """A subscription that may send if its standing is good."""
    return Subscription(
        id=UUID(int=5 << 120 | 0x4000_8000 << 48 | number),
        offer="enterprise-agreement",
        created=date(2022, 6, 30),
        standing=standing,
    )


def measure(folder: Path, changes: int = 500, batches: int = 4) -> list[Figure]:
    """`changes_per_s_one_by_one` and `changes_per_s_batch`."""
    with running_gateway(folder, max_flip_share=1.0) as gateway:
        bench = Bench(gateway)
        try:
            bench.enforce([record for number in range(_SUBSCRIPTIONS) for record in _first(number)])
            single = [bench.enforce([subscription(n, Standing.DISABLED)]) for n in range(changes)]
            batch = []
            for turn in range(batches):
                standing = Standing.GOOD if turn % 2 else Standing.DISABLED
                # The subscriptions that were changed one by one are disabled already.
                batch.append(bench.enforce([subscription(n, standing) for n in range(_SUBSCRIPTIONS)]))
        finally:
            bench.close()
    whole = [sum(times) for times in single]
    rates = [_SUBSCRIPTIONS / sum(times) for times in batch]
    return [
        Figure(
            "changes_per_s_one_by_one", changes / sum(whole),
            1 / percentile(whole, 0.95), 1 / percentile(whole, 0.05),
            "changes a second (from, to: by the slowest and the quickest twentieth)", ">= 100",
        ),
        Figure(
            "changes_per_s_batch", statistics.median(rates), min(rates), max(rates),
            f"changes a second, {_SUBSCRIPTIONS} in one commit", ">= 5000",
        ),
    ]  # fmt: skip


def _first(number: int) -> tuple[Record, Record]:
    account = subscription(number, Standing.GOOD)
    address = ip_network((_FIRST + number, 32))
    return account, Attachment(segment=FABRIKAM.segment, address=address, subscription=account.id)
