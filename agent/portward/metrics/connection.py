"""A client of the metrics server: the state of its connection, and how long each state may last."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Final

from portward.metrics.http import Request

# A client sends the head of its request at once.
HEAD_TIMEOUT_S: Final = 5.0
# A request waits no longer than Prometheus does: 10 s (`scrape_timeout`).
WAIT_TIMEOUT_S: Final = 10.0
# An answer without progress for 5 s, or not sent within 30 s, ends with its connection.
STALL_TIMEOUT_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 30.0
# How long the server waits for the client to close an answered connection. If it closed first and the client had
# sent more than a head, the kernel would send a reset, which destroys data that the client has not read.
_LINGER_S: Final = 1.0


@dataclass(eq=False)
class Connection:
    """A client: it sends its request, waits, receives its answer, and ends. `since`: when its present state
    began."""

    socket: socket.socket
    since: float
    received: bytearray
    request: Request | None = None
    answer: memoryview | None = None
    progress: float = 0.0
    ending: bool = False
    watched: int = 0  # the events that the selector waits for

    @property
    def idle(self) -> bool:
        """Whether it has not sent a request yet, or has received its answer."""
        return self.ending or (self.request is None and self.answer is None)

    def expires(self) -> float:
        """When its present state times out."""
        if self.ending:
            return self.since + _LINGER_S
        if self.answer is not None:
            return min(self.progress + STALL_TIMEOUT_S, self.since + ANSWER_TIMEOUT_S)
        return self.since + (WAIT_TIMEOUT_S if self.request is not None else HEAD_TIMEOUT_S)
