"""`portward audit`."""

from __future__ import annotations

import contextlib
from itertools import islice
from typing import Annotated, Final

import typer

from portward.base.limits import MAX_REVISION
from portward.cli.options import DEFAULT_PATH, ConfigOption, JsonOption, warn_not_following
from portward.cli.streams import echo, echo_json
from portward.config.load import load_config
from portward.errors import InputError
from portward.ops import audit as audits
from portward.ops.audit import Wanted
from portward.store.backends import open_store
from portward.store.chain import Check, parse_mark
from portward.store.protocol import Store

# Issues that are printed. More are only counted.
_MAX_ISSUES: Final = 100
# Entries that are printed by default: about one screen.
_LAST: Final = 20


def audit(
    since: Annotated[
        int | None,
        typer.Option(
            "--since", metavar="REVISION", min=0, max=MAX_REVISION, help="Print the entries after this one."
        ),
    ] = None,
    last: Annotated[
        int | None,
        typer.Option(
            "--last",
            metavar="N",
            min=1,
            max=MAX_REVISION,
            help=f"Print the last N entries; {_LAST} if not given.",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key", metavar="KEY", help="Print only what changed this key, or the keys of attachments/SEGMENT."
        ),
    ] = None,
    actor: Annotated[str | None, typer.Option("--actor", metavar="NAME", help="Print only what NAME did.")] = None,
    only_check: Annotated[bool, typer.Option("--check", help="Print the verdict alone.")] = False,
    expect: Annotated[
        str | None,
        typer.Option(
            "--expect",
            metavar="REVISION:HASH",
            help="Check that this entry, the head of an audit before, is still there.",
        ),
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = DEFAULT_PATH,
) -> None:
    """Print the log of who changed what and when, and check that the log itself is unchanged.

    Checks the whole log, whichever entries it prints. Prints each issue on a line of stderr, with exit code 1. If
    an older state of the whole store was restored, its log is consistent: keep the printed head elsewhere, and
    pass it to --expect the next time.

    Example: portward audit --last 5
    """
    mark = None if expect is None else parse_mark(expect)
    wanted = _wanted(since, last, key, actor, only_check=only_check)
    settings = load_config(config)
    warn_not_following(settings)
    with contextlib.closing(open_store(settings.store)) as store, store.reading():
        check = Check(store, mark)
        if json:
            shown = audits.as_json(store, wanted, check, _MAX_ISSUES)
            echo_json(shown)
            issues = shown["findings_total"]
        else:
            if wanted is not None:
                _print_entries(store, wanted)
            issues = _print_issues(check)
            echo(audits.verdict(check, issues))
    if issues:
        raise typer.Exit(1)


def _wanted(
    since: int | None, last: int | None, key: str | None, actor: str | None, *, only_check: bool
) -> Wanted | None:
    """The entries to print; None with `--check`. Raises InputError for options that exclude each other."""
    if since is not None and last is not None:
        raise InputError("either this or --last, not both", field="--since")
    if key is not None:
        audits.check_key(key)
    options = {"--since": since, "--last": last, "--key": key, "--actor": actor}
    given = [name for name, value in options.items() if value is not None]
    if only_check and given:
        raise InputError(f"prints no entries, so {given[0]} says nothing: leave one of them out", field="--check")
    return None if only_check else Wanted(since, last or _LAST, key, actor)


def _print_entries(store: Store, wanted: Wanted) -> None:
    line = None
    for line in audits.lines(store, audits.shown(store, wanted)):
        echo(line)
    if line is None:
        echo(audits.nothing(store, wanted))


def _print_issues(check: Check) -> int:
    """Prints the issues on stderr, and returns their number."""
    issues, printed = check.issues(), 0
    for issue in islice(issues, _MAX_ISSUES):
        echo(f"portward: {issue.text}", err=True)
        printed += 1
    more = sum(1 for _ in issues)
    if more:
        echo(f"portward: … and {more} more", err=True)
    return printed + more
