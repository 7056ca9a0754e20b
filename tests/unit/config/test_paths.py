"""A path in portward.toml names the same file from every working folder and under every locale."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from portward.base.resources import rules
from portward.config import paths
from portward.config.load import load_config
from portward.daemon.settings import settings
from portward.errors import InputError
from portward.ops import check
from unit.store.samples import EXAMPLE, FABRIKAM

LEAST: Final = 'segments = ["vni*"]\nuplinks = ["up0"]\n'
RELATIVE: Final = (
    LEAST + 'store = "sqlite:état/policy.db"\ntable = "../table"\npreset = "own.toml"\n'
    '[exemptions]\ncheck = ["bin/vérifie", "bin/x"]\n'
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration with relative paths to files beside it. The working folder has no such files."""
    folder = tmp_path / "etc"
    (folder / "bin").mkdir(parents=True)
    (folder / "état").mkdir()
    program = folder / "bin" / "vérifie"
    program.write_text('#!/bin/sh\ncat >/dev/null\necho \'{"result": "pass", "note": "known"}\'\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    shutil.copy(rules("policy", "azure-2020.toml"), folder / "own.toml")
    (folder / "inventory.yaml").write_text(EXAMPLE)
    path = folder / "portward.toml"
    path.write_text(RELATIVE, encoding="utf-8")
    return path


@pytest.mark.parametrize("start", ["/", "etc", "."])
@pytest.mark.parametrize("named", ["absolute", "relative"])
def test_a_relative_path_is_relative_to_the_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path / start)
    found = load_config(file if named == "absolute" else Path(os.path.relpath(file)))
    assert found.store.startswith("sqlite:/")
    assert found.store.endswith("/etc/état/policy.db")
    assert found.table.is_absolute()
    assert found.table.parent.resolve() == tmp_path
    assert Path(found.preset).samefile(file.with_name("own.toml"))
    assert Path(found.exemptions.check[0]).samefile(file.parent / "bin" / "vérifie")
    assert found.exemptions.check[1] == "bin/x", "only the program is a path that portward knows"
    assert settings(file).preset.digest


def test_absolute_paths_and_names_stay(tmp_path: Path) -> None:
    path = tmp_path / "portward.toml"
    path.write_text(LEAST + 'store = "sqlite:/srv/x.db"\ntable = "/srv/t"\n[exemptions]\ncheck = ["true", "/x"]\n')
    found = load_config(path)
    assert (found.store, found.table) == ("sqlite:/srv/x.db", Path("/srv/t"))
    assert found.preset == "azure-2020"
    assert found.exemptions.check == ("true", "/x")


def test_the_folder_of_a_link_is_what_counts(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.toml"
    link.symlink_to(file)
    assert load_config(link).store == f"sqlite:{tmp_path}/état/policy.db"


def test_a_preset_that_is_not_there_is_named_whole(file: Path) -> None:
    file.with_name("own.toml").unlink()
    with pytest.raises(InputError, match=f"{file.parent}/own.toml: No such file"):
        settings(file)


def test_a_mistake_in_the_file_does_not_hide_the_agent_of_a_relative_table(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verb looks for the table folder at the same place as the agent."""
    asked: list[Path] = []
    monkeypatch.setattr("portward.daemon.settings.running", asked.append)
    file.write_text("segments = 5\n" + RELATIVE.replace(LEAST, ""))
    with pytest.raises(InputError):
        settings(file)
    assert [os.path.normpath(folder) for folder in asked] == [str(file.parent.parent / "table")]


def portward(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs the program in a working folder."""
    return subprocess.run(
        [sys.executable, "-m", "portward", *arguments],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, timeout=60, check=False,
    )  # fmt: skip


def test_verbs_of_all_folders_and_locales_meet_in_one_store(file: Path, tmp_path: Path) -> None:
    latin = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    config = ("--config", str(file))
    applied = portward(file.parent, "apply", "inventory.yaml", "--config", "portward.toml")
    assert applied.returncode == 0, applied.stderr
    asked = portward(
        tmp_path, "exemption", "request", str(FABRIKAM.id), "--justification", "x", "--terms", *config, **latin
    )
    assert b"No such file" not in asked.stderr
    assert b"no such file" not in asked.stderr
    elsewhere = portward(Path("/"), "export", *config, **latin)
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert str(FABRIKAM.id).encode() in elsewhere.stdout
    assert [path.name for path in tmp_path.rglob("*.db")] == ["policy.db"]
    relative = portward(file.parent, "policy", "show", "own.toml")
    assert relative.returncode == 0, "a path on the command line is relative to the working folder"
    assert portward(tmp_path, "policy", "show", "own.toml").returncode == 2


def test_the_text_of_a_path_is_the_same_for_every_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path("/etc/portward/portward.toml")
    monkeypatch.setattr(os, "fsdecode", lambda data: data.decode("latin-1"))
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("latin-1"))
    found = paths.from_file("é→.db", file)
    assert found.encode("latin-1") == "/etc/portward/é→.db".encode()
    assert paths.to_text(found) == "/etc/portward/é→.db"


def test_check_prints_whole_paths(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unit.ops.test_check import on_a_host  # its kernel takes everything

    on_a_host(monkeypatch)
    monkeypatch.chdir(file.parent)
    assert portward(file.parent, "apply", "inventory.yaml", "--config", "portward.toml").returncode == 0
    lines = list(check.check(Path("portward.toml")))
    assert any(line.startswith("preset ") and f"({file.parent}/own.toml)" in line for line in lines)
    assert f"exemptions.check: {file.parent}/bin/vérifie" in lines
    assert f"store sqlite:{file.parent}/état/policy.db: revision 1" in lines
    assert any(line.startswith(f"table {file.parent}/../table") for line in lines)
