"""How far the agent here is with a revision that a verb has written.

It may read another store, take in no changes because of an error, or hold an earlier revision until that is
confirmed. While it holds one, denials are enforced ahead of the held revision, and everything else waits behind
it.
"""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple

from portward.config import paths
from portward.config.keys import Config
from portward.config.store_url import path_of
from portward.daemon import settings
from portward.daemon.runtime import age_of, hidden, read_status, running
from portward.errors import PortwardError
from portward.ops.host_state import STALE_STATUS_S
from portward.store.backends import open_store
from portward.store.protocol import Store
from portward.table.history import ahead_of, count_in_table, held_history, same_history
from portward.table.reader import Reader

# The agent takes a revision within some milliseconds, or later while it works on a large change.
_PATIENCE_S: Final = 2.0
_PAUSE_S: Final = 0.005


class Behind(NamedTuple):
    """A revision of `records` changed records behind the revision `held`; `enforced` of them are in force here.
    `status` is the command that shows the status of the agent here (`settings.asking`)."""

    held: int
    enforced: int
    records: int
    status: str

    @property
    def waits(self) -> bool:
        """Whether a part of it is not in force."""
        return self.enforced < self.records

    def __str__(self) -> str:
        if not self.waits:
            return f"in force here, ahead of the held revision {self.held}"
        if not self.enforced:
            return f"NOT in force here yet: revision {self.held} is held, see `{self.status}`"
        return (
            f"in force here only in part, ahead of the held revision {self.held}: {self.enforced} of "
            f"{self.records} records; the others wait, see `{self.status}`"
        )

    def as_json(self) -> dict[str, object]:
        """The same for JSON."""
        return {"held": self.held, "enforced": self.enforced, "records": self.records}


def held_here(config: Config) -> bytes | None:
    """The name of the history that the gateway here holds because it is not that of its policy, for a
    confirmation. None if it holds none, or if that is unknown."""
    try:
        with closing(Reader.open(config.table)) as reader:
            head = reader.head()
    except PortwardError:
        return None
    return None if head is None else held_history(head)


def nothing_held(config: Config) -> bool:
    """Whether the agent here has taken everything that the store has, so that there is nothing to confirm. False
    if no agent runs here, or if that is unknown, because agents elsewhere may hold a change."""
    if running(config.table) is None:
        return False
    try:
        with closing(Reader.open(config.table)) as reader, closing(open_store(config.store)) as store:
            head = reader.head()
            return (
                head is not None
                and not head.held
                and head.revision == store.revision()
                and same_history(head, store)
            )
    except PortwardError:
        return False


def held_unknown(config: Config) -> str:
    """Why it is unknown whether the agent here holds a change; empty if it is known."""
    if hidden(config.table):
        why = "this user may not see whether an agent runs here"
    elif running(config.table) is None:
        why = "no agent runs here"
    else:
        try:
            with closing(Reader.open(config.table)) as reader:
                why = "the agent here has no policy yet" if reader.head() is None else ""
        except PortwardError as error:
            why = f"the agent's policy cannot be read ({error})"
    return why and f"{why}: it is not known whether anything was held"


def other_store(config: Config) -> str:
    """A warning for a writer if the agent on the table of `config` reads another store. Empty if it reads this
    one, or if that is unknown."""
    its = str(_reported(config).get("store") or config.store)
    if _same_store(its, config.store):
        return ""
    return (
        f"the agent here reads another store, {its}: it does not see what is in {config.store}; put `store` "
        "right, or restart the agent with this configuration"
    )


def _reported(config: Config) -> dict[str, Any]:
    """The status that the agent on the table of `config` last wrote. Empty if none runs, or if that is unknown."""
    if running(config.table) is None:
        return {}
    try:
        return read_status(config.table) or {}
    except PortwardError:
        return {}


def not_following(config: Config) -> str:
    """A warning for a writer if the agent on the table of `config` takes in no changes of the store now. Empty if
    it does, or if that is unknown."""
    status = _reported(config)
    if error := status.get("store_error"):
        return f"the agent here takes in no change now, and retries: {error}"
    age_s = age_of(status) if "clock" in status else 0.0
    if age_s > STALE_STATUS_S:
        return f"the agent here has not reported for {age_s:.0f} s: see `{settings.asking(config.table)}`"
    return ""


def _same_store(its: str, ours: str) -> bool:
    """Whether the URL that an agent reports and the URL of a verb are the same store, also by different paths. An
    agent in another locale may report the same path as another text."""
    if its in (ours, paths.to_text(ours)):
        return True
    one, other = (None if (path := path_of(url)) is None else Path(path) for url in (its, ours))
    if one is None or other is None:
        return False
    try:
        return os.path.realpath(one) == os.path.realpath(other) or one.samefile(other)  # a bind mount
    except (OSError, ValueError):  # one of them is not there
        return False


def lost_store(config: Config) -> str:
    """A warning for a writer before it makes a missing store, if the policy table here was read from a store.
    Empty if it was not, or if that is unknown."""
    try:
        # Whatever removed the store may have damaged the table, too, and no error may end the verb that repairs
        # both.
        with closing(Reader.open_left(config.table)) as reader:
            head = reader.head()
    except (PortwardError, OSError):
        return ""
    if head is None or not head.revision:
        return ""
    return (
        f"there is no store at {config.store}, and the policy table here was read from one, up to revision "
        f"{head.revision}: if it was this one, put it back from a backup; a new one has none of what it held"
    )


def behind_held(config: Config, revision: int) -> Behind | None:
    """How far the agent here is with `revision` of the store, if it holds an earlier one. Waits up to
    `_PATIENCE_S` until the agent has read it. None if the agent holds no change, or if that is unknown. Raises
    StoreError."""
    if running(config.table) is None:
        return None
    try:
        reader = Reader.open(config.table)
    except PortwardError:
        return None
    with closing(reader):
        head = reader.head()
        if head is None or not head.held:
            return None
        with closing(open_store(config.store)) as store:
            return _wait(config, reader, store, revision)


def _wait(config: Config, reader: Reader, store: Store, revision: int) -> Behind | None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        with reader.view():
            head = reader.head()
            if head is None or not head.held or head.held >= revision:
                return None
            seen = ahead_of(head, store) >= revision
            if seen or time.monotonic() > deadline:
                enforced, records = count_in_table(reader, store, revision)
                return Behind(head.held, enforced if seen else 0, records, settings.asking(config.table))
        time.sleep(_PAUSE_S)
