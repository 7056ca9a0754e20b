"""A gateway for faults: a lab, the real daemon and its restarts, traffic, and the checks that must hold.

`Ground.fault` measures one fault. It counts the leaked packets and the seconds without connections. Then it waits
until the gateway works again, and compares its verdicts and its store with the policy that was applied.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Final, NamedTuple
from uuid import UUID, uuid4

import msgspec

from faults import traffic
from faults.traffic import SEND_AT_ONCE, SEND_EVERY, Figures, Traffic
from kernel.conftest import ALLOWED, DENIED, lab_name, source_records
from kernel.wire import meanwhile
from portward.config.documents import dec_hook, enc_hook
from portward.daemon.runtime import read_status
from portward.dataplane.names import COUNTED_SETS, FIXED_SETS, TABLE, LimitResult
from portward.dataplane.nfnetlink import KernelElements, NfNetlink
from portward.dataplane.verdict_cache import VerdictCache
from portward.errors import PortwardError
from portward.inventory.json_document import json_text
from portward.ipc.mark import classify
from portward.lab import namespaces
from portward.lab.agent import PROGRAM, Agent, until
from portward.lab.topology import CONTOSO, FABRIKAM, Lab, Tenant
from portward.model import Attachment, Record, Subscription
from portward.ops.explanation import explain
from portward.store.backends import open_store
from portward.store.codec import KINDS, key_of
from portward.table.reader import Reader

INJECT: Final = Path(__file__).parent / "inject"
# Like `RestartSec=100ms` of systemd.
_RESTART_SECONDS: Final = 0.1
# A gateway must work again after this many seconds. The faults here take a few seconds at most.
RECOVERY_SECONDS: Final = 30.0
# Size of the file system that holds the policy table and the store.
_DISK_BYTES: Final = 24 << 20


class Outcome(NamedTuple):
    """The outcome of a fault. `wrong` has a line for each wrong verdict or failed check, `lost` the keys of
    acknowledged records that the store does not have, and `note` is for the table of results. `may_leak` is set if
    another program took rules out of the kernel: packets pass until the rules are back, `back` seconds later."""

    name: str
    figures: Figures
    wrong: list[str]
    lost: list[str]
    note: str = ""
    may_leak: bool = False
    back: float | None = None

    @property
    def violations(self) -> list[str]:
        """A line for each result that must not be."""
        found = [f"wrong: {one}" for one in self.wrong] + [f"lost: {one}" for one in self.lost]
        if self.figures.leaked and not self.may_leak:
            found.append(f"{len(self.figures.leaked)} packets of the blocked tenant came out")
        if self.figures.missed:
            found.append(f"the watcher missed {self.figures.missed} packets")
        if not self.figures.others:
            found.append("no packet to another port came out: nothing was seen at all")
        return found


class Agents:
    """Runs `portward run` with the fault injection of `inject/`, and starts it again whenever it ends, as systemd
    would."""

    def __init__(self, agent: Agent, control: Path) -> None:
        self.agent, self._control = agent, control
        self._keep = False
        self._thread: threading.Thread | None = None
        self.starts = 0

    def environment(self) -> dict[str, str]:
        """The environment variables that load `inject/` into a process of portward."""
        path = os.pathsep.join(filter(None, (os.fspath(INJECT), os.environ.get("PYTHONPATH", ""))))
        return {"PYTHONPATH": path, "PORTWARD_FAULTS": os.fspath(self._control)}

    def start(self) -> None:
        """Starts the daemon and keeps it running; does not wait until it enforces."""
        self._keep = True
        self._launch()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ends the daemon with a signal, and does not start it again. Idempotent."""
        self._keep = False
        process = self.agent.process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(number)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        assert self.agent.process is not None
        return self.agent.process.pid

    def workers(self) -> list[int]:
        """The process ids of its workers."""
        return [pid for pid in _children(self.pid) if b"portward.worker.process" in _words(pid)]

    def _launch(self) -> None:
        with self.agent.log.open("ab") as log:
            self.agent.process = namespaces.start(
                self.agent.lab.gateway, [*PROGRAM, "run", "--config", os.fspath(self.agent.config)],
                stderr=log, stdout=log, environment=self.environment(),
            )  # fmt: skip
        self.starts += 1

    def _watch(self) -> None:
        while self._keep:
            assert self.agent.process is not None
            self.agent.process.wait()
            if self._keep:
                time.sleep(_RESTART_SECONDS)  # pause: as a service manager makes it
                self._launch()
        if self.agent.process is not None and self.agent.process.poll() is None and not self._keep:
            # It was started again while `stop` was called.
            self.agent.process.kill()
            self.agent.process.wait()


def _words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return b""


def _children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == parent:
                    found.append(int(path.name))
    return found


@dataclass
class Model:
    """The policy that the harness has applied. `records`: the acknowledged records by key. `unsure`: by key, the
    encodings that a record may have in the store after a change that was not acknowledged, the one before
    included; empty bytes stand for no record. `revision`: the newest revision that the harness has seen."""

    records: dict[str, Record] = field(default_factory=dict)
    unsure: dict[str, set[bytes]] = field(default_factory=dict)
    revision: int = 0


def _body(record: Record) -> bytes:
    return msgspec.json.encode(record, enc_hook=enc_hook)


class Ground:
    """Lab, daemon, traffic and model, while the `with` lasts."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.lab = Lab(lab_name())
        self.control, self.disk = folder / "control", folder / "disk"
        self.model = Model()
        self._extra = itertools.count(1)
        self._changing = threading.Lock()
        self.changes = 0

    def __enter__(self) -> Ground:
        self.control.mkdir()
        self.disk.mkdir()
        with contextlib.ExitStack() as stack:
            _run("mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", os.fspath(self.disk))
            stack.callback(_run, "umount", "-l", os.fspath(self.disk))
            self.lab.up()
            stack.callback(self.lab.down)
            traffic.route(self.lab)
            self.store, self.table = self.disk / "portward.db", self.disk / "table"
            # Some faults are the other program that changes the table.
            self.agent = Agent(
                self.lab, self.folder, store=f"sqlite:{self.store}", table=str(self.table),
                ruleset={"owned": "never"},
            )  # fmt: skip
            self.agents = Agents(self.agent, self.control)
            self.traffic = Traffic(self.lab)
            self._first_records()
            stack.callback(self.agents.stop)
            self.agents.start()
            # Start the traffic after the daemon enforces. Before that port 25 is open, and packets that wait for
            # neighbour discovery could come out later.
            until(self._enforces, "the daemon enforces")
            stack.enter_context(self.traffic)
            self.recovered()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # --- policy ---

    def _first_records(self) -> None:
        records: list[Record] = []
        for tenant, network, offer in (
            (CONTOSO, traffic.ALLOWED4, ALLOWED),
            (CONTOSO, traffic.ALLOWED6, ALLOWED),
            (FABRIKAM, traffic.BLOCKED4, DENIED),
            (FABRIKAM, traffic.BLOCKED6, DENIED),
        ):
            records += source_records(tenant, str(network), offer, uuid4())
        self.subjects: dict[UUID, str] = {}
        for network, size in ((traffic.SUBJECTS4, 28), (traffic.SUBJECTS6, 120)):
            # Two single hosts, and a prefix around the third address.
            for number in range(1, 4):
                address, id_ = network[4096 * number + 5], uuid4()
                prefix = ip_network((address, size if number == 3 else network.max_prefixlen), strict=False)
                self.subjects[id_] = str(address)
                records += source_records(CONTOSO, str(prefix), DENIED, id_)
        self.traffic.subjects = [ip_address(address).packed for address in self.subjects.values()]
        self.apply(records)

    def apply(self, records: list[Record], environment: dict[str, str] | None = None) -> bool:
        """Runs `portward apply` with these records; gives whether it succeeded. If not, the records become unsure,
        because the change may or may not be in the store."""
        lists: dict[str, list[Record]] = {}
        for record in records:
            lists.setdefault(key_of(record).partition("/")[0], []).append(record)
        text = msgspec.json.encode(lists, enc_hook=enc_hook)
        verb = [*PROGRAM, "apply", "-", "--json", "--config", os.fspath(self.agent.config)]
        result = subprocess.run(
            ["ip", "netns", "exec", self.lab.gateway, *verb],
            input=text, capture_output=True, timeout=60, check=False, env={**os.environ, **(environment or {})},
        )  # fmt: skip
        for record in records:
            key = key_of(record)
            if result.returncode == 0:
                self.model.records[key] = record
                self.model.unsure.pop(key, None)
            else:
                before = self.model.records.get(key)
                may = self.model.unsure.setdefault(key, {b"" if before is None else _body(before)})
                may.add(_body(record))
        if result.returncode == 0:
            self.model.revision = max(self.model.revision, json.loads(result.stdout)["revision"])
            self.changes += 1
        return result.returncode == 0

    def change(self, environment: dict[str, str] | None = None) -> bool:
        """Switches one to three subjects between allowed and denied, and adds an attachment; gives what `apply`
        does."""
        records: list[Record] = []
        for id_ in self.random.sample(sorted(self.subjects), self.random.randint(1, 3)):
            known = self.model.records[f"subscriptions/{id_}"]
            assert isinstance(known, Subscription)
            offer = ALLOWED if known.offer == DENIED else DENIED
            records.append(msgspec.structs.replace(known, offer=offer))
        number = next(self._extra)
        records.append(
            Attachment(
                segment=CONTOSO.segment,
                address=ip_network(traffic.SUBJECTS4[32_768 + number % 30_000]),
                subscription=self.random.choice(sorted(self.subjects)),
            )
        )
        return self.apply(records, environment)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Changes the policy again and again within the `with`."""
        with meanwhile(self.change):
            yield

    # --- faults ---

    def fault(
        self,
        name: str,
        act: Callable[[], str | None],
        *,
        may_leak: bool = False,
        about: str = "",
    ) -> Outcome:
        """Runs `act`, measures the traffic until the gateway works again, and then checks verdicts and store. The
        text that `act` gives becomes the note. `about` is put before each line of `wrong` and `lost`."""
        note, wrong, lost = "", [], []
        with self.traffic.measured() as figures:
            try:
                note = act() or ""
                self.recovered()
                # `lost` finds out which unsure changes are in the store. They may be of a newer revision.
                lost = self.lost()
                until(self._enforces, "the daemon enforces what was not acknowledged", seconds=RECOVERY_SECONDS)
                wrong = self.wrong()
            except (AssertionError, TimeoutError) as error:
                wrong.append(f"{error}; the log ends: {self.last_words()}")
        about = f"{about}: " if about else ""
        return Outcome(
            name, figures, [about + one for one in wrong], [about + one for one in lost], note, may_leak
        )

    def arm(self, process: str, where: str, side: str, nth: int = 1, action: str = "SIGKILL") -> None:
        """Arms a point: the next process of this kind that comes there carries out the action. See
        `inject/sitecustomize.py`."""
        (self.control / "hit").unlink(missing_ok=True)
        new = self.control / "armed.new"
        new.write_text(f"{process}|{where}|{side}|{nth}|{action}")
        new.rename(self.control / "armed")

    def hit(self) -> bool:
        """Whether a process has carried out the armed action."""
        return (self.control / "hit").exists()

    def disarm(self) -> None:
        """Withdraws the armed action."""
        (self.control / "armed").unlink(missing_ok=True)

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Sends a signal to a process of the gateway, which may have ended already."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    # --- what must hold afterwards ---

    def recovered(self, seconds: float = RECOVERY_SECONDS) -> None:
        """Waits until the daemon enforces the newest revision, its workers run, and the allowed tenant opens
        connections from new sources; raises TimeoutError."""
        start = time.monotonic()
        until(self._enforces, "the daemon enforces the newest revision", seconds=seconds)
        since = time.monotonic()
        left = max(1.0, seconds - (since - start))
        until(lambda: self.traffic.opens(since), "connections of the allowed tenant", seconds=left)

    def _enforces(self) -> bool:
        try:
            numbers = self.agent.metrics()
        except (OSError, http.client.HTTPException, ValueError):  # it was killed while it answered
            return False
        return numbers.get("portward_enforced_revision", -1) >= self.model.revision and bool(self.agents.workers())

    def expected(self, tenant: Tenant, address: str) -> bool | None:
        """Whether a source may send by the applied policy; None if that depends on a change that is unsure."""
        best: Attachment | None = None
        for record in self.model.records.values():
            if isinstance(record, Attachment) and record.segment == tenant.segment:
                inside = ip_address(address) in record.address
                if inside and (best is None or record.address.prefixlen > best.address.prefixlen):
                    best = record
        if best is None:
            return False
        key = f"subscriptions/{best.subscription}"
        if key in self.model.unsure or key_of(best) in self.model.unsure:
            return None
        known = self.model.records[key]
        assert isinstance(known, Subscription)
        return known.offer == ALLOWED

    def sources(self) -> list[tuple[Tenant, str]]:
        """Sources of every kind: with and without a cached verdict, allowed, denied and unknown, single hosts and
        addresses in prefixes."""
        number = self.random.randrange(50_000, 60_000)
        found = [(CONTOSO, address) for address in self.subjects.values()]
        for tenant, four, six in (
            (CONTOSO, traffic.ALLOWED4, traffic.ALLOWED6),
            (FABRIKAM, traffic.BLOCKED4, traffic.BLOCKED6),
            (FABRIKAM, traffic.UNKNOWN4, traffic.UNKNOWN6),
        ):
            found += [(tenant, str(network[place])) for network in (four, six) for place in (7, number)]
        extra = [
            record for key, record in self.model.records.items() if key.startswith("attachments/vni1001/10.4.")
        ]
        hosts = [one for one in extra if isinstance(one, Attachment) and one.address.prefixlen == 32]
        found += [(CONTOSO, str(one.address.network_address)) for one in hosts[-3:]]
        return found

    def wrong(self) -> list[str]:
        """A line for each way in which the gateway deviates from the applied policy. Checked are real packets, the
        verdicts of `explain`, and the kernel's cached verdicts."""
        found = self._wrong_elements()
        probes = []
        for tenant, address in self.sources():
            frames = self.traffic.allowed_frames if tenant is CONTOSO else self.traffic.frames
            probe = frames.syn(ip_address(address).packed)
            frames.send(probe.frame)
            said, applied = self._explained(tenant, address), self.expected(tenant, address)
            probes.append((tenant, address, said if applied is None else applied, probe, frames))
            if applied not in (None, said):
                found.append(f"explain says {said} of {tenant.segment} {address}, applied was {applied}")
        for tenant, address, want, probe, frames in probes:
            if want:
                # A packet can be lost for other reasons, so an allowed one is sent again until it comes out.
                deadline = time.monotonic() + 30
                while not (passed := probe.sequence in self.traffic.seen) and time.monotonic() < deadline:
                    frames.send(probe.frame)
                    time.sleep(0.02)  # pause: of a poll
                if not passed:
                    found.append(f"a packet of {tenant.segment} {address} did not come out, applied was allow")
        time.sleep(0.1)  # pause: a denied packet would come out by now
        for tenant, address, want, probe, _ in probes:
            if want is False and probe.sequence in self.traffic.seen:
                found.append(f"a packet of {tenant.segment} {address} came out, applied was deny")
        return found + self._wrong_elements()

    def _explained(self, tenant: Tenant, address: str) -> bool | None:
        with namespaces.inside(self.lab.gateway):
            try:
                return explain(self.agent.config, tenant.segment, address, None).verdict == "allow"
            except PortwardError:
                return None

    def _wrong_elements(self) -> list[str]:
        """A line for each cached verdict that differs from the policy table's, at most five."""
        found = []
        with namespaces.inside(self.lab.gateway):
            netlink = NfNetlink()
            try:
                cache, reader = self._cache(netlink), Reader.open(self.table)
                try:
                    head = reader.head()
                    for element in list(cache.elements()):
                        if isinstance(element.verdict, LimitResult):
                            continue
                        finding = reader.lookup(element.source.link, element.source.address)
                        if finding is None or classify(finding)[0] is not element.verdict:
                            found.append(f"{COUNTED_SETS[element.verdict]} remembers {element.source}: {finding}")
                    if head is None or cache.synced() != head.generation:
                        found.append(f"the kernel is in step with {cache.synced()}, the table is {head}")
                finally:
                    reader.close()
            except (OSError, PortwardError) as error:
                found.append(f"cannot be compared: {error}")
            finally:
                netlink.close()
        return found[:5]

    def lost(self) -> list[str]:
        """The keys of acknowledged records that are not in the store as they were applied. Also settles the unsure
        records: the one that the store has is the applied one. The store is read as `portward export` does."""
        with contextlib.closing(open_store(f"sqlite:{self.store}")) as store:
            revision, records = store.read_all()
            lists = json.loads("".join(json_text(dict(records))))
        self.model.revision = max(self.model.revision, revision)
        have = {}
        for kind, type_ in KINDS.items():
            for item in lists[kind]:
                record = _decoded(type_, item)
                have[key_of(record)] = _body(record)
        found = []
        for key, may in list(self.model.unsure.items()):
            now = have.get(key, b"")
            if now not in may:
                found.append(f"{key}: neither as before nor as applied")
            else:  # the store says which one it is
                del self.model.unsure[key]
                if now:
                    self.model.records[key] = _decoded(KINDS[key.partition("/")[0]], json.loads(now))
        found += [
            key
            for key, record in self.model.records.items()
            if key not in self.model.unsure and have.get(key) != _body(record)
        ]
        return found

    # --- what the harness can look at ---

    def whole(self) -> bool:
        """Whether the gateway works and nothing is wrong or lost."""
        try:
            self.recovered(5)
        except TimeoutError:
            return False
        return not self.wrong() and not self.lost()

    def sent_for(self, seconds: float) -> None:
        """Waits until the blocked tenant has sent the packets of `seconds`; on a busy machine that takes
        longer."""
        goal = self.traffic.sent + int(seconds / SEND_EVERY * SEND_AT_ONCE)
        until(lambda: self.traffic.sent >= goal, "packets of the blocked tenant", seconds=60)

    def loaded(self) -> tuple[object, ...]:
        """The state that another program can change: a fingerprint of the ruleset, and the epoch."""
        with namespaces.inside(self.lab.gateway):
            netlink = NfNetlink()
            try:
                return netlink.fingerprint(TABLE, FIXED_SETS), self._cache(netlink).epoch()
            finally:
                netlink.close()

    @staticmethod
    def _cache(netlink: NfNetlink) -> VerdictCache:
        """The kernel's cached verdicts, for reading only."""
        return VerdictCache(KernelElements(netlink))

    def index(self, tenant: Tenant) -> int:
        """The index of a segment's interface on the gateway."""
        with namespaces.inside(self.lab.gateway):
            return socket.if_nametoindex(tenant.segment)

    def nft(self, text: str) -> None:
        """Runs nft commands on the gateway, as another program would."""
        namespaces.load(self.lab.gateway, text)

    def shift(self, seconds: float) -> None:
        """Shifts the daemon's wall clock by `seconds` from the right time."""
        new = self.control / "shift.new"
        new.write_text(str(seconds))
        new.rename(self.control / "shift")

    def repairs(self) -> int:
        """How often the daemon has repaired the ruleset, by its log."""
        return self.agent.log.read_bytes().count(b"it is put back")

    def on_gateway(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Runs a program on the gateway."""
        return namespaces.run(self.lab.gateway, argv)

    def status(self) -> dict[str, Any]:
        """The daemon's latest status; empty if there is none."""
        return read_status(self.table) or {}

    def last_words(self) -> str:
        """The last line of the daemon's log."""
        lines = self.agent.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


def _decoded(type_: Any, item: Any) -> Record:
    record: Record = msgspec.convert(item, type_, dec_hook=dec_hook, strict=False)
    return record


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)
