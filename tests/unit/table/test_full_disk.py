"""A policy table on a full disk is an error with a reason, and never the end of the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from portward.table.database import LOCK_FILE
from portward.table.writer import Writer
from unit.table.test_table import AZURE, ENFORCE

BLOCK = 4096
DISK_BLOCKS = 64
# Makes a table on a disk with this many free blocks, in a mount namespace of its own.
MAKE = """\
import sys
from pathlib import Path
from portward.policy import presets
from portward.table.commits import Answers
from portward.table.database import TableError
from portward.table.writer import Writer
folder, free = Path(sys.argv[1]), int(sys.argv[2])
(folder / "other").write_bytes(bytes((64 - free) * 4096))
try:
    Writer(folder / "table", presets.load("azure-2020"), Answers(observe=False, reject=False)).close()
    print("made")
except TableError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
@pytest.mark.parametrize("free", [0, 1, 2, 8, 9, 10, 12, 40])
def test_a_table_that_does_not_fit_on_the_disk_is_an_error(tmp_path: Path, free: int) -> None:
    mount = f'mount -t tmpfs -o size={DISK_BLOCKS * BLOCK} tmpfs {tmp_path} && exec "$@"'
    made = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, "-c", MAKE, str(tmp_path), str(free)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (made.returncode, made.stderr) == (0, "")
    if free == 40:
        assert made.stdout == "made\n"
    else:
        assert made.stdout.startswith(f"{tmp_path}/table: the policy table ")
        assert made.stdout.endswith("(the disk is full)\n")


def test_the_lock_file_has_all_its_blocks_from_the_beginning(tmp_path: Path) -> None:
    """LMDB maps it. A hole that is used while the disk is full would end the process by SIGBUS."""
    Writer(tmp_path, AZURE, ENFORCE).close()
    found = (tmp_path / LOCK_FILE).stat()
    assert found.st_blocks * 512 >= found.st_size > 0
