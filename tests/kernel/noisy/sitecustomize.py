"""Makes workers print lines that are not messages to the daemon, at their start and all the time. Python imports
this at its start if PYTHONPATH names this folder."""

import os
import sys
import threading
import time

_NOISE = (b"a library printed this\n", b"half a line", b"\xff\xfe\0\n", b"x" * 100_000 + b"\n", b"5 0a0000\n")


def _print() -> None:
    while True:
        for noise in _NOISE:
            os.write(1, noise)
        print("and this", flush=True)
        time.sleep(0.02)  # pause: between two prints


if "portward.worker.process" in sys.orig_argv:
    for _noise in _NOISE:
        os.write(1, _noise)
    os.write(1, b"\n")
    threading.Thread(target=_print, daemon=True).start()
