"""The anti-fraud check that a provider plugs in: a command that gets a request and says pass, fail or refer.

It is given the request as one JSON object on stdin, and answers with one on stdout:

    {"result": "pass", "note": "known since 2019, no complaints"}

Whatever else happens (it takes too long, crashes, is not there, answers something else) means refer: a person has
to look. Nothing but that answer, from a command that ended with 0, means pass.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from typing import BinaryIO, Final

import msgspec

from portward.config.documents import enc_hook
from portward.errors import printable
from portward.exemptions.lifecycle import Application, Case, FraudResult
from portward.model import FraudCheck

# What an answer may have, in bytes; a longer one is none.
_LONGEST: Final = 65_536
_LONGEST_NOTE: Final = 500


class _Answer(msgspec.Struct, frozen=True):
    result: FraudCheck
    note: str = ""


def check(command: tuple[str, ...], seconds: float, case: Case, asked: Application, by: str) -> FraudResult:
    """What the command finds about a request, within so many seconds; never raises."""
    try:
        code, out = _run(command, seconds, _request(case, asked, by))
    except subprocess.TimeoutExpired:
        return _refer(f"it gave no answer within {seconds:g} s")
    except OSError as error:
        return _refer(f"{command[0]} cannot be run: {error.strerror or error}")
    except ValueError as error:
        return _refer(f"{command[0]} cannot be run: {error}")
    if code:
        return _refer(f"it ended with {code}")
    if len(out) > _LONGEST:
        return _refer(f"its answer is longer than {_LONGEST} bytes")
    try:
        answer = msgspec.json.decode(out, type=_Answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return _refer(f"its answer is not understood: {error}")
    return FraudResult(answer.result, printable(answer.note)[:_LONGEST_NOTE])


def _request(case: Case, asked: Application, by: str) -> bytes:
    """What the command is given."""
    return msgspec.json.encode(
        {
            "subscription": case.subscription,
            "before": case.exemption,
            "preset": case.preset.name,
            "at": case.now,
            "by": by,
            "justification": asked.justification,
            "details": asked.details,
            "until": asked.until,
        },
        enc_hook=enc_hook,
    )


def _run(command: tuple[str, ...], seconds: float, request: bytes) -> tuple[int, bytes]:
    """Exit code and output; of an output that is too long only so much that it shows. Raises TimeoutExpired,
    OSError or ValueError."""
    with _file(request) as given, subprocess.Popen(
        command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + seconds
            out = _output(process, deadline)
            code = 0 if len(out) > _LONGEST else process.wait(max(0.0, deadline - time.monotonic()))
        except TimeoutError as error:
            raise subprocess.TimeoutExpired(command, seconds) from error
        finally:
            # What it has started ends with it: a child that keeps the pipe open must not hold anybody up.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return code, out


def _file(data: bytes) -> BinaryIO:
    """A file in memory with this content: a command that does not read it does not hold up who writes it."""
    file = os.fdopen(os.memfd_create("portward-request"), "w+b")
    file.write(data)
    file.seek(0)
    return file


def _output(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """What a command prints until it closes its output, or until that is too long; raises TimeoutError at the
    deadline, by the monotonic clock."""
    assert process.stdout is not None  # noqa: S101 # asked for in `_run`
    out = b""
    while len(out) <= _LONGEST:
        if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        data = os.read(process.stdout.fileno(), _LONGEST)
        if not data:
            break
        out += data
    return out


def _refer(why: str) -> FraudResult:
    return FraudResult(FraudCheck.REFER, f"the anti-fraud check decided nothing: {printable(why)[:_LONGEST_NOTE]}")
