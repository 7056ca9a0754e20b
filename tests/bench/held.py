"""How long it takes until the kernel enforces a revocation, with a held change before it and without one.

Each revocation is one run of `portward exemption revoke --wait`, for another customer whose machine sends. The
time is the one that the program prints. The held change would deny five thousand customers at once. It is written
and taken back in turns, so that both cases are measured under the same load. After each command, the customer
sends one packet, which must not arrive. A packet of a customer who is not revoked yet must arrive.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Final
from uuid import UUID

from msgspec.structs import replace

from bench.figures import Figure, percentile
from bench.revoke import _revoke, _write
from kernel.conftest import Gateway, running_gateway
from portward.lab.agent import until
from portward.lab.topology import FABRIKAM
from portward.model import Attachment, Exemption, ExemptionState, Record, Standing, Subscription
from portward.store.backends import open_store
from portward.store.codec import encode, key_of
from portward.store.values import Put

_GRANTED: Final = datetime(2026, 1, 9, 12, tzinfo=UTC)
_CUSTOMERS: Final = 5_000
_EACH: Final = 12
_FIRST: Final = int(ip_address("10.128.0.0"))
# The same code runs in both cases, so a larger ratio than this is more than noise of the machine.
_RATIO: Final = "<= 1.5"


def measure(folder: Path, rounds: int = 8) -> list[Figure]:
    """`revoke_p99_ms` and `revoke_behind_held_p99_ms`, and the ratio of the medians."""
    free: list[float] = []
    behind: list[float] = []
    leaked = 0
    with running_gateway(folder) as gateway:
        _write(gateway, *_customers(), *_senders(2 * _EACH * rounds + 1))
        for start in range(0, 2 * _EACH * rounds, 2 * _EACH):
            leaked += _revoke_all(gateway, range(start, start + _EACH), free)
            _held(gateway, Standing.DISABLED, held=1)
            leaked += _revoke_all(gateway, range(start + _EACH, start + 2 * _EACH), behind)
            if gateway.agent.metrics()["portward_policy_held"] != 1:
                raise RuntimeError("the change is not held any more")
            _held(gateway, Standing.GOOD, held=0)
    halves = percentile(free, 0.5), percentile(behind, 0.5)
    ratio = halves[1] / halves[0]
    return [
        Figure(
            "revoke_free_p99_ms", percentile(free, 0.99), halves[0], max(free),
            "ms, nothing held (from: median, to: largest)",
        ),
        Figure(
            "revoke_behind_held_p99_ms", percentile(behind, 0.99), halves[1], max(behind),
            f"ms, behind a change of {_CUSTOMERS} customers",
        ),
        Figure("revoke_behind_held_ratio", ratio, ratio, ratio, "median behind it to median without", _RATIO),
        Figure(
            "revoke_behind_held_leaked", leaked, leaked, leaked,
            f"packets sent after one of {2 * _EACH * rounds} had returned", "<= 0",
        ),
    ]  # fmt: skip


def _customers() -> list[Record]:
    """Customers who may send by their offer, with an address each."""
    records: list[Record] = []
    for number in range(1, _CUSTOMERS + 1):
        id_ = UUID(int=number)
        records.append(Subscription(id=id_, offer="enterprise-agreement", created=date(2022, 6, 30)))
        records.append(Attachment(segment="vni7777", address=ip_network(_FIRST + number), subscription=id_))
    return records


def _sender(number: int) -> UUID:
    return UUID(int=(9 << 96) | number)


def _address(number: int) -> str:
    return str(ip_address(int(ip_address("10.200.0.0")) + number))


def _senders(count: int) -> list[Record]:
    """Customers who may send by an exemption."""
    records: list[Record] = []
    for number in range(count):
        id_ = _sender(number)
        records.append(Subscription(id=id_, offer="pay-as-you-go", created=date(2022, 6, 30)))
        records.append(
            Attachment(
                segment=FABRIKAM.segment, address=ip_network(_address(number)), subscription=id_,
                started=_GRANTED + timedelta(days=1),
            )
        )  # fmt: skip
        records.append(
            Exemption(subscription=id_, state=ExemptionState.GRANTED, requested=_GRANTED, decided=_GRANTED)
        )
    return records


def _held(gateway: Gateway, standing: Standing, *, held: int) -> None:
    """Writes another standing of all customers to the store without `portward apply`. Waits until that change is
    held (`held` is 1), or no change is (0)."""
    records = [replace(record, standing=standing) for record in _customers() if isinstance(record, Subscription)]
    store = open_store(f"sqlite:{gateway.agent.folder / 'portward.db'}")
    try:
        batch = [Put(key_of(record), encode(record)) for record in records]
        store.write(batch, expected=store.revision(), actor="another tool", at=datetime.now(UTC))
    finally:
        store.close()
    until(lambda: gateway.agent.metrics()["portward_policy_held"] == held, f"held: {held}", seconds=60)


def _revoke_all(gateway: Gateway, numbers: range, times: list[float]) -> int:
    """Revokes these customers one by one. Adds the milliseconds until each is enforced to `times`. Returns how
    many packets came out afterwards."""
    leaked = 0
    for number in numbers:
        if not gateway.passes(FABRIKAM, _address(number)):
            raise RuntimeError(f"customer {number} may not send before the revocation")
        times.append(_revoke(gateway, str(_sender(number)))["enforced_after_ms"])
        leaked += gateway.passes(FABRIKAM, _address(number))
    if not gateway.passes(FABRIKAM, _address(numbers.stop)):
        raise RuntimeError("a customer who was not revoked may not send")
    return leaked
