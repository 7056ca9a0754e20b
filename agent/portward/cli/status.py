"""`portward status` and `portward top`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, Protocol

import typer

from portward.base import characters
from portward.base.words import counted, times
from portward.cli.options import DEFAULT_PATH, ConfigOption, JsonOption, seconds, warn
from portward.cli.streams import echo, echo_json, echo_text
from portward.config.keys import Config
from portward.daemon import settings
from portward.daemon.runtime import age_of, hidden, read_status, running
from portward.errors import PortwardError

if TYPE_CHECKING:
    from portward.ops.top_talkers import Talker

# The daemon writes its status each second: an older one is told as old.
_STALE_SECONDS = 5.0
# So long after it has bound its queue a worker may not have been asked yet.
_UNASKED_S: Final = 5.0
# A step of the policy thread that takes longer is shown.
_LONG_SECONDS: Final = 1.0
# The columns of `top` that hold numbers.
_NUMBERS: Final = (3, 4)


class Show(Protocol):
    """Shows one reading of `top`."""

    def __call__(self, rows: list[Talker], *, first: bool) -> None:
        """See `_screen`."""


def status(json: JsonOption = False, config: ConfigOption = DEFAULT_PATH) -> None:
    """Show whether the agent runs here, what it enforces, and what is wrong.

    Exit code 1 where no agent runs.

    Example: portward status --json
    """
    found = settings.settings(config)
    told = _status(found.config)
    if json:
        echo_json(told | {"remarks": found.remarks})
        return
    warn(found.remarks)
    for line in _lines(told):
        echo(line)


def top(
    interval: Annotated[
        float,
        typer.Option("--interval", metavar="SECONDS", callback=seconds, help="Seconds between readings."),
    ] = 1.0,
    count: Annotated[int, typer.Option("--count", metavar="N", min=0, help="Readings, 0 for ever.")] = 0,
    config: ConfigOption = DEFAULT_PATH,
) -> None:
    """Show which sources send to port 25 now: packets a second by source, as the kernel counts them.

    On a terminal the busiest of them, over and over in one place; else all of them, reading by reading.

    Example: portward top --interval 2
    """
    from portward.ops.top_talkers import TopTalkers  # noqa: PLC0415 # only this verb needs it

    found = settings.settings(config)
    warn(found.remarks)
    talkers = TopTalkers(found.config)
    with _screen() as show:
        show(talkers.read(time.monotonic()), first=True)
        readings = 0
        while count == 0 or readings < count:
            time.sleep(interval)
            show(talkers.read(time.monotonic()), first=False)
            readings += 1


@contextlib.contextmanager
def _screen() -> Iterator[Show]:
    """What shows rows: in place on a terminal, cut off at its edges; else as plain lines, without the first
    reading, which has no rates."""
    from rich.console import Console  # noqa: PLC0415 # only `top` needs these
    from rich.live import Live  # noqa: PLC0415 # as above
    from rich.text import Text  # noqa: PLC0415 # as above

    console = Console()
    if not console.is_terminal:
        yield lambda rows, *, first: None if first else echo_text("\n".join(_top_lines(rows)))
        return
    with Live(console=console, auto_refresh=False, transient=False) as live:

        def show(rows: list[Talker], *, first: bool) -> None:  # it is replaced by the next one
            lines = _top_lines(rows[: max(5, console.height - 6)])
            live.update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"), refresh=True)

        yield show
    console.print()


def _status(config: Config) -> dict[str, Any]:
    if hidden(config.table):
        raise PortwardError(f"table {config.table}: only root and the agent's own user may see its status")
    pid = running(config.table)
    if pid is None:
        from portward.ops import rules  # noqa: PLC0415 # a running agent is not looked up in the kernel

        raise PortwardError(f"no agent runs on table {config.table}: {rules.without_agent(config)}")
    told = read_status(config.table)
    if told is None:
        raise PortwardError(f"agent {pid} is starting: no status yet")
    return told | _in_step(config, told)


def _in_step(config: Config, told: dict[str, Any]) -> dict[str, Any]:
    """Whether the table stands at what the store holds at this moment, and if not, what the store holds. The agent
    looks once a second, and while it reads another history anew its word is older."""
    if told["store_error"]:
        return {}
    from portward.ops.host import behind_store  # noqa: PLC0415 # it loads what asks the kernel

    why = behind_store(config)
    return {"in_step": False, "newest": why} if why else {}


def _lines(told: dict[str, Any]) -> list[str]:
    age = age_of(told)
    found = [
        f"portward {told['version']}, process {told['pid']}, up {_span(_uptime(told))}, "
        f"mode {told['mode']}, preset {told['preset']}",
        f"policy    revision {told['revision']}{_behind(told)}, "
        f"{counted(told['attachments'], 'attachment')} of {counted(told['subscriptions'], 'subscription')}",
        f"store     {told['store']}{_store(told)}",
        f"queue     {told['queue_path']}; " + ", ".join(map(_worker, told["workers"])),
        "kernel    remembers "
        + (", ".join(f"{n} {name}" for name, n in told["remembered"].items() if n) or "nobody"),
    ]
    found.append(_self_check(told["self_check"], age))
    guard = told.get("guard")
    if guard and guard["loaded"]:
        found.append(f"guard     loaded, what is forwarded is judged again: {'; '.join(guard['why'])}")
    elif guard and told["ruleset_error"]:
        found.append("guard     not loaded: no ruleset is")
    elif guard:
        found.append("guard     not loaded: nobody else translates packets here")
    for segment in told["segments"]:
        seen = (
            f"{counted(segment['packets'], 'packet')} to the judged ports"
            if segment["packets"]
            else (
                "no packet to the judged ports has passed here since the agent's start: does its traffic cross "
                "this host's own stack?"
            )
        )
        found.append(f"segment   {segment['name']}{' (observed)' if segment['observed'] else ''}: {seen}")
    if not told["segments"]:
        found.append("segment   NONE: no interface matches `segments`")
    if age > _STALE_SECONDS:
        found.insert(0, f"this is {age:.0f} s old: the agent does not report")
    if held := told["held"]:
        found[:0] = _held(held)
    found[:0] = [f"STACKED   {line}" for line in told.get("stacked", ())]
    if dropped := told.get("tunnels_dropped"):
        found.append(f"tunnels   {counted(dropped, 'packet')} from segments to tunnels that end here: dropped")
    if told["ruleset_error"]:
        found.insert(0, f"THE RULESET IS NOT IN FORCE, port 25 may be open: {told['ruleset_error']}")
    found[:0] = [_failing(one) for one in told.get("failing", ())]
    found[:0] = [f"STUCK     {line}" for line in told.get("stuck", ())]
    if told["reload_failed"]:
        found.append("config    the last reload was refused: the configuration before is in force (see the log)")
    # An agent of an older version does not write these.
    if problem := told.get("metrics_error"):
        found.append(f"metrics   CANNOT BE SCRAPED at {problem}: it is tried again")
    if damaged := told.get("table_rows_damaged"):
        rows = counted(damaged, "DAMAGED ROW", "DAMAGED ROWS")
        found.append(f"table     {rows}, whose sources are denied: see `portward check`")
        found += [f"          {one}" for one in told.get("table_rows_damaged_first", ())]
    found += _unreadable(told.get("records_unreadable") or {"number": 0})
    if replaced := told.get("history_replaced"):
        found.append(
            f"history   {counted(replaced, 'time')} the store had another history than the policy (a restored "
            "backup?), and was read anew"
        )
    if told["ruleset_repairs"]:
        found.append(
            f"ruleset   put back {times(told['ruleset_repairs'])}: another program had changed it, or the kernel "
            "had refused a change"
        )
    return found


def _unreadable(records: dict[str, Any]) -> list[str]:
    """The records of the store that cannot be read."""
    if not records["number"]:
        return []
    number = counted(records["number"], "RECORD", "RECORDS")
    if records.get("more"):
        number = f"AT LEAST {number}"
    return [
        f"records   {number} OF THE STORE CANNOT BE READ: what was in "
        "force before stays; without that, the sources are denied (`portward check` lists all)",
        *(f"          {one}" for one in records["first"]),
    ]


def _behind(told: dict[str, Any]) -> str:
    """What is to be said if the kernel acts on another revision than the table. An older agent does not say."""
    enforced = told.get("enforced_revision", told["revision"])
    if enforced == told["revision"]:
        return ""
    return f" in the table, NOT enforced yet: the kernel acts on revision {enforced}"


def _worker(worker: dict[str, Any]) -> str:
    """What a worker does. An agent of an older version says only whether its process is there."""
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


def _failing(one: dict[str, Any]) -> str:
    """A step of the agent that fails by an error that nobody expects."""
    again = "`systemctl reload portward` tries it again" if one["step"] == "reload" else "it is tried again"
    return (
        f"FAILING   step {one['step']}: {one['error']}, {times(one['times'])} in a row, for "
        f"{_span(one['seconds'])}: {again}, see the log"
    )


def _held(held: dict[str, Any]) -> Iterator[str]:
    """What is held, and what behind it is in force."""
    whole = "the store has another history (a restored backup?), and all of it up to " if held.get("whole") else ""
    yield (
        f"HELD      {whole}revision {held['revision']} would flip the verdict of {held['flipped']} of "
        f"{counted(held['subscriptions'], 'subscription')}: `portward apply --confirm` lets it through"
    )
    if held.get("ahead", 0) > held["revision"]:
        yield (
            f"          denials in later revisions are enforced, up to revision {held['ahead']}; everything else "
            "in them waits"
        )


def _store(told: dict[str, Any]) -> str:
    """What follows the store's URL: whether the agent is in step. An older agent does not write all of it."""
    waits = f"; {told['store_waits']}" if told.get("store_waits") else ""
    if told["store_error"]:
        # The error of a store names it too.
        error = told["store_error"].removeprefix(f"{told['store']}: ")
        return f": {error}; the last known policy stays in force{waits}"
    work = told.get("working")
    if work is not None and work["seconds"] >= _LONG_SECONDS:
        return f", {work['what']} for {_span(work['seconds'])} now: later changes wait{waits}"
    if told.get("in_step", True):
        return f", in step{waits}"
    if told["held"]:
        return f", NOT in step: revision {told['held']['revision']} is held{waits}"
    newest = (
        f"{told['newest']}, not loaded yet" if told.get("newest") else "it has changes that are not loaded yet"
    )
    return f", NOT in step: {newest}{waits}"


def _uptime(told: dict[str, Any]) -> float:
    """For how many seconds the agent has been running; an older one says only times, by the wall clock."""
    if "uptime" in told:
        return float(told["uptime"])
    at, started = datetime.fromisoformat(told["at"]), datetime.fromisoformat(told["started"])
    return max(0.0, (at - started).total_seconds())


def _self_check(told: dict[str, Any], written: float) -> str:
    """When all workers last answered, and the last difference that was found; `written` is the status's age."""
    age, number = told.get("age"), sum(told["divergences"].values())
    when = (
        "no worker has answered yet"
        if told["at"] is None
        else "every worker has answered"
        if age is None  # an older agent
        else f"every worker answered {_span(age + written)} ago"
    )
    last = (
        f"; {counted(number, 'difference')} so far, the last {told['last_difference']}"
        if number
        else ", no difference found"
    )
    return f"check     {when}{last}"


def _top_lines(rows: list[Talker]) -> list[str]:
    cells = [("segment", "source", "verdict", "packets/s", "packets", "subscription")]
    cells += [
        (row.segment, row.source, row.verdict, f"{row.rate:.1f}", str(row.packets), characters.shown(row.owner))
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place in _NUMBERS else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join([f"{number} {unit}" for number, unit in parts if number][:2]) or "0 s"
