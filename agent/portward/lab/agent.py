"""The real agent on a lab's gateway, operated as an operator would: with its program, its files and its
signals."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from portward.base.resources import PYTHON
from portward.config.documents import enc_hook
from portward.errors import PortwardError
from portward.lab import namespaces
from portward.model import Record
from portward.store.codec import key_of

PROGRAM: Final = (*PYTHON, "-m", "portward")
_START_S: Final = 60.0  # generous, as in `until`
# A series that appears when the agent has counted for the first time, and how long a reader waits for it.
_COUNTED: Final = 'portward_divergence_total{kind="ruleset"}'
_COUNTED_S: Final = 5.0
_METRICS: Final = "127.0.0.1:9125"


class Place(Protocol):
    """A place where an agent can run: a lab, or another set of namespaces. `gateway` is the agent's namespace."""

    gateway: str

    def run(self, namespace: str, *argv: str) -> subprocess.CompletedProcess[str]:
        """See `namespaces.run`."""


class Agent:
    """`portward run` in the gateway of a lab, with its files in `folder`."""

    def __init__(self, lab: Place, folder: Path, **settings: Any) -> None:
        """`settings` are keys of portward.toml; a table is a dict."""
        self.lab, self.folder = lab, folder
        self.config, self.log = folder / "portward.toml", folder / "portward.log"
        self.run_options: tuple[str, ...] = ("--config", os.fspath(self.config))
        # A command before the program's, which executes the program: `env LC_ALL=C portward run`.
        self.before: tuple[str, ...] = ()
        self.process: subprocess.Popen[bytes] | None = None
        self._notified: socket.socket | None = None
        self._settings: dict[str, Any] = {}
        self.configure(**settings)

    def configure(self, **settings: Any) -> None:
        """Writes portward.toml. The settings replace or add to the earlier ones."""
        base = {
            "segments": ["vni*"],
            "uplinks": ["up0"],
            "store": f"sqlite:{self.folder / 'portward.db'}",
            "table": str(self.folder / "table"),
        }
        self._settings = {**base, **self._settings, **settings}
        self.config.write_bytes(msgspec.toml.encode(self._settings))

    def start(
        self,
        *,
        wait: bool = True,
        detached: bool = False,
        seconds: float = _START_S,
        within: Sequence[str] = (),
    ) -> None:
        """Starts the daemon and, with `wait`, returns when it reports that it is ready. Raises PortwardError, with
        its last line of output, if it does not. `within`: a command that executes the daemon's command."""
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        path = self.folder / "notify.sock"
        path.unlink(missing_ok=True)
        self._notified.bind(os.fspath(path))
        with self.log.open("ab") as log:
            self.process = namespaces.start(
                self.lab.gateway, [*within, *self.before, *PROGRAM, "run", *self.run_options],
                stderr=log, stdout=log, environment={"NOTIFY_SOCKET": os.fspath(path)}, detached=detached,
            )  # fmt: skip
        if wait:
            self._wait_ready(seconds)

    def reload(self) -> None:
        """Sends SIGHUP, and waits until the daemon has read its configuration again."""
        self._signal(signal.SIGHUP)
        self._wait_ready()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stops the daemon with a signal, and returns its exit code. Idempotent."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self._signal(number)
        code = self.process.wait(_START_S)
        if self._notified is not None:
            self._notified.close()
        return code

    @property
    def notified(self) -> socket.socket:
        """The socket that receives the daemon's messages to the service manager; only after a start."""
        assert self._notified is not None  # noqa: S101 # for the type checker
        return self._notified

    def portward(self, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a verb of portward on the gateway, with the same configuration."""
        verb = [*self.before, *PROGRAM, *arguments, "--config", os.fspath(self.config)]
        return namespaces.run(self.lab.gateway, verb, text=text)

    def apply(self, *records: Record, prune: bool = False, confirm: bool = False) -> int:
        """Applies records, waits until the daemon enforces them, and returns the revision. `confirm`: with
        `--confirm`, however many subscriptions flip."""
        lists: dict[str, list[Record]] = {}
        for record in records:
            lists.setdefault(key_of(record).partition("/")[0], []).append(record)
        text = msgspec.json.encode(lists, enc_hook=enc_hook).decode()
        options = [option for option, wanted in (("--prune", prune), ("--confirm", confirm)) if wanted]
        result = self.portward("apply", "-", "--json", *options, text=text)
        if result.returncode:
            raise PortwardError(f"apply: {result.stderr.strip()}")
        revision = int(json.loads(result.stdout)["revision"])
        if self.process is not None:
            until(lambda: self.revision() >= revision, f"revision {revision} in force")
        return revision

    def revision(self) -> int:
        """The revision that the daemon enforces, from its metrics."""
        return int(self.metrics().get("portward_enforced_revision", 0))

    def explain(self, segment: str, address: str, *more: str) -> dict[str, Any]:
        """The output of `portward explain --json`."""
        result = self.portward("explain", segment, address, *more, "--json")
        if result.returncode:
            raise PortwardError(f"explain: {result.stderr.strip()}")
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer

    def metrics(self) -> dict[str, float]:
        """All metrics, scraped in the gateway's namespace, after the agent has counted for the first time. Before
        that, for less than a second after its start, series with labels are missing."""
        deadline = time.monotonic() + _COUNTED_S
        while _COUNTED not in (found := self._scraped()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def _scraped(self) -> dict[str, float]:
        with namespaces.inside(self.lab.gateway):
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"http://{_METRICS}/metrics", timeout=30) as reply:
                lines = reply.read().decode().splitlines()
        rows = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in rows}

    def _signal(self, number: int) -> None:
        if self.process is None or self.process.poll() is not None:
            raise PortwardError(f"portward does not run: {self._last_line()}")
        self.process.send_signal(number)

    def _wait_ready(self, seconds: float = _START_S) -> None:
        assert self._notified is not None and self.process is not None  # noqa: S101, PT018 # after a start only
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if select.select([self._notified], [], [], 0.05)[0] and b"READY=1" in self._notified.recv(4096):
                return
            if self.process.poll() is not None:
                raise PortwardError(f"portward ended: {self._last_line()}")
        raise PortwardError(f"portward was not ready within {seconds:.0f} s: {self._last_line()}")

    def _last_line(self) -> str:
        lines = self.log.read_text("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def until(true: Callable[[], object], what: str, *, seconds: float = 60.0, every_s: float = 0.01) -> None:
    """Calls `true` until it returns a true value. Raises TimeoutError with `what` after this many seconds. The
    deadline is generous, because it costs nothing in the normal case, and other programs may keep the machine
    busy."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(every_s)
