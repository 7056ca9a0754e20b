"""The file with the sums of the metrics and the readings that they come from, so that they outlive a restart.

It is written after each reading of the counters, before a scrape can see the new sums. So a scrape never shows
more than the file has. The file consists of two slots beside the policy table, written in turn and in place. If a
process dies while it writes one slot, the other slot is whole. The data is not synced to disk, because after a
power cut the kernel's counters are gone, too.
"""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path
from typing import Final
from zlib import crc32

_SLOTS: Final = ("counts-0", "counts-1")
# Changed if the content gets another meaning. A file with another magic is ignored.
_MAGIC: Final = b"pwcount1"
_HEADER: Final = struct.Struct("<8sQQI")  # magic, sequence number, bytes, checksum of the rest


class CountsFile:
    """The two slots in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sequence = 0

    def load(self) -> bytes | None:
        """The content that was saved last; None if no slot is whole."""
        newest: tuple[int, bytes] | None = None
        for slot in _SLOTS:
            with contextlib.suppress(OSError, struct.error):
                data = (self._folder / slot).read_bytes()
                magic, sequence, length, checksum = _HEADER.unpack_from(data)
                content = data[_HEADER.size : _HEADER.size + length]
                whole = magic == _MAGIC and len(content) == length and crc32(content) == checksum
                if whole and (newest is None or sequence > newest[0]):
                    newest = sequence, content
        if newest is None:
            return None
        self._sequence = newest[0]
        return newest[1]

    def save(self, content: bytes) -> None:
        """Replaces the content. Raises OSError, and then the content before is still there."""
        sequence = self._sequence + 1
        path = self._folder / _SLOTS[sequence % 2]
        data = _HEADER.pack(_MAGIC, sequence, len(content), crc32(content)) + content
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, data[written:], written)
            os.ftruncate(descriptor, len(data))
        finally:
            os.close(descriptor)
        self._sequence = sequence
