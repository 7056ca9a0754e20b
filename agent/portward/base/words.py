"""Numbers in sentences for operators, in English."""

from __future__ import annotations


def counted(number: float, one: str, many: str = "") -> str:
    """A number with its noun: `1 packet`, `2 packets`; `many` if an s does not make the plural."""
    return f"{number:.0f} {one if number == 1 else many or one + 's'}"


def times(number: float) -> str:
    """How often: `once`, `2 times`."""
    return "once" if number == 1 else f"{number:.0f} times"
