"""`make test-mail`: real mail software sends through a gateway, and tcpdump counts its packets.

    python -m tests.mail [--cache FOLDER]

Prints a line for each check, and the table of docs/explanation/mail.md. Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernel.conftest import LABS
from mail import acts, machines, report  # the path above must be there first
from mail.roots import roots
from mail.rows import STATES, Row, rows
from portward.errors import PortwardError
from portward.lab import namespaces

ROOT: Final = Path(__file__).resolve().parents[2]


def main() -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mail", description=__doc__)
    parser.add_argument("--cache", type=Path, default=ROOT / "build/mail", help="folder for the roots")
    asked = parser.parse_args()
    namespaces.require_root()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exit removes the labs and the mounts
    began = time.monotonic()
    made = roots(asked.cache.resolve())
    print(f"roots {', '.join(made)}: {time.monotonic() - began:.0f} s", flush=True)
    checks = report.Checks()
    with tempfile.TemporaryDirectory(prefix="portward-mail-") as folder, machines.memory() as memory:
        sent = _run(Path(folder), made, memory, checks)
    print(report.table(sent))
    print(f"{checks.good} checks hold, {len(checks.bad)} do not; {time.monotonic() - began:.0f} s")
    return 1 if checks.bad else 0


def _run(folder: Path, made: dict[str, Path], memory: machines.Memory, checks: report.Checks) -> list[Row]:
    """Runs both gateways in parallel, because most of the time is spent waiting for timeouts; gives their rows."""

    def one(refuse_with: str) -> list[Row]:
        customers = rows(STATES[refuse_with])
        acts.play(folder / refuse_with, made, memory, customers, refuse_with, checks)
        return customers

    with ThreadPoolExecutor() as pool:
        try:
            return [row for found in pool.map(one, STATES) for row in found]
        except BaseException:
            # The threads may wait for minutes for programs in these namespaces. The programs end with them.
            for name in namespaces.names(f"{LABS}{os.getpid()}x"):
                with contextlib.suppress(PortwardError):
                    namespaces.remove(name)
            raise


if __name__ == "__main__":
    sys.exit(main())
