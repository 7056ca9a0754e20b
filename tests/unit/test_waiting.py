"""Tests wait for the event itself, with a deadline. A pause of a guessed length fails on a busy machine, and a
number that is refreshed each second may be read too early."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The comment that a pause needs on its own line: its purpose. A pause is right if the test needs that time itself
# (a pace, a time in which an error could happen), or if it stands in the loop of a poll.
PAUSE = "# pause: "
# The comment on the line of an assertion that reads such a number without polling: why one reading is enough.
ONCE = "# once: "
# The methods by which tests read what the agent refreshes once a second: its metrics, and `portward status`.
READS = {"metrics", "status"}


def is_pause(call: ast.Call) -> bool:
    """Whether a call is `time.sleep` or `asyncio.sleep`, unless it sleeps 0 s to let other tasks run."""
    match call:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="time" | "asyncio"), attr="sleep"), args=[length]):
            return not (isinstance(length, ast.Constant) and length.value == 0)
        case ast.Call(func=ast.Name(id="sleep")):
            return True
    return False


def is_read(node: ast.AST) -> bool:
    """Whether this reads something that the agent refreshes each second. An exit code is not refreshed."""
    match node:
        case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)) if name in READS:
            return True
        case ast.Attribute(
            attr="stdout" | "stderr",
            value=ast.Call(func=ast.Attribute(attr="portward"), args=[ast.Constant(value="status"), *_]),
        ):
            return True
    return False


def reads_once(statement: ast.Assert) -> bool:
    """Whether an assertion itself contains such a reading."""
    return any(map(is_read, ast.walk(statement)))


def faults(text: str) -> Iterator[tuple[int, str]]:
    """Line and fault of each pause without a reason, and of each assertion that reads once."""
    lines = text.splitlines()

    def has(reason: str, node: ast.Call | ast.Assert) -> bool:
        return any(reason in line for line in lines[node.lineno - 1 : node.end_lineno])

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and is_pause(node) and not has(PAUSE, node):
            yield node.lineno, f"a pause without a reason: poll (`until`), or say what it is for ({PAUSE}…)"
        elif isinstance(node, ast.Assert) and reads_once(node) and not has(ONCE, node):
            yield node.lineno, f"what is refreshed each second is read once: poll, or say why not ({ONCE}…)"


def sources() -> list[str]:
    """Every Python file of the tests, below tests/."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("name", sources())
def test_no_test_waits_a_guessed_time_or_reads_once_what_is_refreshed(name: str) -> None:
    found = [f"tests/{name}:{line}: {fault}" for line, fault in faults((ROOT / name).read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("import time\ntime.sleep(0.2)", 2),
        ("from time import sleep\nsleep(1)", 2),
        ("import asyncio\nasync def f():\n    await asyncio.sleep(seconds)", 3),
        ("assert gateway.agent.metrics()['x'] == 1", 1),
        ("assert agent.metrics().get(\n    'x', 0\n) == 1", 1),
        ("assert 'held' in agent.portward('status').stdout", 1),
        ("assert status(agent)['held'] is None", 1),
    ],
)
def test_what_is_forbidden_is_found(text: str, line: int) -> None:
    assert [found for found, _ in faults(text)] == [line]


@pytest.mark.parametrize(
    "text",
    [
        "import time\ntime.sleep(0.2)  # pause: the pace of the sender",
        "import asyncio\nasync def f():\n    await asyncio.sleep(0)",
        "until(lambda: agent.metrics()['x'] == 1, 'counted')",
        "assert agent.metrics()['x'] == 0  # once: of the refresh that was waited for",
        "assert agent.portward('status').returncode == 1",
        "program = 'import time; time.sleep(60)'",
    ],
)
def test_what_is_allowed_is_not_found(text: str) -> None:
    assert not list(faults(text))
