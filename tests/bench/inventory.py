"""A large inventory as JSON, for the measurements: many attachments, ten of each subscription."""

from __future__ import annotations

import json
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from uuid import UUID

# One subscription in ten may send, so most are denied, as in a cloud.
OFFERS = ("enterprise-agreement", *["pay-as-you-go"] * 9)
PER_SEGMENT = 1_000
_FIRST = int(IPv4Address("10.0.0.0"))


def subscription(number: int) -> UUID:
    """The id of a subscription."""
    return UUID(int=(0x22222222 << 96) | 0x4000_8000 << 48 | number)


def place(number: int) -> tuple[str, str]:
    """Segment and address of an attachment: the first thousand are in vni1001."""
    return f"vni{1001 + number // PER_SEGMENT}", str(IPv4Address(_FIRST + 256 + number % PER_SEGMENT))


def write(path: Path, attachments: int) -> None:
    """Writes the inventory; one record a line."""
    with path.open("w") as out:
        out.write('{"subscriptions": [\n')
        out.write(",\n".join(_subscriptions(attachments // 10)))
        out.write('\n], "attachments": [\n')
        out.write(",\n".join(_attachments(attachments)))
        out.write("\n]}\n")


def _subscriptions(count: int) -> Iterator[str]:
    for number in range(count):
        yield json.dumps(
            {
                "id": str(subscription(number)),
                "name": f"customer-{number}",
                "offer": OFFERS[number % len(OFFERS)],
                "created": "2022-06-30",
            }
        )


def _attachments(count: int) -> Iterator[str]:
    for number in range(count):
        segment, address = place(number)
        yield json.dumps(
            {
                "segment": segment,
                "address": address,
                "subscription": str(subscription(number // 10)),
                "started": "2026-01-10T08:00:00Z",
            }
        )
