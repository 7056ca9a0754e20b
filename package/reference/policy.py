"""The pages on presets, on the inventory and on reason codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from package.reference.tables import HERE, code, enum_table, sentence, struct_table, table
from portward.base import limits
from portward.base.codes import REASON_NUMBER
from portward.config.documents import network_text
from portward.model import Attachment, Details, Exemption, RateLimit, Reason, Subscription
from portward.policy import presets
from portward.policy.preset import ExemptionPath, Offer, Preset, ReviewQuestion
from portward.policy.remedy import reason_text

# The inventory that the page shows; a test applies it.
EXAMPLE: Final[Path] = HERE / "inventory.yaml"
_OVERVIEW: Final = ("preset", "ports", "offer", "a new customer", "a grant counts")
_NEW: Final = {
    ExemptionPath.NOT_NEEDED: "may send",
    ExemptionPath.SELF_SERVICE: "is blocked, and may ask: the request is decided at once",
    ExemptionPath.REVIEW: "is blocked, and may ask: a person decides",
    ExemptionPath.NEVER: "is blocked, and cannot get an exemption",
}


def presets_fills() -> dict[str, object]:
    """The values for the page on presets."""
    return {
        "preset": struct_table(Preset),
        "offer": struct_table(Offer),
        "paths": enum_table(ExemptionPath, "`exemption`"),
        "asked": enum_table(ReviewQuestion, "`asks`"),
        "overview": table(_OVERVIEW, (row for name in presets.bundled() for row in _overview(presets.load(name)))),
        "bundled": "\n".join(_bundled(presets.load(name)) for name in presets.bundled()),
    }


def inventory_fills() -> dict[str, object]:
    """The values for the page on the inventory."""
    return {
        "example": EXAMPLE.read_text(),
        "subscription": struct_table(Subscription),
        "attachment": struct_table(Attachment),
        "exemption": struct_table(Exemption),
        "details": struct_table(Details),
        "limit": struct_table(RateLimit),
        "first": limits.FIRST_TIME.date(),
        "last": limits.LAST_TIME.date(),
        "name": limits.MAX_NAME_CHARS,
        "long": limits.MAX_TEXT_CHARS,
    }


def reasons_fills() -> dict[str, object]:
    """The values for the page on reason codes."""
    rows = (
        (code(one), str(REASON_NUMBER[one]), "allow" if one.allows else "deny", sentence(reason_text(one)))
        for one in Reason
    )
    return {"reasons": table(("code", "number", "verdict", "meaning"), rows)}


def _bundled(preset: Preset) -> str:
    rows: list[tuple[str, str]] = [
        ("source", f"{preset.source} ({preset.source_date})"),
        ("ports", ", ".join(map(str, preset.ports))),
        ("internal", ", ".join(code(network_text(net)) for net in preset.internal)),
        ("restart", preset.restart or "not needed for a grant to count"),
        ("paas_blocked", json.dumps(preset.paas_blocked)),
        ("request", preset.request or "–"),
    ]
    default = " This is the default." if preset.name == presets.DEFAULT else ""
    return f"### {preset.name}\n\n{sentence(preset.title)}{default}\n\n{table(('key', 'value'), rows)}\n" + table(
        ("offers", "exemption", "requires", "a request states"), (_offer(*offer) for offer in _offers(preset))
    )


def _offers(preset: Preset) -> list[tuple[str, Offer]]:
    """The ids of each rule, as a reader sees them, with the rule."""
    offers = [(", ".join(map(code, offer.ids)), offer) for offer in preset.offers]
    if preset.otherwise is not None:
        offers.append(("every other offer" if offers else "every offer", preset.otherwise))
    return offers


def _overview(preset: Preset) -> Iterator[tuple[str, ...]]:
    """For each rule: what happens to a customer of today."""
    link, ports = f"[{preset.name}](#{preset.name})", ", ".join(map(str, preset.ports))
    counts = "after a restart of the machine" if preset.restart else "at once"
    for ids, offer in _offers(preset):
        asks = offer.exemption in (ExemptionPath.SELF_SERVICE, ExemptionPath.REVIEW)
        yield link, ports, ids, _NEW[offer.exemption], counts if asks else "–"
    if preset.otherwise is None:
        yield link, ports, "every other offer", _NEW[ExemptionPath.NEVER], "–"


def _offer(ids: str, offer: Offer) -> Iterator[str]:
    yield f"{ids}: {offer.title}"
    before = f"; always allowed if created before {offer.created_before}" if offer.created_before else ""
    yield code(offer.exemption) + before
    yield "; ".join(offer.requires) or "–"
    yield ", ".join(map(code, offer.asks)) or "–"
