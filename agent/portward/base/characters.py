"""Which characters a text may contain, and how to print an untrusted text. Pure.

| kind of text | allowed characters |
| --- | --- |
| customers' names, actors, titles | every character but the unshown ones |
| reasons and justifications | the same, and line breaks and tabs |
| names of segments, ids of offers | what `str.isprintable` accepts |

The *unshown* characters change how the text around them looks, or are invisible:

- control characters: a terminal obeys them, and a line break forges a line;
- line and paragraph separators, marks that change the direction of the text that follows, annotation marks;
- invisible characters that are part of no letter, such as U+200B;
- noncharacters, and lone surrogates, which Python puts in place of bytes that are not UTF-8.

They are listed by number, because `str.isprintable` depends on the Unicode tables of the Python version: two
gateways could disagree about one customer. It also refuses joiners, which Persian and Indian names and emoji need,
and every space but U+0020.

Left and right marks (U+200E, U+200F, U+061C) are accepted, because they affect their neighbours no more than a
letter of that direction does.
"""

from __future__ import annotations

import re
from typing import Final

_UNSHOWN: Final = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # C0 and C1 controls: CR, LF, ESC, and CSI as one character
    "\u2028\u2029"  # line and paragraph separator
    "\u202a-\u202e\u2066-\u2069"  # embeddings, overrides and isolates of the bidirectional algorithm
    "\u206a-\u206f\ufff9-\ufffb"  # deprecated format characters, interlinear annotation
    "\u00ad\u200b\u2060-\u2064\ufeff"  # soft hyphen, zero-width space, word joiner, invisible operators, BOM
    "\ud800-\udfff"  # surrogates
    "\ufdd0-\ufdef"
    + "".join(f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0, 0x110000, 0x10000))
    + "]"
)
_NOT_ASCII: Final = re.compile(r"[^\x00-\x7e]")
# Replacements that a reader understands if the terminal lacks the character.
_ALIKE: Final = {
    "→": "->", "←": "<-", "–": "-", "—": "-", "−": "-", "…": "...", "“": '"', "”": '"', "„": '"', "‘": "'",
    "’": "'", "×": "x", "\u202f": " ", "\u2009": " ", "\u3000": " ",
}  # fmt: skip


def unshown(text: str, *, lines: bool = False) -> str | None:
    """The first unshown character of a text; None if there is none. With `lines`, line breaks and tabs are
    allowed."""
    if lines:
        text = text.replace("\n", "").replace("\t", "")
    found = _UNSHOWN.search(text)
    return found[0] if found else None


def shown(text: str) -> str:
    """The text as one line that is safe to print: each unshown character becomes an escape, for example `\\x1b`
    for ESC, and a byte that was not UTF-8 becomes `\\xNN`."""
    return _UNSHOWN.sub(lambda found: _escape(found[0]), text)


def json_shown(text: str, *, ascii_only: bool = False) -> str:
    """An equal JSON text with the unshown characters as `\\uNNNN`; with `ascii_only`, all characters that are not
    ASCII. Outside its strings, JSON contains only ASCII; line breaks there stay."""
    pattern = _NOT_ASCII if ascii_only else _UNSHOWN
    return pattern.sub(lambda found: found[0] if found[0] < " " else _json_escape(found[0]), text)


def alike(text: str) -> str:
    """ASCII for characters that a terminal cannot show: a similar character, else `\\uNNNN`."""
    return "".join(_ALIKE.get(sign) or _json_escape(sign) for sign in text)


def from_bytes(text: str) -> str:
    """Decodes a word of the command line or the environment as UTF-8, if it is. Python decodes these words by the
    locale, and turns bytes that it cannot decode into lone surrogates."""
    try:
        return text.encode("utf-8", "surrogateescape").decode() if unreadable(text) else text
    except UnicodeError:
        return text


def unreadable(text: str) -> bool:
    """Whether a text contains lone surrogates, which stand for undecodable bytes. It cannot be encoded as
    UTF-8."""
    return any("\ud800" <= sign <= "\udfff" for sign in text) if not text.isascii() else False


def _escape(sign: str) -> str:
    if "\udc80" <= sign <= "\udcff":
        return f"\\x{ord(sign) - 0xDC00:02x}"
    return sign.encode("unicode_escape").decode()


def _json_escape(sign: str) -> str:
    number = ord(sign)
    if number < 0x10000:
        return f"\\u{number:04x}"
    high, low = divmod(number - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"
