"""Names of network interfaces: which names the kernel accepts, which names a configured pattern matches, and how
to print a name. Pure.

The kernel's names are bytes. In portward they are text: UTF-8, with each other byte as a lone surrogate
(`surrogateescape`). So each name has exactly one text, and no two names have the same. Code that exchanges names
with the kernel uses `decoded` and `encoded`; code that prints one uses `shown`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

MAX_NAME_BYTES: Final = 15  # IFNAMSIZ − 1, because the kernel stores a zero byte after the name

# The bytes that dev_valid_name (net/core/dev.c) refuses. The kernel's isspace is that of Latin-1, so the byte 0xA0
# is a space, which is also the second byte of "à" in UTF-8. The kernel replaces `%d` in a name by a number.
_REFUSED: Final = frozenset(b"\0/:%\t\n\v\f\r \xa0")
# nft has no escape for a quotation mark in a name, and reads a backslash before `*` as an escape.
_UNQUOTABLE: Final = frozenset('"\\')


def decoded(name: bytes) -> str:
    """The text of a name from the kernel, without the zero byte at its end."""
    return name.decode("utf-8", "surrogateescape")


def encoded(name: str) -> bytes:
    """The kernel's bytes of a name. Raises UnicodeEncodeError for a text that `decoded` cannot return."""
    return name.encode("utf-8", "surrogateescape")


def is_name(name: str) -> bool:
    """Whether the kernel accepts an interface with this name."""
    try:
        data = encoded(name)
    except UnicodeEncodeError:
        return False
    return 0 < len(data) <= MAX_NAME_BYTES and data not in (b".", b"..") and _REFUSED.isdisjoint(data)


def is_segment_name(name: str) -> bool:
    """Whether an attachment can be in a segment with this name. A `*` is refused, because it looks like a
    pattern."""
    return name.isprintable() and "*" not in name and is_name(name)


def is_pattern(pattern: str) -> bool:
    """Whether the configuration can name interfaces by this text: a name, or the beginning of a name and `*`.

    A `*` alone is refused, because nft cannot express it. So is a name that nft cannot quote, because then the
    kernel and `matches` would disagree."""
    wild = pattern.endswith("*")
    stem = pattern.removesuffix("*")
    if not stem.isprintable() or "*" in stem or not _UNQUOTABLE.isdisjoint(stem):
        return False
    # The beginning of a name, with any character after it, must be a valid name.
    return is_name(f"{stem}x" if wild and stem else stem)


def matches(patterns: tuple[str, ...], interface: str) -> bool:
    """Whether an interface name matches one of the patterns. Compares bytes, as the kernel does for the
    ruleset."""
    name = encoded(interface)
    return any(
        name.startswith(encoded(pattern[:-1])) if pattern.endswith("*") else name == encoded(pattern)
        for pattern in patterns
    )


def covers(wide: Sequence[str], patterns: Iterable[str]) -> bool:
    """Whether each interface that one of the patterns can match also matches one of `wide`."""
    return all(
        any(one == other or (one.endswith("*") and other.startswith(one[:-1])) for one in wide)
        for other in patterns
    )


def shown(name: str) -> str:
    """The name in printable characters: other bytes become `\\xNN`, and a backslash becomes two, so that no two
    names look the same."""
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(sign if sign.isprintable() and sign != "\\" else _escaped(sign) for sign in name)


def _escaped(sign: str) -> str:
    return "\\\\" if sign == "\\" else "".join(f"\\x{byte:02x}" for byte in encoded(sign))
