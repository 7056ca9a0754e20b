"""A verb that writes to a store warns if the agent on this host reads another store, or holds a change of this
one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from portward.cli.program import app
from portward.config.keys import Config
from portward.config.load import load_config
from portward.daemon.runtime import Runtime
from portward.ops.behind import held_unknown, lost_store, not_following, other_store
from portward.store.sqlite.store import SqliteStore
from portward.table.follower import Follower
from portward.table.writer import Writer
from unit.store.samples import ALL, CONTOSO, EXAMPLE, NOON, put, write
from unit.table.test_table import AZURE, ENFORCE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration, and an inventory beside it."""
    (tmp_path / "inventory.yaml").write_text(EXAMPLE)
    found = tmp_path / "portward.toml"
    configure(found, "portward.db")
    return found


@pytest.fixture
def config(file: Path) -> Config:
    return load_config(file)


@pytest.fixture
def agent(config: Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """An agent that runs on that table and reports that it reads that store."""
    monkeypatch.setattr("portward.daemon.runtime.faulthandler.enable", lambda _: None)
    runtime = Runtime(config.table)
    runtime.write_status({"format": 1, "store": config.store})
    yield runtime
    runtime.close()


def configure(file: Path, store: str) -> None:
    """Writes a configuration with this store."""
    settings: dict[str, Any] = {"segments": ["vni*"], "uplinks": ["up0"], "store": f"sqlite:{store}", "table": "t"}
    file.write_bytes(msgspec.toml.encode(settings))


def read_into_table(config: Config) -> None:
    """Loads the table from the store, as an agent that has ended since."""
    path = Path(config.store.removeprefix("sqlite:"))
    with closing(SqliteStore(path, create=True)) as store, closing(Writer(config.table, AZURE, ENFORCE)) as writer:
        write(store, *map(put, ALL))
        Follower(store, writer).step(NOON)


def portward(file: Path, *arguments: str) -> Result:
    """Runs a verb."""
    argv = [*arguments, "--config", str(file)]
    return CliRunner().invoke(app, argv, catch_exceptions=False, standalone_mode=False)


def test_the_store_that_the_agent_reads_needs_no_warning(config: Config, file: Path, agent: Runtime) -> None:
    """The URL may use another path."""
    assert agent
    assert other_store(config) == ""
    (file.parent / "link.db").symlink_to("portward.db")
    configure(file, "../" + file.parent.name + "/link.db")
    assert other_store(load_config(file)) == ""


def test_the_same_file_under_another_name_is_the_same_store(config: Config, file: Path, agent: Runtime) -> None:
    """A bind mount gives such a name. The test uses a hard link."""
    assert agent
    (file.parent / "portward.db").touch()
    (file.parent / "mount.db").hardlink_to(file.parent / "portward.db")
    configure(file, "mount.db")
    assert other_store(load_config(file)) == ""


@pytest.mark.parametrize(
    ("status", "warning"),
    [
        ({}, ""),
        ({"store_error": ""}, ""),
        (
            {"store_error": "table /t: mdb_txn_commit: Input/output error"},
            "the agent here takes in no change now, and retries: table /t: mdb_txn_commit: Input/output error",
        ),
        ({"clock": {"boot": "", "seconds": 4}}, ""),
        (
            {"clock": {"boot": "", "seconds": 60}},
            "the agent here has not reported for 60 s: see `portward status`",
        ),
    ],
)
def test_a_writer_is_warned_if_the_agent_takes_in_no_changes(
    config: Config, agent: Runtime, monkeypatch: pytest.MonkeyPatch, status: dict[str, Any], warning: str
) -> None:
    if "clock" in status:
        monkeypatch.setattr("portward.ops.behind.age_of", lambda status: float(status["clock"]["seconds"]))
    agent.write_status({"format": 1, "store": config.store, **status})
    assert not_following(config) == warning


def test_a_verb_prints_that_the_agent_takes_in_no_changes(file: Path, config: Config, agent: Runtime) -> None:
    agent.write_status({"format": 1, "store": config.store, "store_error": "the disk is full"})
    result = portward(file, "apply", str(file.with_name("inventory.yaml")))
    assert "WARNING   the agent here takes in no change now, and retries: the disk is full" in result.stdout


def test_a_path_that_goes_in_a_circle_is_another_store(file: Path, agent: Runtime) -> None:
    assert agent
    (file.parent / "one").symlink_to("two")
    (file.parent / "two").symlink_to("one")
    configure(file, "one/portward.db")
    assert "reads another store" in other_store(load_config(file))


def test_the_locale_of_the_agent_makes_no_other_store(
    config: Config, file: Path, agent: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verb in Latin-1 has other text for the bytes of the same path."""
    agent.write_status({"format": 1, "store": config.store.replace("portward.db", "dép.db")})
    verb = msgspec.structs.replace(config, store=config.store.replace("portward.db", "dÃ©p.db"))
    monkeypatch.setattr("portward.config.paths.os.fsencode", lambda text: text.encode("latin-1"))
    assert other_store(verb) == ""


def test_without_an_agent_no_store_is_another_one(config: Config) -> None:
    assert other_store(config) == ""


@pytest.mark.parametrize(
    "verb",
    [
        ("audit",),
        ("audit", "--json"),
        ("export",),
        ("attachment", "started", "vni1001", "10.0.0.4"),
        ("exemption", "list"),
        ("exemption", "revoke", str(CONTOSO.id), "--reason", "spam"),
    ],
    ids=" ".join,
)
def test_each_verb_on_a_store_says_that_the_agent_reads_another_one(
    file: Path, config: Config, agent: Runtime, verb: tuple[str, ...]
) -> None:
    assert agent
    configure(file, "typo.db")
    portward(file, "apply", str(file.parent / "inventory.yaml"))
    result = CliRunner().invoke(app, [*verb, "--config", str(file)])
    typo = load_config(file).store
    assert result.stderr.startswith(
        f"WARNING   the agent here reads another store, {config.store}: it does not see "
    )
    assert f"what is in {typo}; put `store` right, or restart the agent" in result.stderr


def test_check_says_so_of_a_file_that_the_agent_does_not_have_in_force(
    file: Path, config: Config, agent: Runtime
) -> None:
    assert agent
    configure(file, "typo.db")
    portward(file, "apply", str(file.parent / "inventory.yaml"))
    lines = portward(file, "check").stdout.splitlines()
    assert any(line.startswith(f"WARNING: the agent here reads another store, {config.store}: ") for line in lines)


def test_apply_says_so_before_it_is_done_and_after(file: Path, config: Config, agent: Runtime) -> None:
    assert agent
    configure(file, "typo.db")
    inventory = str(file.parent / "inventory.yaml")
    warning = f"the agent here reads another store, {config.store}: it does not see what is in "
    printed = json.loads(portward(file, "apply", "--dry-run", "--json", inventory).stdout)
    assert printed["new_store"] is True
    assert printed["warnings"][0].startswith(warning)
    for more in ("--dry-run",), ():
        assert portward(file, "apply", *more, inventory).stdout.startswith(f"WARNING   {warning}")
    confirmed = portward(file, "apply", "--confirm").stdout
    assert confirmed.startswith(f"WARNING   {warning}")


def test_a_table_that_is_cut_off_does_not_end_the_verb_that_makes_a_store(file: Path, config: Config) -> None:
    """Reading a missing page would end the process, so the test uses a process of its own."""
    read_into_table(config)
    for beside in file.parent.glob("portward.db*"):
        beside.unlink()
    os.truncate(config.table / "data.mdb", 9000)
    verb = (sys.executable, "-m", "portward", "apply", "--config", str(file), str(file.parent / "inventory.yaml"))
    result = subprocess.run(verb, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"made a new store: {config.store}\n")


def test_explain_names_a_store_that_is_gone_also_beside_a_table_that_is_cut_off(
    file: Path, config: Config
) -> None:
    read_into_table(config)
    for beside in file.parent.glob("portward.db*"):
        beside.unlink()
    os.truncate(config.table / "data.mdb", 9000)
    verb = (sys.executable, "-m", "portward", "explain", "vni1001", "10.0.0.4", "--config", str(file))
    result = subprocess.run(verb, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"portward: {config.store}: no such file")


def test_a_store_that_is_gone_is_not_replaced_in_silence(file: Path, config: Config) -> None:
    assert lost_store(config) == ""
    read_into_table(config)
    for beside in file.parent.glob("portward.db*"):
        beside.unlink()
    lines = portward(file, "apply", "--dry-run", str(file.parent / "inventory.yaml")).stdout.splitlines()
    assert lines[0] == (
        f"WARNING   there is no store at {config.store}, and the policy table here was read from one, up to "
        "revision 1: if it was this one, put it back from a backup; a new one has none of what it held"
    )
    assert lines[-2] == f"would make a new store: {config.store}"


def test_a_store_that_is_there_is_not_lost(file: Path, config: Config) -> None:
    read_into_table(config)
    assert "WARNING" not in portward(file, "apply", str(file.parent / "inventory.yaml")).stdout


def test_a_confirmation_warns_if_it_is_unknown_whether_anything_is_held(file: Path, config: Config) -> None:
    inventory = str(file.parent / "inventory.yaml")
    portward(file, "apply", inventory)
    unknown = "no agent runs here: it is not known whether anything was held"
    assert held_unknown(config) == unknown
    assert portward(file, "apply", "--confirm").stdout == (
        f"WARNING   {unknown}\napplied revision 2: everything up to it is confirmed\n"
    )
    assert "! confirmed everything up to revision 2" in portward(file, "audit").stdout
    assert json.loads(portward(file, "apply", "--confirm", "--json").stdout) == {
        "revision": 3, "confirmed": 2, "warnings": [unknown],
    }  # fmt: skip
    assert portward(file, "apply", "--confirm", inventory).stdout == (
        f"WARNING   {unknown}\napplied revision 4: everything up to it is confirmed\n"
    )


def test_it_is_unknown_what_an_agent_without_a_policy_holds(config: Config, agent: Runtime) -> None:
    assert agent
    assert held_unknown(config).endswith(": it is not known whether anything was held")


def test_an_agent_with_a_policy_says_what_it_holds(config: Config, agent: Runtime) -> None:
    assert agent
    read_into_table(config)
    assert held_unknown(config) == ""
