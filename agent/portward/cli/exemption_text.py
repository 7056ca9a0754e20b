"""The output of `portward exemption`, as lines and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from portward.base.words import counted, utc
from portward.exemptions.lifecycle import Case, State, no_path, state_of, state_text, useless
from portward.exemptions.service import ExemptionChange, ExemptionRow
from portward.model import Details, Exemption, ExemptionState, FraudCheck
from portward.policy.preset import Preset


def row_json(row: ExemptionRow) -> dict[str, Any]:
    """An exemption of a list, for `--json`."""
    owner = row.owner
    return {
        "subscription": row.subscription,
        "name": None if owner is None else owner.name,
        "offer": None if owner is None else owner.offer,
        "state": row.state,
        "exemption": row.exemption,
    }


def change_json(change: ExemptionChange, took_s: float | None) -> dict[str, Any]:
    """A change, for `--json`. `took_s` is as for `change_lines`."""
    exemption, written = change.exemption, change.written
    found = {"revision": written.revision, "state": state_of(exemption, written.at), "exemption": exemption}
    return found if took_s is None else found | {"enforced_after_ms": milliseconds(took_s)}


def change_lines(
    change: ExemptionChange, preset: Preset, behind: str, took_s: float | None, *, limited: bool
) -> Iterator[str]:
    """A change, for people. `behind`: a text if the agent here has an earlier revision; `took_s`: after how many
    seconds the kernel enforced the change, if the verb waited for that; `limited`: only the rate limit was
    changed."""
    exemption, written = change.exemption, change.written
    state = state_of(exemption, written.at)
    name = f" ({change.subscription.name})" if change.subscription.name else ""
    yield (
        f"exemption of {change.subscription.id}{name}: {state_text(state, exemption)}, "
        f"as revision {written.revision}{enforced(took_s)}"
    )
    if behind:
        yield f"  {behind}"
    if exemption.reason:
        yield f"  reason    {one_line(exemption.reason)}"
    if exemption.fraud_check is not None:
        yield f"  checked   {one_line(_checked(exemption))}"
    if exemption.limit is not None and state is State.GRANTED:
        yield f"  limit     {exemption.limit}"
    row = ExemptionRow(change.subscription.id, change.subscription, exemption, state)
    yield f"  next      {next_step(row, preset, written.at, limited=limited)}"


def lines(exemption: Exemption) -> list[str]:
    """The record, with a line for each field that has a value."""
    details = exemption.details or Details()
    fields = [
        ("state", exemption.state.value),
        ("requested", _time(exemption.requested)),
        ("why", exemption.justification),
        ("software", details.mail_software),
        ("volume", f"{counted(details.volume, 'message')} a day" if details.volume else ""),
        ("rdns", details.reverse_dns),
        ("domain", ", ".join(item.value.upper() for item in details.authentication)),
        ("terms", "accepted" if details.terms_accepted else ""),
        ("checked", _checked(exemption)),
        ("decided", _time(exemption.decided)),
        ("by", exemption.by),
        ("reason", exemption.reason),
        ("until", _time(exemption.until)),
        ("limit", str(exemption.limit) if exemption.limit and exemption.state is ExemptionState.GRANTED else ""),
    ]
    return [f"{name:<10}{one_line(text)}" for name, text in fields if text]


def next_step(row: ExemptionRow, preset: Preset, now: datetime, *, limited: bool = False) -> str:
    """The next step for the support engineer. `limited`: only the rate limit was changed just now."""
    if row.owner is None:
        return "nothing: the store has no such subscription any more"
    case, id_ = Case(preset, row.owner, row.exemption, now), row.subscription
    match row.state:
        case State.REQUESTED if why := no_path(case):
            return f"no grant is possible: {why}; `portward exemption reject {id_} --reason TEXT` ends the request"
        case State.REQUESTED:
            check = "" if row.exemption.fraud_check is FraudCheck.PASS else " --fraud-check TEXT"
            return f"decide: `portward exemption grant {id_}{check}`, or `reject {id_} --reason TEXT`"
        case State.GRANTED if why := useless(case):
            return f"the grant makes no difference: {why}"
        case State.GRANTED if limited:
            return "nothing: it counts at once, for the machines that the exemption counts for already"
        case State.GRANTED if preset.restart:
            return (
                f"it counts for machines started after it was granted: {preset.restart}; `portward attachment "
                "started` records that"
            )
        case State.GRANTED:
            return "nothing: it counts at once"
        case _ if why := no_path(case):
            return f"no new request is possible: {why}"
        case _:
            return f"a new request is possible: `portward exemption request {id_}`"


def owner_text(row: ExemptionRow) -> str:
    """Name and offer of the subscription."""
    if row.owner is None:
        return "(no such subscription any more)"
    return f"{row.owner.name} ({row.owner.offer})".strip()


def none_listed(total: int) -> str:
    """The line of an empty list, if the store has `total` exemptions."""
    return f"none of {counted(total, 'exemption')} is such a one" if total else "the store has no exemption"


def enforced(took_s: float | None) -> str:
    """The end of a line: after how long the change was enforced; empty if the verb did not wait."""
    return "" if took_s is None else f", enforced after {took_s * 1000:.1f} ms"


def milliseconds(took_s: float | None) -> float | None:
    """Seconds → milliseconds with three digits."""
    return None if took_s is None else round(took_s * 1000, 3)


def one_line(text: str) -> str:
    """A text of several lines as one line."""
    return " ".join(text.split())


def _checked(exemption: Exemption) -> str:
    if exemption.fraud_check is None:
        return ""
    note = f": {exemption.fraud_note}" if exemption.fraud_note else ""
    return f"{exemption.fraud_check.value}{note}"


def _time(at: datetime | None) -> str:
    return "" if at is None else utc(at)
