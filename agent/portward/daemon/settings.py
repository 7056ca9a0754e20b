"""The configuration and the preset that are in force here, for verbs that report the present state.

A mistake in portward.toml affects only the next start or reload; a running agent continues with what it has read.
So the agent writes that beside its policy table (`in-force.json`). `status`, `explain`, `diagnose` and `top` use
it while the agent runs. They first report if portward.toml has a mistake or differs. If no agent runs,
portward.toml itself counts, with its mistakes. The ruleset in the kernel may still be an older one: the verbs read
it from the kernel, and first report if portward.toml has changed since the last agent ran.
"""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from portward.base import instance, netns, ownership
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
# Increased if a key is removed or gets another meaning. A file of another format is ignored.
_FORMAT: Final = 1
# The line with the table folder, for a file that is not valid TOML.
_TABLE: Final = re.compile(r"(?m)^table\s*=\s*[\"']([^\"'\n]*)[\"']")
# Far more than any configuration has; it bounds the memory if the file is not ours.
_MAX_FILE_BYTES: Final = 16 * 1024 * 1024
# Keys that a reload cannot change, because sockets and files are opened at the start.
FIXED: Final = ("store", "table", "queue", "metrics")

_log = logging.getLogger("portward")


class Settings(NamedTuple):
    """The configuration and the preset in force here. `remarks`: sentences that a reader must see first."""

    config: Config
    preset: Preset
    remarks: tuple[str, ...] = ()


class _InForce(msgspec.Struct, frozen=True):
    """The content of the file. `path` is the file from which the agent read the configuration."""

    path: str
    config: Config
    preset: Preset
    format: int = _FORMAT


def leave(path: Path, config: Config, preset: Preset) -> None:
    """Writes what the agent has read from `path` and put in force beside its table. An error is only logged; then
    verbs use the file at `path`."""
    document = _InForce(paths.to_text(str(path.absolute())), _in_text(config), preset)
    new = config.table / f"{_FILE}.new"
    try:
        ownership.write(new, msgspec.json.encode(document, enc_hook=_encoded))
        new.replace(config.table / _FILE)
    except OSError as error:
        _log.warning("the settings in force cannot be written beside the table: %s", error.strerror)
        # A file that an earlier reload wrote is not in force any more.
        with contextlib.suppress(OSError):
            (config.table / _FILE).unlink()


def forget(folder: Path) -> None:
    """Removes the file of an agent before, because a starting agent has nothing in force yet."""
    with contextlib.suppress(OSError):
        (folder / _FILE).unlink()


def settings(path: Path) -> Settings:
    """The settings in force here for the configuration at `path`: what the running agent has read from it; if none
    runs, the file itself. Raises InputError for a mistake in the file if no agent runs that has read it."""
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
    """A remark if the agent runs in another network namespace, so that this command does not see its gateway."""
    process = in_another_network(folder)
    return () if process is None else (away(process),)


def away(process: int) -> str:
    """The remark for an agent in another network namespace, with the command to run there, or the option that does
    the same if the namespace has a name."""
    name = netns.name_of(process)
    named = f", or by `--instance {name}`" if name and not instance.problem(name) else ""
    return (
        f"the agent (process {process}) runs in another network namespace: ask there (`nsenter -t {process} -n`"
        f"{named})"
    )


def asking(folder: Path) -> str:
    """The command that shows the status of the agent on the table in `folder`, as it is typed in this network
    namespace. A verb on the store enters none, so it finds the name of an instance only here."""
    process = in_another_network(folder)
    name = "" if process is None else netns.name_of(process)
    if name and not instance.problem(name):
        return instance.of(name, "status")
    return instance.command("status")


def last(config: Config) -> Config:
    """The configuration that the agent which runs or last ran on this table has in force, if it wrote that;
    otherwise `config`. The loaded ruleset may be newer, because a boot loads one before the agent starts."""
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
        return (f"{begin}`systemctl restart {instance.unit()}` takes {which} in; {why}",)
    return (f"{begin}`systemctl reload {instance.unit()}` takes it in, or the log says why not",)


def _since(path: Path, config: Config, preset: Preset, found: _InForce) -> tuple[str, ...]:
    """A remark if the file has changed since an agent last ran."""
    keys = _changed(config, preset, found)
    if not keys:
        return ()
    return (
        f"{path}: not what the agent had in force that ran here last ({', '.join(keys)}): it counts from the next "
        "start on, and until then what is loaded in the kernel",
    )


def _changed(config: Config, preset: Preset, found: _InForce) -> list[str]:
    """The keys whose values in the file differ from those in force."""
    keys = [key for key in Config.__struct_fields__ if getattr(config, key) != getattr(found.config, key)]
    if not keys and preset.digest != found.preset.digest:
        return [f"the preset {config.preset!r}"]
    return keys


def _in_force(folder: Path, path: Path) -> _InForce | None:
    """The settings that the running agent of this table has read from `path`; None if no agent runs, or it wrote
    nothing."""
    return None if running(folder) is None else _left(folder, path)


def _left(folder: Path, path: Path | None) -> _InForce | None:
    """The settings that an agent of this table wrote, if it had read it from `path` (None: from any file)."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        with (folder / _FILE).open("rb") as file:
            found = msgspec.json.decode(file.read(_MAX_FILE_BYTES), type=_InForce, dec_hook=path_hook)
        if found.format != _FORMAT:
            return None
        if path is None:
            return found
        if found.path == paths.to_text(str(path.absolute())):
            return msgspec.structs.replace(found, config=located(found.config, path))
    return None


def folder(path: Path) -> Path:
    """The table folder that a configuration names, even if it has a mistake; the default if the line is
    unreadable."""
    with contextlib.suppress(OSError):
        if named := _TABLE.findall(path.read_text("utf-8", "replace")):
            return Path(paths.from_file(named[-1], path))
    return keys.DEFAULT_TABLE


def _in_text(config: Config) -> Config:
    """The configuration with paths as text, so that an agent and a verb in different locales compare them
    equal."""
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
