"""The provider's own anti-fraud check: a command that answers pass, fail or refer to a request.

It gets the request as one JSON object on stdin, and answers with one on stdout:

    {"result": "pass", "note": "known since 2019, no complaints"}

If the command fails in any way (it takes too long, crashes, is missing, answers something else), the result is
refer: a person must decide. Only this answer, from a command that exits with 0, means pass.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from functools import partial
from typing import BinaryIO, Final

import msgspec

from portward.config.documents import enc_hook
from portward.config.keys import Exemptions
from portward.errors import printable
from portward.exemptions.lifecycle import Application, Case, FraudChecker, FraudResult
from portward.model import FraudCheck

# A longer answer counts as a failure of the command. An answer has two short fields.
_MAX_ANSWER_BYTES: Final = 65_536
# A note is shown on one screen, with the rest of the request.
_MAX_NOTE_CHARS: Final = 500


class _Answer(msgspec.Struct, frozen=True):
    result: FraudCheck
    note: str = ""


def checker(settings: Exemptions) -> FraudChecker | None:
    """The check that the configuration names; None if it names none."""
    return partial(check, settings.check, settings.check_seconds) if settings.check else None


def check(command: tuple[str, ...], seconds: float, case: Case, asked: Application, by: str) -> FraudResult:
    """Runs the command for a request, for at most `seconds`, and returns its result. Never raises."""
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
    if len(out) > _MAX_ANSWER_BYTES:
        return _refer(f"its answer is longer than {_MAX_ANSWER_BYTES} bytes")
    try:
        answer = msgspec.json.decode(out, type=_Answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return _refer(f"its answer is not understood: {error}")
    return FraudResult(answer.result, printable(answer.note)[:_MAX_NOTE_CHARS])


def _request(case: Case, asked: Application, by: str) -> bytes:
    """The command's input, as JSON."""
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
    """The exit code and the output of a command. If the output is too long, only the beginning, which is longer
    than the limit. Raises TimeoutExpired, OSError or ValueError."""
    with _file(request) as given, subprocess.Popen(
        command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + seconds
            out = _output(process, deadline)
            code = 0 if len(out) > _MAX_ANSWER_BYTES else process.wait(max(0.0, deadline - time.monotonic()))
        except TimeoutError as error:
            raise subprocess.TimeoutExpired(command, seconds) from error
        finally:
            # Kills its children too: one that keeps the pipe open must not block the verb.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return code, out


def _file(data: bytes) -> BinaryIO:
    """A file in memory with this content. Unlike a pipe, it does not block the writer if the command never
    reads."""
    file = os.fdopen(os.memfd_create("portward-request"), "w+b")
    file.write(data)
    file.seek(0)
    return file


def _output(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """The output of a command until it closes it, or until it is too long. Raises TimeoutError at the deadline,
    which is a time of `time.monotonic`."""
    assert process.stdout is not None  # noqa: S101 # `_run` opens it as a pipe
    out = b""
    while len(out) <= _MAX_ANSWER_BYTES:
        if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        data = os.read(process.stdout.fileno(), _MAX_ANSWER_BYTES)
        if not data:
            break
        out += data
    return out


def _refer(why: str) -> FraudResult:
    note = f"the anti-fraud check decided nothing: {printable(why)[:_MAX_NOTE_CHARS]}"
    return FraudResult(FraudCheck.REFER, note)
