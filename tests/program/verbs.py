"""Runs one verb after the other in one process, as the program would run each. A new interpreter for each of forty
verbs in each of eight surroundings would take minutes.

    python verbs.py FILE    FILE: a JSON list of command lines. For each, a line with its number and `begin` or its
                            exit code is printed around what it prints, straight to the descriptor.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from portward.cli import main


def _mark(text: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os.write(1, f"\n@@ {text}\n".encode())


def _run(words: list[str]) -> int:
    sys.argv = ["portward", *words]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:  # the program itself would end with this traceback
        traceback.print_exc()
        return 99
    return 0


for number, line in enumerate(json.loads(Path(sys.argv[1]).read_text("utf-8"))):
    _mark(f"{number} begin")
    _mark(f"{number} {_run(line)}")
