"""Floods of prebuilt frames by a small C program, `flood.c`, which is compiled here; and the frames for them.

program = flood.build(folder)
frames = flood.write(folder / "frames", flood.from_sources(template, sources))
sent = flood.run(namespace, program, frames, dev="eth0", seconds=5)
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

from portward.lab import namespaces

_ETHERNET = 14


class Sent(NamedTuple):
    """The frames of a flood that the device took, and the seconds from the first to the last."""

    packets: int
    seconds: float


def build(folder: Path, source: str = "flood.c", *libraries: str) -> Path:
    """Compiles a C program of this folder, unless that was done, and returns its path; raises
    CalledProcessError."""
    program = folder / Path(source).stem
    if program.exists():
        return program
    argv = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", os.fspath(program)]
    subprocess.run([*argv, os.fspath(Path(__file__).parent / source), *libraries], check=True)
    return program


def from_sources(frame: bytes, sources: Iterable[bytes]) -> Iterator[bytes]:
    """An Ethernet frame with a TCP segment right behind the IP header, once from each source (4 or 16 bytes,
    network order); the checksums of IP and TCP are right."""
    four = frame[_ETHERNET] >> 4 == 4
    source, size, tcp = (26, 4, 34) if four else (22, 16, 54)
    bare = bytearray(frame)
    bare[source : source + size] = bytes(size)
    bare[tcp + 16 : tcp + 18] = bytes(2)
    pseudo = bytes(bare[source : source + 2 * size]) + struct.pack(">II", len(bare) - tcp, 6)
    of_tcp = _words(pseudo + bytes(bare[tcp:]))
    of_ip = 0
    if four:
        bare[24:26] = bytes(2)
        of_ip = _words(bytes(bare[_ETHERNET:tcp]))
    words = struct.Struct(f">{size // 2}H")
    for address in sources:
        more = sum(words.unpack(address))
        bare[source : source + size] = address
        bare[tcp + 16 : tcp + 18] = _checksum(of_tcp + more)
        if four:
            bare[24:26] = _checksum(of_ip + more)
        yield bytes(bare)


def _words(data: bytes) -> int:
    even = data + bytes(len(data) % 2)
    return sum(struct.unpack(f">{len(even) // 2}H", even))


def _checksum(total: int) -> bytes:
    total = (total >> 16) + (total & 0xFFFF)
    return (~(total + (total >> 16)) & 0xFFFF).to_bytes(2, "big")


def write(path: Path, frames: Iterable[bytes]) -> Path:
    """Writes frames as `flood.c` reads them, and gives the path."""
    with path.open("wb") as out:
        out.writelines(len(frame).to_bytes(2, "big") + frame for frame in frames)
    return path


class Pace(TypedDict, total=False):
    """The options of `flood.c`. Without `seconds` and `count` the flood does not end by itself."""

    cpu: int
    seconds: float
    count: int
    pps: float
    batch: int
    stamp: int


def start(
    namespace: str, program: Path, frames: Path, *, dev: str, **pace: Unpack[Pace]
) -> subprocess.Popen[bytes]:
    """Starts a flood through an interface of a namespace."""
    argv = [os.fspath(program), "--dev", dev, "--frames", os.fspath(frames)]
    argv += [word for name, value in pace.items() for word in (f"--{name}", f"{value}")]
    return namespaces.start(namespace, argv, stdout=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes], *, now: bool = False) -> Sent:
    """Waits for a flood to end, or ends it `now`; returns what it sent. Raises RuntimeError if it failed."""
    if now:
        process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"flood ended with {process.returncode}")
    return Sent(**json.loads(out))


def run(namespace: str, program: Path, frames: Path, *, dev: str, **pace: Unpack[Pace]) -> Sent:
    """Starts a flood and waits for its end; one of `seconds` and `count` is needed."""
    if not pace.keys() & {"seconds", "count"}:
        raise ValueError("a flood without an end: seconds or count")
    return finish(start(namespace, program, frames, dev=dev, **pace))
