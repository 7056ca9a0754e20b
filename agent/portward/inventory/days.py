"""Days in place of times in an operator's document, as the options of the verbs take them."""

from __future__ import annotations

import re
from datetime import date
from typing import Any, Final

from portward.model import Record
from portward.store.validity import INSTANTS

_DAY: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def with_times(type_: type[Record], item: Any) -> Any:
    """The item of a document for a record of this type, with each day in place of a time replaced by the time at
    which that day begins in UTC. The item itself if it has no such day."""
    if not isinstance(item, dict):
        return item
    days = {name: text for name in INSTANTS[type_] if isinstance(text := item.get(name), str) and _is_day(text)}
    return item | {name: f"{day}T00:00:00Z" for name, day in days.items()} if days else item


def _is_day(text: str) -> bool:
    if _DAY.fullmatch(text) is None:
        return False
    try:
        date.fromisoformat(text)
    except ValueError:  # 2026-02-30: stays as it is, so the message quotes it
        return False
    return True
