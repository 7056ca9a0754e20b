"""Whether the agent of this gateway enforces a revision of the store, asked of the policy table and of the
kernel."""

from __future__ import annotations

import time
from typing import Final

from portward.config import Config
from portward.errors import PortwardError
from portward.gateway.learned import Learned
from portward.gateway.nfnetlink import NfNetlink
from portward.gateway.nft import Nft
from portward.runtime import read_status, running
from portward.store.protocol import Store
from portward.table.reader import Reader

_PAUSE: Final = 0.0005


class Enforced:
    """The agent that runs on this gateway. Opened before a change is written, so that waiting for it costs no more
    than it takes."""

    def __init__(self, config: Config, store: Store) -> None:
        """Raises PortwardError where no agent runs here, or it follows another store, or the kernel may not be
        asked."""
        self._config, self._store = config, store
        if running(config.table) is None:
            raise PortwardError(
                f"no agent runs on table {config.table}, so there is nobody to wait for; nothing was written"
            )
        self._reader = Reader.open(config.table)
        head = self._reader.head()
        if head is None or head.store != store.identity() or head.revision > store.revision():
            self._reader.close()
            raise PortwardError(
                f"the agent here does not stand at what {config.store} holds, see `portward status`; nothing was "
                "written"
            )
        self._netlink = NfNetlink()
        self._learned = Learned(Nft(), self._netlink)
        if self._learned.synced() is None:
            self.close()
            raise PortwardError(
                "the kernel cannot be asked what it enforces: that takes root or CAP_NET_ADMIN, and a loaded "
                "ruleset; nothing was written"
            )

    def wait(self, revision: int, seconds: float) -> None:
        """Returns once the kernel acts on this revision of the store, or a later one; raises PortwardError where
        it does not within so many seconds."""
        deadline = time.monotonic() + seconds
        while not self._is(revision):
            if time.monotonic() > deadline:
                status = read_status(self._config.table) or {}
                held = "; the agent holds it, see `portward status`" if status.get("held") else ""
                raise PortwardError(
                    f"written as revision {revision}, and NOT enforced here after {seconds:g} s{held}"
                )
            time.sleep(_PAUSE)

    def close(self) -> None:
        """Closes table and socket."""
        self._reader.close()
        self._netlink.close()

    def _is(self, revision: int) -> bool:
        head = self._reader.head()
        if head is None or head.revision < revision or head.store != self._store.identity():
            return False
        return self._learned.synced() == head.generation
