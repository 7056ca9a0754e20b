"""Rows of the policy table that cannot be read: counted, and each logged once.

A damaged row denies the one source that it is about. It never stops a start or the change of another source.
"""

from __future__ import annotations

import logging
from typing import Final

from portward.base.instance import command

# Damaged rows that are kept, so that each is counted once. If there are more, the table is useless anyway, and
# each further row is counted as often as it is read.
_MAX_DISTINCT: Final = 10_000
# Rows that are logged. The counter has the total.
_MAX_LOGGED: Final = 20

_log = logging.getLogger("portward.table")


class Damage:
    """The damaged rows that one process has found."""

    def __init__(self) -> None:
        self.rows = 0
        self._known: set[str] = set()
        # The logged lines, for `portward status`.
        self.first: list[str] = []

    def found(self, what: str) -> None:
        """Counts and logs a damaged row, once. `what` names the row and says what holds instead."""
        if what in self._known:
            return
        self.rows += 1
        if len(self._known) < _MAX_DISTINCT:
            self._known.add(what)
        if self.rows <= _MAX_LOGGED:
            self.first.append(what)
            _log.error("the policy table is damaged: %s; `%s` says what to do", what, command("check"))
