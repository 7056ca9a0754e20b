"""`portward apply` and `portward export`."""

from __future__ import annotations

import contextlib
import getpass
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from portward import config as configuration
from portward.cli.options import DEFAULT_PATH, ConfigOption, JsonOption
from portward.policy import preset as presets
from portward.store import open_store
from portward.store.difference import check_offers, check_references, described, difference, exported
from portward.store.inventory import read_inventory

_LINES = 40


def apply(
    files: Annotated[list[str], typer.Argument(metavar="FILE…", help="YAML or JSON; - for standard input.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would change, and change nothing.")
    ] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove what the files do not name.")] = False,
    actor: Annotated[str | None, typer.Option("--as", metavar="NAME", help="Who changes it, for the log.")] = None,
    json: JsonOption = False,
    config: ConfigOption = DEFAULT_PATH,
) -> None:
    """Bring subscriptions, attachments and exemptions into the store: all of the files, or nothing.

    A running agent enforces the change at once.

    Example: portward apply --dry-run inventory.yaml
    """
    settings = configuration.load(config)
    with _progress() as step:
        inventory = read_inventory(files, step("reading"))
        check_offers(inventory, presets.load(settings.preset))
        have, revision = _records(settings.store)
        check_references(have, inventory, prune=prune)
        change = difference(have, inventory, prune=prune)
        puts = change.puts()
        counts = {
            "added": len(change.added),
            "changed": len(change.changed),
            "removed": len(change.removed),
        }
        if not dry_run and puts:
            store = open_store(settings.store, create=True)
            with contextlib.closing(store):
                revision = store.write(
                    puts, expected=revision, actor=actor or _login(), at=datetime.now(UTC),
                    progress=step("writing", len(puts)),
                )  # fmt: skip
    if json:
        told = {"revision": revision, "dry_run": dry_run, **counts}
        typer.echo(msgspec.json.encode(told).decode())
        return
    if dry_run:
        lines = described(have, inventory, change)
        for line in itertools.islice(lines, _LINES):
            typer.echo(line)
        if len(puts) > _LINES:
            typer.echo(f"… and {len(puts) - _LINES} more")
    summary = ", ".join(f"{number} {name}" for name, number in counts.items())
    if not puts:
        typer.echo(f"nothing to change, the store stays at revision {revision}")
    elif dry_run:
        typer.echo(f"would change revision {revision}: {summary}")
    else:
        typer.echo(f"applied revision {revision}: {summary}")


def export(json: JsonOption = False, config: ConfigOption = DEFAULT_PATH) -> None:
    """Print all that the store holds, as `portward apply` takes it.

    Example: portward export > inventory.yaml
    """
    store = open_store(configuration.load(config).store)
    with contextlib.closing(store):
        document = exported(dict(store.read_all()[1]))
    if json:
        typer.echo(msgspec.json.encode(document).decode())
        return
    dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    yaml.dump(document, sys.stdout, Dumper=dumper, sort_keys=False, allow_unicode=True)


def _records(url: str) -> tuple[dict[str, str], int]:
    """All records and their revision; none of a store that is yet to be made."""
    if url.startswith("sqlite:") and not Path(url.partition(":")[2]).exists():
        return {}, 0
    store = open_store(url)
    with contextlib.closing(store):
        revision, records = store.read_all()
        return dict(records), revision


def _login() -> str:
    """Who is at the keyboard, also behind sudo."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


@contextlib.contextmanager
def _progress() -> Iterator[Callable[..., Callable[[int], None]]]:
    """Bars on stderr for a person who waits; silent where stderr is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:

        def step(title: str, total: int | None = None) -> Callable[[int], None]:
            task = bars.add_task(title, total=total)
            return lambda done: bars.update(task, completed=done)

        yield step
