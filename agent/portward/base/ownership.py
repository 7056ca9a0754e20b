"""The owner and the permissions of the policy table's folder and files.

They contain every customer's standing, and a user who can open a lock file can lock it and so keep the agent from
starting. So only the agent's user may use the folder (its group may enter it) and the files. portward closes its
own files if they are open to others. It refuses files that another user may have put there, and names the command
that repairs it.

root may run the agent and every verb by hand. A file that root makes in a folder of another user is given to that
user, because the agent could not open it otherwise.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from portward.errors import PortwardError

# The same as in systemd/tmpfiles.d/portward.conf, by which the package makes the folder.
FOLDER_MODE: Final = 0o750
FILE_MODE: Final = 0o600
# The files that the agent and the verbs make in the folder. Other files are ignored.
_OURS: Final = re.compile(
    r"(data\.mdb|data\.mdb\.damaged|lock\.mdb|daemon\.lock|status\.json|in-force\.json|crash|counts-\d+|worker-\d+)"
    r"(\.new)?"
)


class Found(NamedTuple):
    """The problems of a folder: `refused` has a sentence for each that portward cannot repair, and `open` has the
    paths that need another mode, with that mode."""

    refused: tuple[str, ...]
    open: tuple[tuple[Path, int], ...]


def make(folder: Path) -> None:
    """Makes the folder if it is missing, and closes files that are open to others. Raises PortwardError for what
    is not safe, or OSError."""
    if not folder.exists():
        folder.mkdir(mode=FOLDER_MODE, parents=True)
        folder.chmod(FOLDER_MODE)  # whatever the umask is
    hand_over(folder)
    found = look(folder)
    if found.refused:
        raise PortwardError(found.refused[0])
    for path, mode in found.open:
        path.chmod(mode)


def look(folder: Path) -> Found:
    """The problems of the folder and of portward's files in it, for an agent of this user. Raises OSError."""
    if not folder.exists():
        return Found((), ())
    whole = folder.stat()
    refused, opened = [*_folder_refused(folder, whole)], []
    if refused:
        return Found(tuple(refused), ())
    # A folder with other files in it may have users of its own, so its mode stays.
    if (mode := stat.S_IMODE(whole.st_mode)) & ~FOLDER_MODE & 0o777 and _alone(folder):
        opened.append((folder, mode & (FOLDER_MODE | stat.S_ISGID)))
    for path, status in _ours(folder):
        refused += _file_refused(folder, path, status, whole)
        if stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) & ~FILE_MODE:
            opened.append((path, stat.S_IMODE(status.st_mode) & FILE_MODE))
    return Found(tuple(refused), tuple(opened))


def users(folder: Path) -> set[int]:
    """The ids of the users that may have what the agent on this folder keeps for the next one: root, the user of
    this process, and the folder's owner."""
    found = _trusted()
    with contextlib.suppress(OSError):
        found.add(folder.stat().st_uid)
    return found


def hand_over(folder: Path) -> None:
    """If this process is root, gives root's files in the folder to the folder's owner. Never raises: a file that
    cannot be given away stays root's."""
    if os.geteuid() != 0:
        return
    with contextlib.suppress(OSError):
        owner = folder.stat()
        if owner.st_uid == 0:
            return
        for path, status in _ours(folder):
            if status.st_uid == 0 and stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def create(path: Path) -> None:
    """Makes an empty file of the agent. If root makes it, it belongs to the folder's owner. Does nothing if it
    exists or cannot be made."""
    with contextlib.suppress(OSError):
        os.close(_opened(path, os.O_EXCL))


def write(path: Path, data: bytes) -> None:
    """Writes one of the agent's files from its beginning. If root writes it, it belongs to the folder's owner.
    Does not follow a link. Raises OSError."""
    with open(_opened(path, os.O_TRUNC), "wb") as file:
        file.write(data)


def _opened(path: Path, flag: int) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flag, FILE_MODE)
    try:
        if os.geteuid() == 0:
            owner = path.parent.stat()
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _folder_refused(folder: Path, status: os.stat_result) -> Iterator[str]:
    if not stat.S_ISDIR(status.st_mode):
        yield f"table {folder}: this is no folder"
        return
    link = folder.lstat()
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in _trusted():
        yield f"table {folder}: a link that {_name(link.st_uid)} can change: name the folder itself in `table`"
    if status.st_uid != os.geteuid() != 0:
        yield (
            f"table {folder}: the folder is {_name(status.st_uid)}'s, and this process is "
            f"{_name(os.geteuid())}'s: run it as {_name(status.st_uid)}, or, if {_name(os.geteuid())} is the "
            f"agent's user, `chown -R {_name(os.geteuid())}: {_quoted(folder)}`"
        )
    # In a folder with the sticky bit, such as the root of a tmpfs, other users cannot replace these files.
    if status.st_mode & stat.S_IWOTH and not (status.st_mode & stat.S_ISVTX and _alone(folder)):
        yield (
            f"table {folder}: everybody may write in this folder, so any user may have put files there: name a "
            f"folder of its own in `table`, or `chmod 0750 {_quoted(folder)}` if you trust all users of this host"
        )


def _file_refused(folder: Path, path: Path, status: os.stat_result, whole: os.stat_result) -> Iterator[str]:
    if not stat.S_ISREG(status.st_mode):
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "no regular file"
        yield f"table {folder}: {path.name} is {kind}: `rm -r {_quoted(path)}`; the agent makes it anew"
    elif status.st_nlink > 1:
        yield (
            f"table {folder}: {path.name} has another name elsewhere (a hard link): `rm {_quoted(path)}`; the "
            "agent makes it anew"
        )
    elif status.st_uid not in {os.geteuid(), whole.st_uid}:
        yield (
            f"table {folder}: {path.name} is {_name(status.st_uid)}'s: `chown -R {_name(whole.st_uid)}: "
            f"{_quoted(folder)}` if you know why, else `rm {_quoted(path)}`; the agent makes it anew"
        )


def _ours(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in sorted(folder.iterdir()):
        if _OURS.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # `status.json.new` was just renamed
                status = path.lstat()
                if not stat.S_ISDIR(status.st_mode):
                    yield path, status


def _alone(folder: Path) -> bool:
    """Whether the folder contains only portward's files and what every file system has."""
    return all(_OURS.fullmatch(path.name) or path.name == "lost+found" for path in folder.iterdir())


def _trusted() -> set[int]:
    return {0, os.geteuid()}


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _name(user: int) -> str:
    """The name of a user; its number if it has no name."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)
