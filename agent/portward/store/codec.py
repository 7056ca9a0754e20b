"""How records are written: keys, and JSON. Pure.

    subscriptions/<uuid>
    attachments/<segment>/<address>     attachments/vni1001/10.0.0.4        attachments/vni1001/2001:db8::1
    attachments/<segment>/<prefix>      attachments/vni1001/10.0.0.0/24
    exemptions/<uuid of the subscription>

Each record has exactly one key: addresses are compressed and in lower case, and a prefix of one address is written
as that address. A segment's name contains no `/`, so the text after the second `/` is the address or prefix.

A subscription has at most one exemption record, which is its latest state; earlier states are in the log.
"""

from __future__ import annotations

from datetime import date
from ipaddress import ip_network
from typing import Final
from uuid import UUID

import msgspec

from portward.config.documents import brief, dec_hook, enc_hook, explained, field_name, network_text
from portward.errors import printable
from portward.model import Attachment, Exemption, ExemptionState, Record, Subscription
from portward.store.validity import flaws
from portward.store.values import RecordError

KINDS: Final[dict[str, type[Record]]] = {
    "subscriptions": Subscription,
    "attachments": Attachment,
    "exemptions": Exemption,
}
# The exceptions that msgspec raises for a text that is no record of its kind, or no JSON.
UNREADABLE: Final = (msgspec.DecodeError, UnicodeEncodeError, RecursionError)
_DECODERS: Final = {kind: msgspec.json.Decoder(type_, dec_hook=dec_hook) for kind, type_ in KINDS.items()}
# Messages quote a key up to this length, in characters. A valid key has about a hundred.
_QUOTED_KEY: Final = 200


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


def decode(key: str, body: str) -> Record:
    """The record with this key, from its JSON. Raises RecordError if it is not valid, or has another key."""
    kind = key.partition("/")[0]
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise RecordError(f"{shown_key(key)}: not a key of a subscription, an attachment or an exemption")
    try:
        record: Record = decoder.decode(body)
    except UNREADABLE as error:
        raise _record_error(key, body, error) from None
    for field, problem in flaws(record):
        raise RecordError(f"{shown_key(key)}: {field}: {problem}")
    if key_of(record) != key:
        raise RecordError(f"{shown_key(key)}: holds the record of {key_of(record)}")
    return record


def readable(key: str, body: str | None) -> Record | None:
    """The record with this key; None if `body` is None or cannot be read."""
    if body is None:
        return None
    try:
        return decode(key, body)
    except RecordError:
        return None


def key_only(key: str) -> Record | None:
    """A record with this key and arbitrary other fields, for removing it; None if the key is not valid."""
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


def shown_key(key: str) -> str:
    """A key for a message: printable characters only, and cut off if it is too long."""
    return printable(key) if 0 < len(key) <= _QUOTED_KEY else brief(key)


def _record_error(key: str, body: str, error: Exception) -> RecordError:
    if not isinstance(error, msgspec.ValidationError):
        deep = isinstance(error, RecursionError)
        problem = "nested too deeply" if deep else f"not JSON: {str(error).removeprefix('JSON is malformed: ')}"
        return RecordError(f"{shown_key(key)}: {problem}")
    try:
        document = msgspec.json.decode(body)
    except (msgspec.ValidationError, RecursionError):  # a number that is too large, or deep nesting
        document = None
    except msgspec.DecodeError as malformed:  # after the place of the first error
        return _record_error(key, body, malformed)
    problem, steps = explained(str(error), KINDS[key.partition("/")[0]], document)
    return RecordError(": ".join(part for part in (shown_key(key), field_name(steps), problem) if part))
