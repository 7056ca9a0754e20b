"""The key `confirmed`: how an operator confirms, on the store, a change that a gateway holds back. Pure.

Its value is one of

    <revision>                      this revision and all before it may flip any number of subscriptions
    alone <revision>                this one revision may
    <revision> replaces <hold>      the same, for a gateway whose table comes from another history of the store

The last one is needed after a backup was restored. `<hold>` names what the gateway holds, in hex. The name is new
for each hold, so no backup can contain a confirmation of it.
"""

from __future__ import annotations

import re
from typing import Final

from portward.store.values import Put

CONFIRMED: Final = "confirmed"
_ALONE: Final = "alone "
# The length of a hold's name: `table.history` makes it.
HOLD_BYTES: Final = 24
# A revision has up to 19 digits: 2**63 - 1.
_CONFIRMED: Final = re.compile(rf"([0-9]{{1,19}})(?: replaces ([0-9a-f]{{{2 * HOLD_BYTES}}}))?")


def confirmation(revision: int, *, alone: bool = False, hold: bytes | None = None) -> Put:
    """The write that, as part of this revision, confirms it and all before it, or it `alone`. `hold` is the name
    (24 bytes) of what a gateway holds because the store has another history."""
    if alone:
        return Put(CONFIRMED, f"{_ALONE}{revision}")
    return Put(CONFIRMED, str(revision) if hold is None else f"{revision} replaces {hold.hex()}")


def confirmed_alone(body: str | None) -> int:
    """The revision that is confirmed alone; 0 if there is none."""
    return confirmed(body.removeprefix(_ALONE)) if body is not None and body.startswith(_ALONE) else 0


def confirmed(body: str | None) -> int:
    """The revision up to which everything is confirmed; 0 if nothing is, or if the value is not valid."""
    found = _CONFIRMED.fullmatch(body or "")
    return int(found[1]) if found else 0


def confirmed_hold(body: str | None) -> bytes | None:
    """The name (24 bytes) of the confirmed hold; None if the value names none."""
    found = _CONFIRMED.fullmatch(body or "")
    return bytes.fromhex(found[2]) if found and found[2] else None
