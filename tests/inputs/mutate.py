"""Documents that are nearly right: keys, types, values or text of a right one were changed at random."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from datetime import UTC, date, datetime
from random import Random
from typing import Any, Final

import tomli_w
import yaml

_ID, _OTHER = "11111111-0000-4000-8000-000000000001", "11111111-0000-4000-8000-000000000002"
CONFIG: Final[dict[str, Any]] = {
    "segments": ["vni*", "tap0"], "uplinks": ["up0"], "store": "sqlite:/srv/portward.db", "table": "/srv/table",
    "preset": "azure-2020", "mode": "enforce", "on_agent_down": "closed",
    "queue": {"first": 0, "workers": 2, "length": 4096, "segment_rate": 5000, "rate": 20000, "burst": 4000},
    "verdicts": {"refuse_with": "drop", "observe": ["vni7"], "allow_seconds": 60, "sources": 65536},
    "metrics": {"address": "127.0.0.1:9125", "subscriptions": True},
}  # fmt: skip
PRESET: Final[dict[str, Any]] = {
    "name": "own", "title": "Our own", "source": "the board", "source_date": date(2026, 2, 3), "ports": [25, 587],
    "internal": ["10.0.0.0/8", "fd00::/8"], "restart": "stop it", "paas_blocked": True, "request": "ask",
    "offers": [
        {"ids": ["gold", "silver"], "title": "Gold", "exemption": "not-needed"},
        {"ids": ["bronze"], "title": "Bronze", "exemption": "review", "created_before": date(2020, 1, 1),
         "requires": ["a reason"]},
    ],
    "otherwise": {"title": "Others", "exemption": "never"},
}  # fmt: skip
INVENTORY: Final[dict[str, Any]] = {
    "subscriptions": [
        {"id": _ID, "name": "contoso", "offer": "enterprise-agreement", "created": "2021-03-02"},
        {"id": _OTHER, "offer": "csp", "created": "2022-06-30", "standing": "good", "payment_history": True,
         "mode": "observe"},
    ],
    "attachments": [
        {"segment": "vni1", "address": "10.0.0.4", "subscription": _ID, "started": "2026-01-10T08:00:00Z"},
        {"segment": "vni2", "address": "2001:db8::/64", "subscription": _OTHER, "workload": "paas"},
    ],
    "exemptions": [
        {"subscription": _OTHER, "state": "granted", "requested": "2026-01-08T09:00:00Z",
         "decided": "2026-01-09T12:00:00Z", "until": "2027-01-09T12:00:00+02:00", "by": "self",
         "justification": "a\nb"},
    ],
}  # fmt: skip
RECORDS: Final[list[tuple[str, dict[str, Any]]]] = [
    (f"subscriptions/{_ID}", INVENTORY["subscriptions"][0]),
    ("attachments/vni1/10.0.0.4", INVENTORY["attachments"][0]),
    ("attachments/vni2/2001:db8::/64", INVENTORY["attachments"][1]),
    (f"exemptions/{_OTHER}", INVENTORY["exemptions"][0]),
]

WORDS: Final = (
    "", " ", "a", "\x00", "\x1b[31m", "\x9b", "\u202e", "\u200b", "\u2028", "\x85", "\ufeff", "é", "\U0001f4e7",
    "p\u0430y",
    "null", "~", "yes", "=", "<<", "*", "..", "vni 1", "vni/1", "v" * 16, "x" * 700, "1e999", "0x10", "1:20",
    "%s{}`$.a",
    "a` - at `$.b", "10.0.0.0/8", "10.0.0.4/24", "0.0.0.0/0", "::/0", "::ffff:10.0.0.4", "fe80::1%eth0",
    "10.0.0.4/32",
    "2001:DB8::1", "10.0.0.256", "2020-02-30", "0001-01-01", "9999-12-31", "0001-01-01T00:00:00+01:00",
    "9999-12-31T23:59:59-23:59", "1970-01-01T00:00:00Z", "1969-12-31T23:59:59Z", "2026-01-10T08:00:00",
    "2026-01-10",
    "2026-01-10T08:00:00.123456+05:30", _ID, _ID.upper().replace("1", "A"), _ID.replace("-", ""), "granted",
    "revoked",
    "requested", "rejected", "good", "vm", "observe", "never", "not-needed", "csp", "azure-2023", "sqlite:",
    ":1", "[::1]:1",
)  # fmt: skip
VALUES: Final[tuple[Any, ...]] = (
    None, True, False, -1, 0, 1, 25, 65535, 65536, 2**31, 2**63, 2**70, 10**400, 0.5, 1e308, float("nan"),
    float("inf"),
    [], {}, [[]], [[[[["a"]]]]], {"a": {"b": {"c": 1}}}, ["a", 5], date(1, 1, 1), datetime(9999, 12, 31,
    tzinfo=UTC),
)  # fmt: skip
TOKENS: Final = (
    "\n", "\r", "\r\n", "\t", " ", "\x00", "\x1b", "\ufeff", "[", "]", "{", "}", "[[", "]]", '"', "'", '"""',
    "'''", "\\",
    "\\u0000", "\\ud800", "\\x", ",", ":", ": ", "- ", "? ", "#", "=", ".", "&a ", "*a", "<<: *a\n", "!!int ",
    "!!bool ",
    "!!binary ", "!!python/object:os.system ", "!a ", "---\n", "...\n", "|\n", ">-\n", "%YAML 9.9\n", "[" * 50,
    "{a: " * 50,
    "a." * 30, "9" * 5000, "0b_", "0x", "NaN", "1e999", "-", "~", "null", "true", "id", "segment", "\U0001f4e7",
    "é",
)  # fmt: skip


def mutated(kind: str, random: Random) -> bytes:
    """A document of a kind (config, preset, yaml, json, record), changed in up to four places; unchanged at times.
    A record is its key, a line break, and its JSON."""
    if kind == "record":
        key, body = copy.deepcopy(random.choice(RECORDS))
        box = {"body": body, "key": key}
        _mutate(box, random)
        text = f"{box.get('key')}\n{_json(box.get('body'))}"
    else:
        document = copy.deepcopy({"config": CONFIG, "preset": PRESET}.get(kind, INVENTORY))
        _mutate(document, random)
        text = WRITERS[kind](document)
    return _mutated_text(text, random)


def _mutate(document: Any, random: Random) -> None:
    for _ in range(random.choice((0, 0, 1, 1, 1, 2, 4))):
        inner = _places(document)
        if not inner:
            return
        at, step = random.choice(inner)
        match random.randrange(6):
            case 0:
                at[step] = random.choice(WORDS)
            case 1:
                at[step] = copy.deepcopy(random.choice(VALUES))
            case 2:
                del at[step]
            case 3 if isinstance(at, dict):
                at[random.choice((*WORDS, "id", "created", "until", "first", "offers"))] = at.pop(step)
            case 3 | 4:
                other, its = random.choice(inner)
                at[step] = copy.deepcopy(other[its])
            case _:
                if isinstance(at, list):
                    at.extend(copy.deepcopy(at) * random.choice((1, 2, 9)))
                elif isinstance(at[step], str):
                    word = at[step]
                    cut = random.randint(0, len(word))
                    at[step] = word[:cut] + random.choice(WORDS) + word[cut:]


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every value in a document, as its container and its key or index there."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        at = waiting.pop()
        steps = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
        found += [(at, step) for step in steps]
        waiting += [at[step] for step in steps]
    return found


def _mutated_text(text: str, random: Random) -> bytes:
    for _ in range(random.choice((0, 0, 0, 1, 1, 3))):
        start = random.randint(0, len(text))
        end = min(len(text), start + random.choice((0, 0, 1, 1, 5, 40)))
        piece = text[start:end]
        match random.randrange(4):
            case 0:
                text = text[:start] + random.choice(TOKENS) + text[end:]
            case 1:
                text = text[:start] + text[end:]
            case 2:
                text = text[:end] + piece + text[end:]
            case _:
                lines = text.splitlines(keepends=True) or [""]
                line = random.randrange(len(lines))
                text = "".join([*lines[: line + 1], *lines[random.randrange(len(lines)) :]])
    data = text.encode(errors="surrogatepass")
    if not random.randrange(12):
        at = random.randint(0, len(data))
        data = data[:at] + random.randbytes(random.choice((1, 1, 4))) + data[at + 1 :]
    return data


def _json(document: Any) -> str:
    return json.dumps(document, default=str, ensure_ascii=False, indent=1)


def _toml(document: Any) -> str:
    try:
        return tomli_w.dumps(_without_none(document))
    except (TypeError, ValueError):  # a number that is too large to be text
        return ""


def _yaml(document: Any) -> str:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def _without_none(value: Any) -> Any:
    """The value without its None values, which TOML cannot express."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return "" if value is None else value


WRITERS: Final[dict[str, Callable[[Any], str]]] = {"config": _toml, "preset": _toml, "yaml": _yaml, "json": _json}
KINDS: Final = (*WRITERS, "record")
