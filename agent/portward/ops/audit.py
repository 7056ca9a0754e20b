"""`portward audit`: the entries of the store's log in words, and whether the log is whole.

Entries and check are of one state of the store, even if it is written meanwhile. Nothing is written here.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Final, NamedTuple

import msgspec

from portward.base.words import counted, utc_as_typed
from portward.config.documents import nearest
from portward.errors import InputError, printable
from portward.inventory.difference import described_change
from portward.store.chain import Check, IntegrityIssue
from portward.store.codec import KINDS, key_only
from portward.store.confirmation import CONFIRMED
from portward.store.protocol import Store
from portward.store.values import Cell, Entry, LogRow

# A revision with more changes is printed as their counts, because a reader wants an overview.
_MAX_LINES: Final = 40
# With `--json` a revision with more changes has their counts, and null instead of the changes, because the
# document is made in memory.
_MAX_JSON_CHANGES: Final = 10_000
_WHAT: Final = {"+": "added", "~": "changed", "-": "removed"}


class Wanted(NamedTuple):
    """Which entries are printed: those after revision `since`, or the `last` ones if that is None. Of these, those
    that change `key` (or a key below it, as below `attachments/vni1002`) and those of `actor`."""

    since: int | None = None
    last: int = 20
    key: str | None = None
    actor: str | None = None


class Shown(NamedTuple):
    """An entry and those of its changes that are wanted: their number by sign (`+ ~ -`) and kind, and the changes
    themselves unless there are too many."""

    entry: Entry
    counts: Counter[tuple[str, str]]
    changes: list[LogRow] | None


def check_key(key: str) -> None:
    """Raises InputError for a text that cannot be a record's key, or the beginning of one."""
    kind, _, rest = key.rstrip("/").partition("/")
    known = [*KINDS, CONFIRMED]
    if kind not in known:
        raise InputError(f"{key!r} is no key; {nearest(kind, known)}", field="--key")
    beginning = not rest or (kind == "attachments" and "/" not in rest)
    if kind != CONFIRMED and not beginning and key_only(key) is None:
        right = {"attachments": "attachments/SEGMENT/ADDRESS"}.get(kind, f"{kind}/UUID")
        raise InputError(f"{key!r} is no key; {right} would be, as the log writes it", field="--key")


def shown(store: Store, wanted: Wanted, most: int = _MAX_LINES) -> Iterator[Shown]:
    """The wanted entries, oldest first. An entry with more than `most` wanted changes has only their counts."""
    for entry in _chosen(store, wanted):
        rows = (row for row in store.rows(entry.number) if _matches(row[0], wanted.key))
        first = list(islice(rows, most + 1))
        counts = Counter((_sign(row), _kind(row)) for row in first)
        counts.update((_sign(row), _kind(row)) for row in rows)
        yield Shown(entry, counts, first if len(first) <= most else None)


def _chosen(store: Store, wanted: Wanted) -> Iterable[Entry]:
    found = (entry for entry in store.log(wanted.since) if _is_wanted(store, entry, wanted))
    return found if wanted.since is not None else deque(found, maxlen=wanted.last)


def _is_wanted(store: Store, entry: Entry, wanted: Wanted) -> bool:
    if wanted.actor is not None and entry.actor != wanted.actor:
        return False
    return wanted.key is None or any(_matches(row[0], wanted.key) for row in store.rows(entry.number))


def _matches(key: Cell, wanted: str | None) -> bool:
    if wanted is None or key == wanted:
        return True
    # A whole key is not the beginning of another one: 10.0.0.0 is not the beginning of 10.0.0.0/24.
    beginning = wanted.rstrip("/") + "/"
    return key_only(wanted) is None and str(key).startswith(beginning)


def _sign(row: LogRow) -> str:
    _, before, after = row
    return "-" if after is None else "+" if before is None else "~"


def _kind(row: LogRow) -> str:
    kind = str(row[0]).partition("/")[0]
    return kind if kind in KINDS or kind == CONFIRMED else "other"


def lines(store: Store, entries: Iterable[Shown]) -> Iterator[str]:
    """Entries as lines for people: one for the revision, then one for each change, or for each sign."""
    for entry, counts, changes in entries:
        number = counts.total()
        yield printable(
            f"revision {entry.number}  {_instant(entry.at)}  {entry.actor}  "
            f"{number} {'change' if number == 1 else 'changes'}"
        )
        described = _in_counts(counts) if changes is None else (_in_words(store, row) for row in changes)
        yield from (f"  {printable(line)}" for line in described)


def _in_words(store: Store, row: LogRow) -> str:
    key, before, after = (None if cell is None else str(cell) for cell in row)
    return described_change(str(key), before, after, store.get)


def _in_counts(counts: Counter[tuple[str, str]]) -> Iterator[str]:
    for sign in _WHAT:
        of_sign = [f"{number} {kind}" for (its, kind), number in counts.items() if its == sign]
        if of_sign:
            yield f"{sign} {', '.join(of_sign)}"


def nothing(store: Store, wanted: Wanted) -> str:
    """The line if no entry matches."""
    newest = store.revision()
    if not newest:
        return "the log has no entry yet"
    what = [f" after revision {wanted.since}"] if wanted.since is not None else []
    what += [f" by {wanted.actor!r}"] if wanted.actor is not None else []
    what += [f" of {wanted.key}"] if wanted.key is not None else []
    return f"no entry{''.join(what)}: the newest is revision {newest}"


def verdict(check: Check, findings: int) -> str:
    """The result of a complete check, in one line."""
    outcome = "whole" if not findings else f"NOT WHOLE, {findings} {'finding' if findings == 1 else 'findings'}"
    head = "no hash" if check.head is None else f"head {check.head}"
    # In a rehearsal of a restore, this shows that revisions newer than the backup exist.
    if check.newer:
        head += f", {counted(check.newer, 'revision')} after the one expected"
    sealed = ""
    if check.origin is not None and check.origin.sealed:
        sealed = f", revisions up to {check.origin.sealed} sealed {_instant(check.origin.at)}"
    checked = f"{counted(check.revisions, 'revision')}, {counted(check.changes, 'change')}"
    return printable(f"checked {checked}: {outcome}, {head}{sealed}")


def as_json(store: Store, wanted: Wanted | None, check: Check, most_findings: int) -> dict[str, Any]:
    """The document for `--json`; it has entries only if `wanted` is given. `findings` has at most `most_findings`,
    but all are counted."""
    entries = None if wanted is None else [_entry(each) for each in shown(store, wanted, _MAX_JSON_CHANGES)]
    walk = check.issues()
    findings = [_finding(finding) for finding in islice(walk, most_findings)]
    number = len(findings) + sum(1 for _ in walk)
    document: dict[str, Any] = {
        "whole": not number,
        "revisions": check.revisions,
        "changes": check.changes,
        "head": None if check.head is None else str(check.head),
        "newer_than_expected": check.newer,
        "sealed": None,
        "findings_total": number,
        "findings": findings,
    }
    if check.origin is not None and check.origin.sealed:
        document["sealed"] = {"revision": check.origin.sealed, "at": str(check.origin.at)}
    return document if entries is None else {**document, "entries": entries}


def _entry(each: Shown) -> dict[str, Any]:
    entry = each.entry
    counts: Counter[str] = Counter()
    for (sign, _), number in each.counts.items():
        counts[_WHAT[sign]] += number
    return {
        "revision": entry.number,
        "at": str(entry.at),
        "actor": str(entry.actor),
        "hash": None if entry.hash is None else entry.hash.hex(),
        **{what: counts[what] for what in _WHAT.values()},
        "changes": None
        if each.changes is None
        else [
            {"key": str(key), "before": _raw(before), "after": _raw(after)} for key, before, after in each.changes
        ],
    }


def _finding(finding: IntegrityIssue) -> dict[str, Any]:
    return {
        "kind": finding.kind,
        "revision": finding.revision,
        "keys": finding.keys,
        "text": printable(finding.text),
    }


def _raw(body: Cell) -> msgspec.Raw | str | None:
    """A record as JSON within JSON; as a text if it is not JSON."""
    if body is None:
        return None
    text = str(body)
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
    return msgspec.Raw(text.encode())


def _instant(at: Cell) -> str:
    try:
        return utc_as_typed(datetime.fromisoformat(str(at)).astimezone(UTC))
    except (ValueError, OverflowError):
        return f"at {str(at)!r}"
