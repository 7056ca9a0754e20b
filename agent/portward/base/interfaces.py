"""Names of network interfaces: which names the kernel takes, what a configured name means, how a name is shown.
Pure.

The kernel's names are bytes. In portward they are text: UTF-8, and each byte that is not UTF-8 as a lone surrogate
(`surrogateescape`). So each name has exactly one text, no two names have the same, and none is refused. Whatever
reads or writes names uses `decoded` and `encoded`; whatever prints one uses `shown`.
"""

from __future__ import annotations

from typing import Final

MAX_NAME_BYTES: Final = 15  # IFNAMSIZ − 1: the kernel keeps a zero byte behind the name

# What dev_valid_name (net/core/dev.c) refuses in a name. The kernel's isspace is Latin-1's, so it takes the byte
# 0xA0 for a space, which is also the second byte of "à" in UTF-8. `%` asks it for a number in that place.
_REFUSED: Final = frozenset(b"\0/:%\t\n\v\f\r \xa0")
# nft has no escape for a quotation mark in a name, and takes a backslash before `*` for one.
_UNQUOTABLE: Final = frozenset('"\\')


def decoded(name: bytes) -> str:
    """The text of a name as the kernel gives it, without the zero byte at its end."""
    return name.decode("utf-8", "surrogateescape")


def encoded(name: str) -> bytes:
    """The kernel's bytes of a name. Raises UnicodeEncodeError for text that `decoded` cannot give."""
    return name.encode("utf-8", "surrogateescape")


def is_name(name: str) -> bool:
    """Whether the kernel can have an interface of this name."""
    try:
        data = encoded(name)
    except UnicodeEncodeError:
        return False
    return 0 < len(data) <= MAX_NAME_BYTES and data not in (b".", b"..") and _REFUSED.isdisjoint(data)


def is_segment_name(name: str) -> bool:
    """Whether an attachment can be in a segment of this name. A `*` would look like a pattern."""
    return name.isprintable() and "*" not in name and is_name(name)


def is_pattern(pattern: str) -> bool:
    """Whether the configuration can name interfaces by this text: a name, or a name's beginning and `*`.

    A `*` alone is refused, because nft has no match for it. So is what nft cannot quote: there the kernel would
    match another name than `matches`."""
    wild = pattern.endswith("*")
    stem = pattern.removesuffix("*")
    if not stem.isprintable() or "*" in stem or not _UNQUOTABLE.isdisjoint(stem):
        return False
    # With any character behind it, the beginning of a name must be a name.
    return is_name(f"{stem}x" if wild and stem else stem)


def matches(patterns: tuple[str, ...], interface: str) -> bool:
    """Whether an interface name is one of the patterns, as the kernel decides it for the ruleset: by bytes, of
    which a character may have several."""
    name = encoded(interface)
    return any(
        name.startswith(encoded(pattern[:-1])) if pattern.endswith("*") else name == encoded(pattern)
        for pattern in patterns
    )


def shown(name: str) -> str:
    """The name in printable characters: other bytes as `\\xNN`, a backslash as two, so that no two look the
    same."""
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(sign if sign.isprintable() and sign != "\\" else _escaped(sign) for sign in name)


def _escaped(sign: str) -> str:
    return "\\\\" if sign == "\\" else "".join(f"\\x{byte:02x}" for byte in encoded(sign))
