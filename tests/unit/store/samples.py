"""Records, stores and inventories for the tests of the store."""

from __future__ import annotations

from datetime import UTC, date, datetime
from ipaddress import ip_network
from pathlib import Path
from uuid import UUID

from portward.model import Attachment, Exemption, ExemptionState, Record, Subscription
from portward.store.codec import encode, key_of
from portward.store.sqlite.store import SqliteStore
from portward.store.values import Put

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)

CONTOSO = Subscription(
    id=UUID("11111111-0000-4000-8000-000000000001"),
    name="contoso-prod",
    offer="enterprise-agreement",
    created=date(2021, 3, 2),
)
FABRIKAM = Subscription(
    id=UUID("11111111-0000-4000-8000-000000000002"),
    name="fabrikam",
    offer="pay-as-you-go",
    created=date(2022, 6, 30),
    payment_history=True,
)
MACHINE = Attachment(
    segment="vni1001",
    address=ip_network("10.0.0.4"),
    subscription=CONTOSO.id,
    started=datetime(2026, 1, 10, 8, tzinfo=UTC),
)
PREFIX = Attachment(segment="vni1002", address=ip_network("10.0.0.0/24"), subscription=FABRIKAM.id)
GRANT = Exemption(
    subscription=FABRIKAM.id,
    state=ExemptionState.GRANTED,
    requested=datetime(2026, 1, 8, 9, tzinfo=UTC),
    decided=datetime(2026, 1, 9, 12, tzinfo=UTC),
    by="self-service",
)
ALL: tuple[Record, ...] = (CONTOSO, FABRIKAM, MACHINE, PREFIX, GRANT)

EXAMPLE = """\
subscriptions:
  - id: 11111111-0000-4000-8000-000000000001
    name: contoso-prod
    offer: enterprise-agreement
    created: 2021-03-02
  - id: 11111111-0000-4000-8000-000000000002
    name: fabrikam
    offer: pay-as-you-go
    created: 2022-06-30
    standing: good
    payment_history: true
attachments:
  - segment: vni1001
    address: 10.0.0.4
    subscription: 11111111-0000-4000-8000-000000000001
    started: 2026-01-10T08:00:00Z
  - segment: vni1002
    address: 10.0.0.0/24
    subscription: 11111111-0000-4000-8000-000000000002
exemptions:
  - subscription: 11111111-0000-4000-8000-000000000002
    state: granted
    requested: 2026-01-08T09:00:00Z
    decided: 2026-01-09T12:00:00Z
    by: self-service
"""


def put(record: Record) -> Put:
    """The change that sets a record."""
    return Put(key_of(record), encode(record))


def texts(*records: Record) -> dict[str, str]:
    """Records as a store holds them."""
    return {key_of(record): encode(record) for record in records}


def write(store: SqliteStore, *batch: Put, actor: str = "ada") -> int:
    """Writes a batch after the newest revision."""
    return store.write(batch, expected=store.revision(), actor=actor, at=NOON)


def held(store: SqliteStore) -> dict[str, str]:
    """All records."""
    return dict(store.read_all()[1])


def opened(path: Path) -> SqliteStore:
    """Opens the store at `path`, and makes it if it is missing."""
    return SqliteStore(path, create=True)
