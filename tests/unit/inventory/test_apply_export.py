"""`portward apply` and `portward export` as an operator uses them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from portward.base.clock import utc_now
from portward.cli import inventory as verbs
from portward.cli.program import app
from portward.errors import ConflictError, InputError, PortwardError, StoreError
from portward.inventory.difference import Difference, difference
from portward.inventory.records import Inventory
from portward.store.codec import key_of
from portward.store.values import Change
from unit.store.samples import ALL, CONTOSO, EXAMPLE, FABRIKAM, held, opened, put, texts, write
from unit.store.test_sqlite import environment

Run = Callable[..., Result]

OTHER = """
subscriptions: [{id: 11111111-0000-4000-8000-00000000000f, offer: pay-as-you-go, created: 2022-06-30}]
"""


@pytest.fixture
def files(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with portward.toml and inventory.yaml, in which the program runs."""
    (tmp_path / "portward.toml").write_text(f'segments = ["vni*"]\nuplinks = ["up0"]\nstore = "sqlite:{path}"\n')
    (tmp_path / "inventory.yaml").write_text(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(files: Path) -> Run:
    """Runs a verb in that folder, with `input` as its standard input, and raises its errors."""
    assert files.is_dir()

    def checked(*arguments: str, **more: Any) -> Result:
        argv = [*arguments, "--config", "portward.toml"]
        result = CliRunner().invoke(app, argv, catch_exceptions=False, standalone_mode=False, **more)
        assert (result.exit_code, result.stderr) == (0, "")
        return result

    return checked


def log(path: Path) -> list[Change]:
    """The store's whole log."""
    with closing(opened(path)) as store:
        return list(store.changes(0))


def records(path: Path) -> dict[str, str]:
    """All that the store holds."""
    with closing(opened(path)) as store:
        return held(store)


def test_apply_makes_the_store_and_says_what_it_did(run: Run, path: Path) -> None:
    assert run("apply", "inventory.yaml").stdout == (
        f"made a new store: sqlite:{path}\napplied revision 1: 5 added, 0 changed, 0 removed\n"
    )
    assert records(path) == texts(*ALL)


def test_applying_the_same_again_changes_nothing(run: Run, path: Path) -> None:
    run("apply", "inventory.yaml")
    assert run("apply", "inventory.yaml").stdout == "nothing to change, the store stays at revision 1\n"
    assert {change.revision for change in log(path)} == {1}


def test_apply_changes_what_differs(run: Run, files: Path, path: Path) -> None:
    run("apply", "inventory.yaml")
    (files / "inventory.yaml").write_text(EXAMPLE.replace("standing: good", "standing: disabled"))
    assert run("apply", "inventory.yaml").stdout == "applied revision 2: 0 added, 1 changed, 0 removed\n"
    assert [change.key for change in log(path) if change.revision == 2] == [key_of(FABRIKAM)]


def test_a_dry_run_prints_the_difference_and_changes_nothing(run: Run, path: Path) -> None:
    assert run("apply", "--dry-run", "inventory.yaml").stdout == (
        "+ subscription contoso-prod 11111111-0000-4000-8000-000000000001 "
        "(enterprise-agreement, created 2021-03-02, good)\n"
        "+ subscription fabrikam 11111111-0000-4000-8000-000000000002 (pay-as-you-go, created 2022-06-30, good)\n"
        "+ attachment vni1001 10.0.0.4 → contoso-prod (enterprise-agreement)\n"
        "+ attachment vni1002 10.0.0.0/24 → fabrikam (pay-as-you-go)\n"
        "+ exemption of fabrikam (pay-as-you-go): granted\n"
        f"would make a new store: sqlite:{path}\n"
        "would change revision 0: 5 added, 0 changed, 0 removed\n"
    )
    assert not path.exists()


def test_a_dry_run_on_a_store_leaves_it_as_it_is(run: Run, files: Path, path: Path) -> None:
    run("apply", "inventory.yaml")
    before = records(path), log(path)
    (files / "inventory.yaml").write_text(EXAMPLE.replace("standing: good", "standing: disabled"))
    printed = run("apply", "--dry-run", "inventory.yaml").stdout
    assert printed.splitlines()[0] == "~ subscription fabrikam: standing good → disabled"
    assert (records(path), log(path)) == before


def test_a_long_difference_is_cut_and_counted(run: Run, files: Path) -> None:
    rows = [
        {"segment": "vni1001", "address": f"10.0.1.{number}", "subscription": str(CONTOSO.id)}
        for number in range(100)
    ]
    (files / "more.json").write_text(json.dumps({"attachments": rows}))
    lines = run("apply", "--dry-run", "inventory.yaml", "more.json").stdout.splitlines()
    assert len(lines) == 43
    assert lines[-3] == "… and 65 more"
    assert lines[-1] == "would change revision 0: 105 added, 0 changed, 0 removed"


@pytest.mark.parametrize("nothing", ["{}", "subscriptions: []\n", OTHER])
def test_pruning_every_customer_of_a_small_store_has_to_be_confirmed(
    run: Run, files: Path, path: Path, nothing: str
) -> None:
    """This holds even if new customers replace them. The share alone would allow it, because so few never count as
    too many."""
    run("apply", "inventory.yaml")
    before = records(path)
    (files / "nothing.yaml").write_text(nothing)
    would = "would remove every subscription in the store (2)"
    with pytest.raises(PortwardError) as refused:
        run("apply", "--prune", "nothing.yaml")
    assert str(refused.value) == f"nothing was written: this {would}; --dry-run shows it, --confirm applies it"
    assert refused.value.exit_code == 1
    dry = run("apply", "--prune", "--dry-run", "nothing.yaml").stdout
    assert dry.endswith(f"it {would}: to be applied with --confirm only\n")
    printed = json.loads(run("apply", "--prune", "--dry-run", "--json", "nothing.yaml").stdout)
    assert printed["warnings"] == [f"it {would}: to be applied with --confirm only"]
    assert records(path) == before
    run("apply", "--prune", "--confirm", "nothing.yaml")
    assert not any(key in before for key in records(path))


def test_a_subscription_that_is_created_in_the_future_is_warned_of(run: Run, files: Path) -> None:
    (files / "inventory.yaml").write_text(EXAMPLE.replace("2021-03-02", "3021-03-02"))
    first = run("apply", "inventory.yaml").stdout.splitlines()[0]
    assert first.startswith("WARNING   inventory.yaml:")
    assert "subscriptions[0].created: 3021-03-02 lies in the future, this host's clock says " in first
    (files / "inventory.yaml").write_text(EXAMPLE.replace("2021-03-02", str(utc_now().date())))
    assert "WARNING" not in run("apply", "inventory.yaml").stdout


def test_a_grant_to_an_offer_that_can_never_be_exempt_is_warned_of(run: Run, files: Path) -> None:
    run("apply", "inventory.yaml")
    id_, other = "11111111-0000-4000-8000-0000000000aa", "11111111-0000-4000-8000-0000000000bb"
    (files / "grants.yaml").write_text(
        "subscriptions:\n"
        f"- {{id: {id_}, offer: free-trial, created: 2022-06-30}}\n"
        f"- {{id: {other}, offer: pay-as-you-go, created: 2022-06-30}}\n"
        "exemptions:\n"
        f"- {{subscription: {id_}, state: granted, decided: 2026-01-09T12:00:00Z}}\n"
        f"- {{subscription: {other}, state: granted, decided: 2026-01-09T12:00:00Z}}\n"
    )
    warned = [line for line in run("apply", "grants.yaml").stdout.splitlines() if line.startswith("WARNING")]
    assert warned == [
        "WARNING   grants.yaml:5: exemptions[0].state: is granted and makes no difference: the offer free-trial "
        "can never be exempt"
    ]
    assert "WARNING" not in run("apply", "grants.yaml").stdout, "it is there already"


def test_many_grants_that_make_no_difference_take_no_longer(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finding the line of a record takes another reading of the documents."""
    found: list[str] = []
    mistake = Inventory.mistake

    def counted(self: Inventory, key: str, problem: str, *fields: str) -> InputError:
        found.append(key)
        return mistake(self, key, problem, *fields)

    monkeypatch.setattr(Inventory, "mistake", counted)
    ids = [f"11111111-0000-4000-8000-{number:012}" for number in range(100, 120)]
    owners = "".join(f"- {{id: {id_}, offer: free-trial, created: 2022-06-30}}\n" for id_ in ids)
    grants = "".join(f"- {{subscription: {id_}, state: granted, decided: 2026-01-09T12:00:00Z}}\n" for id_ in ids)
    (files / "grants.yaml").write_text(f"subscriptions:\n{owners}exemptions:\n{grants}")
    assert "WARNING   and 15 more grants like these\n" in run("apply", "grants.yaml").stdout
    assert len(found) == 5


def test_pruning_removes_what_the_files_do_not_name(run: Run, files: Path, path: Path) -> None:
    run("apply", "inventory.yaml")
    (files / "inventory.yaml").write_text(EXAMPLE.partition("attachments:")[0])
    assert "nothing to change" in run("apply", "inventory.yaml").stdout
    dry = run("apply", "--prune", "--dry-run", "inventory.yaml").stdout.splitlines()
    assert [line[0] for line in dry] == ["-", "-", "-", "w"]
    assert (
        run("apply", "--prune", "inventory.yaml").stdout == "applied revision 2: 0 added, 0 changed, 3 removed\n"
    )
    assert records(path).keys() == {key_of(CONTOSO), key_of(FABRIKAM)}


def test_a_mistake_in_one_file_keeps_all_of_them_out(run: Run, files: Path, path: Path) -> None:
    (files / "wrong.yaml").write_text("attachments:\n- {segment: vni9, address: 10.0.0.4/8, subscription: x}\n")
    with pytest.raises(InputError, match=r"^wrong.yaml:2: attachments\[0\]"):
        run("apply", "inventory.yaml", "wrong.yaml")
    assert not path.exists()


def test_an_unknown_subscription_or_offer_makes_no_store(run: Run, files: Path, path: Path) -> None:
    (files / "inventory.yaml").write_text(f"exemptions:\n- {{subscription: {CONTOSO.id}, state: requested}}\n")
    with pytest.raises(InputError, match=r"^inventory.yaml:2: exemptions\[0\].subscription: no subscription"):
        run("apply", "inventory.yaml")
    (files / "inventory.yaml").write_text(EXAMPLE.replace("pay-as-you-go", "pay-as-you-went"))
    with pytest.raises(
        InputError, match=r"^inventory.yaml:8: subscriptions\[1\].offer: .* did you mean 'pay-as-you-go'"
    ):
        run("apply", "inventory.yaml")
    assert not path.exists()


def test_standard_input_can_be_applied(run: Run) -> None:
    assert "5 added" in run("apply", "-", input=EXAMPLE).stdout


def test_the_log_names_the_login_or_who_was_named(
    run: Run, files: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "lin")
    monkeypatch.delenv("SUDO_USER", raising=False)
    for number, (arguments, sudo) in enumerate([((), ""), ((), "ada"), (("--as", "pipeline 7"), "ada")]):
        (files / "inventory.yaml").write_text(EXAMPLE.replace("fabrikam", f"fabrikam-{number}"))
        monkeypatch.setenv("SUDO_USER", sudo)
        run("apply", "inventory.yaml", *arguments)
    by_revision = {change.revision: change.actor for change in log(path)}
    assert by_revision == {1: "lin", 2: "ada", 3: "pipeline 7"}


@pytest.mark.parametrize(
    ("set_", "found"),
    [
        ("eve\nrevision 9  2026-01-01T00:00:00Z  alice", "eve\\nrevision 9  2026-01-01T00:00:00Z  alice"),
        ("\x1b[2Kalice\r", "\\x1b[2Kalice\\r"),
        ("ali\u202ece", "ali\\u202ece"),
        ("al\udcffice", "al\\xffice"),
        ("J\udcc3\udcbcrgen", "Jürgen"),
        ("x" * 5_000, "x" * 100),
    ],
    ids=["lines", "escape", "bidi", "byte", "read-by-another-locale", "long"],
)
def test_a_login_from_the_environment_forges_no_line_of_the_log(
    run: Run, path: Path, monkeypatch: pytest.MonkeyPatch, set_: str, found: str
) -> None:
    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.setenv("LOGNAME", set_)
    run("apply", "inventory.yaml")
    assert {change.actor for change in log(path)} == {found}


@pytest.mark.parametrize("variables", [{"LOGNAME": "", "USER": "kim"}, {"LOGNAME": " ", "USERNAME": "kim"}])
def test_an_empty_login_is_not_taken(
    run: Run, path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name in ("SUDO_USER", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run("apply", "inventory.yaml")
    assert {change.actor for change in log(path)} == {"kim"}


@pytest.mark.parametrize(
    "name", ["می\u200cخواهم", "क्\u200dष", "山田\u3000太郎", "Société\u00a0Générale", "👩\u200d💻"]
)
def test_a_customers_name_as_it_is_written_goes_in_and_comes_out(run: Run, files: Path, name: str) -> None:
    (files / "inventory.yaml").write_text(EXAMPLE.replace("fabrikam", name))
    run("apply", "inventory.yaml")
    for form in ((), ("--json",)):
        exported = run("export", *form).stdout
        (files / "again.yaml").write_text(exported)
        assert "nothing to change" in run("apply", "--prune", "again.yaml").stdout
    assert name in run("audit").stdout


@pytest.mark.parametrize("name", ["", " ", "a\nb"])
def test_a_name_that_would_spoil_the_log_is_refused(run: Run, path: Path, name: str) -> None:
    with pytest.raises(InputError, match="--as"):
        run("apply", "inventory.yaml", "--as", name)
    assert not path.exists()


def test_json_says_what_was_done(run: Run) -> None:
    dry = json.loads(run("apply", "--dry-run", "--json", "inventory.yaml").stdout)
    changes = {change["key"]: change for change in dry.pop("changes")}
    assert dry == {
        "revision": 0,
        "dry_run": True,
        "added": 5,
        "changed": 0,
        "removed": 0,
        "held": None,
        "new_store": True,
    }
    assert changes[key_of(FABRIKAM)]["before"] is None
    assert changes[key_of(FABRIKAM)]["after"]["name"] == "fabrikam"
    done = json.loads(run("apply", "--json", "inventory.yaml").stdout)
    assert done == {
        "revision": 1, "dry_run": False, "added": 5, "changed": 0, "removed": 0, "new_store": True,
    }  # fmt: skip
    again = json.loads(run("apply", "--json", "inventory.yaml").stdout)
    assert again == {"revision": 1, "dry_run": False, "added": 0, "changed": 0, "removed": 0}


def test_the_slower_of_two_writers_gets_a_conflict_and_writes_nothing(
    run: Run, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(opened(path)) as store:
        write(store, put(CONTOSO))
    found = difference

    def meanwhile(*arguments: Any, **more: Any) -> Difference:
        with closing(opened(path)) as store:
            write(store, put(FABRIKAM), actor="grace")
        return found(*arguments, **more)

    monkeypatch.setattr(verbs, "difference", meanwhile)
    with pytest.raises(
        ConflictError, match=r"read at revision 1 and is now at revision 2, by grace .*run it again"
    ):
        run("apply", "inventory.yaml")
    assert records(path).keys() == {key_of(CONTOSO), key_of(FABRIKAM)}
    monkeypatch.setattr(verbs, "difference", found)
    assert run("apply", "inventory.yaml").stdout == "applied revision 3: 3 added, 0 changed, 0 removed\n"


def test_a_missing_folder_is_an_error(run: Run, files: Path) -> None:
    config = files / "portward.toml"
    config.write_text(config.read_text().replace("portward.db", "gone/portward.db"))
    with pytest.raises(StoreError, match=f"there is no folder {files}/gone"):
        run("apply", "inventory.yaml")
    with pytest.raises(StoreError, match=f"there is no folder {files}/gone"):  # the dry run fails as well
        run("apply", "--dry-run", "inventory.yaml")


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_an_export_can_be_applied_without_any_difference(run: Run, files: Path, form: tuple[str, ...]) -> None:
    run("apply", "inventory.yaml")
    (files / "exported").write_text(run("export", *form).stdout)
    assert "nothing to change" in run("apply", "--prune", "exported").stdout


def test_an_export_of_no_store_is_an_error(run: Run, path: Path) -> None:
    with pytest.raises(StoreError, match="no such file: put it back from a backup"):
        run("export")
    assert not path.exists()


def test_an_error_is_one_line_on_stderr(files: Path) -> None:
    (files / "inventory.yaml").write_text("subscription: []\n")
    argv = [sys.executable, "-m", "portward", "apply", "inventory.yaml", "--config", "portward.toml"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=files, env=environment())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "portward: inventory.yaml:1: subscription: unknown key; did you mean 'subscriptions'?\n"
    )


def test_progress_is_shown_to_a_person_only(files: Path) -> None:
    argv = [sys.executable, "-m", "portward", "apply", "inventory.yaml", "--config", "portward.toml"]
    person, terminal = pty.openpty()
    try:
        env = environment() | {"TERM": "xterm"}
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=terminal, text=True, check=True, env=env)
        shown = os.read(person, 65_536).decode()
    finally:
        os.close(person)
        os.close(terminal)
    assert "reading" in shown
    assert "writing" in shown
    assert done.stdout.endswith("applied revision 1: 5 added, 0 changed, 0 removed\n")


@pytest.mark.parametrize("verb", ["apply", "export"])
def test_help_shows_an_example(verb: str) -> None:
    assert f"Example: portward {verb}" in CliRunner().invoke(app, [verb, "--help"]).stdout
