"""The job that puts a changed configuration in force when an operator asks for it (SIGHUP)."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from portward.config.keys import Config
from portward.config.load import load_config
from portward.daemon import settings
from portward.daemon.core import Core
from portward.daemon.steps import Step, StepRunner
from portward.daemon.systemd import notify
from portward.daemon.threads import Threads
from portward.errors import PortwardError
from portward.policy import presets
from portward.store.flips import UnconfirmedError

_log = logging.getLogger("portward")


class ConfigReload:
    """Reads the configuration again on request. A configuration with a mistake changes nothing."""

    def __init__(self, path: Path, config: Config, core: Core, threads: Threads, steps: StepRunner) -> None:
        """`config` was read from `path` and is in force."""
        self._path, self._config, self._core = path, config, core
        self._threads, self._steps = threads, steps
        # Whether the last reload was refused. Any thread may read it.
        self.failed = False

    async def run(self, requested: asyncio.Event) -> None:
        """Reloads each time that `requested` is set, and clears it; never returns."""
        while True:
            await requested.wait()
            requested.clear()
            # systemd takes RELOADING only with the time at which it began.
            notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            await self._reload()
            notify("READY=1")

    async def _reload(self) -> None:
        try:
            await self._put_in_force(load_config(self._path))
        except PortwardError as error:
            self.failed = True
            for line in error.lines():
                _log.error("the configuration before stays in force: %s", line)
        except Exception as error:
            self.failed = True
            self._steps.record_failure(Step.RELOAD, error)
            return
        else:
            self.failed = False
            _log.info("%s: read again and in force", self._path)
        self._steps.record_success(Step.RELOAD)

    async def _put_in_force(self, config: Config) -> None:
        """Raises PortwardError, and then the configuration before stays in force."""
        preset = presets.load(config.preset, named_in=self._path)
        for name in settings.FIXED:
            if getattr(config, name) != getattr(self._config, name):
                raise PortwardError(f"{self._path}: {name} cannot change while portward runs: restart it")
        await self._threads.kernel(lambda: self._core.expect_owner(config))
        try:
            await self._threads.policy(lambda: self._core.intake.reload(config, preset))
        except UnconfirmedError as error:
            raise PortwardError(
                f"{self._path}: preset {preset.name} {error}; if you intend that, raise max_flip_share with it; "
                "if not, put the old preset back, because a restart takes this one"
            ) from None
        finally:
            # Behind the steps of the reload on the kernel thread.
            await self._threads.kernel(self._core.settle_owner)
        self._config = config
        settings.leave(self._path, self._core.dataplane.config, self._core.dataplane.preset)
