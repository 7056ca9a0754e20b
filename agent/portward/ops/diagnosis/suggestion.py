"""Suggests what an operator probably meant by a word that names no subscription."""

from __future__ import annotations

import difflib
import re
from itertools import islice
from typing import Final

from portward.base.addresses import is_address
from portward.base.instance import command
from portward.base.interfaces import shown
from portward.config.documents import brief
from portward.config.keys import Config
from portward.dataplane.rtnetlink import index_of
from portward.ops.diagnosis.accounts import Accounts
from portward.store.lookup import uuid_of

_HEX_DIGITS: Final = 32
# A part of a UUID, or a UUID with a digit too many.
_LIKE_ID: Final = re.compile(r"(?=(?:.*[0-9]){3})[0-9A-Fa-f]{8}[0-9A-Fa-f-]{4,40}")
# Comparing takes some microseconds for each name, so this many take some 0.1 s.
_MAX_COMPARED: Final = 20_000
# Names whose lengths differ by more cannot be similar enough.
_MAX_LENGTH_DIFFERENCE: Final = 3


def hint(config: Config, place: Accounts, who: str) -> str:
    """A sentence on what to type next."""
    if is_address(who):
        return f"this is an address: `{command(f'diagnose SEGMENT {who}')}` asks about a source"
    segment = config.group_named(who) is not None or config.segment(who)
    if segment and (config.group_named(who) is not None or index_of(who) is not None):
        return f"this is a segment: `{command(f'diagnose {shown(who)} ADDRESS')}` asks about a source in it"
    if _LIKE_ID.fullmatch(who) and uuid_of(who) is None:
        digits = len(who.replace("-", ""))
        return f"this looks like an id, of which all {_HEX_DIGITS} digits are needed (it has {digits}); {_all()}"
    if near := _nearest(place, who):
        return f"did you mean {brief(near)}? {_all()}"
    if segment:
        return f"if it is a segment, ADDRESS is missing: `{command(f'diagnose {shown(who)} ADDRESS')}`; {_all()}"
    return _all()


def _all() -> str:
    """The end of a hint: the ways to find any subscription."""
    by_machine, listed = command("diagnose SEGMENT ADDRESS"), command("export")
    return f"`{by_machine}` finds it by one of its machines, `{listed}` lists all"


def _nearest(place: Accounts, who: str) -> str:
    """The most similar name of a subscription; empty if none is similar."""
    if not who.strip() or uuid_of(who) is not None:
        return ""
    folded = who.strip().casefold()
    names = [name for name in place.names() if name]
    same = next((name for name in names if name.strip().casefold() == folded), "")
    if same:
        return same
    near = (name for name in names if abs(len(name) - len(who)) <= _MAX_LENGTH_DIFFERENCE)
    by_folded = {name.casefold(): name for name in islice(near, _MAX_COMPARED)}
    found = difflib.get_close_matches(folded, by_folded, n=1, cutoff=0.75)
    return by_folded[found[0]] if found else ""
