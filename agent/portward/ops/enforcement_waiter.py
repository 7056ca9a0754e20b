"""Whether the agent of this gateway enforces a revision of the store, asked of table, kernel and workers.

The kernel may remember nothing older any more while a worker still holds a packet that it judged under the policy
before: its verdict would act once. A queue is answered in its order, so who has answered a question that was put
behind that packet holds it no longer.
"""

from __future__ import annotations

import time
from typing import Final

from portward.config.keys import Config
from portward.daemon.runtime import read_status, running
from portward.dataplane.kernel_elements import KernelElements
from portward.dataplane.names import TABLE
from portward.dataplane.nfnetlink import NfNetlink
from portward.dataplane.verdict_cache import VerdictCache
from portward.errors import PortwardError
from portward.ipc.probe import Prober
from portward.ops.behind import Behind
from portward.policy import presets
from portward.store.protocol import Store
from portward.table.history import ahead_of, count_in_table, same_history
from portward.table.reader import Reader

_PAUSE: Final = 0.0005
# A question that a full queue has dropped is put again after this, in seconds.
_ASK_AGAIN: Final = 0.05


class EnforcementWaiter:
    """The agent that runs on this gateway. Opened before a change is written, so that waiting for it costs no more
    than it takes."""

    def __init__(self, config: Config, store: Store) -> None:
        """Raises PortwardError where no agent runs here, or it follows another store, or the kernel may not be
        asked."""
        self._config, self._store = config, store
        self._behind: Behind | None = None
        if running(config.table) is None:
            raise PortwardError(
                f"no agent runs on table {config.table}, so there is nobody to wait for; nothing was written"
            )
        self._reader = Reader.open(config.table)
        head = self._reader.head()
        if head is None or not (same_history(head, store) or ahead_of(head, store)):
            self._reader.close()
            raise PortwardError(
                f"the agent here does not stand at what {config.store} holds, see `portward status`; nothing was "
                "written"
            )
        # Those of the agent that runs: the file may name others by now, which count from the next start on.
        workers = (read_status(config.table) or {}).get("workers", ())
        first, number = config.queue.first, config.queue.workers
        self._queues = [worker["queue"] for worker in workers] or list(range(first, first + number))
        self._port = presets.load(config.preset).ports[0]
        self._netlink = NfNetlink()
        self._cache = VerdictCache(KernelElements(self._netlink))
        try:
            self._prober: Prober | None = Prober()
        except OSError:
            self._prober = None
        if self._prober is None or self._cache.synced() is None:
            self.close()
            raise PortwardError(
                "the kernel cannot be asked what it enforces: that takes root, or CAP_NET_ADMIN and CAP_NET_RAW, "
                "and a loaded ruleset; nothing was written"
            )

    def wait(self, revision: int, seconds: float) -> None:
        """Returns once kernel and workers act on this revision of the store, or a later one, and on no other. A
        revision behind a held one counts if all that it changed is enforced ahead of that. Raises PortwardError if
        they do not within so many seconds."""
        deadline = time.monotonic() + seconds
        while not self._is(revision):
            if time.monotonic() > deadline:
                status = read_status(self._config.table) or {}
                held = "; the agent holds it, see `portward status`" if status.get("held") else ""
                raise PortwardError(
                    f"written as revision {revision}, and NOT enforced here after {seconds:g} s{held}"
                )
            time.sleep(_PAUSE)
        for place in range(len(self._queues)):
            self._settle(place, revision, deadline, seconds)

    def behind(self) -> Behind | None:
        """What was enforced ahead of a held revision, of the revision that was waited for last; None if none is
        held. It waited for all of it."""
        return self._behind

    def _settle(self, place: int, revision: int, deadline: float, seconds: float) -> None:
        """Returns once the worker at `place` has answered a question that was put from now on. The agent asks each
        worker too, one question at a time, and answers are counted together: so one more is put than it may have
        under way, all to this worker."""
        questions = len(self._queues) + 1
        while time.monotonic() < deadline:
            before = self._answered()
            for _ in range(questions):
                self._ask(place)
            again = time.monotonic() + _ASK_AGAIN
            while time.monotonic() < again:
                if self._answered() - before >= questions:
                    return
                time.sleep(_PAUSE)
        raise PortwardError(
            f"revision {revision} is enforced here, but the worker of queue {self._queues[place]} has not "
            f"answered within {seconds:g} s: a packet that it judged before may still come out"
        )

    def _ask(self, place: int) -> None:
        assert self._prober is not None  # noqa: S101 # else this object would not be
        try:
            self._prober.ask(place, self._port)
        except OSError as error:
            raise PortwardError(
                f"the workers cannot be asked: lo: {error.strerror}: `ip link set lo up`?"
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

    def _is(self, revision: int) -> bool:
        with self._reader.view():
            head = self._reader.head()
            if head is None:
                return False
            if not (head.revision >= revision and same_history(head, self._store)):
                if ahead_of(head, self._store) < revision:
                    return False
                self._behind = Behind(head.held, *count_in_table(self._reader, self._store, revision))
                if self._behind.waits:
                    raise PortwardError(f"written as revision {revision}, and {self._behind}")
        return self._cache.enforces(head.generation)
