"""Reads from the agent's metrics what it and the agents before it have counted for a subscription."""

from __future__ import annotations

import http.client
import math
import re
from datetime import datetime
from typing import Final
from uuid import UUID

from portward.config.keys import Config
from portward.daemon.runtime import read_status, running
from portward.ops.diagnosis.facts import Metrics, SinceStart

# The metrics of some hundred thousand subscriptions. A larger answer would take too long to read.
_MAX_BYTES: Final = 32 << 20
_TIMEOUT_S: Final = 2.0
# Lines as the agent writes them. No character of a UUID or a verdict is escaped.
_SAMPLE: Final = r'(?m)^portward_subscription_packets_total\{{subscription="{id}",verdict="([a-z_]+)"\}} (\S+)$'
_AGE: Final = re.compile(r"(?m)^portward_counters_age_seconds (\S+)$")
# An older version has no such metric, and reads its counters every 5 s.
_UNKNOWN_AGE_S: Final = 6
_REFUSED: Final = ("deny", "reject")
_BEYOND: Final = "throttled"


def since_start(config: Config, id_: UUID) -> tuple[Metrics, SinceStart | None]:
    """The counts of the subscription, and whether they are known. Waits at most `_TIMEOUT_S` for each answer."""
    status = None if running(config.table) is None else read_status(config.table)
    if status is None:
        return Metrics.NO_AGENT, None
    served = config.metrics_endpoints()
    if not served or not config.metrics.subscriptions:
        return Metrics.OFF, None
    # If the agent cannot listen at the address, another program answers there, perhaps another agent.
    text = None if status.get("metrics_error") else _read(served[0].reachable, served[0].port)
    if text is None:
        return Metrics.UNREACHABLE, None
    counts = counts_of(text, id_)
    return Metrics.READ, SinceStart(
        started=datetime.fromisoformat(status.get("counted_since", status["started"])),
        age=age_of(text),
        refused=sum(counts.get(verdict, 0) for verdict in _REFUSED),
        beyond_limit=counts.get(_BEYOND, 0),
    )


def counts_of(text: str, id_: UUID) -> dict[str, int]:
    """The packets of a subscription in the text of a scrape: verdict → number."""
    return {verdict: int(float(number)) for verdict, number in re.findall(_SAMPLE.format(id=id_), text)}


def age_of(text: str) -> int:
    """How many seconds ago the counters in a scrape were read, rounded up."""
    found = _AGE.search(text)
    age = float(found[1]) if found else math.inf
    return math.ceil(age) if math.isfinite(age) else _UNKNOWN_AGE_S


def _read(host: str, port: int) -> str | None:
    """The text of a scrape; None if there is no answer, or it is too long."""
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        data = connection.getresponse().read(_MAX_BYTES + 1)
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return data.decode(errors="replace") if len(data) <= _MAX_BYTES else None
