"""The anti-fraud command of a provider: if the check fails in any way, no request passes it."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from uuid import UUID

import pytest

from portward.exemptions import fraud
from portward.exemptions.lifecycle import Application, Case, FraudResult
from portward.lab.agent import until
from portward.model import Authentication, Details, FraudCheck, Subscription
from portward.policy import presets

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
CASE = Case(
    presets.load("azure-2020"),
    Subscription(
        id=UUID("11111111-0000-4000-8000-000000000003"),
        name="tailspin",
        offer="azure-sponsorship",
        created=date(2022, 6, 30),
    ),
    None,
    NOW,
)
ASKED = Application(
    "own servers",
    Details(volume=900, authentication=(Authentication.SPF, Authentication.DKIM)),
    until=datetime(2027, 1, 1, tzinfo=UTC),
)
Check = Callable[..., FraudResult]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Asks a shell script."""

    def asked(script: str, application: Application = ASKED) -> FraudResult:
        command = tmp_path / "check"
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(stat.S_IRWXU)
        return fraud.check((os.fspath(command), "--first"), 2.0, CASE, application, "bob")

    return asked


@pytest.mark.parametrize("result", FraudCheck)
def test_an_answer_is_taken(check: Check, result: FraudCheck) -> None:
    found = check(f"""cat > /dev/null; echo '{{"result": "{result.value}", "note": "seen before", "score": 7}}'""")
    assert found == FraudResult(result, "seen before")


def test_it_is_given_the_request(check: Check, tmp_path: Path) -> None:
    check(f"""cat > {tmp_path}/got; echo "$1" > {tmp_path}/arguments; echo '{{"result": "pass"}}'""")
    got = json.loads((tmp_path / "got").read_text())
    assert got["subscription"]["id"] == str(CASE.subscription.id)
    assert got["subscription"]["offer"] == "azure-sponsorship"
    assert got["justification"] == "own servers"
    assert got["details"]["authentication"] == ["spf", "dkim"]
    assert (got["at"], got["until"]) == ("2026-06-01T12:00:00Z", "2027-01-01T00:00:00Z")
    assert (got["by"], got["before"], got["preset"]) == ("bob", None, "azure-2020")
    assert (tmp_path / "arguments").read_text() == "--first\n"


ANSWER = """echo '{"result": "pass"}'"""


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 0", "not understood"),
        ("echo pass", "not understood"),
        ("echo '\"pass\"'", "not understood"),
        ("echo '{}'", "not understood"),
        ("""echo '{"result": "PASS"}'""", "not understood"),
        ("""echo '{"result": "yes"}'""", "not understood"),
        ("""echo '{"result": true}'""", "not understood"),
        (f"{ANSWER}; {ANSWER}", "not understood"),
        (f"{ANSWER}; exit 1", "ended with 1"),
        (f"{ANSWER}; kill -9 $$", "ended with -9"),
        ("head -c 100000 /dev/zero | tr '\\0' x", "longer than"),
        ("printf '\\377\\376'", "not understood"),
        ("printf '%0100000d' 0 | tr 0 '['", "longer than"),
        ("printf '%05000d' 0 | tr 0 '['", "not understood"),
    ],
)
def test_what_is_no_answer_refers(check: Check, script: str, message: str) -> None:
    found = check(f"cat > /dev/null; {script}")
    assert found.result is FraudCheck.REFER
    assert message in found.note


def test_who_does_not_read_may_answer_all_the_same(check: Check) -> None:
    assert check(ANSWER) == FraudResult(FraudCheck.PASS)


def test_endless_output_is_ended_before_it_fills_the_memory(check: Check, tmp_path: Path) -> None:
    """`yes` prints gigabytes in the time that a check may take."""
    found = check(f"""cat > /dev/null; echo $$ > {tmp_path}/pid; exec yes '{{"result": "pass"}}'""")
    assert found.result is FraudCheck.REFER
    assert "longer than" in found.note, "not for the time that it took"
    pid = int((tmp_path / "pid").read_text())
    until(lambda: not _runs(pid), "it ends")


def test_a_large_request_to_a_command_that_does_not_read_does_not_block(check: Check) -> None:
    """The request is larger than a pipe's buffer."""
    assert check(ANSWER, ASKED._replace(justification="x" * (1 << 20))) == FraudResult(FraudCheck.PASS)


def test_who_takes_too_long_refers_and_is_ended(check: Check, tmp_path: Path) -> None:
    began = time.monotonic()
    found = check(f"echo $$ > {tmp_path}/pid; sleep 60 & echo $! > {tmp_path}/child; {ANSWER}; wait")
    assert time.monotonic() - began < 50, "it does not wait for the child"
    assert found.result is FraudCheck.REFER
    assert "within 2 s" in found.note
    for name in ("pid", "child"):
        pid = int((tmp_path / name).read_text())
        until(lambda pid=pid: not _runs(pid), f"{name} ends")  # type: ignore[misc]


def _runs(pid: int) -> bool:
    """Whether a process runs; a zombie does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("command", ["/nowhere/check", "", "check\0", "/etc/passwd"])
def test_what_is_not_there_refers(command: str) -> None:
    found = fraud.check((command,), 2.0, CASE, ASKED, "bob")
    assert found.result is FraudCheck.REFER
    assert "cannot be run" in found.note
    assert "Errno" not in found.note


def test_a_note_cannot_play_tricks_on_a_terminal(check: Check) -> None:
    found = check("""cat > /dev/null; printf '{"result": "fail", "note": "\\\\u001b[2Jgone\\\\nx"}'""")
    assert found.result is FraudCheck.FAIL
    assert found.note.isprintable()
    assert "gone" in found.note
