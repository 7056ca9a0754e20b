"""Only the agent may use the table's folder. It closes a folder that is open to other users, refuses files that
other users may have made, and can open files that root has made there."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from portward.base import ownership
from portward.daemon.runtime import Runtime, hidden
from portward.errors import PortwardError
from portward.table.database import FILE, LOCK_FILE, open_database

OTHER_UID = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for others")


def mode(path: Path) -> int:
    """The permissions of a file or folder."""
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder made by hand, which every user may enter and read, like all folders above it."""
    with TemporaryDirectory() as above:
        Path(above).chmod(0o755)
        found = Path(above) / "table"
        found.mkdir()
        found.chmod(0o755)
        yield found


def begin(folder: Path) -> None:
    """Opens and closes a table like an agent that starts, and a reader of its table after it."""
    runtime = Runtime(folder)
    open_database(folder, write=True).close()
    open_database(folder, write=False).close()
    runtime.write_status({})
    runtime.close()


def test_a_new_folder_is_the_agents_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        begin(tmp_path / "above" / "table")
    finally:
        os.umask(before)
    assert mode(tmp_path / "above" / "table") == 0o750
    assert {path.name: mode(path) for path in (tmp_path / "above" / "table").iterdir()} == dict.fromkeys(
        (FILE, LOCK_FILE, "daemon.lock", "crash"), 0o600
    )


def test_what_is_open_to_others_is_closed(folder: Path) -> None:
    for name in (FILE, LOCK_FILE, "daemon.lock", "worker-3", "status.json", "in-force.json", "counts-0"):
        (folder / name).touch()
        (folder / name).chmod(0o777)
    found = ownership.look(folder)
    assert not found.refused
    assert len(found.open) == 8
    ownership.make(folder)
    assert mode(folder) == 0o750
    assert {mode(path) for path in folder.iterdir()} == {0o600}
    assert ownership.look(folder) == ((), ())


def test_a_folder_that_holds_other_things_stays_as_it_is(folder: Path) -> None:
    """An operator may configure /var/cache, which must stay open to other users. Only portward's own files there
    are closed."""
    for name in (FILE, "notes"):
        (folder / name).touch()
        (folder / name).chmod(0o644)
    ownership.make(folder)
    assert mode(folder) == 0o755
    assert mode(folder / FILE) == 0o600
    assert mode(folder / "notes") == 0o644
    folder.chmod(0o1777)
    with pytest.raises(PortwardError, match="everybody may write in this folder"):
        ownership.make(folder)


def test_a_new_file_system_is_closed(folder: Path) -> None:
    """Every user may write to a new tmpfs, with the sticky bit. A new ext4 has a folder of its own, lost+found."""
    (folder / "lost+found").mkdir()
    folder.chmod(0o1777)
    ownership.make(folder)
    assert mode(folder) == 0o750


@pytest.mark.parametrize("wanted", [0o750, 0o700, 0o2750])
def test_a_folder_that_is_closed_stays_as_it_is(folder: Path, wanted: int) -> None:
    folder.chmod(wanted)
    ownership.make(folder)
    assert mode(folder) == wanted


@as_root
def test_another_user_cannot_hold_the_lock(folder: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from portward.daemon.runtime import hidden; "
        f"os.setgid({OTHER_UID}); os.setuid({OTHER_UID}); print(hidden(Path(sys.argv[1])))"
    )
    argv = [sys.executable, "-c", program, str(folder)]
    runtime = Runtime(folder)
    assert not hidden(folder)
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "True\n"
    runtime.close()


def everybody_writes(folder: Path) -> str:
    """The folder is writable for every user, so another user may have put another table there."""
    folder.chmod(0o777)
    return "everybody may write in this folder"


def a_link(folder: Path) -> str:
    """A link to a file, through which the agent would write to that file."""
    (folder / "status.json.new").symlink_to(folder.parent / "target")
    return "status.json.new is a link"


def a_dangling_link(folder: Path) -> str:
    """A link to no file, through which LMDB would make that file."""
    (folder / LOCK_FILE).symlink_to(folder.parent / "target")
    return "lock.mdb is a link"


def a_hard_link(folder: Path) -> str:
    """A hard link. Closing it would change another file's permissions."""
    (folder.parent / "target").touch()
    (folder / "worker-0").hardlink_to(folder.parent / "target")
    return "worker-0 has another name elsewhere"


def a_pipe(folder: Path) -> str:
    """A pipe, which blocks a process that opens it."""
    os.mkfifo(folder / "crash")
    return "crash is no regular file"


def anothers_file(folder: Path) -> str:
    """A file of another user, who can lock it and change it."""
    (folder / "daemon.lock").touch()
    os.chown(folder / "daemon.lock", OTHER_UID, OTHER_UID)
    return "daemon.lock is nobody's"


KINDS = [everybody_writes, a_link, a_dangling_link, a_hard_link, a_pipe, anothers_file]


@as_root
@pytest.mark.parametrize("kind", KINDS)
def test_what_others_may_have_made_is_refused(folder: Path, kind: Callable[[Path], str]) -> None:
    """The message has the command that repairs it, and nothing is changed."""
    said = kind(folder)
    before = mode(folder), sorted(path.name for path in folder.parent.rglob("*"))
    with pytest.raises(PortwardError, match=said) as raised:
        Runtime(folder)
    assert str(raised.value).startswith(f"table {folder}: ")
    assert "`" in str(raised.value)
    assert (mode(folder), sorted(path.name for path in folder.parent.rglob("*"))) == before


@as_root
@pytest.mark.parametrize("owner", [0, OTHER_UID - 1])
def test_the_folder_of_another_user_is_refused(folder: Path, owner: int) -> None:
    """It is allowed only if root runs the agent."""
    os.chown(folder, owner, owner)
    program = (
        "import os, sys; from pathlib import Path; from portward.daemon.runtime import Runtime; "
        f"os.setgid({OTHER_UID}); os.setuid({OTHER_UID}); Runtime(Path(sys.argv[1]))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False
    ).stderr
    assert "and this process is nobody's: run it as " in said
    assert f"if nobody is the agent's user, `chown -R nobody: {folder}`" in said


@as_root
def test_what_root_makes_in_the_agents_folder_is_the_agents(folder: Path) -> None:
    """Root may run an agent by hand, or a verb that reads the table and finds no lock file there."""
    os.chown(folder, OTHER_UID, OTHER_UID)
    begin(folder)
    assert {path.stat().st_uid for path in folder.iterdir()} == {OTHER_UID}
    (folder / LOCK_FILE).unlink()
    open_database(folder, write=False).close()
    assert (folder / LOCK_FILE).stat().st_uid == OTHER_UID
    # An older version has left files of root.
    os.chown(folder / LOCK_FILE, 0, 0)
    os.chown(folder / FILE, 0, 0)
    ownership.make(folder)
    assert {path.stat().st_uid for path in folder.iterdir()} == {OTHER_UID}


def test_without_a_folder_nothing_is_wrong(tmp_path: Path) -> None:
    assert ownership.look(tmp_path / "none") == ((), ())
