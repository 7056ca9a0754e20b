"""Finds the exemptions that an id, a name, a list in a file or an offer means."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Final
from uuid import UUID

from portward.base.clock import utc_now
from portward.base.words import counted
from portward.config.documents import nearest
from portward.config.files import read_text
from portward.errors import InputError, PortwardError, together
from portward.exemptions.lifecycle import State
from portward.exemptions.service import ExemptionService
from portward.policy.preset import Preset
from portward.store.lookup import records_of
from portward.store.protocol import Store

# Enough for a million ids of 36 characters, with comments.
_MAX_LIST_BYTES: Final = 64 * 1024 * 1024
# If several subscriptions have the name, the error lists this many ids.
_NAMED: Final = 5
# This many bad lines of a list are reported; more are counted.
_MAX_LINES: Final = 20


def id_of(text: str, store: Store) -> UUID:
    """The id in `text`, or that of the only subscription with this name. Raises InputError if no subscription or
    more than one has the name."""
    try:
        return UUID(text)
    except ValueError:
        ids = [one.id for one in records_of(store, text)[1]] if text.strip() else []
    if not ids:
        raise InputError(
            f"{text!r} is no subscription's id like 11111111-0000-4000-8000-000000000001, and no subscription in "
            "the store has exactly this name",
            field="SUBSCRIPTION",
        )
    if len(ids) == 1:
        return ids[0]
    few = ", ".join(sorted(map(str, ids))[:_NAMED]) + (
        f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    )
    raise InputError(
        f"{text!r} is the name of {counted(len(ids), 'subscription')}; write the id instead: {few}",
        field="SUBSCRIPTION",
    )


def listed(service: ExemptionService, file: Path) -> list[UUID]:
    """The ids in a file, one on each line; a # begins a comment. Raises InputError for a line that is not an id,
    and PortwardError with each line whose exemption cannot be revoked."""
    lines: dict[UUID, int] = {}
    for number, line in enumerate(read_text(file, _MAX_LIST_BYTES).splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            lines.setdefault(UUID(text), number)
        except ValueError:
            raise InputError(f"{text!r} is no subscription's id", file=str(file), line=number) from None
    refused = service.not_revocable(lines)
    found = [PortwardError(f"{file}:{lines[id_]}: {why}") for id_, why in islice(refused, _MAX_LINES)]
    if more := sum(1 for _ in refused):
        found.append(PortwardError(f"{file}: and {counted(more, 'line')} more like these"))
    if found:
        raise together(found)
    return list(lines)


def granted(service: ExemptionService, offer: str) -> list[UUID]:
    """The subscriptions with this offer and a grant."""
    return [
        row.subscription
        for row in service.rows(utc_now())
        if row.state is State.GRANTED and row.owner is not None and row.owner.offer == offer
    ]


def known_offer(preset: Preset, offer: str | None) -> None:
    """Raises InputError if the preset has no rule for the offer: it is probably mistyped."""
    if offer is not None and preset.offer(offer) is None:
        known = [id_ for entry in preset.offers for id_ in entry.ids]
        raise InputError(f"the preset {preset.name} knows no {offer!r}; {nearest(offer, known)}", field="--offer")


def confirm(count: int, confirmed: int | None) -> None:
    """Raises PortwardError unless exactly this count is confirmed. A count of 0 needs no confirmation."""
    if confirmed == count or (confirmed is None and not count):
        return
    if not count:
        raise PortwardError(f"there is nothing to revoke, and not {confirmed}; nothing was written")
    was = "" if confirmed is None else f", and not {confirmed}"
    raise PortwardError(
        f"this would revoke {counted(count, 'exemption')}{was}; nothing was written: --confirm {count} does it"
    )
