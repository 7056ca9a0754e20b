"""`portward apply` and `portward export`."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Final, NamedTuple, TypeAlias

import msgspec
import typer

from portward.base.clock import utc_now
from portward.cli.actor import ActorOption, actor_name
from portward.cli.options import DEFAULT_PATH, ConfigOption, JsonOption, warn, warn_not_following
from portward.cli.streams import echo, echo_json, note_revision, put
from portward.config.keys import Config
from portward.config.load import load_config
from portward.errors import InputError, PortwardError
from portward.inventory.difference import (
    Difference,
    check_offers,
    check_references,
    check_starts,
    described,
    difference,
    late_creation,
    useless_grants,
)
from portward.inventory.files import read_inventory
from portward.inventory.json_document import json_text
from portward.inventory.records import Inventory
from portward.inventory.yaml_document import yaml_text
from portward.ops import mistyped
from portward.ops.behind import (
    behind_held,
    held_here,
    held_unknown,
    lost_store,
    not_following,
    nothing_held,
    other_store,
)
from portward.policy import presets
from portward.policy.preset import Preset
from portward.store.backends import open_store
from portward.store.confirmation import CONFIRMED, confirmation
from portward.store.flips import UnconfirmedError, check_flips
from portward.store.values import NoStoreError

# Changes that a dry run prints, about one screen. More are only counted.
_MAX_LINES: Final = 40

# Begins a step of the progress display: title and total (None: unknown) → the function to call with the number
# done.
Step: TypeAlias = Callable[[str, int | None], Callable[[int], None]]


class _Plan(NamedTuple):
    """The changes that an inventory would make. `new`: the store must be made; `have` and `revision`: its records
    (key → JSON) and their revision; `warnings`: sentences for the operator."""

    new: bool
    have: dict[str, str]
    revision: int
    inventory: Inventory
    change: Difference
    warnings: tuple[str, ...]


def apply(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", help="YAML or JSON; - for standard input.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would change, and change nothing.")
    ] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove what the files do not name.")] = False,
    confirm: Annotated[
        bool,
        typer.Option(
            "--confirm",
            help="Also if more than max_flip_share of all subscriptions flip, or --prune removes all of them. "
            "Without FILE: let through what the agents hold back.",
        ),
    ] = False,
    actor: ActorOption = None,
    json: JsonOption = False,
    config: ConfigOption = DEFAULT_PATH,
) -> None:
    """Write the subscriptions, attachments and exemptions of the files to the store: all of them, or none.

    A running agent enforces the change at once. A change that would flip the verdict of more than max_flip_share
    of all subscriptions, or remove every subscription, needs --confirm.

    Example: portward apply --dry-run inventory.yaml
    """
    settings = load_config(config)
    who = actor_name(actor)
    if not files:
        if not confirm or dry_run or prune:
            raise InputError("missing: name an inventory, or - for standard input", field="FILE")
        _confirm(settings, who, json=json)
        return
    preset = presets.load(settings.preset, named_in=config)
    with _progress() as step:
        plan = _plan(settings, preset, files, step, prune=prune)
        held = None if confirm else _too_many(settings, preset, plan)
        refused = "" if confirm else str(held or "") or _emptied(plan)
        if refused and not dry_run:
            raise PortwardError(f"nothing was written: this {refused}; --dry-run shows it, --confirm applies it")
        revision = plan.revision if dry_run else _write(settings, plan, who, step, confirm=confirm)
    warnings = _warnings(settings, plan, revision, confirm=confirm)
    behind = behind_held(settings, revision) if revision != plan.revision and not confirm else None
    if json:
        if refused and held is None:
            warnings.append(f"it {refused}: to be applied with --confirm only")
        shown = _as_json(plan, revision, held, dry_run=dry_run)
        shown |= {} if behind is None else {"behind": behind.as_json()}
        echo_json(shown | ({"warnings": warnings} if warnings else {}))
        return
    warn(warnings)
    for line in _lines(plan, settings.store, revision, dry_run=dry_run):
        echo(line)
    if confirm and not dry_run and revision == plan.revision:
        echo(_nothing_held(revision))
    if behind is not None:
        echo(str(behind))
    if refused:
        echo(f"it {refused}: to be applied with --confirm only")


def _warnings(settings: Config, plan: _Plan, revision: int, *, confirm: bool) -> list[str]:
    """The sentences for the operator after a change: those of the plan, segments that are probably mistyped, and
    whether a confirmation may have been unnecessary."""
    named = mistyped.segments_of([*plan.change.added, *plan.change.changed])
    found = [*plan.warnings, *(mistyped.warnings(settings, named, mistyped.here()) if named else ())]
    if confirm and not plan.change.puts() and revision != plan.revision and (unknown := held_unknown(settings)):
        found.append(unknown)
    return found


def export(json: JsonOption = False, config: ConfigOption = DEFAULT_PATH) -> None:
    """Print all records of the store, as an inventory for `portward apply`.

    Example: portward export > inventory.yaml
    """
    settings = load_config(config)
    warn_not_following(settings)
    have, _ = _stored(settings.store)
    for piece in json_text(have) if json else yaml_text(have):
        put(piece)


def _plan(settings: Config, preset: Preset, files: list[str], step: Step, *, prune: bool) -> _Plan:
    """Reads the inventory and the store, and checks the inventory. Raises InputError at the first mistake."""
    inventory = read_inventory(files, step("reading", None))
    check_offers(inventory, preset)
    check_starts(inventory, utc_now())
    step("comparing", None)
    new, have, revision = False, dict[str, str](), 0
    try:
        have, revision = _stored(settings.store)
    except NoStoreError:
        new = True
    check_references(have, inventory, prune=prune)
    change = difference(have, inventory, prune=prune)
    warnings = (
        other_store(settings) or (lost_store(settings) if new else ""),
        not_following(settings),
        late_creation(inventory, utc_now()),
        *useless_grants(have, inventory, change, preset, utc_now()),
    )
    return _Plan(new, have, revision, inventory, change, tuple(filter(None, warnings)))


def _stored(url: str) -> tuple[dict[str, str], int]:
    """All records of a store (key → JSON), and their revision."""
    with contextlib.closing(open_store(url)) as store:
        revision, records = store.read_all()
        return {key: body for key, body in records if key != CONFIRMED}, revision


def _too_many(settings: Config, preset: Preset, plan: _Plan) -> UnconfirmedError | None:
    """The error if the change needs a confirmation because of its flips; else None."""
    try:
        check_flips(plan.have, plan.change.puts(), preset, share=settings.max_flip_share, now=utc_now())
    except UnconfirmedError as held:
        return held
    return None


def _emptied(plan: _Plan) -> str:
    """A text if the change removes every subscription of the store; else empty. In a store with few customers,
    that is too few flips for `_too_many`."""
    had, gone = (
        sum(key.startswith("subscriptions/") for key in keys) for keys in (plan.have, plan.change.removed)
    )
    return f"would remove every subscription in the store ({gone})" if gone and gone == had else ""


def _confirm(settings: Config, who: str, *, json: bool) -> None:
    """Confirms everything in the store, for agents that hold back a part of it. If the agent here holds back the
    whole store, because it has another history, the confirmation names that hold, and so is for this agent
    alone."""
    with contextlib.closing(open_store(settings.store)) as store:
        newest = store.revision()
        if nothing_held(settings):
            if json:
                echo_json({"revision": newest, "confirmed": None})
            else:
                echo(_nothing_held(newest))
            return
        warnings = [line] if (line := other_store(settings) or held_unknown(settings)) else []
        confirming = confirmation(newest + 1, hold=held_here(settings))
        note_revision(store.write([confirming], expected=newest, actor=who, at=utc_now()))
    if json:
        echo_json({"revision": newest + 1, "confirmed": newest} | ({"warnings": warnings} if warnings else {}))
        return
    warn(warnings)
    echo(_confirmed(newest + 1))


def _nothing_held(revision: int) -> str:
    return f"nothing to confirm: the agent here holds nothing, the store stays at revision {revision}"


def _confirmed(revision: int) -> str:
    # The same number as in `portward audit`.
    return f"applied revision {revision}: everything up to it is confirmed"


def _write(settings: Config, plan: _Plan, who: str, step: Step, *, confirm: bool) -> int:
    """Writes the difference to the store, and returns the revision. Makes the store if it is missing."""
    puts = plan.change.puts()
    # Also if nothing changes, because agents may hold back what is in the store already.
    if confirm and (puts or not nothing_held(settings)):
        puts.append(confirmation(plan.revision + 1, hold=held_here(settings)))
    if not puts:
        return plan.revision
    with contextlib.closing(open_store(settings.store, create=True)) as store:
        progress = step("writing", len(puts))
        return note_revision(store.write(puts, expected=plan.revision, actor=who, at=utc_now(), progress=progress))


def _as_json(plan: _Plan, revision: int, held: UnconfirmedError | None, *, dry_run: bool) -> dict[str, object]:
    shown: dict[str, object] = {"revision": revision, "dry_run": dry_run, **plan.change.counts()}
    shown |= {"new_store": True} if plan.new else {}
    if dry_run:
        shown["held"] = None if held is None else held.flips._asdict()
        shown["changes"] = [
            {"key": put.key, "before": _raw(plan.have.get(put.key)), "after": _raw(put.body)}
            for put in plan.change.puts()
        ]
    return shown


def _raw(body: str | None) -> msgspec.Raw | None:
    return None if body is None else msgspec.Raw(body.encode())


def _lines(plan: _Plan, url: str, revision: int, *, dry_run: bool) -> Iterator[str]:
    counts = plan.change.counts()
    summary = ", ".join(f"{number} {name}" for name, number in counts.items())
    total = sum(counts.values())
    if not total and revision != plan.revision:
        yield _confirmed(revision)
    elif not total:
        yield f"nothing to change, the store stays at revision {revision}"
    elif not dry_run:
        if plan.new:
            yield f"made a new store: {url}"
        yield f"applied revision {revision}: {summary}"
    else:
        yield from itertools.islice(described(plan.have, plan.inventory, plan.change), _MAX_LINES)
        if total > _MAX_LINES:
            yield f"… and {total - _MAX_LINES} more"
        if plan.new:
            yield f"would make a new store: {url}"
        yield f"would change revision {revision}: {summary}"


@contextlib.contextmanager
def _progress() -> Iterator[Step]:
    """Progress bars on stderr, if it is a terminal."""
    from rich.console import Console  # noqa: PLC0415 # a start of the agent does not wait for it
    from rich.progress import (  # noqa: PLC0415 # as above
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bars:

        def step(title: str, total: int | None) -> Callable[[int], None]:
            task = bars.add_task(title, total=total)
            return lambda done: bars.update(task, completed=done)

        yield step
