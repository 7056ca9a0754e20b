"""The account of a subscription in the table, and the decisions on its attachments."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from operator import attrgetter
from typing import Final, Literal, TypeAlias
from uuid import UUID

import msgspec

from portward.base.limits import time_problem
from portward.model import Exemption, ExemptionState, Mode, Reason, Subscription, Workload
from portward.policy.decide import Ruling
from portward.table import layout
from portward.table.layout import DamagedError

# Decides on the attachments of a subscription with an exemption and a workload, at a time that the rule knows.
Rule: TypeAlias = Callable[[Subscription | None, Exemption | None, Workload], Ruling]


class Account(msgspec.Struct, frozen=True, gc=False):
    """A subscription and its exemption. A record that the store does not have is None."""

    id: UUID
    subscription: Subscription | None = None
    exemption: Exemption | None = None

    def pack(self) -> bytes:
        """The account as MessagePack: version, id, and the values of both records by their positions."""
        subscription = None if self.subscription is None else _subscription_values(self.subscription)
        exemption = None if self.exemption is None else _exemption_values(self.exemption)
        return _encoder.encode((VERSION, self.id, subscription, exemption))

    @classmethod
    def unpack(cls, data: bytes) -> Account:
        """The account that `pack` encoded. Raises DamagedError, also for an account of another version."""
        try:
            _, id_, subscription, exemption = _decoder.decode(data)
        except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:
            raise DamagedError(f"an account cannot be read: {error}") from None
        if exemption is not None:
            _check_times(exemption.requested, exemption.decided, exemption.until)
        return cls(
            id_,
            None if subscription is None else Subscription(id=id_, **msgspec.structs.asdict(subscription)),
            None if exemption is None else Exemption(subscription=id_, **msgspec.structs.asdict(exemption)),
        )


def _check_times(*times: datetime | None) -> None:
    """Raises DamagedError for a time that the limits refuse, because then a bit of the row has flipped."""
    for at in times:
        if at is not None and (problem := time_problem(at)) is not None:
            raise DamagedError(f"an account cannot be read: {problem}")


# Raise it with every change of the positions below. An account of another version counts as damaged, because a
# field that this version does not know may be the exemption's limit.
VERSION: Final = 1
# The position of each field in its record, from 0. The id comes before both records. The order of the fields in
# `model` does not matter. Add a new field at the end.
SUBSCRIPTION_FIELDS: Final = ("offer", "created", "name", "standing", "payment_history", "mode")
EXEMPTION_FIELDS: Final = (
    "state", "requested", "decided", "until", "by", "justification", "reason", "details", "fraud_check",
    "fraud_note", "limit",
)  # fmt: skip

_subscription_values: Final = attrgetter(*SUBSCRIPTION_FIELDS)
_exemption_values: Final = attrgetter(*EXEMPTION_FIELDS)


def _packed(type_: type[Subscription | Exemption], names: tuple[str, ...]) -> type[msgspec.Struct]:
    """A struct that is encoded as an array of these fields, in this order."""
    types = {field.name: field.type for field in msgspec.structs.fields(type_)}
    fields = [(name, types[name]) for name in names]
    return msgspec.defstruct(f"Packed{type_.__name__}", fields, array_like=True, forbid_unknown_fields=True)


_encoder: Final = msgspec.msgpack.Encoder(uuid_format="bytes")
_PackedSubscription: Final = _packed(Subscription, SUBSCRIPTION_FIELDS)
_PackedExemption: Final = _packed(Exemption, EXEMPTION_FIELDS)
_decoder: Final = msgspec.msgpack.Decoder(
    tuple[Literal[VERSION], UUID, _PackedSubscription | None, _PackedExemption | None]  # type: ignore[valid-type] # the types are created above
)


class Outcomes(msgspec.Struct, frozen=True, gc=False):
    """The codes of the entries of an account's attachments with one workload.

    `started_since` is the code if the machine was started after `since` (0: never) and not after `now`, both in
    microseconds since 1970. `others` is the code of all others. `number` is the table's number of the account.
    """

    number: int
    others: int
    since: int
    now: int
    started_since: int

    def row(self, place: bytes, started: int) -> bytes:
        """The row of the entry at a place, for a machine whose last start was at `started` (microseconds; 0:
        unknown)."""
        code = self.started_since if 0 < self.since < started <= self.now else self.others
        return place + layout.OUTCOME.pack(self.number, started << layout.CODE_BITS | code)

    def later(self, started: int) -> bool:
        """Whether the decision changes at `started`, a recorded start that has not come yet."""
        return self.since > 0 and started > self.now


def grant_end(exemption: Exemption | None) -> int | None:
    """The end of a grant in microseconds since 1970; None if it has no end, or if there is no grant."""
    if exemption is None or exemption.state is not ExemptionState.GRANTED or exemption.until is None:
        return None
    return layout.microseconds(exemption.until)


# The outcomes for virtual machines and for platform services, in this order, so that `paas` is the index.
ByWorkload: TypeAlias = tuple[Outcomes, Outcomes]


def by_workload(number: int, account: Account, rule: Rule) -> ByWorkload:
    """The outcomes for the attachments of the account with the table's number `number`."""
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
