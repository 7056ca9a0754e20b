"""The helpers with which the tests in the virtual machine measure: watcher, and messages of the machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from vm import machine as vm_machine
from vm.guest import connect, watcher
from vm.image import Image
from vm.machine import EmulatorError, Machine

# The output of Linux 6.1 when both CPUs had stalled, shortened.
_STALL = """\
[  162.129048] rcu: INFO: rcu_preempt self-detected stall on CPU
[  162.130000] CPU: 0 PID: 339 Comm: python3 Not tainted 6.1.0-50-cloud-amd64 #1  Debian 6.1.176-1
[  162.130100] RIP: 0010:asm_exc_int3+0x0/0x40
[  162.130200]  <TASK>
[  162.130300]  ip_local_deliver+0x5c/0x110
[  162.130400]  ? do_sync_core+0x26/0x30
[  162.130500]  process_backlog+0x8b/0x120
[  162.131000] CPU: 1 PID: 404 Comm: python3 Not tainted 6.1.0-50-cloud-amd64 #1  Debian 6.1.176-1
[  162.131100] RIP: 0010:ip_local_deliver+0x5c/0x110
[  162.131300]  __netif_receive_skb_one_core+0x85/0xa0
"""
_LEFTOVER = "[    9.000000]  ? asm_exc_int3+0x35/0x40\n"


def test_a_connection_that_is_not_open_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "RUN", tmp_path)
    lines = [{"at": 1.0}, {"at": 2.0}, {"at": 2.0, "wait": 0.5}, {"at": 3.0}, {"at": 9.0}]
    (tmp_path / "connect-vni1001").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert connect.read(2.0, 4.0) == [0.5, None]


@pytest.mark.parametrize(("written", "others", "taken"), [(1.0, 1.0, True), (-1.0, 1.0, False), (1.0, 0.0, False)])
def test_a_watcher_that_does_not_see_is_no_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: float, others: float, taken: bool
) -> None:
    """The watcher writes `written` seconds after the request, and has seen `others` more packets than before."""
    monkeypatch.setattr(watcher, "RUN", tmp_path)
    now = time.monotonic()
    numbers = iter([{"at": now, "others": 5.0}] + 1000 * [{"at": now + written, "others": 5.0 + others}])
    monkeypatch.setattr(watcher, "read", lambda: next(numbers))
    if taken:
        assert watcher.newer(0.3)["others"] == 6.0
    else:
        with pytest.raises(TimeoutError):
            watcher.newer(0.3)


class _Process:
    """The process of a machine that runs until it was polled `times` times."""

    def __init__(self, times: int) -> None:
        self._left = times

    def poll(self) -> int | None:
        """None while the process runs."""
        self._left -= 1
        return 0 if self._left < 0 else None


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine that has sent no message, and whose console is checked without a delay."""
    monkeypatch.setattr(vm_machine, "_LOOKED_AT", 0.0)
    monkeypatch.setattr(vm_machine, "_PAUSE", 0.001)
    found = Machine(Image(tmp_path, tmp_path, tmp_path), tmp_path, tmp_path)
    monkeypatch.setattr(found, "_process", _Process(100), raising=False)
    for name in ("console", "told"):
        (tmp_path / name).touch()
    return found


def send(machine: Machine, *words: dict[str, Any]) -> None:
    """Writes messages to the file to which the machine would write them."""
    machine.console.with_name("told").write_text("".join(json.dumps(line) + "\n" for line in words))


def test_all_messages_of_a_machine_that_is_off_are_read(machine: Machine) -> None:
    send(machine, {"stage": "one"}, {"end": True})
    assert list(machine.words(60, 60)) == [{"stage": "one"}, {"end": True}]


def test_a_silent_machine_is_not_waited_for(machine: Machine) -> None:
    send(machine, {"stage": "one"})
    with pytest.raises(TimeoutError, match="told nothing"):
        list(machine.words(60, 0.02))


def test_leaks_do_not_keep_a_machine_alive(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Leaking(_Process):
        def poll(self) -> int | None:
            with machine.console.with_name("told").open("a") as out:
                out.write('{"leak": "packet"}\n')
            return super().poll()

    monkeypatch.setattr(machine, "_process", Leaking(1_000))
    with pytest.raises(TimeoutError, match="told nothing"):
        list(machine.words(60, 0.05))


def test_a_breakpoint_that_is_gone_is_known_as_the_emulators(machine: Machine) -> None:
    machine.console.write_text(_LEFTOVER + _STALL)
    with pytest.raises(EmulatorError):
        list(machine.words(60, 60))


def test_what_calls_left_on_a_stack_is_no_breakpoint(machine: Machine) -> None:
    machine.console.write_text(_LEFTOVER)
    assert list(machine.words(60, 60)) == []


def test_console_output_before_the_last_message_is_ignored(machine: Machine) -> None:
    machine.console.write_text(_STALL)
    send(machine, {"stage": "one"})
    assert list(machine.words(60, 60)) == [{"stage": "one"}]


def test_a_stall_is_reported_cpu_by_cpu(machine: Machine) -> None:
    machine.console.write_text("[    1.000000] early\n" + _STALL + "[  170.000000] last line\n")
    said = machine.last_words()
    assert said[0] == "rcu: INFO: rcu_preempt self-detected stall on CPU"
    assert said[3] == "ip_local_deliver < process_backlog"
    assert said[5:8] == ["RIP: 0010:ip_local_deliver+0x5c/0x110", "__netif_receive_skb_one_core", "…"]
    assert said[-1] == "last line"
    assert "early" not in said


def test_without_a_stall_the_consoles_last_lines_are_returned(machine: Machine) -> None:
    machine.console.write_text("".join(f"[    1.000000] line {number}\n" for number in range(20)))
    assert machine.last_words() == [f"line {number}" for number in range(12, 20)]
