"""Rows of the policy table that cannot be what they are: counted, and logged once each.

A damaged row costs the one source that it is about, which is denied, and never the start or the change of another
source.
"""

from __future__ import annotations

import logging
from typing import Final

# Rows that are told apart; beyond that many the table is of no use, and each is counted as often as it is met.
_KNOWN: Final = 10_000
# Rows that are logged; the count says how many there are.
_LOGGED: Final = 20

_log = logging.getLogger("portward.table")


class Damage:
    """What was found so far by one process."""

    def __init__(self) -> None:
        self.rows = 0
        self._known: set[str] = set()
        # What was logged, for `status`.
        self.first: list[str] = []

    def found(self, what: str) -> None:
        """Counts and logs a damaged row, once; `what` says which one, and what holds instead."""
        if what in self._known:
            return
        self.rows += 1
        if len(self._known) < _KNOWN:
            self._known.add(what)
        if self.rows <= _LOGGED:
            self.first.append(what)
            _log.error("the policy table is damaged: %s; `portward check` says what to do", what)
