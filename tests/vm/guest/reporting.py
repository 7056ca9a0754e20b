"""Reports to the host: JSON lines on the machine's second serial port, which `tests/vm/machine.py` reads."""

from __future__ import annotations

import json
import os

_PORT = "/dev/ttyS1"


def report(**words: object) -> None:
    """Sends one line. Several processes may do so at once, because a short line is a single write."""
    port = os.open(_PORT, os.O_WRONLY | os.O_NOCTTY)
    try:
        os.write(port, (json.dumps(words) + "\n").encode())
    finally:
        os.close(port)
