"""The agent's start and every verb in hostile surroundings: no resolver, terminals that are not UTF-8, random
bytes in the environment, wrong clocks. They print and write the same as in plain surroundings.

`lab up` and `lab demo` are not run here, because they make whole labs.
"""

from __future__ import annotations

import json
import os
import pty
import random
import re
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

import portward
from portward.base.characters import alike, shown
from portward.cli import actor
from portward.daemon import workers
from portward.daemon.runtime import read_status, running
from portward.i18n import catalogues
from portward.lab import namespaces
from portward.lab.agent import Agent, until
from portward.lab.topology import Lab
from unit.cli.test_cli import verbs

SEED: Final = random.SystemRandom().randrange(2**32)
ONE: Final = "11111111-0000-4000-8000-000000000001"
TWO: Final = "11111111-0000-4000-8000-000000000002"
NAME: Final = "Société→\u00a0山田\u3000می\u200cخواهم"
INVENTORY: Final = f"""\
subscriptions:
  - {{id: {ONE}, name: "{NAME}", offer: pay-as-you-go, created: 2022-06-30, payment_history: true}}
  - {{id: {TWO}, name: fabrikam, offer: azure-sponsorship, created: 2022-06-30}}
attachments:
  - {{segment: vni1001, address: 10.0.0.4, subscription: {ONE}}}
  - {{segment: vni1002, address: 10.0.0.0/24, subscription: {TWO}}}
"""
# Every variable that portward reads, or a library that it uses. PATH finds the programs of the test, and PYTHON…
# are the interpreter's own. `PORTWARD_WORKERS_STAY` has a test of its own, because the agent refuses it.
VARIABLES: Final = (
    "LOGNAME", "SUDO_USER", "USER", "LNAME", "USERNAME", "HOME", "SHELL", "PWD", "TZ", "TMPDIR",
    "LANG", "LANGUAGE", "LC_ALL", "LC_MESSAGES", "LC_CTYPE", "LC_TIME",
    "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM", "INVOCATION_ID", "SYSTEMD_EXEC_PID",
    "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TERM", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE",
    "TERMINAL_WIDTH", "TYPER_USE_RICH", "TYPER_STANDARD_TRACEBACK", "COMP_WORDS", "COMP_CWORD",
    "http_proxy", "no_proxy", "RES_OPTIONS", "LOCALDOMAIN", "HOSTALIASES",
)  # fmt: skip


class Said(NamedTuple):
    """The output of a verb, and its exit code."""

    code: int
    text: str


class Scene(NamedTuple):
    """An agent that runs in its surroundings, whose store holds the inventory."""

    agent: Agent
    encoding: str = "utf-8"
    terminal: bool = False


# Each verb, in an order in which each has something to do. `run` comes last; it is refused, because an agent runs.
VERBS: Final[tuple[tuple[str, ...], ...]] = (
    ("--version",), ("--help",), ("exemption", "grant", "--help"),
    ("apply", "--dry-run", "--prune", "INVENTORY"), ("apply", "INVENTORY", "--as", "Jürgen→"),
    ("apply", "--dry-run", "--json", "INVENTORY"), ("export",), ("export", "--json"),
    ("exemption", "request", ONE, "--justification", "own mail → servers"),
    ("exemption", "request", TWO, "--justification", "für uns", "--mail-software", "Postfix", "--volume", "5",
     "--reverse-dns", "a.example", "--authentication", "spf", "--terms"),
    ("exemption", "reject", ONE, "--reason", "x"),
    ("exemption", "grant", TWO, "--fraud-check", "zurückgerufen →", "--rate", "60"),
    ("exemption", "limit", TWO, "--rate", "30", "--json"), ("exemption", "list"), ("exemption", "list", "--json"),
    ("exemption", "show", TWO), ("exemption", "show", TWO, "--json"),
    ("attachment", "started", "vni1002", "10.0.0.4"),
    ("attachment", "started", "vni1001", "::ffff:10.0.0.4", "--json"),
    ("explain", "vni1001", "10.0.0.4"), ("explain", "vni1002", "10.0.0.9", "--json"),
    ("exemption", "revoke", TWO, "--reason", "spam → “é”", "--wait"),
    ("exemption", "history", TWO), ("exemption", "history", TWO, "--json"),
    ("diagnose", NAME, "--lang", "fr"), ("diagnose", "fabrikam", "--lang", "en", "--all"), ("diagnose", "nobody"),
    ("diagnose", TWO, "--customer", "--lang", "fr"), ("diagnose", TWO, "--json", "--lang", "en"),
    ("audit",), ("audit", "--json"), ("audit", "--check"),
    ("check",), ("status",), ("status", "--json"), ("top", "--count", "1", "--interval", "0.2"),
    ("rules", "show"), ("rules", "show", "--wanted"), ("rules", "baseline"), ("rules", "remove"),
    ("policy", "list"), ("policy", "show", "azure-2020"), ("policy", "show", "aws", "--json"),
    ("lab", "down", "--name", "no-such-lab"), ("expalin",), ("explain", "vni1001", "x→"),
    ("run",),
)  # fmt: skip
# Verbs whose output differs each time: they print process ids, speeds, counts, or random numbers.
VOLATILE: Final = {"status", "top", "rules", "audit", "lab"}
UNCONFIGURED: Final = {"--version", "--help", "expalin", "policy", "lab"}


def command_lines(config: Path) -> list[list[str]]:
    """The verbs with their configuration."""
    inventory = str(config.with_name("inventory.yaml"))
    return [
        [inventory if word == "INVENTORY" else word for word in verb]
        + ([] if verb[0] in UNCONFIGURED or "--help" in verb else ["--config", str(config)])
        for verb in VERBS
    ]


def driven(agent: Agent, lines: list[list[str]], *, terminal: bool, before: tuple[str, ...]) -> bytes:
    """The output of one process that runs these verbs, on a terminal of its own if `terminal` is true."""
    file = agent.folder / "lines.json"
    file.write_text(json.dumps(lines), "utf-8")
    argv = [
        "ip",
        "netns",
        "exec",
        agent.lab.gateway,
        *before,
        sys.executable,
        str(Path(__file__).with_name("verbs.py")),
    ]
    argv.append(str(file))
    if not terminal:
        found = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               timeout=120, check=True, cwd="/")  # fmt: skip
        return found.stdout
    ours, theirs = pty.openpty()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, cwd="/") as process:
        os.close(theirs)
        data = b"".join(iter(lambda: read(ours), b""))
        assert process.wait(120) == 0
    os.close(ours)
    return data.replace(b"\r\n", b"\n")


def read(terminal: int) -> bytes:
    """The next bytes from a terminal; none once its other end is closed."""
    try:
        return os.read(terminal, 65_536)
    except OSError:  # EIO
        return b""


def spoken(data: bytes, encoding: str) -> list[Said]:
    """The output of each of the verbs."""
    found = []
    for number in range(len(VERBS)):
        part = data.partition(b"\n@@ %d begin\n" % number)[2]
        text, _, rest = part.partition(b"\n@@ %d " % number)
        code = int(rest.split(b"\n", 1)[0])
        document = VERBS[number][0] == "export" or VERBS[number][:2] == ("rules", "show")
        found.append(Said(code, text.decode("utf-8" if document else encoding)))
    return found


@contextmanager
def scene(
    lab: Lab, folder: Path, *before: str, encoding: str = "utf-8", terminal: bool = False
) -> Iterator[Scene]:
    """An agent in these surroundings, ready, with the inventory in its store. Removes the rules at the end."""
    folder.mkdir()
    agent = Agent(lab, folder, store="sqlite:portward.db", table="table", metrics={"address": "localhost:9125"})
    agent.before = before
    (folder / "inventory.yaml").write_text(INVENTORY, "utf-8")
    try:
        applied = agent.portward("apply", str(folder / "inventory.yaml"))
        assert applied.returncode == 0, applied.stderr
        agent.start(wait=False)
        until(lambda: up(agent), "the agent is up", seconds=30)
        yield Scene(agent, encoding, terminal)
        assert agent.stop() == 0, agent.log.read_text(errors="replace")
        log = agent.log.read_text(errors="replace")
        assert "Traceback" not in log
        assert all(re.match(r"(WARNING|INFO) ", line) for line in log.splitlines()), log
    finally:
        agent.before = ()
        agent.stop()
        agent.portward("rules", "remove", "--yes")


def up(agent: Agent) -> bool:
    """Whether the agent runs and enforces what the store holds."""
    assert agent.process is not None
    assert agent.process.poll() is None, agent.log.read_text(errors="replace")
    found = read_status(agent.folder / "table") or {}
    return running(agent.folder / "table") is not None and found.get("revision", 0) >= 1 and bool(found["in_step"])


def all_verbs(found: Scene) -> list[Said]:
    """The output of every verb in a scene."""
    lines = command_lines(found.agent.config)
    return spoken(driven(found.agent, lines, terminal=found.terminal, before=found.agent.before), found.encoding)


@pytest.fixture(scope="module")
def plain(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> list[Said]:
    """The output of every verb in plain surroundings."""
    with scene(lab, tmp_path_factory.mktemp("plain") / "x", "env", "LC_ALL=C.UTF-8", "LOGNAME=root") as found:
        said = all_verbs(found)
        whole(found.agent, said)
    return said


def test_the_list_names_every_verb() -> None:
    named = {verb[: 2 if len(verb) > 1 and not verb[1].startswith("-") else 1] for verb in VERBS}
    named |= {verb[:1] for verb in VERBS}
    missing = {verb for verb in verbs() if verb not in named}
    assert missing == {("lab", "up"), ("lab", "demo")}


def test_the_list_names_every_variable_that_is_read() -> None:
    sources = Path(portward.__file__).parent.rglob("*.py")
    text = "\n".join(path.read_text("utf-8") for path in sources)
    named = set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", text))
    read_by_name = {*actor._VARIABLES, *catalogues._VARIABLES}
    assert workers.STAY == "PORTWARD_WORKERS_STAY"
    assert named | read_by_name <= {*VARIABLES}


def whole(agent: Agent, said: list[Said]) -> None:
    """Checks that the store holds each change once, and that its log is complete."""
    written = [verb for verb, one in zip(VERBS, said, strict=True) if one.code == 0 and wrote(verb)]
    with sqlite3.connect(agent.folder / "portward.db") as store:
        numbers = [number for (number,) in store.execute("SELECT number FROM revision ORDER BY number")]
    assert numbers == [*range(1, 2 + len(written))], "the inventory, and each of these once"
    assert "whole" in said[VERBS.index(("audit", "--check"))].text


def wrote(verb: tuple[str, ...]) -> bool:
    """Whether a verb changes the store if it succeeds."""
    changing = {"request", "grant", "reject", "limit", "revoke", "started"}
    return len(verb) > 1 and verb[1] in changing and "--help" not in verb


def same(plain: list[Said], said: list[Said], encoding: str = "utf-8") -> None:
    """Checks that every verb prints the same as in plain surroundings, as far as the encoding has its
    characters."""
    for verb, expected, found in zip(VERBS, plain, said, strict=True):
        assert "Traceback" not in found.text, found.text
        assert found.code == expected.code, (verb, expected, found)
        assert tame(found.text), (verb, found.text)
        if verb[0] in VOLATILE:
            continue
        if "--json" in verb and verb[0] != "export":
            assert form(found.text) == form(expected.text), verb
        else:
            assert timeless(found.text) == timeless(in_encoding(expected.text, encoding, verb)), verb


def tame(text: str) -> bool:
    """Whether the text has no control characters but line breaks and tabs."""
    return all(shown(line) == line for line in re.split("[\n\t]", text))


def form(text: str) -> list[Any]:
    """The JSON documents of a text, without times."""
    lines = [json.loads(line) for line in text.splitlines() if line]
    return [json.loads(timeless(json.dumps(line, ensure_ascii=True))) for line in lines]


def in_encoding(text: str, encoding: str, verb: tuple[str, ...]) -> str:
    """The text as a terminal of this encoding shows it."""
    if verb[0] == "export":
        return text
    return "".join(sign if can(sign, encoding) else alike(sign) for sign in text)


def can(sign: str, encoding: str) -> bool:
    """Whether the encoding has the character."""
    try:
        sign.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def timeless(text: str) -> str:
    """The text without folders, times, durations and process ids, which differ each time."""
    text = re.sub(r"/[\w./-]*/pytest-[\w./-]*", "PATH", text)
    text = re.sub(r"\d{4}-\d\d-\d\d[T ][\d:.]+Z", "TIME", text)
    text = re.sub(r"\d{1,2}\S* \S+ \d{4} (at|à|\\u00e0).{3,20}UTC", "TIME", text)
    # A day in English or French words. Near midnight, a clock that is wrong by an hour shows another day.
    text = re.sub(r"\b\d{1,2}(er)? [^\s\d]\S{2,14} \d{4}\b", "DAY", text)
    text = re.sub(r"(process )\d+|[\d.]+ ms|\d+ s\b|[0-9a-f]{64}", "N", text)
    text = re.sub(r"for \d+ s more, \d+ packets", "N", text)
    return re.sub(r'("(?:enforced_after_ms|age)": )[\d.]+', r"\g<1>0", text)


@pytest.mark.parametrize("code", ["en", "fr"])
def test_the_days_and_times_of_a_letter_are_no_difference(code: str) -> None:
    say = catalogues.language(code)
    for month in range(1, 13):
        for day in (1, 29):
            at = datetime(2024, month, day, 23, 59, tzinfo=UTC)
            assert timeless(f"granted on {say.day(at)}, that is") == "granted on DAY, that is"
            assert timeless(f"granted on {say.time(at)}, that is") == "granted on TIME, that is"


def test_in_plain_surroundings_all_verbs_do_their_work(plain: list[Said]) -> None:
    failed = {verb for verb, one in zip(VERBS, plain, strict=True) if one.code}
    assert failed == {
        ("exemption", "reject", ONE, "--reason", "x"), ("diagnose", "nobody"), ("rules", "remove"), ("expalin",),
        ("lab", "down", "--name", "no-such-lab"), ("explain", "vni1001", "x→"), ("run",),
    }, [one for one in plain if one.code]  # fmt: skip
    same(plain, plain)


def test_on_a_latin_1_terminal(lab: Lab, plain: list[Said], tmp_path: Path) -> None:
    locale = tmp_path / "fr_FR.ISO-8859-1"
    subprocess.run(["localedef", "-i", "fr_FR", "-f", "ISO-8859-1", str(locale)], check=True, capture_output=True)
    before = ("env", f"LOCPATH={tmp_path}", "LC_ALL=fr_FR.ISO-8859-1", "LOGNAME=root", "COLUMNS=200", "TERM=xterm")
    with scene(lab, tmp_path / "x", *before, encoding="latin-1", terminal=True) as found:
        said = all_verbs(found)
        same_words(plain, said)
        whole(found.agent, said)


def same_words(plain: list[Said], said: list[Said]) -> None:
    """Checks that no verb ends with a traceback, and that those with ASCII arguments give the same exit code. On a
    Latin-1 terminal, this test's UTF-8 arguments are read as other names."""
    ours = [(one, two) for verb, one, two in zip(VERBS, plain, said, strict=True) if all(map(str.isascii, verb))]
    for expected, found in ours:
        assert found.code == expected.code, (expected, found)
    for verb, found in zip(VERBS, said, strict=True):
        assert "Traceback" not in found.text, (verb, found.text)
        if "--json" in verb and verb[0] != "export":
            assert found.text.isascii()


@pytest.mark.parametrize("mode", [(), ("PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0")], ids=["utf-8-mode", "ascii"])
def test_in_the_locale_c(lab: Lab, plain: list[Said], tmp_path: Path, mode: tuple[str, ...]) -> None:
    encoding = "ascii" if mode else "utf-8"
    with scene(lab, tmp_path / "x", "env", "LC_ALL=C", "LOGNAME=root", *mode, encoding=encoding) as found:
        said = all_verbs(found)
        same(plain, said, encoding)
        whole(found.agent, said)


def test_without_a_resolver(lab: Lab, plain: list[Said], tmp_path: Path) -> None:
    """The only name server is the test itself, which never answers. It must get no query."""
    names = tmp_path / "resolv.conf"
    names.write_text("nameserver 127.0.0.1\n")
    (tmp_path / "hosts").write_text("")
    mounts = f'mount --bind {names} /etc/resolv.conf; mount --bind {tmp_path / "hosts"} /etc/hosts; exec "$@"'
    before = ("unshare", "--mount", "sh", "-ec", mounts, "sh", "env", "LC_ALL=C.UTF-8", "LOGNAME=root")
    with namespaces.inside(lab.gateway), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 53))
        server.setblocking(False)
        with scene(lab, tmp_path / "x", *before) as found:
            said = all_verbs(found)
            same(plain, said)
            whole(found.agent, said)
        with pytest.raises(BlockingIOError):
            server.recv(512)


@pytest.mark.parametrize("draw", range(2))
def test_with_random_bytes_in_each_variable(lab: Lab, plain: list[Said], tmp_path: Path, draw: int) -> None:
    chance = random.Random(SEED + draw)  # no secret
    words = [f"{name}={os.fsdecode(value(chance))}" for name in VARIABLES]
    print(f"seed {SEED} + {draw}: {words}")
    with scene(lab, tmp_path / "x", "env", *words) as found:
        said = all_verbs(found)
        for verb, expected, one in zip(VERBS, plain, said, strict=True):
            assert "Traceback" not in one.text, (verb, one.text)
            assert one.code == expected.code, (verb, expected, one)
            # FORCE_COLOR makes `top` draw as it does on a terminal.
            assert verb[0] == "top" or tame(one.text), (verb, one.text)
        whole(found.agent, said)


def value(chance: random.Random) -> bytes:
    """Random bytes that a variable can hold, often with control characters and syntax."""
    parts = [
        b"\x1b[2J",
        b"\n",
        b"\r",
        "\u202e".encode(),
        b"\xff",
        "²".encode(),
        b"../..",
        b"%s",
        b"=",
        b"0",
        b"fr",
    ]
    drawn = [chance.choice(parts) for _ in range(chance.randrange(4))]
    drawn += [bytes(chance.randrange(1, 256) for _ in range(chance.randrange(20)))]
    chance.shuffle(drawn)
    return b"".join(drawn)


def test_a_wrong_number_of_seconds_for_workers_is_named(lab: Lab, tmp_path: Path) -> None:
    agent = Agent(lab, tmp_path)
    for text in (b"\xff\n\x1b[2J", "²".encode(), b"nan"):
        agent.before = ("env", f"{workers.STAY}={os.fsdecode(text)}")
        refused = agent.portward("run")
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"portward: {workers.STAY}: ")
        assert len(refused.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def wrong_clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes a program's wall clock wrong."""
    library = tmp_path_factory.mktemp("clock") / "wrong_clock.so"
    source = Path(__file__).with_name("wrong_clock.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def faked(library: Path, seconds: int) -> tuple[str, ...]:
    """Words before a command that make its wall clock wrong. Its monotonic clock stays right."""
    return ("env", f"LD_PRELOAD={library}", f"WRONG_CLOCK={seconds}", "LC_ALL=C.UTF-8", "LOGNAME=root")


@pytest.mark.parametrize("seconds", [3_600, -3_600])
def test_with_a_clock_that_is_wrong(
    lab: Lab, plain: list[Said], tmp_path: Path, wrong_clock: Path, seconds: int
) -> None:
    with scene(lab, tmp_path / "x", *faked(wrong_clock, seconds)) as found:
        said = all_verbs(found)
        same(plain, said)
        whole(found.agent, said)


def test_with_a_clock_that_was_set_back_by_an_hour(
    lab: Lab, plain: list[Said], tmp_path: Path, wrong_clock: Path
) -> None:
    """The agent started, and the store was written, while the clock was an hour ahead of that of the verbs."""
    with scene(lab, tmp_path / "x", *faked(wrong_clock, 3_600)) as found:
        found.agent.before = ("env", "LC_ALL=C.UTF-8", "LOGNAME=root")
        said = all_verbs(found)
        for verb, expected, one in zip(VERBS, plain, said, strict=True):
            assert "Traceback" not in one.text, one.text
            assert not re.search(r"(?<![\w.-])-\d+(\.\d+)? (s|min|h|d)\b", one.text), (verb, one.text)
            if wrote(verb):
                assert one.code == 1, (verb, one)
                assert "this host's clock says" in one.text
            elif verb[0] in ("status", "top", "check", "explain", "rules", "policy", "export"):
                assert one.code == expected.code, (verb, one)
        whole(found.agent, said)
        trusted = found.agent.portward("exemption", "request", ONE, "--justification", "x", "--trust-clock")
        assert trusted.returncode == 0, trusted.stderr
