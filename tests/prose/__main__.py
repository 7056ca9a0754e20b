"""`python -m tests.prose`: looks for unclear English in documents, docstrings, comments and messages.

The patterns are in rules.toml. remaining.toml has, for each rule, how many places must still be rewritten. If
there are more, places of that rule are printed, from the files that changed last, and the exit code is 1.
`--tighten` writes the present counts to remaining.toml: it adds a new rule, and never raises the count of another.
`--list RULE` prints every place of a rule.

Left out: code in backticks and in fenced blocks, targets of links, strings of the tests (they quote the program)
and strings of fewer than three words (they are names).
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
REMAINING: Final = HERE / "remaining.toml"
_HEADING: Final = "# Written by `python -m tests.prose --tighten`: how many places must still be rewritten.\n"
# Places of a rule that are printed if there are too many: enough to have the new ones among them.
_SHOWN: Final = 20
# Below these, and what lies in the project's folder itself.
_FOLDERS: Final = ("agent", "tests", "package", "docs", "rules", "systemd", ".ci", ".github", "debian")
_COMMENTED: Final = (".toml", ".nft", ".sh", ".service", ".yaml", ".yml", "Makefile", "run", "rules")
_SENTENCE: Final = r"(?:\A|(?<=[.!?]\s)|(?<=\n\n))(?:[-*>|] |\d+\. )?"


class Block(NamedTuple):
    """A piece of prose: the line of its file that it begins at, and its text with its line breaks."""

    line: int
    text: str


class Rule(NamedTuple):
    """A pattern, and what to write instead."""

    name: str
    pattern: re.Pattern[str]
    say: str


class Place(NamedTuple):
    """Where a rule does not hold."""

    path: Path
    line: int
    rule: Rule
    words: str

    def __str__(self) -> str:
        """As compilers print it."""
        return (
            f"{self.path}:{self.line}: {self.rule.name}: “{' '.join(self.words.split())[:60]}…” ({self.rule.say})"
        )


def read_rules(text: str) -> list[Rule]:
    """The rules of a TOML text."""
    return [
        Rule(
            name, re.compile(rule["pattern"].replace(" ", r"\s+").replace("{sentence}", _SENTENCE), re.IGNORECASE),
            rule["say"],
        )
        for name, rule in tomllib.loads(text).items()
    ]  # fmt: skip


def blocks(path: Path, text: str) -> Iterator[Block]:
    """The prose of a file: its paragraphs; or its comments, docstrings and messages."""
    if path.suffix == ".md":
        yield from _markdown(text)
    elif path.suffix == ".py":
        yield from _python(text, messages=path.parts[0] == "agent")
    elif path.name.endswith(_COMMENTED):
        lines = enumerate(text.splitlines(), 1)
        yield from _joined((number, line.lstrip()[1:]) for number, line in lines if re.match(r"\s*#(?!!)", line))


def _markdown(text: str) -> Iterator[Block]:
    # Spaces take the place of code, so that lines keep their numbers.
    text = re.sub(r"(?ms)^ *(```|~~~).*?^ *\1$", _blank, text)
    for found in re.finditer(r"\S(?:(?!\n\n|\n[-*] |\n\d+\. |\n\|).)*", text, re.DOTALL):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(line, re.sub(r"\]\([^)]*\)", "]", found[0]))


def _python(text: str, *, messages: bool) -> Iterator[Block]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    yield from _joined((token.start[0], token.string[1:]) for token in tokens if token.type == tokenize.COMMENT)
    tree = ast.parse(text)
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) in docstrings:
                yield from (Block(node.lineno + at, part) for at, part in _paragraphs(node.value))
            elif messages and len(node.value.split()) > 2:
                yield Block(node.lineno, node.value)


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Each paragraph, and how many lines come before it."""
    for found in re.finditer(r"\S(?:(?!\n\s*\n).)*", text, re.DOTALL):
        yield text.count("\n", 0, found.start()), found[0].strip(" ")


def _joined(comments: Iterable[tuple[int, str]]) -> Iterator[Block]:
    """Comments on lines that follow each other are one block."""
    lines: list[str] = []
    last = 0
    for number, comment in comments:
        if lines and number != last + 1:
            yield Block(last - len(lines) + 1, "\n".join(lines))
            lines = []
        lines.append(comment.strip())
        last = number
    if lines:
        yield Block(last - len(lines) + 1, "\n".join(lines))


def _blank(found: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", found[0])


def places(path: Path, text: str, rules: Iterable[Rule]) -> Iterator[Place]:
    """Where the rules do not hold in a file."""
    for block in blocks(path, text):
        prose = re.sub(r"``?[^`]*``?", "`…`", block.text)
        for rule in rules:
            for found in rule.pattern.finditer(prose):
                words = prose[found.start() : max(found.end(), found.start() + 50)]
                yield Place(path, block.line + prose.count("\n", 0, found.start()), rule, words)


def files() -> Iterator[Path]:
    """Every file that holds prose of ours, as a path below the project's folder."""
    for path in [*ROOT.iterdir(), *(path for folder in _FOLDERS for path in (ROOT / folder).rglob("*"))]:
        name = path.relative_to(ROOT)
        # The other files of the tests are fed to the program; these rules quote what they forbid.
        if name.parts[0] == "tests" and (path.suffix != ".py" or path.parent == HERE):
            continue
        # These pages repeat texts of the code, where they count already.
        if name.is_relative_to("docs/reference"):
            continue
        if path.is_file() and (path.suffix in (".py", ".md") or path.name.endswith(_COMMENTED)):
            yield name


def main() -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.prose")
    parser.add_argument("--tighten", action="store_true", help="write the present counts, if they are lower")
    parser.add_argument("--list", metavar="RULE", help="print every place of a rule")
    arguments = parser.parse_args()
    rules = read_rules((HERE / "rules.toml").read_text())
    allowed: dict[str, int] = tomllib.loads(REMAINING.read_text())
    found: dict[str, list[Place]] = {rule.name: [] for rule in rules}
    # A new place is in a file that has just changed: such files come first.
    for path in sorted(files(), key=lambda path: -(ROOT / path).stat().st_mtime):
        for place in places(path, (ROOT / path).read_text(), rules):
            found[place.rule.name].append(place)
    if arguments.list:
        print(*found[arguments.list], sep="\n")
        return 0
    if arguments.tighten:
        lines = [f"{name} = {min(len(there), allowed.get(name, len(there)))}\n" for name, there in found.items()]
        REMAINING.write_text(_HEADING + "".join(lines))
        return 0
    above = {name: there for name, there in found.items() if len(there) > allowed.get(name, 0)}
    for name, there in above.items():
        print(*there[:_SHOWN], sep="\n")
        print(f"{name}: {len(there)} places, {allowed.get(name, 0)} allowed. Use other words in yours.\n")
    return bool(above)


if __name__ == "__main__":
    sys.exit(main())
