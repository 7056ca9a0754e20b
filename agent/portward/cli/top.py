"""`portward top`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Final, Protocol

import typer

from portward.base import characters
from portward.cli.options import GatewayConfigOption, InstanceOption, configuration, seconds, warn
from portward.cli.streams import echo_text
from portward.daemon import settings

if TYPE_CHECKING:
    from portward.ops.top_talkers import Talker

# The columns with numbers.
_NUMBERS: Final = (3, 4)
# Lines of a terminal that are left for the prompt and a resize; on a low terminal, this many rows are shown
# anyway.
_SPARE_LINES: Final = 6
_MIN_ROWS: Final = 5


class Show(Protocol):
    """Shows one reading."""

    def __call__(self, rows: list[Talker], *, first: bool) -> None:
        """See `_screen`."""


def top(
    interval: Annotated[
        float,
        typer.Option("--interval", metavar="SECONDS", callback=seconds, help="Seconds between readings."),
    ] = 1.0,
    count: Annotated[int, typer.Option("--count", metavar="N", min=0, help="Readings, 0 for ever.")] = 0,
    instance: InstanceOption = None,
    config: GatewayConfigOption = None,
) -> None:
    """Show which sources send to port 25 now: packets a second by source, as the kernel counts them.

    On a terminal, shows the top talkers and updates them in place. Otherwise prints all sources for each reading.

    Example: portward top --interval 2
    """
    from portward.ops.top_talkers import TopTalkers  # noqa: PLC0415 # only this verb needs it

    found = settings.settings(configuration(config, instance))
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
    """On a terminal, a function that shows rows in place, cut off at its edges. Otherwise one that prints plain
    lines, except for the first reading, which has no rates."""
    from rich.console import Console  # noqa: PLC0415 # only `top` needs these
    from rich.live import Live  # noqa: PLC0415 # as above
    from rich.text import Text  # noqa: PLC0415 # as above

    console = Console()
    if not console.is_terminal:
        yield lambda rows, *, first: None if first else echo_text("\n".join(_lines(rows)))
        return
    with Live(console=console, auto_refresh=False, transient=False) as live:

        def show(rows: list[Talker], *, first: bool) -> None:  # the next reading replaces the first
            lines = _lines(rows[: max(_MIN_ROWS, console.height - _SPARE_LINES)])
            live.update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"), refresh=True)

        yield show
    console.print()


def _lines(rows: list[Talker]) -> list[str]:
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
