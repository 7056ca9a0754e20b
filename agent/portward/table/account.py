"""What the table holds of a subscription, and how its attachments come out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias
from uuid import UUID

import msgspec

from portward.model import Exemption, Mode, Reason, Subscription, Workload
from portward.policy.decide import Ruling
from portward.table import layout

# Gives what holds for the attachments of (subscription, exemption, workload), at a time of its own.
Rule: TypeAlias = Callable[[Subscription | None, Exemption | None, Workload], Ruling]


class Account(msgspec.Struct, frozen=True, gc=False):
    """What the table holds of a subscription; None for what the store does not name (any more)."""

    id: UUID
    subscription: Subscription | None = None
    exemption: Exemption | None = None

    def pack(self) -> bytes:
        """The account as MessagePack: the fields' values, whose names stand in `model.py`, the id once."""
        return _encoder.encode((self.id, _values(self.subscription), _values(self.exemption)))

    @classmethod
    def unpack(cls, data: bytes) -> Account:
        """The account that `pack` wrote; raises msgspec's errors where the bytes are damaged."""
        id_, subscription, exemption = _decoder.decode(data)
        return cls(
            id_,
            None if subscription is None else Subscription(id=id_, **msgspec.structs.asdict(subscription)),
            None if exemption is None else Exemption(subscription=id_, **msgspec.structs.asdict(exemption)),
        )


def _values(record: Subscription | Exemption | None) -> tuple[object, ...] | None:
    return None if record is None else msgspec.structs.astuple(record)[1:]


def _packed(type_: type[Subscription | Exemption]) -> type[msgspec.Struct]:
    """The same fields as an array, without the first one, the id. What a version before did not write has its
    default."""
    fields = [
        (field.name, field.type) if field.default is msgspec.NODEFAULT else (field.name, field.type, field.default)
        for field in msgspec.structs.fields(type_)[1:]
    ]
    return msgspec.defstruct(f"Packed{type_.__name__}", fields, array_like=True)


_encoder: Final = msgspec.msgpack.Encoder(uuid_format="bytes")
_decoder: Final = msgspec.msgpack.Decoder(
    tuple[UUID, _packed(Subscription) | None, _packed(Exemption) | None]  # type: ignore[misc] # made just here
)


class Outcomes(msgspec.Struct, frozen=True, gc=False):
    """How an account's attachments with one workload come out: the codes of their entries, for those whose machine
    was started after `since` (0: for none of them) and not after `now`, and for the others. Both are microseconds
    since 1970."""

    number: int
    others: int
    since: int
    now: int
    started_since: int

    def row(self, place: bytes, started: int) -> bytes:
        """The row of the entry at a place, for a machine that was last started then (0: unknown)."""
        code = self.started_since if 0 < self.since < started <= self.now else self.others
        return place + layout.OUTCOME.pack(self.number, started << layout.CODE_BITS | code)

    def later(self, started: int) -> bool:
        """Whether a machine that was started then, by its record, comes out otherwise once that time has come."""
        return self.since > 0 and started > self.now


# Of virtual machines, and of platform services: `paas` is the place.
ByWorkload: TypeAlias = tuple[Outcomes, Outcomes]


def by_workload(number: int, account: Account, rule: Rule) -> ByWorkload:
    """How the attachments of the account with the table's number `number` come out."""
    return _outcomes(number, account, Workload.VM, rule), _outcomes(number, account, Workload.PAAS, rule)


def _outcomes(number: int, account: Account, workload: Workload, rule: Rule) -> Outcomes:
    subscription, paas = account.subscription, workload is Workload.PAAS
    ruling = rule(subscription, account.exemption, workload)
    observed = subscription is not None and subscription.mode is Mode.OBSERVE
    has_limit = account.exemption is not None and account.exemption.limit is not None

    def code(reason: Reason) -> int:
        limited = has_limit and reason is Reason.ALLOWED_EXEMPT
        return layout.code_of(reason, observed=observed, paas=paas, limited=limited)

    since = layout.microseconds(ruling.unless_started_after)
    now = layout.microseconds(ruling.now)
    return Outcomes(number, code(ruling.reason), since, now, code(Reason.ALLOWED_EXEMPT))
