"""A gateway of two namespaces that queues every packet to port 25 and caches no verdict, and readers for its
queues.

    flood ── veth ── raw table: mark of a miss, NFQUEUE ── chain after it: counted by the class of its mark,
    dropped

So each packet costs a reader as much as it costs the worker in portward's own ruleset, which drops an unknown
source right behind the queue too. Work that follows a verdict is not measured.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from ipaddress import ip_network
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from bench import flood
from bench.standing import Standing
from kernel.wire import link_address
from portward.base.clock import utc_now
from portward.dataplane.nfnetlink import NfNetlink
from portward.ipc import mark
from portward.ipc.counters import WorkerCounters
from portward.lab import namespaces
from portward.lab.agent import until
from portward.lab.topology import MAIL4
from portward.model import Attachment, Record, Subscription
from portward.policy import presets
from portward.table.commits import Answers
from portward.table.writer import Writer

SEGMENT = "vni1"
# One core runs the flood and the kernel's path up to the queue, the other one the reader.
FLOOD_CPU, READER_CPU = 1, 0
LENGTH = 4096
# Packets that `drain` queues: as many as fit into a reader's socket, whose buffer is 8 MiB, which the kernel
# doubles.
DRAINED = 16_000
DRAINED_LENGTH = 20_000
# A thousand hosts, and a prefix whose addresses may send. So two prefix lengths are looked up for any other
# source.
HOSTS = tuple(bytes([10, 0, number >> 8, number & 0xFF]) for number in range(1000))
PREFIX = "10.64.0.0/10"
# Every third address of these has an attachment: more gaps between attachments than the batch reader caches.
SCATTERED = range(172 << 24 | 16 << 16, 172 << 24 | 17 << 16)
_CLASSES = ("allow", "deny", "refused", "answer", "unknown", "observed")


class Drained(NamedTuple):
    """The time that readers took to empty full queues, in seconds: by the clock, and as processor time with the
    kernel's work for them. `answered`: packets by the class of their verdict."""

    wall_s: float
    processor_s: float
    answered: dict[str, int]


class Gateway(Standing):
    """The two namespaces. Packets go to queue 0 until `queue_to` says otherwise."""

    def __init__(self, folder: Path) -> None:
        super().__init__("a", "b")
        self.folder = folder
        self.tenant, self.gateway = self.names

    def _up(self) -> None:
        namespaces.ip(
            "-n",
            self.tenant,
            "link",
            "add",
            "eth0",
            "type",
            "veth",
            "peer",
            "name",
            SEGMENT,
            "netns",
            self.gateway,
        )
        for name, device in ((self.tenant, "eth0"), (self.gateway, SEGMENT)):
            namespaces.batch(name, [f"link set {device} up"])
        namespaces.load(self.gateway, "\n".join(_rules()))
        self.queue_to(0)
        index = int(namespaces.run(self.gateway, ["cat", f"/sys/class/net/{SEGMENT}/ifindex"]).stdout)
        self.table = _table(self.folder / "table", index)
        with namespaces.inside(self.gateway):
            self._netlink = NfNetlink()
        self.frame = bytes(
            Ether(src=link_address(self.tenant, "eth0"), dst=link_address(self.gateway, SEGMENT))
            / IP(src="10.0.0.0", dst=MAIL4)
            / TCP(sport=4000, dport=25, flags="S")
        )

    def queue_to(self, *queues: int) -> None:
        """From now on packets go to these queues in turn."""
        first = "-A PREROUTING -p tcp --dport 25"
        lines = ["*raw", f"{first} -j MARK --set-mark {0x00AB0000 | mark.MISS:#x}"]
        for place, number in enumerate(queues):
            left = len(queues) - place
            turn = f"-m statistic --mode nth --every {left} --packet 0" if left > 1 else ""
            lines.append(f"{first} {turn} -j NFQUEUE --queue-num {number}")
        result = namespaces.run(self.gateway, ["iptables-restore"], text="\n".join([*lines, "COMMIT", ""]))
        if result.returncode:
            raise RuntimeError(f"iptables-restore: {result.stderr}")

    def answered(self) -> dict[str, int]:
        """Packets with a verdict so far, by the class of that verdict."""
        return self._netlink.counters("bench")

    def waiting(self, queue: int) -> int:
        """Packets that wait in a queue, or that its reader has received and not answered yet."""
        printed = namespaces.run(self.gateway, ["cat", "/proc/net/netfilter/nfnetlink_queue"]).stdout
        rows = [[int(column) for column in line.split()] for line in printed.splitlines()]
        return sum(row[2] for row in rows if row[0] == queue)

    def drain(self, generator: Path, frames: Path, readers: dict[int, int]) -> Drained:
        """Fills the queues while their readers (queue → process id) are stopped. Measures from the moment that the
        readers go on until all packets have a verdict, so the speed of the generator does not matter. Raises
        RuntimeError if the kernel has dropped any packet."""
        self.queue_to(*readers)
        before = self.answered()
        for pid in readers.values():
            os.kill(pid, signal.SIGSTOP)
        try:
            flood.run(self.tenant, generator, frames, dev="eth0", cpu=FLOOD_CPU, count=DRAINED)
            if (waiting := sum(self.waiting(queue) for queue in readers)) != DRAINED:
                raise RuntimeError(f"{waiting} of {DRAINED} packets wait")
            used = sum(map(_processor_s, readers.values()))
        finally:
            began = time.perf_counter()
            for pid in readers.values():
                os.kill(pid, signal.SIGCONT)
        goal = sum(before.values()) + DRAINED
        until(lambda: sum(self.answered().values()) >= goal, "the queues are empty", every_s=0.001)
        wall_s = time.perf_counter() - began
        until(lambda: not any(self.waiting(queue) for queue in readers), "nothing waits")
        # The kernel updates a process's processor time when the process leaves the processor.
        until(lambda: all(map(_sleeps, readers.values())), "the readers wait for packets")
        after = self.answered()
        answered = {name: after[name] - before[name] for name in after if after[name] != before[name]}
        return Drained(wall_s, sum(map(_processor_s, readers.values())) - used, answered)

    def frames(self, name: str, sources: Sequence[bytes]) -> Path:
        """A file for `flood`: a SYN from each of the sources."""
        return flood.write(self.folder / name, flood.from_sources(self.frame, sources))

    @contextmanager
    def reader(self, argv: Sequence[str], cpu: int = READER_CPU, pass_fds: Sequence[int] = ()) -> Iterator[int]:
        """Runs a reader on the core `cpu`, and waits until it has printed `ready`. Yields its process id."""
        with subprocess.Popen(
            ["ip", "netns", "exec", self.gateway, "taskset", "-c", str(cpu), *argv],
            stdout=subprocess.PIPE, pass_fds=pass_fds,
        ) as process:  # fmt: skip
            try:
                assert process.stdout is not None
                if b"ready\n" not in process.stdout:  # a worker prints an empty line before it
                    raise RuntimeError(f"{argv[0]} is not ready")
                yield process.pid
            finally:
                process.kill()

    @contextmanager
    def worker(
        self, kind: str = "batch", queue: int = 0, length: int = LENGTH, cpu: int = READER_CPU
    ) -> Iterator[int]:
        """portward's worker over the table, with the reader of this kind."""
        counters, (theirs, ours) = WorkerCounters.create(), os.pipe()
        argv = [
            sys.executable, "-m", "portward.worker.process", "--reader", kind, "--queue", str(queue),
            "--length", str(length), "--table", os.fspath(self.table),
            "--counters", str(counters), "--lifeline", str(theirs),
        ]  # fmt: skip
        os.write(ours, b"\n")  # the policy is there
        try:
            with self.reader(argv, cpu, (counters, theirs)) as pid:
                yield pid
        finally:
            for descriptor in (counters, theirs, ours):
                os.close(descriptor)


def _processor_s(pid: int) -> float:
    """Processor time of a process so far."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def _sleeps(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def _rules() -> Iterator[str]:
    yield "table inet bench {"
    yield from (f"counter {name} {{}}" for name in _CLASSES)
    yield "chain after { type filter hook prerouting priority raw + 1; policy accept;"
    for name in _CLASSES:
        yield f"meta mark & {mark.CLASS:#x} == {mark.Class[name.upper()]:d} counter name {name} drop"
    yield "}"
    yield "}"


def _table(folder: Path, index: int) -> Path:
    """A policy table in which every second host may send, and every address of the prefix."""
    may, may_not = UUID(int=1 << 80), UUID(int=2 << 80)
    records: list[Record] = [
        Subscription(id=may, offer="enterprise-agreement", created=date(2022, 6, 30)),
        Subscription(id=may_not, offer="pay-as-you-go", created=date(2022, 6, 30)),
        Attachment(segment=SEGMENT, address=ip_network(PREFIX), subscription=may),
    ]
    for number, host in enumerate(HOSTS):
        owner = (may, may_not)[number % 2]
        records.append(Attachment(segment=SEGMENT, address=ip_network(host), subscription=owner))
    for number in SCATTERED[::3]:
        records.append(Attachment(segment=SEGMENT, address=ip_network(number), subscription=may))
    writer = Writer(folder, presets.load("azure-2020"), Answers(observe=False, reject=False))
    writer.replace(records, revision=1, store=b"bench".ljust(16), now=utc_now())
    writer.put_links({index: (SEGMENT, False)}, touched=frozenset(), now=utc_now())
    writer.close()
    return folder
