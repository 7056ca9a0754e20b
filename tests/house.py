"""`make house`: how much of portward a newcomer must read, beside what the project aims at.

**Files of a question.** Each question is run, and the files of `agent/portward` on the way are counted. On the
way is every file on the call stack from the entry point to a *destination*: a function of the store, the policy
table or the kernel. That the verb opens the store is no step of the change, so the file that finds out which store
it is does not count; with it, each way would have one file more. A helper that returns before the next step (a
check, a codec, the clock) is not on the way: a reader can take its name for what it does. For the packet it counts
too, because nothing else is on the fast path. "in all" is every file in which a function ran. Names that are only
read, as constants are, do not count.

- *packet*: the batch reader gets one plain SYN of a source that it has no verdict for yet. It has answered another
  source before, so its message template and the segment behind the interface are cached, as in a running worker.
- *apply*: the verb `portward apply` changes the offer of a subscription. Then the daemon takes the change in
  (`Intake.sync`), from the store to a fake kernel, which stands for `nfnetlink`: both count as one file.
- *revocation*: the verb `portward exemption revoke`, then the same.

The loop of the daemon, which calls `Intake.sync` when the store has changed, is not run, and is not counted.

**Files to edit.** The files that a new metric, reason code, preset key, verb or store must be added to. For a
reason code these are the files that name every one there is. For the others these are the files that name one
typical example (`EXAMPLES`). Tests, documents and files that only use the example are not counted.

**Functions** are measured from `def` to their last line, with docstring, without decorators.

**Free of I/O** is a line of a module that neither imports a library of `IO` nor calls open, print or input, and
that imports no module of portward that does, also through others. `pathlib` counts if the module calls a method
that reaches the file system. The `__init__` of a package counts as imported by its modules, because Python runs it
first.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, Final, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from portward.cli import program, usage
from portward.dataplane import fake
from portward.ipc.mark import Class
from portward.model import Reason
from portward.store.sqlite import store as sqlite
from portward.table import database
from unit.daemon import test_core  # the path above must be there first
from unit.worker import test_batch  # as above
from unit.worker.test_messages import message  # as above

PACKAGE: Final = Path(__file__).resolve().parents[1] / "agent" / "portward"
# Libraries that reach outside the process: files, other processes, the kernel, the terminal, the clock, chance.
IO: Final = frozenset((
    "aiosmtpd", "asyncio", "concurrent", "ctypes", "faulthandler", "fcntl", "getpass", "gettext", "glob", "grp",
    "http", "importlib", "inotify_simple", "io", "lmdb", "locale", "logging", "mmap", "multiprocessing",
    "netfilterqueue", "os", "pathlib", "prometheus_client", "pty", "pwd", "queue", "random", "resource", "rich",
    "secrets", "select", "selectors", "shutil", "signal", "socket", "socketserver", "sqlite3", "ssl", "stat",
    "subprocess", "syslog", "tempfile", "termios", "threading", "time", "tty", "typer", "urllib", "yaml",
))  # fmt: skip
_CALLS: Final = frozenset(("open", "print", "input"))
# The methods of `Path` that reach the file system. A module that only names paths, as the types of the
# configuration do, and calls none of them, does no I/O.
_PATH_METHODS: Final = frozenset((
    "chmod", "cwd", "exists", "expanduser", "glob", "group", "home", "is_dir", "is_file", "is_mount", "is_symlink",
    "iterdir", "lstat", "mkdir", "open", "owner", "read_bytes", "read_text", "readlink", "rename", "resolve",
    "rglob", "rmdir", "samefile", "stat", "symlink_to", "touch", "unlink", "walk", "write_bytes", "write_text",
))  # fmt: skip
# The kernel in the questions, and the file that a fake of it stands for.
_FAKE: Final = "dataplane/fake.py"
_KERNEL: Final = "dataplane/nfnetlink.py"
# co_flags of a function, and of neither a module nor a class body.
_FUNCTION: Final = 1


class Goal(NamedTuple):
    """A figure, and the most (or, with `least`, the least) that it should be."""

    name: str
    figure: float
    goal: float
    least: bool = False
    detail: str = ""

    @property
    def met(self) -> bool:
        """Whether it is as it should be."""
        return self.figure >= self.goal if self.least else self.figure <= self.goal

    def __str__(self) -> str:
        sign = "≥" if self.least else "≤"
        missed = "  " if self.met else "✗ "
        return f"{missed}{self.name:<36}{self.figure:>4g}  {sign} {self.goal:<4g} {self.detail}".rstrip()


# --- files of a question ---


class Way:
    """The files that run, and those on the way to the destinations, while it is entered as a context."""

    def __init__(self, *destinations: Any) -> None:
        """`destinations` are modules, or packages with all their modules."""
        files = [Path(module.__file__) for module in destinations]
        self._ends = tuple(str(file.parent if file.stem == "__init__" else file) for file in files)
        self.way: set[str] = set()
        self.ran: set[str] = set()

    def __enter__(self) -> Way:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, _: object) -> None:
        name = _ours(frame)
        if event == "call" and name:
            self.ran.add(name)
            if frame.f_code.co_filename.startswith(self._ends) and not self._opens(frame):
                self.way |= {name for each in _stack(frame) if (name := _ours(each))}

    @staticmethod
    def _opens(frame: FrameType) -> bool:
        """Whether a function of the store runs because the verb opens it."""
        return any(each.f_code is sqlite.SqliteStore.__init__.__code__ for each in _stack(frame))


def _ours(frame: FrameType) -> str:
    """The file of a function of portward, below its package; empty for anything else."""
    file = frame.f_code.co_filename
    inside = file.startswith(f"{PACKAGE}/") and frame.f_code.co_flags & _FUNCTION
    name = file.removeprefix(f"{PACKAGE}/") if inside else ""
    return _KERNEL if name in (_FAKE, _KERNEL) else name


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def packet(folder: Path) -> Way:
    """One plain SYN through the batch reader of a worker that has answered another source before."""
    bench = test_batch.Bench(folder / "packet")
    assert test_batch.classes(bench.answer(message(test_batch.syn("10.0.0.9"))))
    with Way() as way:
        answered = bench.answer(message(test_batch.syn("10.0.0.4")))
    assert test_batch.classes(answered) == [Class.DENY]
    bench.writer.close()
    way.way = way.ran
    return way


# Gives the words of a verb, for a gateway and its configuration file.
Verb = Callable[[test_core.Ground, str], list[str]]


def change(folder: Path, verb: Verb) -> Way:
    """Runs a verb that changes the policy, then the daemon's step that takes the change in. Asserts that exactly
    one cached verdict was deleted."""
    with pytest.MonkeyPatch.context() as patch:
        ground = test_core.Ground(folder, patch)
        ground.put(test_core.exemption(test_core.MAY_NOT, None))
        ground.start()
        ground.kernel.learn("allow4", test_core.ALLOWED.key)
        ground.kernel.learn("allow4", test_core.DENIED.key)
        config = folder / "portward.toml"
        config.write_text(
            f'segments = ["vni*"]\nuplinks = ["up0"]\n'
            f'store = "{ground.config.store}"\ntable = "{ground.config.table}"\n'
        )
        words = verb(ground, str(config))
        with redirect_stdout(StringIO()), Way(sqlite, database, fake) as way:
            patch.setattr(sys, "argv", ["portward", *words])
            assert usage.run(program.app) == 0
            assert ground.core.intake.sync()
        assert len(ground.cached()) == 1, "the cached verdict of the other subscription stays"
        ground.core.close()
    return way


def _apply(ground: test_core.Ground, config: str) -> list[str]:
    inventory = ground.folder / "inventory.yaml"
    inventory.write_text(
        f"subscriptions:\n  - {{id: {test_core.MAY}, offer: pay-as-you-go, created: 2022-06-30}}\n"
    )
    return ["apply", str(inventory), "--config", config]


def _revoke(_: test_core.Ground, config: str) -> list[str]:
    # The times of the test's store lie in the past.
    return ["exemption", "revoke", str(test_core.MAY_NOT), "--reason", "spam", "--trust-clock", "--config", config]


def questions() -> Iterator[tuple[str, Way, int]]:
    """Each question, its files, and how many they should be at most."""
    for name, run, goal in (
        ("packet → verdict", packet, 8),
        ("apply → kernel", lambda folder: change(folder, _apply), 16),
        ("revocation → kernel", lambda folder: change(folder, _revoke), 20),
    ):
        with TemporaryDirectory() as folder:
            yield name, run(Path(folder)), goal


# --- files to edit ---


@cache
def sources() -> dict[str, str]:
    """The text of every file of the package, by its name below it."""
    return {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def naming(pattern: str) -> set[str]:
    """The files that have a match of a regular expression."""
    return {name for name, text in sources().items() if re.search(pattern, text)}


# A pattern that names a typical example, and the files that use the example without having to know of it.
EXAMPLES: Final[dict[str, tuple[str, set[str]]]] = {
    # The lab keeps its policy in one kind of store.
    "store": (r"\bSqliteStore\b|sqlite:", {"lab/agent.py"}),
    "preset key": (r"\bpaas_blocked\b", set()),
    "metric": (r"\bguard_loaded\b", set()),
    "verb": (r"\b(top\.top|TopTalkers)\b", set()),
}


def edits(what: str) -> set[str]:
    """The files of the package that a new metric, reason code, store, preset key or verb is added to."""
    if what == "reason code":
        return set.intersection(*(naming(rf"\b{reason.name}\b") for reason in Reason))
    pattern, users = EXAMPLES[what]
    # A backend is one thing to write, in as many files as it likes.
    return {re.sub(r"^store/(\w+)/.*", r"store/\1", name) for name in naming(pattern) - users}


# --- what the files are like ---


def functions() -> list[int]:
    """How many lines each function has, ascending."""
    trees = (ast.parse(text) for text in sources().values())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]
    return sorted((node.end_lineno or 0) - node.lineno + 1 for node in found)


def undocumented() -> list[str]:
    """The packages whose `__init__` says nothing."""
    inits = {name: text for name, text in sources().items() if name.endswith("__init__.py")}
    return [
        name.removesuffix("/__init__.py") for name, text in inits.items() if not ast.get_docstring(ast.parse(text))
    ]


def imports(name: str) -> tuple[set[str], set[str]]:
    """The files of the package that a file imports, and what of `IO` it imports or calls."""
    modules, io, methods = set[str](), set[str](), set[str]()
    for node in ast.walk(ast.parse(sources()[name])):
        match node:
            case ast.ImportFrom(module=str(module), names=names):
                modules |= {module, *(f"{module}.{alias.name}" for alias in names)}
            case ast.Import(names=names):
                modules |= {alias.name for alias in names}
            case ast.Call(func=ast.Name(id=called)) if called in _CALLS:
                io.add(called)
            case ast.Call(func=ast.Attribute(attr=method)):
                methods.add(method)
    io |= {module.split(".")[0] for module in modules} & IO
    if not methods & _PATH_METHODS:
        io.discard("pathlib")
    return {file for module in modules for file in _files(module)}, io


def _files(module: str) -> Iterator[str]:
    """The files that the import of a module of portward runs."""
    first, *parts = module.split(".")
    for end in range(len(parts) + 1 if first == "portward" else 0):
        place = "/".join(parts[: end + 1])
        yield from {f"{place}.py", f"{place}/__init__.py", "__init__.py"} & sources().keys()


def pure() -> set[str]:
    """The files that are free of I/O, also through what they import."""
    found = {name: imports(name) for name in sources()}
    impure = {name for name, (_, io) in found.items() if io}
    while more := {name for name, (files, _) in found.items() if name not in impure and files & impure}:
        impure |= more
    return sources().keys() - impure


def goals() -> Iterator[Goal]:
    """Every figure."""
    for name, way, goal in questions():
        yield Goal(name, len(way.way), goal, detail=f"({len(way.ran)} in all)")
    for what, goal in (("store", 4), ("metric", 1), ("preset key", 3), ("verb", 3), ("reason code", 4)):
        files = edits(what)
        yield Goal(f"files to edit for a {what}", len(files), goal, detail=", ".join(sorted(files)))
    lengths = functions()
    yield Goal("function length, median", statistics.median(lengths), 8, detail="lines")
    yield Goal("function length, 90th percentile", lengths[len(lengths) * 9 // 10], 20, detail="lines")
    lines = {name: text.count("\n") for name, text in sources().items()}
    longest = sorted(lines, key=lambda name: -lines[name])[:5]
    yield Goal(
        "longest file", lines[longest[0]], 450, detail=", ".join(f"{name} {lines[name]}" for name in longest)
    )
    silent = undocumented()
    yield Goal("packages without a docstring", len(silent), 0, detail=", ".join(silent))
    share = 100 * sum(lines[name] for name in pure()) / sum(lines.values())
    yield Goal("lines free of I/O, also transitively", round(share), 30, least=True, detail="%")


def main() -> None:
    """The command line."""
    if sys.argv[1:] == ["--files"]:
        for name, way, _ in questions():
            print(f"{name}:", *sorted(way.way), "\n  beside the way:", *sorted(way.ran - way.way), sep="\n  ")
        print("free of I/O:", *sorted(pure()), sep="\n  ")
        return
    print(*goals(), sep="\n")


if __name__ == "__main__":
    main()
