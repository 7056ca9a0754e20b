"""`portward attachment …`: records the starts of machines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Annotated

import typer

from portward.base.addresses import parse_address
from portward.base.clock import utc_now
from portward.cli.actor import ActorOption, actor_name
from portward.cli.exemption_options import ClockOption
from portward.cli.options import DEFAULT_PATH, ConfigOption, JsonOption, warn_not_following
from portward.cli.streams import echo, echo_json, note_revision
from portward.cli.times import instant
from portward.config.documents import network_text
from portward.config.load import load_config
from portward.exemptions.service import ExemptionService, RecordedStart
from portward.ops.behind import behind_held
from portward.ops.sources import require_segment
from portward.policy import presets
from portward.policy.remedy import reason_text
from portward.store.backends import open_store

app = typer.Typer(help="The machines behind addresses.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Keeps the group: typer would merge a group with one verb into its parent."""


@app.command()
def started(
    segment: Annotated[
        str, typer.Argument(metavar="SEGMENT", help="The segment: an interface such as vni1002, or a group.")
    ],
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The machine's address, IPv4 or IPv6.")],
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="When it was started; without it, now.")
    ] = None,
    actor: ActorOption = None,
    trust_clock: ClockOption = False,
    json: JsonOption = False,
    config: ConfigOption = DEFAULT_PATH,
) -> None:
    """Record that a machine was started: a grant counts for a machine from its first start after the grant.

    Example: portward attachment started vni1002 10.0.0.4 --at 2026-01-10T08:00:00Z
    """
    source = parse_address(address, "ADDRESS")
    settings = load_config(config)
    require_segment(settings, segment)
    warn_not_following(settings)
    with closing(open_store(settings.store)) as store:
        service = ExemptionService(
            store,
            presets.load(settings.preset, named_in=config),
            actor=actor_name(actor),
            clock=utc_now,
            trust_clock=trust_clock,
        )
        found = service.started(segment, source, instant(at, "--at"))
        note_revision(found.written.revision)
    behind = behind_held(settings, found.written.revision)
    if json:
        shown = {"revision": found.written.revision, "attachment": found.attachment, "reason": found.reason}
        echo_json(shown | ({} if behind is None else {"behind": behind.as_json()}))
        return
    for line in _lines(found):
        echo(line)
    if behind is not None:
        echo(f"  {behind}")


def _lines(found: RecordedStart) -> Iterator[str]:
    place = f"{found.attachment.segment} {network_text(found.attachment.address)}"
    yield f"{place}: started {found.attachment.started:%Y-%m-%d %H:%M:%SZ}, as revision {found.written.revision}"
    verdict = "may send" if found.reason.allows else "may NOT send"
    yield f"  it {verdict}: {reason_text(found.reason)} ({found.reason})"
