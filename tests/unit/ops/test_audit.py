"""`portward audit` as an operator uses it."""

# ruff: noqa: S608 # the test writes every statement

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from portward.base.characters import unshown
from portward.cli.program import app
from portward.errors import InputError, PortwardError
from portward.store.codec import key_of
from portward.store.confirmation import confirmation
from portward.store.sqlite.store import SqliteStore
from portward.store.values import NoStoreError, Put
from unit.store.samples import CONTOSO, FABRIKAM, GRANT, MACHINE, PREFIX, opened, put, write
from unit.store.test_chain import fill, format_1, tamper, version

Run = Callable[..., Result]

HEAD = r"head \d+:[0-9a-f]{64}"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the store that the configuration names."""
    path = tmp_path / "portward.db"
    (tmp_path / "portward.toml").write_text(f'segments = ["vni*"]\nuplinks = ["up0"]\nstore = "sqlite:{path}"\n')
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def log(path: Path) -> Path:
    """A store with five revisions by two people."""
    with closing(opened(path)) as store:
        fill(store)
    return path


def audit(*arguments: str, code: int = 0) -> list[str]:
    """The lines that `portward audit` prints."""
    result = run(*arguments)
    assert result.exit_code == code, result.stderr
    assert (result.stderr != "") == (code != 0)
    return result.stdout.splitlines()


def run(*arguments: str) -> Result:
    """Runs `portward audit`; raises the error that the program would print."""
    result = CliRunner().invoke(app, ["audit", "--config", "portward.toml", *arguments])
    if isinstance(result.exception, PortwardError):
        raise result.exception
    return result


def machine(*arguments: str) -> dict[str, Any]:
    """The output of `portward audit --json`."""
    found: dict[str, Any] = json.loads(run("--json", *arguments).stdout)
    return found


def revisions(lines: list[str]) -> list[int]:
    """The revisions that are printed."""
    return [int(found[1]) for line in lines if (found := re.match(r"revision (\d+) ", line))]


def test_it_prints_who_changed_what_and_when_and_the_verdict(path: Path) -> None:
    with closing(opened(path)) as store:
        write(store, put(CONTOSO), put(FABRIKAM), put(MACHINE), put(GRANT))
        text = put(FABRIKAM).body
        assert text is not None
        write(store, Put(key_of(FABRIKAM), text.replace("good", "disabled")), actor="grace")
        write(store, Put(key_of(MACHINE), None), confirmation(3))
    *lines, last = audit()
    assert "\n".join(lines) == (
        "revision 1  2026-06-01T12:00:00Z  ada  4 changes\n"
        "  + attachment vni1001 10.0.0.4 → contoso-prod (enterprise-agreement)\n"
        "  + exemption of fabrikam (pay-as-you-go): granted\n"
        f"  + subscription contoso-prod {CONTOSO.id} (enterprise-agreement, created 2021-03-02, good)\n"
        f"  + subscription fabrikam {FABRIKAM.id} (pay-as-you-go, created 2022-06-30, good)\n"
        "revision 2  2026-06-01T12:00:00Z  grace  1 change\n"
        "  ~ subscription fabrikam: standing good → disabled\n"
        "revision 3  2026-06-01T12:00:00Z  ada  2 changes\n"
        "  - attachment vni1001 10.0.0.4 → contoso-prod (enterprise-agreement)\n"
        "  ! confirmed everything up to revision 3"
    )
    assert re.fullmatch(f"checked 3 revisions, 7 changes: whole, {HEAD}", last)


def test_an_unreadable_record_is_shown_by_its_key(path: Path) -> None:
    with closing(opened(path)) as store:
        write(store, Put("subscriptions/x", "no \x1b[31mJSON"), Put("weird", "1"))
        write(store, Put("subscriptions/x", "{}"), Put("weird", None))
        write(store, Put("subscriptions/x", "again none"))
    lines = audit()
    assert [line for line in lines if line.startswith("  ")] == [
        "  + subscriptions/x", "  + weird", "  ~ subscriptions/x: could not be read", "  - weird",
        "  ~ subscriptions/x: cannot be read",
    ]  # fmt: skip


def test_a_terminal_obeys_nothing_that_stands_in_the_log(path: Path) -> None:
    with closing(opened(path)) as store:
        write(store, Put("subscriptions/\x1b[31m", "{}"), actor="eve\x1b[2J")
    assert all(unshown(line) is None for line in audit())
    tamper(path, "UPDATE revision SET at = char(27)")
    result = run()
    assert all(unshown(line) is None for line in result.output.splitlines())
    assert "eve\\x1b[2J" in result.stderr


def test_a_large_revision_is_counted(path: Path) -> None:
    many = [Put(f"attachments/vni1/10.0.{number // 256}.{number % 256}", "{}") for number in range(300)]
    with closing(opened(path)) as store:
        write(store, *many, put(CONTOSO))
        write(store, *(each._replace(body=None) for each in many[:40]), put(FABRIKAM), actor="grace")
    assert audit()[:-1] == [
        "revision 1  2026-06-01T12:00:00Z  ada  301 changes",
        "  + 300 attachments, 1 subscriptions",
        "revision 2  2026-06-01T12:00:00Z  grace  41 changes",
        "  + 1 subscriptions",
        "  - 40 attachments",
    ]
    first, second = machine()["entries"]
    assert (first["added"], first["removed"], len(first["changes"])) == (301, 0, 301)
    assert (second["added"], second["removed"]) == (1, 40)


def test_the_last_20_are_printed_and_all_are_checked(path: Path) -> None:
    with closing(opened(path)) as store:
        for number in range(25):
            write(store, Put("subscriptions/x", str(number)))
    lines = audit()
    assert revisions(lines) == list(range(6, 26))
    assert lines[-1].startswith("checked 25 revisions, 25 changes: whole")
    tamper(path, "UPDATE revision SET actor = 'eve' WHERE number = 2")
    assert "NOT WHOLE, 1 finding" in audit(code=1)[-1]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--last", "2"), [4, 5]),
        (("--since", "3"), [4, 5]),
        (("--since", "0"), [1, 2, 3, 4, 5]),
        (("--actor", "grace"), [2, 4]),
        (("--actor", "grace", "--last", "1"), [4]),
        (("--key", key_of(MACHINE)), [1, 3, 4]),
        (("--key", key_of(MACHINE), "--since", "1", "--actor", "ada"), [3]),
        (("--key", "attachments/vni1002"), [2]),
        (("--key", "attachments/vni1002/"), [2]),
        (("--key", "exemptions"), [2]),
    ],
)
def test_entries_are_chosen(log: Path, arguments: tuple[str, ...], wanted: list[int]) -> None:
    assert log.exists()
    assert revisions(audit(*arguments)) == wanted
    assert [entry["revision"] for entry in machine(*arguments)["entries"]] == wanted


def test_with_a_key_only_its_own_changes_are_printed(log: Path) -> None:
    assert log.exists()
    lines = audit("--key", key_of(PREFIX))
    assert lines[:-1] == [
        "revision 2  2026-06-01T12:00:00Z  grace  1 change",
        "  + attachment vni1002 10.0.0.0/24 → fabrikam (pay-as-you-go)",
    ]


def test_an_address_is_not_the_prefix_that_begins_with_it(log: Path) -> None:
    assert log.exists()
    assert revisions(audit("--key", "attachments/vni1002/10.0.0.0")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--since", "9"), "no entry after revision 9: the newest is revision 5"),
        (("--actor", "bob"), "no entry by 'bob': the newest is revision 5"),
        (
            ("--key", "confirmed", "--since", "1"),
            "no entry after revision 1 of confirmed: the newest is revision 5",
        ),
    ],
)
def test_where_nothing_is_chosen_it_says_so(log: Path, arguments: tuple[str, ...], message: str) -> None:
    assert log.exists()
    assert audit(*arguments)[0] == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--since", "1", "--last", "2"), "--since: either this or --last, not both"),
        (("--check", "--last", "2"), "--check: prints no entries, so --last says nothing"),
        (("--key", "attachment/vni1"), "--key: 'attachment/vni1' is no key; did you mean 'attachments'?"),
        (("--key", "attachments/vni1/10.0.0.300"), "attachments/SEGMENT/ADDRESS would be"),
        (("--key", "subscriptions/1"), "subscriptions/UUID would be"),
        (("--expect", "5:abc"), "--expect: '5:abc' is not REVISION:HASH"),
    ],
)
def test_a_mistake_is_reported(log: Path, arguments: tuple[str, ...], message: str) -> None:
    assert log.exists()
    with pytest.raises(InputError) as error:
        run(*arguments)
    assert message in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "arguments", [("--last", "0"), ("--since", "-1"), ("--since", "x"), ("--chek",), ("more",)]
)
def test_bad_usage_is_exit_code_2(log: Path, arguments: tuple[str, ...]) -> None:
    assert log.exists()
    assert run(*arguments).exit_code == 2


def test_the_verdict_alone(log: Path) -> None:
    assert log.exists()
    lines = audit("--check")
    assert len(lines) == 1
    assert re.fullmatch(f"checked 5 revisions, 9 changes: whole, {HEAD}", lines[0])
    assert "entries" not in machine("--check")


def test_each_finding_is_a_line_on_stderr(log: Path) -> None:
    tamper(log, f"UPDATE change SET after = 'x' WHERE revision = 2 AND key = '{key_of(GRANT)}'")
    result = run("--check")
    assert result.exit_code == 1
    assert result.stdout.startswith("checked 5 revisions, 9 changes: NOT WHOLE, 2 findings, head 5:")
    first, second = result.stderr.splitlines()
    assert first.startswith("portward: revision 2, by grace at 2026-06-01T12:00:00+00:00, does not fit its hash")
    assert key_of(GRANT) in first
    assert second.startswith(f"portward: {key_of(GRANT)}: the record is not as revision 2 left it")


def test_many_findings_are_cut_and_counted(path: Path) -> None:
    with closing(opened(path)) as store:
        write(store, *(Put(f"subscriptions/{number}", "{}") for number in range(250)))
    tamper(path, "UPDATE record SET body = 'x'")
    result = run("--check")
    assert len(result.stderr.splitlines()) == 101
    assert result.stderr.splitlines()[-1] == "portward: … and 150 more"
    assert "250 findings" in result.stdout
    printed = machine()
    assert (printed["whole"], printed["findings_total"], len(printed["findings"])) == (False, 250, 100)


def test_the_head_that_was_printed_is_expected_later(log: Path) -> None:
    backup = log.read_bytes()
    found = re.search(r"head (\d+:\w+)$", audit("--check")[0])
    assert found is not None
    with closing(opened(log)) as store:
        write(store, Put(key_of(GRANT), None))
    audit("--check", "--expect", found[1])
    later = machine("--check")["head"]
    for beside in log.parent.glob("portward.db-*"):
        beside.unlink()
    log.write_bytes(backup)
    audit("--check")
    result = run("--check", "--expect", later)
    assert result.exit_code == 1
    assert "revision 6 with the hash that is expected is not there: the log ends with 5" in result.stderr


def test_what_is_newer_than_the_head_that_is_expected_is_counted(log: Path) -> None:
    """After a restore, the head is the backup's. A newer one means that the restore has failed."""
    mark = machine("--check")["head"]
    assert machine("--check")["newer_than_expected"] is None
    assert re.fullmatch(f"checked .*: whole, {HEAD}", audit("--check", "--expect", mark)[0])
    assert machine("--check", "--expect", mark)["newer_than_expected"] == 0
    with closing(opened(log)) as store:
        write(store, Put(key_of(GRANT), None))
    line = audit("--check", "--expect", mark)[0]
    assert re.fullmatch(f"checked .*: whole, {HEAD}, 1 revision after the one expected", line)
    assert machine("--check", "--expect", mark)["newer_than_expected"] == 1


def test_json_is_one_object(log: Path) -> None:
    tamper(log, "UPDATE revision SET actor = 'eve' WHERE number = 4")
    result = run("--json", "--last", "2")
    assert (result.exit_code, result.stderr) == (1, "")
    printed = json.loads(result.stdout)
    assert (printed["whole"], printed["revisions"], printed["changes"], printed["sealed"]) == (False, 5, 9, None)
    assert re.fullmatch("5:[0-9a-f]{64}", printed["head"])
    assert [(each["kind"], each["revision"]) for each in printed["findings"]] == [("entry-changed", 4)]
    fourth, fifth = printed["entries"]
    assert (fourth["revision"], fourth["actor"], fourth["added"], fourth["changed"]) == (4, "eve", 1, 1)
    assert printed["head"] == f"5:{fifth['hash']}"
    assert fifth["changes"][0]["after"]["name"] == "contoso-prod"


def test_json_holds_what_is_no_json_as_a_text(path: Path) -> None:
    with closing(opened(path)) as store:
        write(store, Put("subscriptions/x", '{"a": '))
    tamper(path, "UPDATE change SET before = X'80'")
    (change,) = machine()["entries"][0]["changes"]
    assert change == {"key": "subscriptions/x", "before": "<bytes 80>", "after": '{"a": '}


def test_a_missing_store_is_an_error(path: Path) -> None:
    with pytest.raises(NoStoreError, match="no such file: put it back from a backup"):
        run()
    path.touch()
    with pytest.raises(NoStoreError, match="an empty file"):
        run()


def test_an_empty_store_is_whole(path: Path) -> None:
    opened(path).close()
    first, last = audit()
    assert first == "the log has no entry yet"
    assert re.fullmatch(f"checked 0 revisions, 0 changes: whole, {HEAD}", last)
    printed = machine()
    assert (printed["whole"], printed["entries"]) == (True, [])


def test_a_store_of_format_1_is_shown_and_reported_and_not_sealed(path: Path) -> None:
    format_1(path)
    result = run()
    assert result.exit_code == 1
    assert revisions(result.stdout.splitlines()) == [1, 2, 3, 4, 5]
    assert result.stdout.endswith("checked 5 revisions, 9 changes: NOT WHOLE, 1 finding, no hash\n")
    assert result.stderr == (
        "portward: the log has no hashes: the store was made by an older portward, and the next change seals it\n"
    )
    assert version(path) == 1


def test_a_sealed_store_says_when_it_was_sealed(path: Path) -> None:
    format_1(path)
    opened(path).close()
    assert re.fullmatch(
        f"checked 5 revisions, 9 changes: whole, {HEAD}, revisions up to 5 sealed 20[-0-9]+T[:0-9]+Z", audit()[-1]
    )
    assert machine()["sealed"]["revision"] == 5


def test_it_writes_nothing_and_works_while_others_have_the_store_open(log: Path) -> None:
    with closing(SqliteStore(log)) as agent:
        records = agent.read_all()[1]
        next(records)
        with closing(sqlite3.connect(log, isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            files = {
                file: file.read_bytes() for file in log.parent.glob("portward.db*") if file.suffix != ".db-shm"
            }
            audit()
            assert {file: file.read_bytes() for file in files} == files
        records.close()


def test_an_error_is_one_line_and_its_exit_code(log: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-m", "portward", "audit", "--config", "portward.toml", "--expect", "5"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=log.parent, env=environment)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("portward: --expect: '5' is not REVISION:HASH")
