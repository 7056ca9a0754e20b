"""`portward exemption …`: requests, decisions and lists of exemptions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import typer

from portward.base import limits
from portward.base.clock import utc_now
from portward.base.words import counted, utc
from portward.cli import exemption_text as texts
from portward.cli.actor import ActorOption, actor_name
from portward.cli.exemption_chosen import confirm as confirm_count
from portward.cli.exemption_chosen import granted, id_of, known_offer, listed
from portward.cli.exemption_options import (
    BurstOption,
    ClockOption,
    IdArgument,
    RateOption,
    ReasonOption,
    UntilOption,
    WaitOption,
    rate_limit,
)
from portward.cli.options import DEFAULT_PATH, ConfigOption, JsonLinesOption, JsonOption, warn_not_following
from portward.cli.streams import echo, echo_json, note_revision
from portward.cli.times import instant
from portward.config.keys import Config
from portward.config.load import load_config
from portward.errors import InputError, printable
from portward.exemptions import fraud
from portward.exemptions.lifecycle import Application, FraudResult, State, state_text
from portward.exemptions.service import ExemptionChange, ExemptionRow, ExemptionService
from portward.model import Authentication, Details, Exemption, ExemptionState, FraudCheck
from portward.ops.behind import Behind, behind_held
from portward.ops.enforcement_waiter import EnforcementWaiter
from portward.policy import presets
from portward.policy.preset import Preset
from portward.store.backends import open_store
from portward.store.codec import readable

app = typer.Typer(
    help="Exemptions: asked for, granted or rejected, revoked.", no_args_is_help=True, rich_markup_mode=None
)

# How long `--wait` waits: a gateway enforces a change within a second, and a large one within a few.
_WAIT_S: Final = 10.0
_STATES: Final = ", ".join(State)


class _Opened(NamedTuple):
    """The store's exemptions, the configuration and the preset, for one verb."""

    service: ExemptionService
    config: Config
    preset: Preset


@app.command()
def request(
    id_: IdArgument,
    justification: Annotated[str, typer.Option(metavar="TEXT", help="Why mail cannot go through a relay.")] = "",
    mail_software: Annotated[str, typer.Option(metavar="TEXT", help="The software that sends the mail.")] = "",
    volume: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=limits.MAX_MESSAGES_PER_DAY, help="Messages a day.")
    ] = None,
    reverse_dns: Annotated[str, typer.Option(metavar="NAME", help="The name that the address points to.")] = "",
    authentication: Annotated[
        list[Authentication] | None,
        typer.Option(metavar="WHAT", help="spf, dkim or dmarc, in place for the sender's domain; more than once."),
    ] = None,
    terms: Annotated[bool, typer.Option("--terms", help="The terms of use are accepted.")] = False,
    until: UntilOption = None,
    actor: ActorOption = None,
    trust_clock: ClockOption = False,
    json: JsonOption = False,
    config: ConfigOption = DEFAULT_PATH,
) -> None:
    """Request an exemption. If the offer allows it, it is decided at once; exit code 1 if it is rejected.

    Example: portward exemption request 11111111-0000-4000-8000-000000000002 --justification "own mail servers"
    """
    details = Details(
        mail_software=mail_software,
        volume=volume,
        reverse_dns=reverse_dns,
        authentication=tuple(dict.fromkeys(authentication or ())),
        terms_accepted=terms,
    )
    asked = Application(justification, None if details == Details() else details, instant(until, "--until"))
    with _open(config, actor, trust_clock=trust_clock) as opened:
        change = opened.service.request(id_of(id_, opened.service.store), asked)
    _print_change(change, opened, json=json)
    if change.exemption.state is ExemptionState.REJECTED:
        raise typer.Exit(1)


@app.command()
def grant(
    id_: IdArgument,
    fraud_check: Annotated[
        str | None,
        typer.Option(
            "--fraud-check", metavar="TEXT", help="How an anti-fraud check was passed, if none is on record."
        ),
    ] = None,
    rate: RateOption = None,
    burst: BurstOption = None,
    until: UntilOption = None,
    actor: ActorOption = None,
    trust_clock: ClockOption = False,
    json: JsonOption = False,
    config: ConfigOption = DEFAULT_PATH,
) -> None:
    """Grant a pending request.

    Example: portward exemption grant 11111111-0000-4000-8000-000000000003 --fraud-check "called back" --rate 60
    """
    limit = rate_limit(rate, burst)
    check = None
    if fraud_check is not None:
        if not fraud_check.strip():
            raise InputError("says nothing: how was it checked, and by whom?", field="--fraud-check")
        check = FraudResult(FraudCheck.PASS, printable(fraud_check))
    with _open(config, actor, trust_clock=trust_clock) as opened:
        id_found, end = id_of(id_, opened.service.store), instant(until, "--until")
        change = opened.service.grant(id_found, check=check, until=end, limit=limit)
    _print_change(change, opened, json=json)


@app.command()
def reject(
    id_: IdArgument,
    reason: ReasonOption,
    actor: ActorOption = None,
    trust_clock: ClockOption = False,
    json: JsonOption = False,
    config: ConfigOption = DEFAULT_PATH,
) -> None:
    """Reject a pending request.

    Example: portward exemption reject 11111111-0000-4000-8000-000000000003 --reason "a relay will do"
    """
    with _open(config, actor, trust_clock=trust_clock) as opened:
        change = opened.service.reject(id_of(id_, opened.service.store), reason)
    _print_change(change, opened, json=json)


@app.command()
def limit(
    id_: IdArgument,
    rate: RateOption = None,
    burst: BurstOption = None,
    none: Annotated[bool, typer.Option("--none", help="No limit any more.")] = False,
    actor: ActorOption = None,
    trust_clock: ClockOption = False,
    json: JsonOption = False,
    config: ConfigOption = DEFAULT_PATH,
) -> None:
    """Change or remove the rate limit of a grant, at once: no machine needs a restart.

    Example: portward exemption limit 11111111-0000-4000-8000-000000000003 --rate 120
    """
    wanted = rate_limit(rate, burst)
    if (wanted is None) is not none:
        raise InputError("say either --rate or --none", field="--rate")
    with _open(config, actor, trust_clock=trust_clock) as opened:
        change = opened.service.limit(id_of(id_, opened.service.store), wanted)
    _print_change(change, opened, json=json, limited=True)


@app.command()
def revoke(
    reason: ReasonOption,
    id_: Annotated[
        str | None,
        typer.Argument(metavar="SUBSCRIPTION", help="The subscription's id or name; or --file, or --offer."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Revoke those of a list: an id on each line.")
    ] = None,
    offer: Annotated[
        str | None, typer.Option("--offer", metavar="OFFER", help="Revoke all that are granted to an offer.")
    ] = None,
    confirm: Annotated[
        int | None,
        typer.Option("--confirm", metavar="COUNT", min=0, help="The number that --file or --offer will revoke."),
    ] = None,
    wait: WaitOption = False,
    actor: ActorOption = None,
    trust_clock: ClockOption = False,
    json: JsonOption = False,
    config: ConfigOption = DEFAULT_PATH,
) -> None:
    """Revoke a grant, at once: also for open connections. --file or --offer revokes many: without --confirm COUNT,
    it only says how many.

    Example: portward exemption revoke 11111111-0000-4000-8000-000000000002 --reason "spam, case 4711" --wait
    """
    if [id_, file, offer].count(None) != 2:
        raise InputError("name one of them: a subscription, --file or --offer", field="SUBSCRIPTION")
    if id_ is not None and confirm is not None:
        raise InputError("goes with --file and --offer: one subscription needs no count", field="--confirm")
    with (
        _open(config, actor, trust_clock=trust_clock) as opened,
        _waiter(opened, wait=wait) as waiter,
    ):
        known_offer(opened.preset, offer)
        if id_ is None:
            _revoke_many(opened, waiter, file, offer or "", reason, confirm=confirm, json=json)
        else:
            _revoke_one(opened, waiter, id_, reason, json=json)


def _revoke_one(opened: _Opened, waiter: EnforcementWaiter | None, id_: str, reason: str, *, json: bool) -> None:
    found, began = id_of(id_, opened.service.store), time.monotonic()
    change = opened.service.revoke(found, reason)
    took_s = _wait(waiter, note_revision(change.written.revision), began)
    _print_change(change, opened, json=json, waiter=waiter, took_s=took_s)


def _revoke_many(
    opened: _Opened,
    waiter: EnforcementWaiter | None,
    file: Path | None,
    offer: str,
    reason: str,
    *,
    confirm: int | None,
    json: bool,
) -> None:
    """Revokes the exemptions of a list or of an offer. Raises PortwardError unless their number is confirmed."""
    service = opened.service
    ids = granted(service, offer) if file is None else listed(service, file)
    confirm_count(len(ids), confirm)
    began = time.monotonic()
    revision = note_revision(service.revoke_all(ids, reason).revision) if ids else service.store.revision()
    took_s = _wait(waiter, revision, began)
    behind = _behind(opened, waiter, revision)
    if json:
        found = {"revoked": len(ids), "revision": revision, "enforced_after_ms": texts.milliseconds(took_s)}
        echo_json(found | _behind_json(behind))
    elif not ids:
        echo(f"nothing to revoke, the store stays at revision {revision}")
    else:
        echo(f"revoked {counted(len(ids), 'exemption')}, as revision {revision}{texts.enforced(took_s)}")
        if behind is not None:
            echo(f"  {behind}")


@app.command("list")
def list_(
    state: Annotated[
        list[State] | None,
        typer.Option("--state", metavar="STATE", help=f"Only these, of {_STATES}; more than once."),
    ] = None,
    offer: Annotated[str | None, typer.Option("--offer", metavar="OFFER", help="Only those of an offer.")] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="TEXT", help="Only those whose name contains this.")
    ] = None,
    json: JsonLinesOption = False,
    config: ConfigOption = DEFAULT_PATH,
) -> None:
    """List exemptions with their states.

    Example: portward exemption list --state requested
    """
    with _open(config, None) as opened:
        known_offer(opened.preset, offer)
        printed = total = 0
        for total, row in enumerate(opened.service.rows(utc_now()), start=1):  # noqa: B007 # used after the loop
            if not _matches(row, state, offer, name):
                continue
            printed += 1
            if json:
                echo_json(texts.row_json(row))
            else:
                echo(f"{row.subscription}  {texts.owner_text(row):<40}  {state_text(row.state, row.exemption)}")
    if not (printed or json):
        echo(texts.none_listed(total))


@app.command()
def show(id_: IdArgument, json: JsonOption = False, config: ConfigOption = DEFAULT_PATH) -> None:
    """Show an exemption: the request, the decision, and the next step.

    Example: portward exemption show 11111111-0000-4000-8000-000000000002
    """
    now = utc_now()
    with _open(config, None) as opened:
        row = opened.service.row(id_of(id_, opened.service.store), now)
    if json:
        echo_json(texts.row_json(row))
        return
    echo(f"{row.subscription}  {texts.owner_text(row)}")
    for line in texts.lines(row.exemption):
        echo(f"  {line}")
    echo(f"  next      {texts.next_step(row, opened.preset, now)}")


@app.command()
def history(id_: IdArgument, json: JsonLinesOption = False, config: ConfigOption = DEFAULT_PATH) -> None:
    """Print all changes of an exemption, oldest first.

    Example: portward exemption history 11111111-0000-4000-8000-000000000002
    """
    with _open(config, None) as opened:
        changes = opened.service.history(id_of(id_, opened.service.store))
    for change in changes:
        record = readable(change.key, change.after)
        state = record.state.value if isinstance(record, Exemption) else "taken out of the store"
        if json:
            echo_json({"revision": change.revision, "at": change.at, "actor": change.actor, "exemption": record})
            continue
        echo(f"{utc(change.at)}  revision {change.revision}  {change.actor}: {state}")
        if isinstance(record, Exemption):
            for line in texts.lines(record)[1:]:
                echo(f"    {line}")


def _matches(row: ExemptionRow, states: list[State] | None, offer: str | None, name: str | None) -> bool:
    """Whether a row passes the filters of `list`; None passes everything."""
    owner = row.owner
    return (
        (not states or row.state in states)
        and (offer is None or (owner is not None and owner.offer == offer))
        and (name is None or (owner is not None and name.lower() in owner.name.lower()))
    )


@contextmanager
def _open(path: Path, actor: str | None, *, trust_clock: bool = False) -> Iterator[_Opened]:
    """Opens the store that the configuration names, and warns if the agent here does not follow it."""
    config = load_config(path)
    preset = presets.load(config.preset, named_in=path)
    warn_not_following(config)
    with closing(open_store(config.store)) as store:
        service = ExemptionService(
            store,
            preset,
            actor=actor_name(actor),
            clock=utc_now,
            trust_clock=trust_clock,
            check=fraud.checker(config.exemptions),
        )
        yield _Opened(service, config, preset)


@contextmanager
def _waiter(opened: _Opened, *, wait: bool) -> Iterator[EnforcementWaiter | None]:
    """The waiter for the agent, made before the change so that it misses nothing; None without `--wait`."""
    if not wait:
        yield None
        return
    with closing(EnforcementWaiter(opened.config, opened.service.store)) as waiter:
        yield waiter


def _wait(waiter: EnforcementWaiter | None, revision: int, began: float) -> float | None:
    """Waits until a revision is enforced. Returns the seconds since `began`, a time of `time.monotonic`; None
    without a waiter."""
    if waiter is None:
        return None
    waiter.wait(revision, _WAIT_S)
    return time.monotonic() - began


def _print_change(
    change: ExemptionChange,
    opened: _Opened,
    *,
    json: bool,
    waiter: EnforcementWaiter | None = None,
    took_s: float | None = None,
    limited: bool = False,
) -> None:
    """Prints a change. `waiter` and `took_s`: of a verb that waited; `limited`: only the rate limit was
    changed."""
    revision = note_revision(change.written.revision)
    behind = _behind(opened, waiter, revision)
    if json:
        echo_json(texts.change_json(change, took_s) | _behind_json(behind))
        return
    for line in texts.change_lines(change, opened.preset, str(behind or ""), took_s, limited=limited):
        echo(line)


def _behind(opened: _Opened, waiter: EnforcementWaiter | None, revision: int) -> Behind | None:
    """How far the agent here is with this revision, if it holds a change; otherwise None. A waiter has found it
    out already, so its answer is used if there is one."""
    return behind_held(opened.config, revision) if waiter is None else waiter.behind()


def _behind_json(behind: Behind | None) -> dict[str, Any]:
    """The additional keys while the agent here has an earlier revision."""
    return {} if behind is None else {"behind": behind.as_json()}
