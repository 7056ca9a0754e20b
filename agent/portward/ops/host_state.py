"""The state of this host, as values: the agent, the ruleset, the workers, and what is cached for a source.

`host` reads these facts. `effect` decides from them what happens to a source's next packet.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from portward.dataplane.stacking import Fate
from portward.ipc.mark import Class

# The agent writes its status each second. If it is older than this, the agent does not report.
STALE_STATUS_S: Final = 5.0


class Agent(StrEnum):
    """Whether an agent runs on this policy table.

    SILENT: an agent runs, but its status is some seconds old. ELSEWHERE: an agent with another table folder
    enforces in this network namespace. AWAY: the agent runs in another network namespace. HIDDEN: this user may
    not see whether an agent runs.
    """

    RUNS = "runs"
    STARTING = "starting"
    SILENT = "silent"
    NONE = "none"
    ELSEWHERE = "elsewhere"
    AWAY = "away"
    HIDDEN = "hidden"


class Ruleset(StrEnum):
    """Which ruleset of portward is loaded. CLOSED: the table that forwards nothing to the policy ports."""

    LOADED = "loaded"
    CLOSED = "closed"
    NONE = "none"
    NOT_PERMITTED = "not-permitted"


class Workers(StrEnum):
    """How many queues are answered: ANSWER all, PART some, DEAF and NONE none.

    DEAF: processes have bound the queues but answer none, so the packets in them are dropped. NONE: no process has
    bound a queue.
    """

    ANSWER = "answer"
    PART = "part"
    DEAF = "deaf"
    NONE = "none"


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """This host now, for the segments in question.

    `opens`: in the loaded ruleset, sources of all these segments pass while no worker answers. `observed`: they
    pass because the segments are only observed. `ruleset_error`: why the agent cannot load its ruleset, as the
    agent reports it. `elsewhere`: which process enforces here instead. `stacked`: a sentence for each device that
    takes packets of the segment before portward sees them; `fate`: what happens to these packets. `unclear`: it is
    unknown whether the ruleset covers a segment, and `elsewhere` says why.
    """

    agent: Agent = Agent.RUNS
    ruleset: Ruleset = Ruleset.LOADED
    workers: Workers = Workers.ANSWER
    opens: bool = False
    observed: bool = False
    ruleset_error: str = ""
    elsewhere: str = ""
    stacked: tuple[str, ...] = ()
    fate: Fate = Fate.FREE
    unclear: bool = False


class CachedState(msgspec.Struct, frozen=True, kw_only=True):
    """The kernel's cache for a source: a verdict for `expires` more seconds, or a rate limit in words.

    `packets` counts the packets that the verdict acted on; with a limit, the packets dropped beyond it within
    about the last minute. With neither `verdict` nor `limit`, nothing is cached. `loaded`: the ruleset that
    caches is there, if the kernel was asked. `interface`: the one behind which it is cached, if the source's
    segment has several.
    """

    loaded: bool = True
    verdict: Class | None = None
    expires: float = 0.0
    packets: int = 0
    limit: str = ""
    interface: str = ""


class TableVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a worker's lookup for a source in the policy table while no agent runs; the table is at
    `revision`.

    `verdict` is None if the interface is not a segment in the table. `waits`: the source may send within a rate
    limit, but only an agent can install it. `error`: why the table could not be read; empty if it could.
    """

    verdict: Class | None = None
    waits: bool = False
    revision: int = 0
    error: str = ""
