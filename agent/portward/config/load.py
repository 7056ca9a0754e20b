"""Reads portward.toml: the file → a checked `Config`, with every path in it absolute (see `paths`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from portward.config import interface_lists, paths, store_url
from portward.config.documents import Steps
from portward.config.files import mistake, read_toml
from portward.config.keys import Config
from portward.errors import together

# Queue numbers have 16 bits.
_QUEUES: Final = 65_536


def load_config(path: Path) -> Config:
    """Reads portward.toml, and returns it with all paths absolute. Raises InputError with all mistakes: file,
    line, field and what would be right."""
    config = read_toml(path, Config)
    if found := [mistake(path, problem, *steps) for problem, steps in _problems(config)]:
        raise together(found)
    return located(config, path)


def located(config: Config, file: Path) -> Config:
    """The configuration with its paths made absolute, as `paths` does."""
    check = config.exemptions.check
    command = (paths.program(check[0], file), *(os.fsdecode(word.encode()) for word in check[1:])) if check else ()
    return replace(
        config,
        store=store_url.located(config.store, lambda path: paths.from_file(path, file)),
        table=Path(paths.from_file(str(config.table), file)),
        preset=paths.from_file(config.preset, file) if paths.is_path(config.preset) else config.preset,
        exemptions=replace(config.exemptions, check=command),
    )


def _problems(config: Config) -> Iterator[tuple[str, Steps]]:
    """The mistakes beyond types and bounds: the problem, and the steps to the field."""
    yield from interface_lists.problems(config)
    try:
        config.metrics_endpoints()
    except ValueError as error:
        yield str(error), ("metrics", "address")
    if problem := store_url.problem(config.store):
        yield problem, ("store",)
    if config.table == Path():  # so is ""
        yield "names no folder of its own", ("table",)
    if config.exemptions.check and not config.exemptions.check[0]:
        yield "names no program: its path comes first, then its arguments", ("exemptions", "check", 0)
    if config.queue.first + config.queue.workers > _QUEUES:
        yield f"the last queue must not be beyond {_QUEUES - 1}", ("queue", "workers")
