"""`--instance` enters a namespace, or says in one line why it cannot. `check` finds two agents with one table."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from portward.base import instance, netns
from portward.cli.options import configuration
from portward.config.keys import DEFAULT_PATH
from portward.config.load import load_config
from portward.errors import InputError, PortwardError
from portward.ops import instances

LEAST = 'segments = ["vni*"]\nuplinks = ["up0"]\n'


@pytest.fixture
def entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The namespaces that were entered, on a host with the namespaces `blue` and `red`, whose configurations are
    in the test's folder."""
    found: list[str] = []
    names = tmp_path / "netns"
    names.mkdir()
    for name in ("blue", "red"):
        (names / name).touch()

    def enter(name: str) -> None:
        os.close(os.open(names / name, os.O_RDONLY))
        found.append(name)

    monkeypatch.setattr(netns, "FOLDER", names)
    monkeypatch.setattr(netns, "enter", enter)
    monkeypatch.setattr(instances, "_FOLDER", tmp_path)
    yield found
    instance.note(None)


def fails(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the kernel refuses to enter a namespace."""

    def enter(_: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(netns, "enter", enter)


def test_without_an_instance_nothing_is_entered(entered: list[str]) -> None:
    assert configuration(None, None) == DEFAULT_PATH
    assert configuration(Path("a.toml"), None) == Path("a.toml")
    assert entered == []


def test_an_instance_has_its_own_file_and_another_one_can_be_named(entered: list[str], tmp_path: Path) -> None:
    assert configuration(None, "blue") == tmp_path / "blue.toml"
    assert configuration(Path("a.toml"), "red") == Path("a.toml")
    assert entered == ["blue", "red"]
    assert instance.unit() == "portward@red"
    assert instance.command("export") == "portward export --config a.toml"


def test_a_process_that_is_there_already_needs_no_privilege(
    entered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent's unit enters the namespace, and has no privilege to do so itself."""
    monkeypatch.setattr(netns, "is_own", lambda name: name == "blue")
    fails(errno.EPERM, monkeypatch)
    assert instances.enter("blue", None).name == "blue.toml"
    assert entered == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "blu",
            "--instance: there is no network namespace 'blu'; did you mean 'blue'? (`ip netns list` shows all)",
        ),
        ("green", "--instance: there is no network namespace 'green' (`ip netns list` shows all)"),
        ("../red", "--instance: '../red' is no name of an instance: "),
        ("..", "--instance: '..' is no name of an instance: "),
    ],
)
def test_a_name_that_no_namespace_has_is_refused(entered: list[str], name: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        instances.enter(name, None)
    assert str(caught.value).startswith(says)
    assert entered == []
    assert instance.unit() == "portward"


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (errno.EPERM, 1, "only root may enter the network namespace 'blue' (CAP_SYS_ADMIN): try sudo"),
        (errno.EINVAL, 2, "blue is no network namespace: `ip netns del blue` removes what is left of one"),
        (errno.ENOMEM, 1, "network namespace 'blue': Cannot allocate memory"),
    ],
)
def test_the_kernels_refusal_is_one_line_with_what_to_do(
    entered: list[str], monkeypatch: pytest.MonkeyPatch, number: int, code: int, says: str
) -> None:
    fails(number, monkeypatch)
    with pytest.raises(PortwardError) as caught:
        instances.enter("blue", None)
    assert caught.value.exit_code == code
    assert str(caught.value).startswith("--instance: ")
    assert str(caught.value).endswith(says)
    assert entered == []


def test_a_process_of_a_unit_whose_namespace_was_made_anew_says_so(
    entered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd enters the namespace before it starts the process, and the name may change hands in between."""
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    fails(errno.EPERM, monkeypatch)
    with pytest.raises(PortwardError) as anew:
        instances.enter("blue", None)
    assert str(anew.value).endswith(
        "try sudo. Or it was made anew after the unit of this process had opened it: then the next start is in "
        "the new one"
    )
    fails(errno.ENOENT, monkeypatch)
    with pytest.raises(InputError) as removed:
        instances.enter("blue", None)
    assert str(removed.value).endswith(
        "there is no network namespace 'blue': it was never there, or was removed after the unit of this process "
        "had opened it"
    )
    # A program that systemd started may start this one.
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getppid()))
    with pytest.raises(InputError, match=r"did you mean|ip netns list"):
        instances.enter("blue", None)
    assert entered == []


def write(folder: Path, table: str, *names: str) -> None:
    """Writes configurations with one table folder."""
    for name in names:
        (folder / f"{name}.toml").write_text(f'{LEAST}table = "{table}"\n')


def shares(folder: Path, name: str) -> Path | None:
    """The other configuration with the table folder of this one."""
    path = folder / f"{name}.toml"
    return instances.same_table(path, load_config(path), None if name == "portward" else name)


def test_two_agents_of_a_host_with_one_table_folder_are_found(entered: list[str], tmp_path: Path) -> None:
    write(tmp_path, "/nowhere/one", "portward")
    write(tmp_path, "/nowhere/two", "blue", "red")
    assert shares(tmp_path, "blue") == tmp_path / "red.toml"
    assert shares(tmp_path, "red") == tmp_path / "blue.toml"
    assert shares(tmp_path, "portward") is None
    write(tmp_path, "/nowhere/one", "red")
    assert shares(tmp_path, "blue") is None
    assert shares(tmp_path, "red") == tmp_path / "portward.toml"
    assert shares(tmp_path, "portward") == tmp_path / "red.toml"
    assert entered == [], "they are compared without entering a namespace"


@pytest.mark.usefixtures("entered")
def test_a_copy_of_a_configuration_and_a_preset_count_as_no_agent(tmp_path: Path) -> None:
    write(tmp_path, "/nowhere/one", "portward", "portward-before")
    (tmp_path / "red.toml").write_text('name = "a preset"\n')
    assert shares(tmp_path, "portward") is None
    write(tmp_path, "/nowhere/two", "blue", "candidate")
    path = tmp_path / "candidate.toml"
    assert instances.same_table(path, load_config(path), "blue") is None


@pytest.mark.usefixtures("entered")
def test_a_table_folder_is_the_same_by_another_path(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/nowhere")
    write(tmp_path, "/nowhere/one", "blue")
    write(tmp_path, f"{tmp_path}/link/one", "red")
    assert shares(tmp_path, "red") == tmp_path / "blue.toml"
