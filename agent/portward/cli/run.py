"""`portward run` and `portward check`."""

from __future__ import annotations

from typing import Annotated

import typer

from portward.cli.options import GatewayConfigOption, InstanceOption, configuration
from portward.cli.streams import echo


def run(instance: InstanceOption = None, config: GatewayConfigOption = None) -> None:
    """Enforce the policy on this gateway until stopped.

    SIGHUP reads the configuration again. If it is not valid, the old one stays in force. SIGTERM stops the agent,
    and the ruleset and the cached verdicts stay in force. `portward rules remove` stops enforcing. With
    --instance, it also stops once the namespace of that name is removed or made anew.

    Example: portward run --config /etc/portward/portward.toml
    """
    from portward.daemon import composition  # noqa: PLC0415 # only this verb needs the daemon's libraries

    composition.run(configuration(config, instance), instance)


def check(
    without_store: Annotated[
        bool, typer.Option("--without-store", help="Do not check the store, which a restart does not need.")
    ] = False,
    instance: InstanceOption = None,
    config: GatewayConfigOption = None,
) -> None:
    """Check configuration, preset, policy table and store, and whether the kernel accepts the ruleset.

    Changes nothing. Exit code 0: `portward run` would start; 2: a mistake in a file; 1: the kernel refuses the
    ruleset, or the policy table is damaged. --without-store skips the table too, which takes seconds if it is
    large, and does not compare it with the table folders of other instances.

    Example: portward check --config ./portward.toml
    """
    from portward.ops import check as checks  # noqa: PLC0415 # as above

    path = configuration(config, instance)
    for line in checks.check(path, with_store=not without_store, instance=instance):
        echo(line)
