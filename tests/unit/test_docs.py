"""All names in the documents exist: files, folders, modules, targets of make, metrics, verbs and their options."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from package import reference
from typer.main import get_command

from portward.cli.program import app

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "agent/portward"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A path from the checkout's root begins with one of these. A path like daemon/core.py belongs to the package.
FOLDERS = ("agent", "docs", "package", "rules", "systemd", "tests")
PATH = re.compile(r"(?<![\w./-])((?:[\w.-]+/)*[\w-]+\.(?:py|nft|md))\b")
FOLDER = re.compile(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})(?:/[\w.-]+)*/?)(?![\w/*.-])")
# Names like portward.toml are files, not modules.
MODULE = re.compile(
    r"(?:\bportward|(?<=-m )(?:tests|package))(?:\.(?!(?:toml|db|conf|service|head|nft)\b)[A-Za-z_]\w*)+"
)
METRICS = set(re.findall(r"(?m)^\| `(portward_\w+)` \|", reference.pages()["metrics.md"]))


def text(document: Path) -> str:
    """The text without links to outside addresses."""
    return re.sub(r"https?://\S+", "", document.read_text())


def documents(pattern: re.Pattern[str]) -> list[tuple[str, str]]:
    """Each document with each thing of a kind that it names."""
    return sorted(
        {(str(one.relative_to(ROOT)), found[0]) for one in DOCUMENTS for found in pattern.finditer(text(one))}
    )


@pytest.mark.parametrize(("document", "path"), documents(PATH))
def test_a_file_that_is_named_exists(document: str, path: str) -> None:
    places = [ROOT / path, PACKAGE / path, (ROOT / document).parent / path]
    if "/" not in path:
        assert [found for top in FOLDERS for found in (ROOT / top).rglob(path)] or (ROOT / path).exists()
    else:
        assert any(place.exists() for place in places), f"{document} names {path}, which is not there"


@pytest.mark.parametrize(("document", "folder"), documents(FOLDER))
def test_a_folder_that_is_named_exists(document: str, folder: str) -> None:
    assert (ROOT / folder).exists() or (PACKAGE / folder).exists(), f"{document} names {folder}"


def test_a_document_that_the_code_names_exists() -> None:
    sources = [path for top in ("agent", "package", "tests") for path in (ROOT / top).rglob("*.py")]
    named = {
        (str(path.relative_to(ROOT)), found)
        for path in [*sources, ROOT / "Makefile", *(ROOT / "rules").rglob("*.nft")]
        for found in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text())
        # These tests write documents themselves.
        if path.name not in ("test_links.py", "test_prose.py")
    }
    assert not [(path, found) for path, found in named if not (ROOT / found).exists()]


@pytest.mark.parametrize(("document", "name"), documents(MODULE))
def test_a_module_that_is_named_exists(document: str, name: str) -> None:
    """`portward.x.y` is a module, or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = (PACKAGE.parent if parts[0] == "portward" else ROOT).joinpath(*parts[:length])
        if path.with_suffix(".py").exists() or path.is_dir():
            break
    else:
        pytest.fail(f"{document} names {name}")
    rest = parts[length:]
    if not rest:
        return
    found: object = importlib.import_module(".".join(parts[:length]))
    for attribute in rest:
        found = getattr(found, attribute)


@pytest.mark.parametrize(("document", "target"), documents(re.compile(r"(?<=`make )[a-z][a-z-]*")))
def test_a_target_of_make_that_is_named_exists(document: str, target: str) -> None:
    assert re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text()), f"{document} names make {target}"


@pytest.mark.parametrize(("document", "metric"), documents(re.compile(r"\bportward_[a-z_]*[a-z]\b")))
def test_a_metric_that_is_named_exists(document: str, metric: str) -> None:
    # Tables of nftables have names of the same form.
    assert metric in METRICS | {"portward_closed", "portward_lock"}, f"{document} names {metric}"


def commands() -> list[tuple[str, str]]:
    """Each command line of portward that a document shows, in backticks or at a prompt of root."""
    found = set()
    for document in DOCUMENTS:
        text = document.read_text()
        for line in re.findall(r"`portward ([a-z][^`]*)`", text) + re.findall(r"(?m)^\s*# portward (.+)$", text):
            found.add((str(document.relative_to(ROOT)), " ".join(line.split())))
    return sorted(found)


@pytest.mark.parametrize(("document", "line"), commands())
def test_a_command_that_is_shown_exists(document: str, line: str) -> None:
    """The verb exists, and has the options that are shown."""
    words = re.split(r"\s", line.partition("|")[0])
    command: Any = get_command(app)
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    # `portward exemption` alone names the group.
    assert command.name or not words, f"{document} shows portward {line}"
    if words and not words[0].startswith("-"):
        assert not hasattr(command, "commands"), f"{document} shows portward {line}"
    options = {option for one in command.params for option in one.opts}
    for word in words:
        if re.fullmatch(r"--[a-z-]+", word):
            assert word in options, f"{document} shows {word} of portward {line}"


def test_every_room_of_the_package_is_explained() -> None:
    text = (ROOT / "docs/explanation/architecture.md").read_text()
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    rooms |= {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}
    explained = {room for row in re.findall(r"(?m)^\| (`[^|]*) \|", text) for room in re.findall(r"`(\w+)`", row)}
    assert rooms == explained


def quoted() -> list[str]:
    """The parts of log and status lines that the runbook quotes; `…`, N, LINE and numbers stand for values."""
    runbook = (ROOT / "docs/how-to/runbook.md").read_text()
    after = re.findall(r"(?:log|status): ((?:`[^`]+`(?:, )?)+)", runbook)
    cells = re.findall(r"(?m)^\| (`[^`]+`) \|", "".join(re.findall(r"(?s)says \| then \|\n(.*?)\n\n", runbook)))
    parts = {part for text in (*after, *cells) for one in re.findall(r"`([^`]+)`", text)
             for part in re.split(r"…|\bN\b|\bLINE\b|\d+|:\s|`", one)}  # fmt: skip
    return sorted(part.strip() for part in parts if len(part.split()) > 1)


@pytest.mark.parametrize("part", quoted())
def test_a_message_that_the_runbook_quotes_is_one_of_the_program(part: str) -> None:
    # The last word may be a value, as the name of a file is.
    assert part in MESSAGES or part.rpartition(" ")[0] in MESSAGES, f"no message has {part!r}"


def messages() -> str:
    """All texts of the program, one after the other."""
    trees = [ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]
    return "\n".join(
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


MESSAGES = messages()


def defined() -> set[str]:
    """The classes of the package, and their methods and fields as `Class.name`."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found.add(node.name)
                for inner in ast.walk(node):
                    if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                        found.add(f"{node.name}.{inner.name}")
                    elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                        found.add(f"{node.name}.{inner.target.id}")
    return found


CLASSES = defined()
# Classes of Python and of libraries that a page names.
FOREIGN = {"MemoryError", "NetfilterQueue", "OverflowError", "NetlinkDumpInterrupted"}


@pytest.mark.parametrize(
    ("document", "name"), documents(re.compile(r"(?<=`)(?:\w+\.)?[A-Z][a-z]\w*[a-z](?:\.\w+)?(?=`)"))
)
def test_a_class_that_is_named_exists(document: str, name: str) -> None:
    if document.startswith("docs/reference/"):  # made from the code, and full of headings of HTTP, units and so on
        return
    bare = re.sub(r"^[a-z_]+\.", "", name)
    assert bare in CLASSES | FOREIGN, f"{document} names {name}"


@pytest.mark.parametrize(
    ("document", "name"), documents(re.compile(r"(?<=chain `)\w+(?=`)|(?<=set `)\w+(?=`)|(?<=counter `)\w+(?=`)"))
)
def test_a_chain_set_or_counter_that_is_named_exists(document: str, name: str) -> None:
    texts = [path.read_text() for path in (ROOT / "rules/nftables").glob("*.nft")]
    known = re.findall(r"(?m)^\s*(?:chain|set|map|counter) (\w+)", "\n".join(texts))
    assert name in known, f"{document} names {name}"
