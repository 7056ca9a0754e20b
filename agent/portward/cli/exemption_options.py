"""Options that the verbs of `portward exemption` share."""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import typer

from portward.base import limits
from portward.errors import InputError
from portward.model import RateLimit

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
    bool,
    typer.Option("--trust-clock", help="Also if the store's newest change is later than this host's time."),
]


def rate_limit(rate: int | None, burst: int | None) -> RateLimit | None:
    """The limit that `--rate` and `--burst` give; None without a rate. Raises InputError for a burst alone."""
    if burst is not None and rate is None:
        raise InputError("a burst needs a rate: --rate says it", field="--burst")
    return None if rate is None else RateLimit(per_minute=rate, burst=burst or _BURST)
