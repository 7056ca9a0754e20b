"""Waits until the agent of this gateway enforces a revision of the store: table, kernel and workers.

When the kernel has no older verdict cached any more, a worker may still have a packet that it classified under the
policy before. Its verdict would act once more. A worker answers its queue in order. So if it has answered a query
that was sent after that packet, it no longer has the packet.
"""

from __future__ import annotations

import time
from typing import Final

from portward.config.keys import Config
from portward.daemon.runtime import read_status, running
from portward.daemon.settings import asking
from portward.dataplane.names import TABLE, KernelTable
from portward.dataplane.nfnetlink import KernelElements, NfNetlink
from portward.dataplane.verdict_cache import VerdictCache
from portward.errors import PortwardError
from portward.ipc.probe import Prober
from portward.ops.behind import Behind
from portward.policy import presets
from portward.store.protocol import Store
from portward.table.history import ahead_of, count_in_table, same_history
from portward.table.reader import Reader

# A change is in force within 3 to 5 ms, so the wait polls often.
_POLL_S: Final = 0.0005
# After this long a query counts as dropped by a full queue, and is sent again.
_RETRY_S: Final = 0.05


class EnforcementWaiter:
    """Waits for the agent on this gateway. It is made before a change is written, so that the wait takes no longer
    than the change."""

    def __init__(self, config: Config, store: Store) -> None:
        """Raises PortwardError if no agent runs here, if it follows another store, or if this user may not read
        the kernel."""
        self._config, self._store = config, store
        self._behind: Behind | None = None
        if running(config.table) is None:
            raise PortwardError(
                f"no agent runs on table {config.table}, so there is none to wait for; nothing was written"
            )
        self._reader = Reader.open(config.table)
        head = self._reader.head()
        if head is None or not (same_history(head, store) or ahead_of(head, store)):
            self._reader.close()
            raise PortwardError(
                f"the agent here has not loaded the policy in {config.store}, see `{asking(config.table)}`; "
                "nothing was written"
            )
        # The queues of the running agent. The configuration may have others, which are used from the next start
        # on.
        workers = (read_status(config.table) or {}).get("workers", ())
        first, number = config.queue.first, config.queue.workers
        self._queues = [worker["queue"] for worker in workers] or list(range(first, first + number))
        self._port = presets.load(config.preset).ports[0]
        self._netlink = NfNetlink()
        loaded = [one for table in KernelTable if (one := self._netlink.of(table)).sets(TABLE)]
        self._caches = [VerdictCache(KernelElements(one)) for one in loaded]
        try:
            self._prober: Prober | None = Prober()
        except OSError:
            self._prober = None
        if self._prober is None or not self._caches or any(one.synced() is None for one in self._caches):
            self.close()
            raise PortwardError(
                "the kernel cannot be asked what it enforces: that takes root, or CAP_NET_ADMIN and CAP_NET_RAW, "
                "and a loaded ruleset; nothing was written"
            )

    def wait(self, revision: int, seconds: float) -> None:
        """Returns when kernel and workers act only on this revision of the store, or a later one.

        A revision behind a held one counts if everything that it changed is enforced ahead of the held one. Raises
        PortwardError if that takes more than `seconds`.
        """
        deadline = time.monotonic() + seconds
        while not self._is_enforced(revision):
            if time.monotonic() > deadline:
                status = read_status(self._config.table) or {}
                held = f"; the agent holds it, see `{asking(self._config.table)}`" if status.get("held") else ""
                raise PortwardError(
                    f"written as revision {revision}, and NOT enforced here after {seconds:g} s{held}"
                )
            time.sleep(_POLL_S)
        for place in range(len(self._queues)):
            self._drain(place, revision, deadline, seconds)

    def behind(self) -> Behind | None:
        """How much of the last awaited revision was enforced ahead of a held one (all of it); None if none is
        held."""
        return self._behind

    def _drain(self, place: int, revision: int, deadline: float, seconds: float) -> None:
        """Returns when the worker at `place` has answered a query that was sent from now on.

        The agent queries each worker, too, one query at a time, and all answers are counted together. So this
        sends one query more than the agent may have on its way, all to this worker.
        """
        queries = len(self._queues) + 1
        while time.monotonic() < deadline:
            before = self._answered()
            for _ in range(queries):
                self._ask(place)
            again = time.monotonic() + _RETRY_S
            while time.monotonic() < again:
                if self._answered() - before >= queries:
                    return
                time.sleep(_POLL_S)
        raise PortwardError(
            f"revision {revision} is enforced here, but the worker of queue {self._queues[place]} has not "
            f"answered within {seconds:g} s: a packet with a verdict from before may still pass"
        )

    def _ask(self, place: int) -> None:
        assert self._prober is not None  # noqa: S101 # `__init__` raises otherwise
        try:
            self._prober.ask(place, self._port)
        except OSError as error:
            raise PortwardError(
                f"the workers cannot be queried: lo: {error.strerror}: `ip link set lo up`?"
            ) from error

    def _answered(self) -> int:
        counters = self._netlink.counters(TABLE)
        return counters["answered"] + counters["answered_stale"]

    def close(self) -> None:
        """Closes table and socket."""
        self._reader.close()
        self._netlink.close()
        if self._prober is not None:
            self._prober.close()

    def _is_enforced(self, revision: int) -> bool:
        with self._reader.view():
            head = self._reader.head()
            if head is None:
                return False
            if not (head.revision >= revision and same_history(head, self._store)):
                if ahead_of(head, self._store) < revision:
                    return False
                counted = count_in_table(self._reader, self._store, revision)
                self._behind = Behind(head.held, *counted, asking(self._config.table))
                if self._behind.waits:
                    raise PortwardError(f"written as revision {revision}, and {self._behind}")
        return all(one.enforces(head.generation) for one in self._caches)
