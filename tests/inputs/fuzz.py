"""The long form: `python -m tests.inputs.fuzz KIND --seconds N`; KIND is config, preset, yaml, json or record.

atheris looks for new paths through the readers. It begins with the corpus and with documents that are nearly
right. It writes each document that fails to the folder `--findings`, and prints the traceback. A document that
takes more than ten seconds or 2 GiB fails too. Exit code 0: nothing was found.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# atheris follows only the paths through these modules, not those through the tests' own code.
with atheris.instrument_imports(include=["portward", "tomllib", "yaml", "json", "ipaddress"]):
    from portward.inventory import files  # noqa: F401 # for what it imports

from inputs.mutate import KINDS, mutated  # the path above must be there first
from inputs.oracle import Oracle  # as above

HERE = Path(__file__).resolve().parent
_LONGEST = 16_384


def _seeds(kind: str, folder: Path) -> None:
    """The corpus of a kind, and some documents that are nearly right."""
    source = {"yaml": "inventory/*.yaml", "json": "inventory/*.json"}.get(kind, f"{kind}/*.toml")
    for path in HERE.glob(source):
        if path.name != "expected.toml" and path.stat().st_size <= _LONGEST:
            shutil.copy(path, folder)
    for number in range(200):
        (folder / f"mutated-{number}").write_bytes(mutated(kind, Random(number)))


def main() -> None:
    """Fuzzes one kind; atheris ends the process."""
    parser = argparse.ArgumentParser(prog="python -m tests.inputs.fuzz")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--findings", type=Path, default=Path.cwd())
    asked = parser.parse_args()
    # In memory, because files are written and tables synced some thousand times a second.
    with TemporaryDirectory(dir="/dev/shm") as memory:
        work, seeds = Path(memory) / "work", Path(memory) / "seeds"
        work.mkdir()
        seeds.mkdir()
        _seeds(asked.kind, seeds)
        oracle = Oracle(asked.kind, work)

        def mutate(data: bytes, largest: int, seed: int) -> bytes:
            random = Random(seed)
            if random.random() < 0.5:
                return mutated(asked.kind, random)[:largest]
            return bytes(atheris.Mutate(data, largest))

        options = (
            f"-max_total_time={asked.seconds}", f"-max_len={_LONGEST}", "-timeout=10", "-rss_limit_mb=2048",
            f"-artifact_prefix={asked.findings}/", "-print_final_stats=1",
        )  # fmt: skip
        atheris.Setup([sys.argv[0], *options, str(seeds)], oracle.check, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
