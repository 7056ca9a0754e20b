"""`portward exemption …`: the life of an exemption."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import typer

from portward.base import limits
from portward.base.clock import utc_now
from portward.base.words import counted
from portward.cli.actor import ActorOption, actor_name
from portward.cli.exemption_chosen import confirm as confirm_count
from portward.cli.exemption_chosen import granted, id_of, known_offer, listed
from portward.cli.exemption_text import checked, in_a_line, lines, next_step
from portward.cli.options import DEFAULT_PATH, ConfigOption, JsonLinesOption, JsonOption, warn_other_store
from portward.cli.streams import echo, echo_json, note_revision
from portward.cli.times import instant
from portward.config.keys import Config
from portward.config.load import load_config
from portward.errors import InputError, printable
from portward.exemptions import lifecycle
from portward.exemptions.lifecycle import Application, FraudResult, State
from portward.exemptions.service import ExemptionChange, ExemptionRow, ExemptionService
from portward.model import Authentication, Details, Exemption, ExemptionState, FraudCheck, RateLimit
from portward.ops.behind import Behind, behind_held
from portward.ops.enforcement_waiter import EnforcementWaiter
from portward.policy import presets
from portward.policy.preset import Preset
from portward.store.backends import open_store
from portward.store.codec import readable
from portward.store.protocol import Store

app = typer.Typer(
    help="Exemptions: asked for, granted or rejected, revoked.", no_args_is_help=True, rich_markup_mode=None
)

_WAIT_SECONDS: Final = 10.0
_STATES: Final = ", ".join(State)
_BURST: Final = RateLimit(per_minute=1).burst

IdArgument: TypeAlias = Annotated[
    str, typer.Argument(metavar="SUBSCRIPTION", help="The subscription's id or name; it has one exemption.")
]
ReasonOption: TypeAlias = Annotated[
    str, typer.Option("--reason", metavar="TEXT", help="Why, for the log and the customer.")
]
UntilOption: TypeAlias = Annotated[
    str | None, typer.Option("--until", metavar="TIME", help="When it ends; without it, never.")
]
WaitOption: TypeAlias = Annotated[
    bool,
    typer.Option("--wait", help="Return once the kernel of this gateway enforces it, and say how long it took."),
]
RateOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--rate",
        metavar="N",
        min=1,
        max=limits.MAX_RATE_PER_MINUTE,
        help="New connections a minute, of the whole subscription.",
    ),
]
BurstOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--burst", metavar="N", min=1, max=limits.MAX_BURST, help=f"How many of them at once, else {_BURST}."
    ),
]
ClockOption: TypeAlias = Annotated[
    bool, typer.Option("--trust-clock", help="Also where the store's newest change lies after this host's time.")
]


@app.command()
def request(
    id_: IdArgument,
    justification: Annotated[str, typer.Option(metavar="TEXT", help="Why mail cannot go through a relay.")] = "",
    mail_software: Annotated[str, typer.Option(metavar="TEXT", help="What sends the mail.")] = "",
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
    """Ask for an exemption. Where the offer says so it is decided at once; exit code 1 where it is rejected.

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
    with _open_service(config, actor, trust_clock=trust_clock) as (service, settings, preset):
        done = service.request(id_of(id_, service.store), asked)
    _print_change(done, preset, behind_held(settings, note_revision(done.written.revision)), json=json)
    if done.exemption.state is ExemptionState.REJECTED:
        raise typer.Exit(1)


@app.command()
def grant(
    id_: IdArgument,
    fraud_check: Annotated[
        str | None,
        typer.Option(
            "--fraud-check", metavar="TEXT", help="How an anti-fraud check was passed, where none is on record."
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
    """Say yes to a request that waits for a decision.

    Example: portward exemption grant 11111111-0000-4000-8000-000000000003 --fraud-check "called back" --rate 60
    """
    limit = _limit(rate, burst)
    check = None
    if fraud_check is not None:
        if not fraud_check.strip():
            raise InputError("says nothing: how was it checked, and by whom?", field="--fraud-check")
        check = FraudResult(FraudCheck.PASS, printable(fraud_check))
    with _open_service(config, actor, trust_clock=trust_clock) as (service, settings, preset):
        done = service.grant(id_of(id_, service.store), check=check, until=instant(until, "--until"), limit=limit)
    _print_change(done, preset, behind_held(settings, note_revision(done.written.revision)), json=json)


@app.command()
def reject(
    id_: IdArgument,
    reason: ReasonOption,
    actor: ActorOption = None,
    trust_clock: ClockOption = False,
    json: JsonOption = False,
    config: ConfigOption = DEFAULT_PATH,
) -> None:
    """Say no to a request that waits for a decision.

    Example: portward exemption reject 11111111-0000-4000-8000-000000000003 --reason "a relay will do"
    """
    with _open_service(config, actor, trust_clock=trust_clock) as (service, settings, preset):
        done = service.reject(id_of(id_, service.store), reason)
    _print_change(done, preset, behind_held(settings, note_revision(done.written.revision)), json=json)


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
    """Give a grant another limit, or none, at once: no machine needs a restart.

    Example: portward exemption limit 11111111-0000-4000-8000-000000000003 --rate 120
    """
    wanted = _limit(rate, burst)
    if (wanted is None) is not none:
        raise InputError("say either --rate or --none", field="--rate")
    with _open_service(config, actor, trust_clock=trust_clock) as (service, settings, preset):
        done = service.limit(id_of(id_, service.store), wanted)
    behind = behind_held(settings, note_revision(done.written.revision))
    _print_change(done, preset, behind, json=json, limited=True)


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
        typer.Option("--confirm", metavar="COUNT", min=0, help="How many --file or --offer are to revoke."),
    ] = None,
    wait: WaitOption = False,
    actor: ActorOption = None,
    trust_clock: ClockOption = False,
    json: JsonOption = False,
    config: ConfigOption = DEFAULT_PATH,
) -> None:
    """Take a grant back, at once: also for connections that are open. Many by --file or --offer, which say how
    many that would be and do it with --confirm COUNT.

    Example: portward exemption revoke 11111111-0000-4000-8000-000000000002 --reason "spam, case 4711" --wait
    """
    if [id_, file, offer].count(None) != 2:
        raise InputError("name one of them: a subscription, --file or --offer", field="SUBSCRIPTION")
    if id_ is not None and confirm is not None:
        raise InputError("goes with --file and --offer: one subscription needs no count", field="--confirm")
    with (
        _open_service(config, actor, trust_clock=trust_clock) as (service, settings, preset),
        _waiting(settings, service.store, wait=wait) as agent,
    ):
        known_offer(preset, offer)
        if id_ is not None:
            one, began = id_of(id_, service.store), time.monotonic()
            done = service.revoke(one, reason)
            took = _wait(agent, note_revision(done.written.revision), began)
            behind = behind_held(settings, done.written.revision) if agent is None else agent.behind()
            _print_change(done, preset, behind, json=json, took=took)
            return
        ids = granted(service, offer or "") if file is None else listed(service, file)
        confirm_count(len(ids), confirm)
        began = time.monotonic()
        revision = note_revision(service.revoke_all(ids, reason).revision) if ids else service.store.revision()
        took = _wait(agent, revision, began)
        behind = behind_held(settings, revision) if agent is None else agent.behind()
    if json:
        told = {"revoked": len(ids), "revision": revision, "enforced_after_ms": _ms(took)}
        echo_json(told | _behind(behind))
    elif not ids:
        echo(f"nothing to revoke, the store stays at revision {revision}")
    else:
        echo(f"revoked {counted(len(ids), 'exemption')}, as revision {revision}{_enforced(took)}")
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
        str | None, typer.Option("--name", metavar="TEXT", help="Only those whose name holds this.")
    ] = None,
    json: JsonLinesOption = False,
    config: ConfigOption = DEFAULT_PATH,
) -> None:
    """List exemptions, with what each waits for.

    Example: portward exemption list --state requested
    """
    with _open_service(config, None) as (service, _, preset):
        known_offer(preset, offer)
        printed = total = 0
        for total, row in enumerate(service.rows(utc_now()), start=1):  # noqa: B007 # said below
            owner = row.owner
            if (
                (state and row.state not in state)
                or (offer is not None and (owner is None or owner.offer != offer))
                or (name is not None and (owner is None or name.lower() not in owner.name.lower()))
            ):
                continue
            printed += 1
            if json:
                echo_json(_as_json(row))
            else:
                told = lifecycle.state_text(row.state, row.exemption)
                echo(f"{row.subscription}  {_owner(row):<40}  {told}")
    if not (printed or json):
        echo(_none(total))


@app.command()
def show(id_: IdArgument, json: JsonOption = False, config: ConfigOption = DEFAULT_PATH) -> None:
    """Show an exemption: what was asked for, what was decided, what comes next.

    Example: portward exemption show 11111111-0000-4000-8000-000000000002
    """
    now = utc_now()
    with _open_service(config, None) as (service, _, preset):
        row = service.row(id_of(id_, service.store), now)
    if json:
        echo_json(_as_json(row))
        return
    echo(f"{row.subscription}  {_owner(row)}")
    for line in lines(row.exemption):
        echo(f"  {line}")
    echo(f"  next      {next_step(row, preset, now)}")


@app.command()
def history(id_: IdArgument, json: JsonLinesOption = False, config: ConfigOption = DEFAULT_PATH) -> None:
    """Print all that has happened to an exemption, the oldest first.

    Example: portward exemption history 11111111-0000-4000-8000-000000000002
    """
    with _open_service(config, None) as (service, _, _):
        changes = service.history(id_of(id_, service.store))
    for change in changes:
        record = readable(change.key, change.after)
        state = record.state.value if isinstance(record, Exemption) else "taken out of the store"
        if json:
            echo_json({"revision": change.revision, "at": change.at, "actor": change.actor, "exemption": record})
            continue
        echo(f"{change.at:%Y-%m-%d %H:%M:%SZ}  revision {change.revision}  {change.actor}: {state}")
        if isinstance(record, Exemption):
            for line in lines(record)[1:]:
                echo(f"    {line}")


@contextmanager
def _open_service(
    path: Path, actor: str | None, *, trust_clock: bool = False
) -> Iterator[tuple[ExemptionService, Config, Preset]]:
    settings = load_config(path)
    preset = presets.load(settings.preset, named_in=path)
    warn_other_store(settings)
    with closing(open_store(settings.store)) as store:
        service = ExemptionService(
            store, preset, settings, actor=actor_name(actor), clock=utc_now, trust_clock=trust_clock
        )
        yield service, settings, preset


@contextmanager
def _waiting(settings: Config, store: Store, *, wait: bool) -> Iterator[EnforcementWaiter | None]:
    if not wait:
        yield None
        return
    with closing(EnforcementWaiter(settings, store)) as agent:
        yield agent


def _wait(agent: EnforcementWaiter | None, revision: int, began: float) -> float | None:
    """Waits for a revision where that is wanted; gives the seconds since `began`."""
    if agent is None:
        return None
    agent.wait(revision, _WAIT_SECONDS)
    return time.monotonic() - began


def _limit(rate: int | None, burst: int | None) -> RateLimit | None:
    if burst is not None and rate is None:
        raise InputError("a burst needs a rate: --rate says it", field="--burst")
    return None if rate is None else RateLimit(per_minute=rate, burst=burst or _BURST)


def _print_change(
    done: ExemptionChange,
    preset: Preset,
    behind: Behind | None,
    *,
    json: bool,
    took: float | None = None,
    limited: bool = False,
) -> None:
    """Prints what was done. `limited`: the limit alone was changed."""
    exemption = done.exemption
    state = lifecycle.state_of(exemption, done.written.at)
    if json:
        echo_json(
            {"revision": done.written.revision, "state": state, "exemption": exemption}
            | ({} if took is None else {"enforced_after_ms": _ms(took)})
            | _behind(behind)
        )
        return
    name = f" ({done.subscription.name})" if done.subscription.name else ""
    echo(
        f"exemption of {done.subscription.id}{name}: {lifecycle.state_text(state, exemption)}, "
        f"as revision {done.written.revision}{_enforced(took)}"
    )
    if behind is not None:
        echo(f"  {behind}")
    if exemption.reason:
        echo(f"  reason    {in_a_line(exemption.reason)}")
    if exemption.fraud_check is not None:
        echo(f"  checked   {in_a_line(checked(exemption))}")
    if exemption.limit is not None and state is State.GRANTED:
        echo(f"  limit     {exemption.limit}")
    row = ExemptionRow(done.subscription.id, done.subscription, exemption, state)
    echo(f"  next      {next_step(row, preset, done.written.at, limited=limited)}")


def _none(total: int) -> str:
    """What a list without a line says, if the store has so many exemptions."""
    return f"none of {counted(total, 'exemption')} is such a one" if total else "the store has no exemption"


def _owner(row: ExemptionRow) -> str:
    if row.owner is None:
        return "(no such subscription any more)"
    return f"{row.owner.name} ({row.owner.offer})".strip()


def _as_json(row: ExemptionRow) -> dict[str, Any]:
    owner = row.owner
    return {
        "subscription": row.subscription,
        "name": None if owner is None else owner.name,
        "offer": None if owner is None else owner.offer,
        "state": row.state,
        "exemption": row.exemption,
    }


def _enforced(took: float | None) -> str:
    return "" if took is None else f", enforced after {took * 1000:.1f} ms"


def _behind(behind: Behind | None) -> dict[str, Any]:
    """What JSON says more while the agent here holds an earlier revision."""
    return {} if behind is None else {"behind": behind.as_json()}


def _ms(took: float | None) -> float | None:
    return None if took is None else round(took * 1000, 3)
