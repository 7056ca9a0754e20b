"""What every store of policy can do, and how its records are written.

A record is JSON under a key, the same in every backend:

    subscriptions/<uuid>
    attachments/<segment>/<address>     attachments/vni1001/10.0.0.4        attachments/vni1001/2001:db8::1
    attachments/<segment>/<prefix>      attachments/vni1001/10.0.0.0/24
    exemptions/<uuid of the subscription>

Addresses are compressed and in lower case; a prefix of one address is written as that address, so nothing has
two keys. No segment holds a `/`, so what follows the second one is the prefix, with its own.

The exemption of a subscription is one record, its latest state; what it was before stands in the change log.

Beside the records there may be one more key, `confirmed`: the number of the revision up to which somebody has
confirmed that many subscriptions may flip, or, after the word `alone`, of the one revision that is. If a gateway
holds another history of the store than its own (a restored backup), the word `replaces` and the name of that hold
follow the number, in hex: no backup can hold a confirmation that names it.
Each accepted batch of changes is one revision; revisions rise by one. Revision and changes together are an entry
of the log, which only grows; each entry has a hash and carries that of the one before (`chain`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import date, datetime
from ipaddress import ip_network
from typing import Final, NamedTuple, Protocol, TypeAlias
from uuid import UUID

import msgspec

from portward.config.documents import brief, dec_hook, enc_hook, explained, field_name, network_text
from portward.errors import StoreError, printable
from portward.model import Address, Attachment, Exemption, ExemptionState, Record, Subscription
from portward.store.validity import flaws, is_interface

Progress: TypeAlias = Callable[[int], None]

KINDS: Final[dict[str, type[Record]]] = {
    "subscriptions": Subscription,
    "attachments": Attachment,
    "exemptions": Exemption,
}

# A longer key is cut off in messages.
_LONGEST_KEY: Final = 200

CONFIRMED: Final = "confirmed"
_ALONE: Final = "alone "
# Bytes of the name of a hold.
HOLD_BYTES: Final = 24
_CONFIRMED: Final = re.compile(rf"([0-9]{{1,19}})(?: replaces ([0-9a-f]{{{2 * HOLD_BYTES}}}))?")


class NoStoreError(StoreError):
    """There is no store yet at the place that was named."""


class RecordError(StoreError):
    """A record in the store that cannot be read; the message names its key and field."""


class Change(NamedTuple):
    """One record as it was and as it became; None: it was not there. `at` in UTC."""

    revision: int
    at: datetime
    actor: str
    key: str
    before: str | None
    after: str | None


class Put(NamedTuple):
    """What a key is to hold from now on; None takes it away."""

    key: str
    body: str | None


class Odd(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What another tool wrote into the log where only text belongs: its type, and what it holds, in hex or as a
    number."""

    kind: str
    content: str

    def __str__(self) -> str:
        return f"<{self.kind} {self.content}>"


# A text of the log as it is kept, word for word: a hash is over these.
Cell: TypeAlias = str | Odd | None
# A change as it is kept: key, before, after.
LogRow: TypeAlias = tuple[Cell, Cell, Cell]

# SHA-256.
HASH_BYTES: Final = 32


class Origin(NamedTuple):
    """How the hashes of a log begin. `at` is when that was: when the store was made, or when a log that had been
    written without hashes was sealed, which gave them; `sealed` is then the newest revision that was there
    already, else 0. What was done to the log before cannot be told. `hash` is None where it is lost."""

    at: Cell
    sealed: int
    hash: bytes | None


class Entry(NamedTuple):
    """A revision as the log keeps it. `at` is ISO 8601 in UTC, unless another tool wrote it; `changes` is how
    many there are. `previous` is the hash of the entry before, which it carries. Both hashes have 32 bytes, and
    are None where there is none."""

    number: int
    at: Cell
    actor: Cell
    previous: bytes | None
    hash: bytes | None
    changes: int


class Store(Protocol):
    """A store of policy. Every method raises StoreError where the store cannot be used."""

    def identity(self) -> bytes:
        """16 bytes that no other store has: revisions of two stores are not comparable."""

    def revision(self) -> int:
        """The newest revision; 0 for a store that never held anything."""

    def hash_of(self, revision: int) -> bytes | None:
        """32 bytes that tell the history of this store up to a revision from every other one: the hash of the
        log's entry, of its origin for revision 0. None if the log has no such entry, or has lost its hash. Where
        a log has no hashes yet, they are made of number, time and actor alone."""

    def get(self, key: str) -> str | None:
        """The record under a key."""

    def read_all(self) -> tuple[int, Generator[tuple[str, str], None, None]]:
        """A revision, and all records (key, JSON) as they stood at it, attachments last: whoever decides
        them needs the others first. Nothing else may be asked of the store before the iterator has come to its
        end."""

    def under(self, prefix: str) -> Iterator[tuple[str, str]]:
        """The records (key, JSON) whose keys begin with `prefix`, in their order."""

    def history(self, key: str) -> Iterator[Change]:
        """All changes of one record, in order."""

    def changes(self, since: int) -> Generator[Change, None, None]:
        """What changed after revision `since`, in order, whole revisions only."""

    def waits(self) -> str:
        """Why a reader may have to wait for a writer, in words; empty if it never does."""

    def written(self) -> datetime | None:
        """When the newest revision was written, in UTC; None for a store that never held anything. No revision is
        dated before the one before it, whatever its writer's clock says."""

    def reading(self) -> AbstractContextManager[None]:
        """While it is open, everything that is asked of the store is answered from one state of it. Others may
        write meanwhile; this one may not."""

    def origin(self) -> Origin | None:
        """How the hashes of the log begin; None for a log that has none yet. The next change seals it."""

    def log(self, since: int | None = None) -> Iterator[Entry]:
        """The entries of the log after revision `since` (None: all of them, also those with a number that cannot
        be), oldest first."""

    def rows(self, revision: int) -> Iterator[LogRow]:
        """The changes of a revision as they are kept, in the order of their keys."""

    def strays(self) -> Iterator[int | Odd]:
        """The revisions under which changes are kept and that have no entry: there are none, unless another tool
        wrote into the log."""

    def write(
        self,
        batch: Sequence[Put],
        *,
        expected: int,
        actor: str,
        at: datetime,
        progress: Progress | None = None,
    ) -> int:
        """Writes a batch, in which no key stands twice, as one revision: all of it or nothing. Gives its
        number; a batch that changes nothing makes no revision, and the number stays. Seals a log that has no
        hashes yet. Raises ConflictError where the store is no longer at revision `expected`. `progress` hears how
        many are written so far."""

    def fileno(self) -> int | None:
        """A descriptor that can be read once a revision was written by anyone; None: only asking tells."""

    def drain(self) -> None:
        """Makes that descriptor unreadable again, until the next revision."""

    def close(self) -> None:
        """Closes the store."""


def key_of(record: Record) -> str:
    """The key of a record."""
    match record:
        case Subscription():
            return f"subscriptions/{record.id}"
        case Attachment():
            return attachment_key(record.segment, network_text(record.address))
        case Exemption():
            return f"exemptions/{record.subscription}"


def attachment_key(segment: str, address: str) -> str:
    """The key of an attachment; `address` as `network_text` writes it."""
    return f"attachments/{segment}/{address}"


def encode(record: Record) -> str:
    """A record as JSON."""
    return msgspec.json.encode(record, enc_hook=enc_hook).decode()


# What a text that is no record of its kind, or no JSON, makes msgspec raise.
UNREADABLE: Final = (msgspec.DecodeError, UnicodeEncodeError, RecursionError)
_DECODERS: Final = {kind: msgspec.json.Decoder(type_, dec_hook=dec_hook) for kind, type_ in KINDS.items()}


def decode(key: str, body: str) -> Record:
    """The record under a key; raises RecordError."""
    kind = key.partition("/")[0]
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise RecordError(f"{told_key(key)}: not a key of a subscription, an attachment or an exemption")
    try:
        record: Record = decoder.decode(body)
    except UNREADABLE as error:
        raise _record_error(key, body, error) from None
    for field, problem in flaws(record):
        raise RecordError(f"{told_key(key)}: {field}: {problem}")
    if key_of(record) != key:
        raise RecordError(f"{told_key(key)}: holds the record of {key_of(record)}")
    return record


def readable(key: str, body: str | None) -> Record | None:
    """The record under a key; None where there is none, or none that can be read."""
    if body is None:
        return None
    try:
        return decode(key, body)
    except RecordError:
        return None


def _record_error(key: str, body: str, error: Exception) -> RecordError:
    if not isinstance(error, msgspec.ValidationError):
        deep = isinstance(error, RecursionError)
        problem = "nested too deeply" if deep else f"not JSON: {str(error).removeprefix('JSON is malformed: ')}"
        return RecordError(f"{told_key(key)}: {problem}")
    try:
        document = msgspec.json.decode(body)
    except (msgspec.ValidationError, RecursionError):  # a number that is too large; nested deeply
        document = None
    except msgspec.DecodeError as malformed:  # further on
        return _record_error(key, body, malformed)
    problem, steps = explained(str(error), KINDS[key.partition("/")[0]], document)
    return RecordError(": ".join(part for part in (told_key(key), field_name(steps), problem) if part))


def told_key(key: str) -> str:
    """A key in a message, in printable characters: the longest right one has some hundred of them."""
    return printable(key) if 0 < len(key) <= _LONGEST_KEY else brief(key)


def named(key: str) -> Record | None:
    """A record with this key, of which nothing else is known: enough to take it away. None for no key."""
    kind, _, rest = key.partition("/")
    try:
        match kind:
            case "subscriptions":
                record: Record = Subscription(id=UUID(rest), offer="", created=date.min)
            case "attachments":
                segment, _, prefix = rest.partition("/")
                record = Attachment(segment=segment, address=ip_network(prefix), subscription=UUID(int=0))
            case "exemptions":
                record = Exemption(subscription=UUID(rest), state=ExemptionState.REVOKED)
            case _:
                return None
    except ValueError:
        return None
    return record if key_of(record) == key and not any(flaws(record)) else None


def confirmation(revision: int, *, alone: bool = False, hold: bytes | None = None) -> Put:
    """What, written as part of this revision, confirms it and all before it, or it `alone`. `hold` is the name (24
    bytes) of what a gateway holds because the store has another history."""
    if alone:
        return Put(CONFIRMED, f"{_ALONE}{revision}")
    return Put(CONFIRMED, str(revision) if hold is None else f"{revision} replaces {hold.hex()}")


def confirmed_alone(body: str | None) -> int:
    """The revision that is confirmed alone; 0 where none is."""
    return confirmed(body.removeprefix(_ALONE)) if body is not None and body.startswith(_ALONE) else 0


def confirmed(body: str | None) -> int:
    """The revision up to which everything is confirmed; 0 where nothing is, or no number stands there."""
    found = _CONFIRMED.fullmatch(body or "")
    return int(found[1]) if found else 0


def confirmed_hold(body: str | None) -> bytes | None:
    """The name of the hold that is confirmed; None where none is named."""
    found = _CONFIRMED.fullmatch(body or "")
    return bytes.fromhex(found[2]) if found and found[2] else None


def find(
    store: Store, segment: str, address: Address
) -> tuple[int, Attachment | None, Subscription | None, Exemption | None]:
    """The store's revision, and what it knows of an address: the attachment with the most specific prefix, its
    subscription and that one's exemption."""
    revision = store.revision()
    attachment = _most_specific(store, segment, address)
    if attachment is None:
        return revision, None, None, None
    subscription = _read(store, f"subscriptions/{attachment.subscription}")
    exemption = _read(store, f"exemptions/{attachment.subscription}")
    return (
        revision,
        attachment,
        subscription if isinstance(subscription, Subscription) else None,
        exemption if isinstance(exemption, Exemption) else None,
    )


def _most_specific(store: Store, segment: str, address: Address) -> Attachment | None:
    if not is_interface(segment):  # bytes that are not UTF-8 cannot be in a key
        return None
    for length in range(address.max_prefixlen, -1, -1):
        network = ip_network((address, length), strict=False)
        record = _read(store, attachment_key(segment, network_text(network)))
        if isinstance(record, Attachment):
            return record
    return None


def _read(store: Store, key: str) -> Record | None:
    body = store.get(key)
    return None if body is None else decode(key, body)
