"""Another program that changes its own nftables all the time, as CrowdSec's bouncer and kube-proxy do.

    python -m kernel.foreign NAMESPACE RATE KIND…

It makes RATE transactions a second in a network namespace. KIND is `elements` or `chains`.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from portward.base.netlink import NLM_F_CREATE, attribute, nest, string
from portward.dataplane.compiled import Message
from portward.dataplane.nfnetlink import NfNetlink
from portward.lab import namespaces

TABLE: Final = "theirs"
_INET, _IP = 1, 2
# linux/netfilter/nf_tables.h
_NEW_TABLE, _NEW_CHAIN, _DELETE_CHAIN, _NEW_RULE, _NEW_SET, _DELETE_SET = 0, 3, 5, 6, 9, 11
_NEW_ELEMENTS, _DELETE_ELEMENTS = 12, 14
_KINDS: Final = ("elements", "chains")


def _of(kind: int, body: bytes, *, made: bool = True) -> Message:
    return Message(kind, _IP, NLM_F_CREATE if made else 0, attribute(1, string(TABLE)) + body)


def _element(kind: int, number: int) -> Message:
    key = nest(1, nest(1, attribute(1, number.to_bytes(4, "big"))))
    return _of(kind, attribute(2, string("banned")) + nest(3, key), made=kind == _NEW_ELEMENTS)


def _set(name: str) -> Message:
    """A set of IPv4 addresses."""
    parts = attribute(2, string(name)) + attribute(3, bytes(4)) + attribute(4, (7).to_bytes(4, "big"))
    return _of(_NEW_SET, parts + attribute(5, (4).to_bytes(4, "big")) + attribute(10, (1).to_bytes(4, "big")))


def _rule(chain: str) -> Message:
    """`counter`."""
    counter = nest(1, attribute(1, string("counter")) + nest(2, b""))
    return _of(_NEW_RULE, attribute(2, string(chain)) + nest(4, counter))


def changes(kind: str) -> Iterator[list[Message]]:
    """An endless sequence of transactions that add and delete elements, or chains with rules and sets."""
    for number in itertools.count():
        if kind == "elements":
            yield [_element(_DELETE_ELEMENTS if number % 2 else _NEW_ELEMENTS, number // 2 % 1000)]
        elif number % 2:
            yield [
                _of(_DELETE_CHAIN, attribute(3, string(f"svc{number // 2}")), made=False),
                _of(_DELETE_SET, attribute(2, string(f"set{number // 2}")), made=False),
            ]
        else:
            chain = f"svc{number // 2}"
            yield [_of(_NEW_CHAIN, attribute(3, string(chain))), _rule(chain), _set(f"set{number // 2}")]


def main() -> None:
    """Makes changes until it is killed; prints a line when it begins."""
    namespace, rate, *kinds = sys.argv[1:]
    with namespaces.inside(namespace):
        netlink = NfNetlink()
    netlink.transact([_of(_NEW_TABLE, b"")])
    netlink.transact([_set("banned")])
    print("ready", flush=True)
    sources = [changes(kind) for kind in kinds]
    began, done = time.monotonic(), 0
    while True:
        for source in sources:
            netlink.transact(next(source))
            done += 1
            time.sleep(max(0.0, began + done / float(rate) - time.monotonic()))  # pause: the pace of the changes


@contextmanager
def traffic(
    namespace: str, rate: float = 200, kinds: tuple[str, ...] = _KINDS
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs this program within the `with`, with `rate` changes a second; gives its process."""
    tests = Path(__file__).resolve().parents[1]
    argv = [sys.executable, "-m", "kernel.foreign", namespace, str(rate), *kinds]
    process = subprocess.Popen(argv, cwd=tests, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        namespaces.run(namespace, ["nft", "delete", "table", "ip", TABLE])


def crowd(namespace: str, chains: int, elements: int, family: str = "ip") -> None:
    """Loads a large ruleset of another program: chains with a rule each, and a set."""
    text = [f"table {family} large {{", " set many { type ipv4_addr;"]
    if elements:
        text.append(
            " elements = { " + ", ".join(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(elements)) + " }"
        )
    text.append(" }")
    text += [f" chain c{number} {{\n  counter\n }}" for number in range(chains)]
    namespaces.load(namespace, "\n".join([*text, "}\n"]))


if __name__ == "__main__":
    main()
