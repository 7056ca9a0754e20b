"""`portward run` and `portward check`."""

from __future__ import annotations

from typing import Annotated

import typer

from portward.cli.options import DEFAULT_PATH, ConfigOption
from portward.cli.streams import echo


def run(config: ConfigOption = DEFAULT_PATH) -> None:
    """Enforce the policy on this gateway until stopped.

    SIGHUP reads the configuration again; a bad one is refused and the old one stays in force. SIGTERM stops the
    agent and leaves ruleset and verdicts in place: nothing opens. `portward rules remove` stops enforcing.

    Example: portward run --config /etc/portward/portward.toml
    """
    from portward.daemon import composition  # noqa: PLC0415 # only this verb needs the daemon's libraries

    composition.run(config)


def check(
    without_store: Annotated[
        bool, typer.Option("--without-store", help="Do not ask for the store, which a later start does without.")
    ] = False,
    config: ConfigOption = DEFAULT_PATH,
) -> None:
    """Check configuration, preset, policy table, store and whether the kernel takes the ruleset.

    Nothing is changed. Exit code 0: `portward run` would begin; 2: a mistake in a file; 1: the kernel refuses, or
    the policy table is damaged. --without-store leaves out the table too, which takes seconds if it is large.

    Example: portward check --config ./portward.toml
    """
    from portward.ops import check as checks  # noqa: PLC0415 # as above

    for line in checks.check(config, with_store=not without_store):
        echo(line)
