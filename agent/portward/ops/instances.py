"""Agents in named network namespaces, one in each, beside the host's own: `--instance NAME`.

An instance has the configuration `/etc/portward/NAME.toml` and the namespace `/run/netns/NAME`. Rules, cached
verdicts, queues and the loopback addresses are the namespace's. Each instance needs a table folder of its own.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from portward.base import instance, netns
from portward.config.documents import nearest
from portward.config.keys import DEFAULT_PATH, Config
from portward.config.load import load_config
from portward.errors import InputError, PortwardError

_FOLDER: Final = DEFAULT_PATH.parent
_OPTION: Final = "--instance"


def enter(name: str, config: Path | None) -> Path:
    """Moves this process into the namespace of an instance for the rest of its life, and returns the path of the
    configuration: `config`, or else that of the instance. Must be called before the process opens a socket or
    starts a thread. Raises InputError for a name that no namespace has, and PortwardError without the privilege.
    """
    path = config or _FOLDER / f"{name}.toml"
    if problem := instance.problem(name):
        raise InputError(problem, field=_OPTION)
    # systemd starts the agent in its namespace, and takes away the privilege to enter one.
    if not netns.is_own(name):
        _move(name)
    instance.note(instance.Own(name, os.fspath(path)))
    return path


def _move(name: str) -> None:
    try:
        netns.enter(name)
    except FileNotFoundError:
        raise InputError(f"there is no network namespace {name!r}{_missing(name)}", field=_OPTION) from None
    except PermissionError:
        raise PortwardError(
            f"{_OPTION}: only root may enter the network namespace {name!r} (CAP_SYS_ADMIN): try sudo{_anew()}"
        ) from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise PortwardError(f"{_OPTION}: network namespace {name!r}: {error.strerror}") from None
        raise InputError(
            f"{netns.FOLDER / name} is no network namespace: `ip netns del {name}` removes what is left of one",
            field=_OPTION,
        ) from None


def _of_unit() -> bool:
    """Whether systemd started this process. The unit of an instance enters the namespace before that, and a
    process without privilege cannot follow if the name belongs to another namespace by then."""
    return os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())


def _anew() -> str:
    """The end of the message about a namespace that this process may not enter."""
    if not _of_unit():
        return ""
    return (
        ". Or it was made anew after the unit of this process had opened it: then the next start is in the new one"
    )


def _missing(name: str) -> str:
    """The end of the message about a name that no namespace has: the nearest name, and how to list all."""
    if _of_unit():
        return ": it was never there, or was removed after the unit of this process had opened it"
    near = nearest(name, netns.names())
    return (f"; {near}" if near.startswith("did you mean") else "") + " (`ip netns list` shows all)"


def same_table(path: Path, config: Config, own: str | None) -> Path | None:
    """The configuration of another agent of this host that has the table folder of `config`, which was read from
    `path`; None if none has. `own` is the instance that `config` belongs to, None for the host's own agent."""
    table = os.path.realpath(config.table)
    others = ((file, other) for file, other in _others(own) if file != path.absolute())
    return next((file for file, other in others if os.path.realpath(other.table) == table), None)


def _others(own: str | None) -> Iterator[tuple[Path, Config]]:
    """The configurations of the other agents of this host. A file whose name is not that of a namespace may be a
    preset, or a copy that an operator keeps. A file with a mistake starts no agent."""
    host = [] if own is None else [_FOLDER / DEFAULT_PATH.name]
    named = [_FOLDER / f"{name}.toml" for name in netns.names() if name != own and not instance.problem(name)]
    for path in (*host, *named):
        try:
            yield path, load_config(path)
        except InputError:
            continue
