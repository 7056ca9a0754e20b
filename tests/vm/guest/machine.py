"""Helpers for the stages: run commands, write the configuration, wait, report results."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from vm.guest.reporting import report
from vm.guest.world import ALLOWED, BLOCKED6, RUN, SEGMENTS

CONFIG = Path("/etc/portward/portward.toml")
INVENTORY = RUN / "inventory.json"
_OFFERS = {True: "enterprise-agreement", False: "pay-as-you-go"}


def slower() -> float:
    """How many times slower than usual the machine is, from its kernel's command line. Timeouts are multiplied by
    it."""
    return float(Path("/proc/cmdline").read_text().rpartition("vm.slower=")[2].split()[0])


def sh(command: str, *, seconds: float = 180, check: bool = True) -> str:
    """Runs a shell command; gives its stdout and stderr together. If it fails and `check` is set, raises
    RuntimeError with the end of that output. `seconds` is the timeout."""
    said = subprocess.run(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=seconds * slower(),
        check=False,
    )  # fmt: skip
    if check and said.returncode:
        raise RuntimeError(f"{command}: exit code {said.returncode}: {said.stdout[-1000:]}")
    return said.stdout.strip()


def row(what: str, happened: object, *, good: bool) -> None:
    """Reports the result of a check: `what` was checked, what `happened`, and whether that is `good`."""
    report(what=what, happened=str(happened), good=good)


def until(true: Callable[[], bool], what: str, *, seconds: float = 30) -> float:
    """Waits until `true()` holds, and gives the seconds that it took. Raises TimeoutError that names `what`."""
    began = time.monotonic()
    seconds *= slower()
    while not true():
        if time.monotonic() > began + seconds:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.05)  # pause: of a poll
    return time.monotonic() - began


def booted() -> str:
    """The time since the kernel started, as words."""
    return f"{time.clock_gettime(time.CLOCK_BOOTTIME):.0f} s after power-on"


def configure(text: str = "") -> None:
    """Writes portward.toml and the inventory; `text` is added to the file's top level."""
    CONFIG.write_text(f'segments = ["vni*", "vlan*", "cust*", "tap*"]\nuplinks = ["up0", "up1"]\n{text}\n')
    INVENTORY.write_text(json.dumps(_inventory()))


def _inventory() -> dict[str, list[dict[str, object]]]:
    subscriptions: list[dict[str, object]] = []
    attachments: list[dict[str, object]] = []
    for number, segment in enumerate(SEGMENTS, 1):
        id_ = f"11111111-0000-4000-8000-{number:012d}"
        subscriptions.append({
            "id": id_, "name": segment, "offer": _OFFERS[segment in ALLOWED], "created": "2022-06-30",
        })  # fmt: skip
        addresses = [SEGMENTS[segment][3], SEGMENTS[segment][4]]
        addresses += [f"{BLOCKED6}::/64"] if segment == "vni1002" else []
        attachments += [{"segment": segment, "address": one, "subscription": id_} for one in addresses]
    return {"subscriptions": subscriptions, "attachments": attachments}
