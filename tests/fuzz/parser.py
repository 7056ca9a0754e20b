"""The long form: `python -m tests.fuzz.parser --seconds N`.

atheris looks for new paths through the worker's packet parser. It writes each input that fails to the folder
`--findings`, and prints the traceback. Exit code 0: nothing was found.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

with atheris.instrument_imports(include=["portward.worker", "portward.ipc"]):
    from portward.worker import slow_path as _  # noqa: F401 # for what it imports

from fuzz.oracle import Oracle  # the path above must be there first
from fuzz.packets import TEMPLATES, mutated  # as above

_LONGEST = 512  # as much as the worker reads


def main() -> None:
    """Fuzzes; atheris ends the process."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.parser")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--findings", type=Path, default=Path.cwd())
    asked = parser.parse_args()
    with TemporaryDirectory(dir="/dev/shm") as memory:
        seeds = Path(memory) / "seeds"
        seeds.mkdir()
        for number, packet in enumerate(TEMPLATES):
            (seeds / f"{number}").write_bytes(packet[:_LONGEST])
        oracle = Oracle(Path(memory) / "table")

        def classify(data: bytes) -> None:
            oracle.classify(data)

        def mutate(data: bytes, largest: int, seed: int) -> bytes:
            random = Random(seed)
            return mutated(random)[:largest] if random.random() < 0.5 else bytes(atheris.Mutate(data, largest))

        options = (
            f"-max_total_time={asked.seconds}", f"-max_len={_LONGEST}", f"-artifact_prefix={asked.findings}/",
            "-print_final_stats=1",
        )  # fmt: skip
        atheris.Setup([sys.argv[0], *options, str(seeds)], classify, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
