"""Attachments as bytes and numbers, without the objects of a record: a load of millions of attachments has neither
the time nor the memory for those.

`Packer.quick` accepts only what `codec.decode` accepts, and returns what `packed` returns for that record. For a
text that it does not recognise it returns None, and the caller must use `decode`.
"""

from __future__ import annotations

import re
from datetime import timedelta
from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Final

import msgspec

from portward.base.limits import FIRST_TIME, LAST_TIME
from portward.model import Attachment, Instant, Workload
from portward.store.codec import UNREADABLE
from portward.store.validity import is_interface


class Packed(msgspec.Struct, frozen=True, gc=False):
    """An attachment: prefix length in bits, network address (4 or 16 bytes, network byte order), the
    subscription's UUID in 36 characters, and the last start in microseconds since 1970, 0 if it is unknown."""

    segment: str
    length: int
    address: bytes
    subscription: str
    paas: bool
    started: int


class _Written(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """The fields of `model.Attachment`, with address and UUID as text."""

    segment: str
    address: str
    subscription: str
    workload: Workload = Workload.VM
    started: Instant | None = None


_read = msgspec.json.Decoder(_Written).decode
_PAAS: Final = Workload.PAAS
_EPOCH: Final = FIRST_TIME - timedelta(days=1)
_MICROSECOND: Final = timedelta(microseconds=1)
_EARLIEST, _LATEST = ((at - _EPOCH) // _MICROSECOND for at in (FIRST_TIME, LAST_TIME))
_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_is_length = re.compile(r"0|[1-9][0-9]{0,2}").fullmatch


def packed(attachment: Attachment) -> Packed:
    """The same attachment."""
    return Packed(
        attachment.segment,
        attachment.address.prefixlen,
        attachment.address.network_address.packed,
        str(attachment.subscription),
        attachment.workload is _PAAS,
        0 if attachment.started is None else (attachment.started - _EPOCH) // _MICROSECOND,
    )


class Packer:
    """Reads many attachments. Its caches end with it: small strings that outlive the records around them would
    keep the allocator from returning the memory of all of them."""

    def __init__(self) -> None:
        self._segments: set[str] = set()
        # The attachments of one customer are often near each other.
        self._is_uuid = lru_cache(maxsize=4_096)(_is_uuid)

    def quick(self, key: str, body: str) -> Packed | None:
        """The attachment with this key, if key and JSON are written as portward writes them; None if only `decode`
        can say."""
        if not key.startswith("attachments/"):
            return None
        try:
            found = _read(body)
        except UNREADABLE:
            return None
        segment, subscription, prefix = found.segment, found.subscription, _prefix(found.address)
        if (
            prefix is None
            or key != f"attachments/{segment}/{found.address}"
            or not (segment in self._segments or self._is_interface(segment))
            or not self._is_uuid(subscription)
        ):
            return None
        started = 0
        if found.started is not None:
            started = (found.started - _EPOCH) // _MICROSECOND
            if not _EARLIEST <= started <= _LATEST:
                return None
        length, address = prefix
        return Packed(segment, length, address, subscription, found.workload is _PAAS, started)

    def _is_interface(self, segment: str) -> bool:
        good = is_interface(segment)
        if good:
            self._segments.add(segment)
        return good


def _prefix(text: str) -> tuple[int, bytes] | None:
    """Prefix length and network address of an address or prefix in its shortest form; None for any other text."""
    written, slash, digits = text.partition("/")
    try:
        if ":" in written:
            bits, address = 128, inet_pton(AF_INET6, written)
            # The C library writes some addresses with an IPv4 address at their end, unlike Python.
            if "." in written or inet_ntop(AF_INET6, address) != written:
                return None
        else:
            bits, address = 32, inet_pton(AF_INET, written)
    except (OSError, ValueError):
        return None
    if not slash:
        return bits, address
    if not _is_length(digits) or (length := int(digits)) >= bits:
        return None
    beyond = int.from_bytes(address, "big") & ((1 << bits - length) - 1)
    return None if beyond else (length, address)


def _is_uuid(text: str) -> bool:
    return _UUID.fullmatch(text) is not None
