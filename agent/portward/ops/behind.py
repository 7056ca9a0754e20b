"""What the agent here does with a revision that was written: whether it reads that store at all, and what it does
while it holds an earlier revision. Denials are enforced ahead of the held revision, everything else waits behind
it.
"""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple

from portward.config import paths
from portward.config.keys import Config
from portward.config.store_url import path_of
from portward.daemon.runtime import hidden, read_status, running
from portward.errors import PortwardError
from portward.store.backends import open_store
from portward.store.protocol import Store
from portward.table.history import ahead_of, count_in_table, held_history, same_history
from portward.table.layout import Head
from portward.table.reader import Reader

# The agent takes a revision in within some milliseconds; while it works out a large change, later.
_PATIENCE_S: Final = 2.0
_PAUSE_S: Final = 0.005


class Behind(NamedTuple):
    """A revision of `records` changed records behind the revision `held`; `enforced` of them are in force here."""

    held: int
    enforced: int
    records: int

    @property
    def waits(self) -> bool:
        """True if anything of it is not in force."""
        return self.enforced < self.records

    def __str__(self) -> str:
        if not self.waits:
            return f"in force here, ahead of the held revision {self.held}"
        if not self.enforced:
            return f"NOT in force here yet: revision {self.held} is held, see `portward status`"
        return (
            f"in force here only in part, ahead of the held revision {self.held}: {self.enforced} of "
            f"{self.records} records; the others wait, see `portward status`"
        )

    def as_json(self) -> dict[str, object]:
        """The same for JSON."""
        return {"held": self.held, "enforced": self.enforced, "records": self.records}


def held_here(config: Config) -> bytes | None:
    """The name of what the gateway here holds because the store has another history than its policy, for a
    confirmation; None if it holds no such thing, or if that cannot be found out."""
    try:
        with closing(Reader.open(config.table)) as reader:
            head = reader.head()
    except PortwardError:
        return None
    return None if head is None else held_history(head)


def nothing_held(config: Config) -> bool:
    """Whether the agent here has taken in all that the store holds, so that there is nothing to confirm. False if
    no agent runs here, or if that cannot be found out: agents elsewhere may hold something."""
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
    """Why it is not known whether the agent here holds anything, in words; empty if it is known."""
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
    """What a writer must know if the agent that runs on the table of `config` reads another store; empty if it
    reads this one, or if that cannot be found out."""
    if running(config.table) is None:
        return ""
    try:
        status = read_status(config.table)
    except PortwardError:
        return ""
    its = str((status or {}).get("store") or config.store)
    if _same_store(its, config.store):
        return ""
    return (
        f"the agent here reads another store, {its}: it does not see what is in {config.store}; put `store` "
        "right, or restart the agent with this configuration"
    )


def _same_store(its: str, ours: str) -> bool:
    """Whether the URL that an agent reports and that of a verb are one store, whatever way they go there. An agent
    of another locale may read the same path as other text."""
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
    """What a writer must know before it makes a store where there is none, if the policy table here was read from
    one; empty if it was not, or if that cannot be found out."""
    try:
        # What took the store may have cut the table off too, and nothing must end the verb that mends both.
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
    """What the agent here does with `revision` of the store, if it holds an earlier one; waits until the agent has
    looked at it. None if the agent holds none, or if that cannot be found out. Raises StoreError."""
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
            return _wait(reader, store, revision)


def _wait(reader: Reader, store: Store, revision: int) -> Behind | None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        with reader.view():
            head = reader.head()
            if head is None or not head.held or head.held >= revision:
                return None
            seen = ahead_of(head, store) >= revision
            if seen or time.monotonic() > deadline:
                return _counted(reader, head, store, revision, seen=seen)
        time.sleep(_PAUSE_S)


def _counted(reader: Reader, head: Head, store: Store, revision: int, *, seen: bool) -> Behind:
    enforced, records = count_in_table(reader, store, revision)
    return Behind(head.held, enforced if seen else 0, records)
