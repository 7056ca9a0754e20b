"""The tour works as it is written: its commands run in a lab, and print what the page shows.

Numbers, times and hashes differ from run to run, so they are not compared. A line `…` stands for any lines.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = f"pwr{os.getpid()}"
MONTHS = (
    "January|February|March|April|May|June|July|August|September|October|November|December|janvier|février|mars|avril"
    "|mai|juin|juillet|août|septembre|octobre|novembre|décembre"
)
# The agent reads counters and cached verdicts every few seconds, so a command is retried for this long.
DEADLINE_S = 20.0
# These show cached verdicts, which expire after a minute. A busy machine may be slower than that, so both tenants
# try to send again before each of these commands.
COUNTING = ("portward explain", "portward status", "portward top", "portward diagnose fabrikam --config")
ATTEMPTS = "; ".join(
    f"ip netns exec {NAME}-{tenant} nc -w 1 203.0.113.25 25" for tenant in ("contoso", "fabrikam")
)


class Step(NamedTuple):
    """A command of the tour, and the lines that it prints."""

    command: str
    output: list[str]


def steps() -> list[Step]:
    """The commands at root's prompt, in their order."""
    text = (ROOT / "docs/tutorial/tour.md").read_text().replace("pw-lab", NAME)
    found: list[Step] = []
    for block in re.findall(r"(?ms)^```console\n(.*?)^```", text):
        for line in block.splitlines():
            if line.startswith("# "):
                found.append(Step(line.removeprefix("# "), []))
            else:
                found[-1].output.append(line)
    return found


def normal(line: str) -> str:
    """A line without what differs from run to run."""
    line = re.sub(r"\b[0-9a-f]{64}\b", "HASH", line)
    line = re.sub(rf"\b({MONTHS})\b", "MONTH", line)
    line = re.sub(r"xtables NFQUEUE|nft queue", "QUEUE", line)
    line = re.sub(r"\d+(\.\d+)?(er\b)?", "N", line)  # French for the first day of a month: 1er
    return " ".join(line.split())


def matches(expected: list[str], printed: list[str]) -> bool:
    """Whether these lines were printed; `…` stands for any lines, none too."""
    pattern = "".join(r"(?:.*\n)*?" if line == "…" else re.escape(line) + r"\n" for line in expected)
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in printed)) is not None


def run(command: str, *, gateway: bool) -> str:
    """Runs a command as in the tour's shell, and gives what it prints."""
    prelude = f'portward() {{ "{sys.executable}" -m portward "$@"; }}; C=/run/portward-lab/{NAME}/portward.toml; '
    inside = ["ip", "netns", "exec", f"{NAME}-gw"] if gateway else []
    done = subprocess.run(
        [*inside, "bash", "-c", prelude + command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False, cwd=ROOT,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    return done.stdout


@pytest.fixture
def lab() -> Iterator[None]:
    """The lab of the tour, under a name of its own."""
    run(f"portward lab up --name {NAME}", gateway=False)
    yield
    run(f"portward lab down --name {NAME}", gateway=False)


@pytest.mark.usefixtures("lab")
def test_the_tour_prints_what_the_page_shows() -> None:
    known = steps()
    # Lines that set up the gateway's shell, which `run` and the fixture replace.
    frame = ("alias ", "portward lab ", "ip netns exec " + NAME + "-gw", "C=", "exit")
    shown = [step for step in known if not step.command.startswith(frame)]
    assert len(shown) > 10
    for step in shown:
        expected = [normal(line) for line in step.output if line.strip()]
        end = time.monotonic() + DEADLINE_S
        while True:
            if step.command.startswith(COUNTING):
                run(ATTEMPTS, gateway=True)
            text = run(step.command, gateway=True)
            printed = [normal(line) for line in text.splitlines() if line.strip()]
            if matches(expected, printed) or not step.command.startswith(COUNTING) or time.monotonic() > end:
                break
        assert matches(expected, printed), f"# {step.command}\n{text}"
