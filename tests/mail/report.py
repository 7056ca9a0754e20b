"""The output of a run: a line for each check, and the table of what senders see."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Final

from mail.clients import CLIENTS, Said
from mail.rows import Row, State

COLUMNS: Final = {"drop": State.DROPPED, "reject": State.REJECTED, "limit": State.LIMITED}


class Checks:
    """The number of checks that hold, and the names of those that do not. Several threads may report at once."""

    def __init__(self) -> None:
        self.good = 0
        self.bad: list[str] = []
        self._lock = threading.Lock()

    def hold(self, what: str, wrong: Iterable[str]) -> None:
        """Counts and prints a check. It holds if `wrong` is empty; otherwise the lines of `wrong` are printed."""
        lines = list(wrong)
        with self._lock:
            self.good += not lines
            self.bad += [what] if lines else []
            print(f"{'ok  ' if not lines else 'FAIL'} {what}", flush=True)
            for line in lines:
                print(f"       {line}", flush=True)


def table(rows: Iterable[Row]) -> str:
    """The table of docs/explanation/mail.md: what each software says over IPv4, and after how long."""
    said = {(row.kind.NAME, row.state): row.said.get(4, []) for row in rows}
    lines = [f"| software | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for kind in CLIENTS:
        cells = [cell(said.get((kind.NAME, state), [])) for state in COLUMNS.values()]
        lines.append(f"| {kind.NAME} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(said: list[Said]) -> str:
    """A cell of the table: the result of the mail that took longest."""
    return str(max(said, key=lambda one: one.seconds)).replace("|", "/") if said else "not measured"
