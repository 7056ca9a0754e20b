"""The agent's status as lines for people. Keys that are read with `get` are missing in the status of an older
agent."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final

from portward.base.instance import command, unit
from portward.base.words import counted, times
from portward.ops.host_state import STALE_STATUS_S

# A worker gets its first packet, at the latest the self-check's, within this time after it has bound its queue.
_UNASKED_S: Final = 5.0
# A step of the policy thread that takes longer is shown.
_LONG_S: Final = 1.0

_Status = dict[str, Any]


def lines(status: _Status, age_s: float) -> list[str]:
    """The lines, the most urgent ones first. `status` is the content of status.json, and `in_step` and `newest`;
    `age_s` is its age."""
    return [*_alarms(status, age_s), *_summary(status, age_s), *_segments(status), *_remarks(status)]


def _alarms(status: _Status, age_s: float) -> Iterator[str]:
    for line in status.get("stuck", ()):
        yield f"STUCK     {line}"
    for one in status.get("failing", ()):
        yield failing(one)
    if status["ruleset_error"]:
        yield f"THE RULESET IS NOT IN FORCE, port 25 may be open: {status['ruleset_error']}"
    for line in status.get("stacked", ()):
        yield f"STACKED   {line}"
    if held := status["held"]:
        yield from _held(held)
    if age_s > STALE_STATUS_S:
        yield f"this is {age_s:.0f} s old: the agent does not report"


def _summary(status: _Status, age_s: float) -> Iterator[str]:
    yield (
        f"portward {status['version']}, process {status['pid']}, up {_span(_uptime(status))}, "
        f"mode {status['mode']}, preset {status['preset']}"
    )
    yield (
        f"policy    revision {status['revision']}{_behind(status)}, "
        f"{counted(status['attachments'], 'attachment')} of {counted(status['subscriptions'], 'subscription')}"
    )
    yield f"store     {status['store']}{store(status)}"
    yield f"queue     {status['queue_path']}; " + ", ".join(map(_worker, status["workers"]))
    cached = ", ".join(f"{n} {name}" for name, n in status["remembered"].items() if n)
    yield f"kernel    caches {cached or 'no verdict'}"
    yield _self_check(status["self_check"], age_s)
    guard = status.get("guard")
    if guard and guard["loaded"]:
        yield f"guard     loaded, forwarded packets are classified again: {'; '.join(guard['why'])}"
    elif guard and status["ruleset_error"]:
        yield "guard     not loaded: no ruleset is"
    elif guard:
        yield "guard     not loaded: no other program translates packets here"


def _segments(status: _Status) -> Iterator[str]:
    for segment in status["segments"]:
        if segment.get("interfaces") == 0:
            yield f"segment   {segment['name']}: this group has NO INTERFACE here now"
            continue
        seen = (
            f"{counted(segment['packets'], 'packet')} to the policy ports"
            if segment["packets"]
            else (
                "no packet to the policy ports has passed here since the agent's start: does its traffic cross "
                "this host's own stack?"
            )
        )
        of = "" if segment.get("index", 0) is not None else f" ({counted(segment['interfaces'], 'interface')})"
        yield f"segment   {segment['name']}{of}{' (observed)' if segment['observed'] else ''}: {seen}"
    if not status["segments"]:
        yield "segment   NONE: no interface matches `segments`"


def _remarks(status: _Status) -> Iterator[str]:
    if dropped := status.get("tunnels_dropped"):
        yield f"tunnels   {counted(dropped, 'packet')} from segments to tunnels that end here: dropped"
    if status["reload_failed"]:
        yield "config    the last reload was refused: the configuration before is in force (see the log)"
    if problem := status.get("metrics_error"):
        yield f"metrics   CANNOT BE SCRAPED at {problem}: it is tried again"
    if damaged := status.get("table_rows_damaged"):
        rows = counted(damaged, "DAMAGED ROW", "DAMAGED ROWS")
        yield f"table     {rows}, whose sources are denied: see `{command('check')}`"
        yield from (f"          {one}" for one in status.get("table_rows_damaged_first", ()))
    yield from unreadable(status.get("records_unreadable") or {"number": 0})
    if replaced := status.get("history_replaced"):
        yield (
            f"history   {counted(replaced, 'time')} the store had another history than the policy (a restored "
            "backup?), and was read anew"
        )
    if status["ruleset_repairs"]:
        yield (
            f"ruleset   put back {times(status['ruleset_repairs'])}: another program had changed it, or the "
            "kernel had refused a change"
        )


def unreadable(records: dict[str, Any]) -> Iterator[str]:
    """The lines on the records of the store that cannot be read."""
    if not records["number"]:
        return
    number = counted(records["number"], "RECORD", "RECORDS")
    if records.get("more"):
        number = f"AT LEAST {number}"
    yield (
        f"records   {number} OF THE STORE CANNOT BE READ: what was in "
        f"force before stays; without that, the sources are denied (`{command('check')}` lists all)"
    )
    yield from (f"          {one}" for one in records["first"])


def _behind(status: _Status) -> str:
    """The end of the line on the policy, if the kernel enforces another revision than the table has."""
    enforced = status.get("enforced_revision", status["revision"])
    if enforced == status["revision"]:
        return ""
    return f" in the table, NOT enforced yet: the kernel acts on revision {enforced}"


def _worker(worker: dict[str, Any]) -> str:
    """The state of a worker. An older agent writes only whether its process runs."""
    state = worker.get("state", "answers" if worker["running"] else "trying")
    since = _span(worker.get("seconds", 0))
    words = {
        "answers": "runs",
        "unanswered": "has bound its queue"
        + (f" and HAS NOT ANSWERED for {since}" if worker.get("seconds", 0) >= _UNASKED_S else ", not asked yet"),
        "starting": f"is starting, for {since}",
        "trying": f"IS DOWN for {since}, and is started again: {worker.get('why', '')}".rstrip(": "),
    }
    restarts = f" ({counted(worker['restarts'], 'restart')})" if worker["restarts"] else ""
    return f"worker {worker['queue']} {words[state]}{restarts}"


def failing(one: dict[str, Any]) -> str:
    """The line on a step of the agent that fails with an unexpected error."""
    again = f"`systemctl reload {unit()}` tries it again" if one["step"] == "reload" else "it is tried again"
    return (
        f"FAILING   step {one['step']}: {one['error']}, {times(one['times'])} in a row, for "
        f"{_span(one['seconds'])}: {again}, see the log"
    )


def _held(held: dict[str, Any]) -> Iterator[str]:
    """The lines on a revision that waits for a confirmation, and on what of later revisions is in force."""
    whole = "the store has another history (a restored backup?), and all of it up to " if held.get("whole") else ""
    yield (
        f"HELD      {whole}revision {held['revision']} would flip the verdict of {held['flipped']} of "
        f"{counted(held['subscriptions'], 'subscription')}: `{command('apply --confirm')}` lets it through"
    )
    if held.get("ahead", 0) > held["revision"]:
        yield (
            f"          denials in later revisions are enforced, up to revision {held['ahead']}; everything else "
            "in them waits"
        )


def store(status: _Status) -> str:
    """The end of the line on the store: whether the agent is in step with it."""
    waits = f"; {status['store_waits']}" if status.get("store_waits") else ""
    if status["store_error"]:
        # The error of a store begins with the store's name too.
        error = status["store_error"].removeprefix(f"{status['store']}: ")
        return f": {error}; the last known policy stays in force{waits}"
    work = status.get("working")
    if work is not None and work["seconds"] >= _LONG_S:
        return f", {work['what']} for {_span(work['seconds'])} now: later changes wait{waits}"
    if status.get("in_step", True):
        return f", in step{waits}"
    if status["held"]:
        return f", NOT in step: revision {status['held']['revision']} is held{waits}"
    newest = (
        f"{status['newest']}, not loaded yet" if status.get("newest") else "it has changes that are not loaded yet"
    )
    return f", NOT in step: {newest}{waits}"


def _uptime(status: _Status) -> float:
    """Seconds since the agent started. An older agent writes only the times of the wall clock."""
    if "uptime" in status:
        return float(status["uptime"])
    at, started = datetime.fromisoformat(status["at"]), datetime.fromisoformat(status["started"])
    return max(0.0, (at - started).total_seconds())


def _self_check(check: dict[str, Any], age_s: float) -> str:
    """When all workers last answered, and the last difference that was found. `age_s` is the status's age."""
    age, number = check.get("age"), sum(check["divergences"].values())
    when = (
        "no worker has answered yet"
        if check["at"] is None
        else "every worker has answered"
        if age is None  # an older agent
        else f"every worker answered {_span(age + age_s)} ago"
    )
    last = (
        f"; {counted(number, 'difference')} so far, the last {check['last_difference']}"
        if number
        else ", no difference found"
    )
    return f"check     {when}{last}"


def _span(seconds: float) -> str:
    """A duration in its two largest units: `2 d 3 h`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join([f"{number} {unit}" for number, unit in parts if number][:2]) or "0 s"
