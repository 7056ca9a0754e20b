"""The manual pages, made from the command line's own help: portward(1), and a page for each verb.

    python -m package.manual FOLDER

The pages have the date SOURCE_DATE_EPOCH, which dh takes from debian/changelog, so that the same sources make the
same pages.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from typer.main import get_command

from portward import __version__
from portward.cli.program import app

_FILES = (
    ("/etc/portward/portward.toml", "the configuration"),
    ("/etc/portward/NAME.toml", "the configuration of the agent in the network namespace NAME (--instance)"),
    ("/var/lib/portward/portward.db", "the store: policy, and the log of its changes"),
    ("/var/cache/portward", "the cached policy table, which a restart enforces at once"),
    ("/usr/share/doc/portward/docs/how-to/operations.md", "how to install, configure, upgrade and remove it"),
    ("/usr/share/doc/portward/docs/how-to/runbook.md", "what to do when something is wrong"),
)
CODES = (
    ("0", "Done."),
    ("1", "Refused, or not found."),
    ("2", "Bad usage, or bad input."),
    ("130", "Interrupted (Ctrl-C)."),
)


def main() -> None:
    """The command line."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), UTC)
    for name, text in pages(__version__, date):
        (folder / f"{name}.1").write_text(text)


def pages(version: str, date: datetime) -> Iterator[tuple[str, str]]:
    """Name (`portward-rules-show`) and roff text of each page."""
    root = get_command(app)
    verbs = list(_verbs(root, ("portward",)))
    yield "portward", _root_page(root, verbs, version, date)
    for words, command in verbs:
        yield "-".join(words), _page(words, command, version, date)


def _verbs(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, sub in getattr(command, "commands", {}).items():
        if hasattr(sub, "commands"):
            yield from _verbs(sub, (*words, name))
        else:
            yield (*words, name), sub


def _root_page(root: Any, verbs: list[tuple[tuple[str, ...], Any]], version: str, date: datetime) -> str:
    lines = _head("portward", _first_line(root.help), version, date)
    lines += [".SH SYNOPSIS", ".B portward", "VERB [OPTIONS]", ".SH DESCRIPTION", *_paragraphs(root.help)]
    lines.append(".SH VERBS")
    for words, command in verbs:
        lines += [".TP", f".BR {_text('-'.join(words))} (1)", _text(_first_line(command.help))]
    lines += _codes()
    lines.append(".SH FILES")
    for path, what in _FILES:
        lines += [".TP", f".I {_text(path)}", _text(what)]
    lines += [".SH SEE ALSO", ".BR nft (8),", ".BR systemctl (1)"]
    return "\n".join(lines) + "\n"


def _page(words: tuple[str, ...], command: Any, version: str, date: datetime) -> str:
    lines = _head("-".join(words), _first_line(command.help), version, date)
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    names = [_argument(one) for one in arguments]
    lines += [".SH SYNOPSIS", f".B {_text(' '.join(words))}", _text(" ".join(["[OPTIONS]", *names]))]
    lines += [".SH DESCRIPTION", *_paragraphs(command.help)]
    if arguments:
        lines.append(".SH ARGUMENTS")
        for one, name in zip(arguments, names, strict=True):
            lines += [".TP", f".I {_text(name)}", _text(getattr(one, "help", None) or "")]
    if options:
        lines.append(".SH OPTIONS")
        for one in options:
            value = "" if one.is_flag else f" {one.metavar or _kind(one)}"
            default = "" if one.is_flag or one.default is None else f" The default is {one.default}."
            name = ", ".join(one.opts) + value
            lines += [".TP", f".B {_text(name)}", _text((getattr(one, "help", None) or "") + default)]
    lines += [*_codes(), ".SH SEE ALSO", ".BR portward (1)"]
    return "\n".join(lines) + "\n"


def _head(name: str, what: str, version: str, date: datetime) -> list[str]:
    return [
        f'.TH {_text(name.upper())} 1 "{date:%Y-%m-%d}" "portward {version}" "User Commands"',
        ".SH NAME",
        f"{_text(name)} \\- {_text(what.rstrip('.'))}",
    ]


def _codes() -> list[str]:
    lines = [".SH EXIT STATUS"]
    for code, what in CODES:
        lines += [".TP", f".B {code}", what]
    return lines


def _argument(argument: Any) -> str:
    name = str(argument.metavar or argument.name.upper())
    name = f"{name}..." if argument.nargs == -1 and not name.endswith("…") else name
    return name if argument.required else f"[{name}]"


def _kind(option: Any) -> str:
    return {float: "NUMBER", int: "NUMBER"}.get(option.type_descriptor.annotation, "TEXT")


def _first_line(text: str | None) -> str:
    return " ".join((text or "").strip().partition("\n\n")[0].split())


def _paragraphs(text: str | None) -> list[str]:
    lines = []
    for paragraph in (text or "").strip().split("\n\n"):
        words = " ".join(paragraph.split())
        example = words.removeprefix("Example: ")
        lines += (
            [".PP", "Example:", ".PP", ".RS", f".B {_text(example)}", ".RE"]
            if example != words
            else [
                ".PP",
                _text(words),
            ]
        )
    return lines


def _text(text: str) -> str:
    """Roff's own characters written as escapes; none of the typographic ones, which not every terminal shows."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...").replace("“", '"').replace("”", '"')
    return f"\\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    main()
