"""What `portward exemption` prints of an exemption, in lines."""

from __future__ import annotations

from datetime import datetime

from portward.base.words import counted
from portward.exemptions.lifecycle import Case, State, no_path, useless
from portward.exemptions.service import ExemptionRow
from portward.model import Details, Exemption, ExemptionState, FraudCheck
from portward.policy.preset import Preset


def lines(exemption: Exemption) -> list[str]:
    """What is on record, a line for each field that says something."""
    details = exemption.details or Details()
    told = [
        ("state", exemption.state.value),
        ("requested", _time(exemption.requested)),
        ("why", exemption.justification),
        ("software", details.mail_software),
        ("volume", f"{counted(details.volume, 'message')} a day" if details.volume else ""),
        ("rdns", details.reverse_dns),
        ("domain", ", ".join(item.value.upper() for item in details.authentication)),
        ("terms", "accepted" if details.terms_accepted else ""),
        ("checked", checked(exemption)),
        ("decided", _time(exemption.decided)),
        ("by", exemption.by),
        ("reason", exemption.reason),
        ("until", _time(exemption.until)),
        ("limit", str(exemption.limit) if exemption.limit and exemption.state is ExemptionState.GRANTED else ""),
    ]
    return [f"{name:<10}{in_a_line(text)}" for name, text in told if text]


def in_a_line(text: str) -> str:
    """A text of several lines as one line."""
    return " ".join(text.split())


def next_step(row: ExemptionRow, preset: Preset, now: datetime, *, limited: bool = False) -> str:
    """The next step for the support engineer. `limited`: it is asked for a limit that was changed just now."""
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


def checked(exemption: Exemption) -> str:
    if exemption.fraud_check is None:
        return ""
    note = f": {exemption.fraud_note}" if exemption.fraud_note else ""
    return f"{exemption.fraud_check.value}{note}"


def _time(at: datetime | None) -> str:
    return "" if at is None else at.strftime("%Y-%m-%d %H:%M:%SZ")
