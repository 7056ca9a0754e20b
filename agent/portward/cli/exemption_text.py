"""What `portward exemption` prints of an exemption, in lines."""

from __future__ import annotations

from datetime import datetime

from portward.exemptions import State
from portward.model import Details, Exemption, ExemptionState, FraudCheck
from portward.policy.preset import Preset
from portward.words import counted


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
    """What somebody wrote, which may have several lines."""
    return " ".join(text.split())


def next_step(state: State, exemption: Exemption, preset: Preset) -> str:
    """The next step for the support engineer."""
    id_ = exemption.subscription
    match state:
        case State.REQUESTED:
            check = "" if exemption.fraud_check is FraudCheck.PASS else " --fraud-check TEXT"
            return f"decide: `portward exemption grant {id_}{check}`, or `reject {id_} --reason TEXT`"
        case State.GRANTED if preset.restart:
            return (
                f"it counts for machines started after it was granted: {preset.restart}; `portward attachment "
                "started` records that"
            )
        case State.GRANTED:
            return "nothing: it counts at once"
        case _:
            return f"a new request is possible: `portward exemption request {id_}`"


def checked(exemption: Exemption) -> str:
    if exemption.fraud_check is None:
        return ""
    note = f": {exemption.fraud_note}" if exemption.fraud_note else ""
    return f"{exemption.fraud_check.value}{note}"


def _time(at: datetime | None) -> str:
    return "" if at is None else at.strftime("%Y-%m-%d %H:%M:%SZ")
