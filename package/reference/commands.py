"""The pages on verbs and exit codes, from the command line's own help."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from typer.main import get_command

from package.manual import CODES
from package.reference.tables import code, sentence, table
from portward.cli.program import app

_OF_EXIT_CODES: Final = re.compile(r"[^.]*\bexit code\b[^.]*\.", re.IGNORECASE)


def fills() -> dict[str, object]:
    """The values for the page on verbs."""
    return {"verbs": "\n".join(_section(words, verb) for words, verb in verbs())}


def exit_codes_fills() -> dict[str, object]:
    """The values for the page on exit codes: the codes of all verbs, and what the help of some says of theirs."""
    said = {
        code(" ".join(words)): " ".join(map(sentence, _OF_EXIT_CODES.findall(" ".join(verb.help.split()))))
        for words, verb in verbs()
    }
    return {
        "codes": table(("code", "meaning"), ((code(number), what) for number, what in CODES)),
        "verbs": table(("verb", "its help says"), (row for row in said.items() if row[1])),
    }


def verbs() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each verb: its words from `portward` on, and typer's command."""
    yield from _verbs(get_command(app), ("portward",))


def _verbs(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, sub in command.commands.items():
        if hasattr(sub, "commands"):
            yield from _verbs(sub, (*words, name))
        else:
            yield (*words, name), sub


def _section(words: tuple[str, ...], verb: Any) -> str:
    names = [_argument(one) for one in verb.params if one.param_type_name == "argument"]
    text = f"## {' '.join(words)}\n\n```text\n{' '.join([*words, '[OPTIONS]', *names])}\n```\n\n"
    for paragraph in verb.help.strip().split("\n\n"):
        line = " ".join(paragraph.split())
        example = line.removeprefix("Example: ")
        text += f"{_safe(line)}\n\n" if example == line else f"```console\n# {example}\n```\n\n"
    rows = ((code(_name(one)), _help(one)) for one in verb.params)
    return text + table(("argument or option", "meaning"), rows)


def _name(one: Any) -> str:
    if one.param_type_name == "argument":
        return _argument(one)
    return ", ".join(one.opts) + ("" if one.is_flag else f" {one.metavar}")


def _argument(one: Any) -> str:
    name = str(one.metavar) + ("..." if one.nargs == -1 and not str(one.metavar).endswith("…") else "")
    return name if one.required else f"[{name}]"


def _help(one: Any) -> str:
    said = sentence(_safe(getattr(one, "help", None) or ""))
    shows_default = one.param_type_name == "option" and not one.is_flag and one.default is not None
    return f"{said} Default: {code(str(one.default))}." if shows_default else said


def _safe(text: str) -> str:
    """Markdown takes `*`, `<` and `_` for its own."""
    return re.sub(r"([*<_])", r"\\\1", text)
