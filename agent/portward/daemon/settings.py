"""What the agent that runs here has in force, for verbs that say what is so.

A mistake in portward.toml is a mistake for the next start or reload. The agent that runs goes on with what it has
read before. So it leaves that beside its policy table (`in-force.json`), and `status`, `explain`, `diagnose` and
`top` go by it as long as the agent runs. They say first if the file has a mistake, or says something else by now.
Without an agent the file itself counts, with its mistakes. What is loaded in the kernel is still from before: the
kernel is asked what that is, and these verbs say first if the file has changed since.
"""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from portward.base import ownership
from portward.config import keys, paths
from portward.config.documents import enc_hook
from portward.config.files import path_hook
from portward.config.keys import Config
from portward.config.load import load_config, located
from portward.daemon.runtime import in_another_network, running
from portward.errors import InputError
from portward.policy import presets
from portward.policy.preset import Preset

_FILE: Final = "in-force.json"
# Raised if a key goes or gets another meaning; another one is not read.
_FORMAT: Final = 1
# The line that names the table folder, in a file that cannot be read as TOML.
_TABLE: Final = re.compile(r"(?m)^table\s*=\s*[\"']([^\"'\n]*)[\"']")
_LARGEST_BYTES: Final = 16 * 1024 * 1024
# What an agent that runs cannot change: it refuses a reload that brings another one.
FIXED: Final = ("store", "table", "queue", "metrics")

_log = logging.getLogger("portward")


class Settings(NamedTuple):
    """The configuration and the preset that count here now. `remarks`: what a reader must know before anything
    else, a sentence each."""

    config: Config
    preset: Preset
    remarks: tuple[str, ...] = ()


class _InForce(msgspec.Struct, frozen=True):
    """What the file holds; `path` is where the agent has read it."""

    path: str
    config: Config
    preset: Preset
    format: int = _FORMAT


def leave(path: Path, config: Config, preset: Preset) -> None:
    """Writes down what the agent has read at `path` and put in force, beside its table. If that fails it is only
    logged: then verbs go by the file."""
    document = _InForce(paths.to_text(str(path.absolute())), _in_text(config), preset)
    new = config.table / f"{_FILE}.new"
    try:
        ownership.write(new, msgspec.json.encode(document, enc_hook=_encoded))
        new.replace(config.table / _FILE)
    except OSError as error:
        _log.warning("what is in force cannot be written down beside the table: %s", error.strerror)
        # What an earlier reload left there is not in force any more.
        with contextlib.suppress(OSError):
            (config.table / _FILE).unlink()


def forget(folder: Path) -> None:
    """Takes away what an agent before had in force: the one that starts has nothing in force yet."""
    with contextlib.suppress(OSError):
        (folder / _FILE).unlink()


def settings(path: Path) -> Settings:
    """What counts here now for the configuration at `path`: what the running agent has in force; without one the
    file. Raises InputError for a mistake in the file, if no agent runs that has it in force."""
    try:
        config = load_config(path)
        preset = presets.load(config.preset, named_in=path)
    except InputError as error:
        found = _in_force(folder(path), path)
        if found is None:
            raise
        *others, last = error.lines()
        last += ": the agent runs with the configuration that it read before"
        return Settings(found.config, found.preset, (*_away(found.config.table), *others, last))
    found = _in_force(config.table, path)
    if found is not None:
        changed = _differences(path, config, preset, found)
        return Settings(found.config, found.preset, (*_away(config.table), *changed))
    before = None if running(config.table) is not None else _left(config.table, path)
    return Settings(config, preset, () if before is None else _since(path, config, preset, before))


def _away(folder: Path) -> tuple[str, ...]:
    """What is to be said first if this command sees another gateway than the agent's."""
    process = in_another_network(folder)
    return () if process is None else (away(process),)


def away(process: int) -> str:
    """Where an agent is whose network namespace is not this one, and what to do."""
    return (
        f"the agent (process {process}) runs in another network namespace: ask there (`nsenter -t {process} -n`)"
    )


def last(config: Config) -> Config:
    """What the agent that runs, or ran, on this table has in force, if it has left that behind; else `config`. It
    may be older than the ruleset that is loaded: a boot loads one before there is an agent."""
    found = _left(config.table, None)
    return config if found is None else found.config


def _differences(path: Path, config: Config, preset: Preset, found: _InForce) -> tuple[str, ...]:
    keys = _changed(config, preset, found)
    if not keys:
        return ()
    begin = f"{path}: not what the agent has in force ({', '.join(keys)}): "
    if fixed := [key for key in keys if key in FIXED]:
        which = "it" if len(keys) == 1 else "all of it"
        why = f"a reload is refused, because {' and '.join(fixed)} cannot change while it runs"
        return (f"{begin}`systemctl restart portward` takes {which} in; {why}",)
    return (f"{begin}`systemctl reload portward` takes it in, or the log says why not",)


def _since(path: Path, config: Config, preset: Preset, found: _InForce) -> tuple[str, ...]:
    """What is to be said of a file that has changed since an agent last ran."""
    keys = _changed(config, preset, found)
    if not keys:
        return ()
    return (
        f"{path}: not what the agent had in force that ran here last ({', '.join(keys)}): it counts from the next "
        "start on, and until then what is loaded in the kernel",
    )


def _changed(config: Config, preset: Preset, found: _InForce) -> list[str]:
    """The keys of the file that say something else than what is in force."""
    keys = [key for key in Config.__struct_fields__ if getattr(config, key) != getattr(found.config, key)]
    if not keys and preset.digest != found.preset.digest:
        return [f"the preset {config.preset!r}"]
    return keys


def _in_force(folder: Path, path: Path) -> _InForce | None:
    """What the running agent of this table has read at `path`; None if none runs there, or it does not say."""
    return None if running(folder) is None else _left(folder, path)


def _left(folder: Path, path: Path | None) -> _InForce | None:
    """What an agent of this table has left, if it has read it at `path` (None: anywhere)."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        with (folder / _FILE).open("rb") as file:
            found = msgspec.json.decode(file.read(_LARGEST_BYTES), type=_InForce, dec_hook=path_hook)
        if found.format != _FORMAT:
            return None
        if path is None:
            return found
        if found.path == paths.to_text(str(path.absolute())):
            return msgspec.structs.replace(found, config=located(found.config, path))
    return None


def folder(path: Path) -> Path:
    """The table folder that a configuration names, also one with a mistake; the default if that line cannot be
    read."""
    with contextlib.suppress(OSError):
        if named := _TABLE.findall(path.read_text("utf-8", "replace")):
            return Path(paths.from_file(named[-1], path))
    return keys.DEFAULT_TABLE


def _in_text(config: Config) -> Config:
    """The configuration as an agent and a verb of different locales write it alike."""
    replace, check = msgspec.structs.replace, config.exemptions.check
    return replace(
        config,
        store=paths.to_text(config.store),
        table=Path(paths.to_text(str(config.table))),
        preset=paths.to_text(config.preset),
        exemptions=replace(config.exemptions, check=tuple(map(paths.to_text, check))),
    )


def _encoded(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else enc_hook(value)
