"""The queue step on kernels without nft_queue: the xtables NFQUEUE target in the raw table, both families.

It stands at priority −300, between portward's two nftables chains, in a chain PORTWARD of its own. These
rules only hand marked packets to the queue. Where they are missing nothing opens: the learning chain drops
what still carries the mark of a miss.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Final

from portward.errors import KernelError
from portward.gateway import mark
from portward.gateway.nft import Nft

_CHAIN: Final = "PORTWARD"
# Only marked packets of ours take the way into the chain.
_JUMP: Final = ("-m", "mark", "!", "--mark", f"0x0/{mark.OWN:#x}", "-j", _CHAIN)
_FAMILIES: Final = ("iptables", "ip6tables")
_PROBE: Final = (
    "table inet portward_probe { chain probe { type filter hook prerouting priority 0; queue to 0; }; }\n"
)
_TIMEOUT: Final = 10.0


def has_native_queue(nft: Nft) -> bool:
    """Whether the kernel takes nft's own `queue` statement; nothing is loaded to find out."""
    try:
        nft.check(_PROBE)
    except KernelError:
        return False
    return True


def install(rules: tuple[tuple[str, ...], ...]) -> None:
    """Makes the chain hold these rules, one transaction for each family. Idempotent; raises KernelError."""
    for family in _FAMILIES:
        lines = ["*raw", f":{_CHAIN} - [0:0]", *(f"-A {_CHAIN} {' '.join(rule)}" for rule in rules)]
        if _run(family, "-C", "PREROUTING", *_JUMP).returncode:
            lines.append(f"-I PREROUTING 1 {' '.join(_JUMP)}")
        _must(family, _restore(family, "\n".join([*lines, "COMMIT", ""])))


def installed() -> str:
    """What the raw tables hold of ours, as iptables prints it; it differs from what `install` left where
    somebody has changed it."""
    told = [_run(family, "-S").stdout for family in _FAMILIES]
    return "".join(line for text in told for line in text.splitlines(keepends=True) if _CHAIN in line)


def remove() -> bool:
    """Takes jump and chain out; True where there was anything. Raises KernelError."""
    found = False
    for family in _FAMILIES:
        if shutil.which(family) is None:
            continue
        while not _run(family, "-D", "PREROUTING", *_JUMP).returncode:
            found = True
        if not _run(family, "-F", _CHAIN).returncode:
            found = True
            _must(family, _run(family, "-X", _CHAIN))
    return found


def _run(family: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return _call([family, "-w", "-t", "raw", *arguments])


def _restore(family: str, text: str) -> subprocess.CompletedProcess[str]:
    return _call([f"{family}-restore", "-w", "--noflush"], text)


def _call(argv: list[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(argv, input=text, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except FileNotFoundError as error:
        raise KernelError(
            f"this kernel has no nft_queue, and {argv[0]} is not there to do without: install iptables"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{argv[0]} gave no answer within {_TIMEOUT:.0f} s") from error


def _must(family: str, result: subprocess.CompletedProcess[str]) -> None:
    if result.returncode:
        said = result.stderr.strip().splitlines()
        raise KernelError(f"{family}: {said[-1] if said else f'exit {result.returncode}'}")
