"""Finds, reads and checks presets: those that come with portward, and an operator's own files.

Refuses a key that `policy.preset` does not name, with its file and line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from portward.base.characters import unshown
from portward.base.resources import rules
from portward.config.documents import brief, nearest
from portward.config.files import mistake, read_toml
from portward.config.paths import is_path
from portward.errors import InputError
from portward.policy.preset import ExemptionPath, Offer, Preset

DEFAULT: Final = "azure-2020"


def bundled() -> tuple[str, ...]:
    """The names of the presets that come with portward."""
    return tuple(sorted(path.stem for path in rules("policy").glob("*.toml")))


def load(name: str, *, named_in: Path | None = None) -> Preset:
    """The preset with this name, or in the file at this path: a text with a `/`, or ending in `.toml`.

    Raises InputError with the file, line and field of a mistake, or with the existing names. `named_in` is the
    configuration file that names the preset, if there is one.
    """
    if is_path(name):
        return _read(Path(name))
    if name not in bundled():
        hint = nearest(name, bundled())
        problem = f"no preset is called {brief(name)}; {hint} (your own: a path)"
        raise InputError(problem, field="PRESET") if named_in is None else mistake(named_in, problem, "preset")
    return _read(rules("policy", f"{name}.toml"))


def _read(path: Path) -> Preset:
    preset = read_toml(path, Preset)
    for place, net in enumerate(preset.internal):
        if net.prefixlen == 0:
            raise mistake(path, f"{net} is the whole Internet: the policy would cover nothing", "internal", place)
        if getattr(net.network_address, "scope_id", None):
            raise mistake(path, f"{net} has a zone: a destination has none, leave it out", "internal", place)
    _check_once(path, preset.ports, "ports")
    _check_once(path, preset.internal, "internal")
    for name in ("name", "title", "source", "restart", "request"):
        _check_printable(path, getattr(preset, name), name)
    _check_offers(path, preset)
    return preset


def _check_once(path: Path, values: tuple[object, ...], field: str) -> None:
    for place, value in enumerate(values):
        if value in values[:place]:
            raise mistake(path, f"{value} stands twice here", field, place)


def _check_printable(path: Path, text: str, *steps: str | int) -> None:
    """Verbs print every text of a preset, and a terminal would obey control characters."""
    if unshown(text) is not None or (steps[-1] == "ids" and not text.isprintable()):  # ids must be typable
        raise mistake(path, f"{brief(text)} holds what cannot be printed: leave it out", *steps)


def _check_offers(path: Path, preset: Preset) -> None:
    seen: dict[str, int] = {}
    for place, offer in enumerate(preset.offers):
        if not offer.ids:
            raise mistake(path, "an offer needs at least one id", "offers", place, "ids")
        for id_ in offer.ids:
            if id_ in seen:
                where = "twice here" if seen[id_] == place else f"in offers[{seen[id_]}] too"
                raise mistake(path, f"offer {brief(id_)} stands {where}", "offers", place, "ids")
            seen[id_] = place
            if not id_ or id_ != id_.strip():
                raise mistake(
                    path, f"{brief(id_)} is no id: text without white space around it", "offers", place, "ids"
                )
        _check_offer(path, offer, "offers", place)
    if preset.otherwise is not None:
        if preset.otherwise.ids:
            raise mistake(path, "[otherwise] is for all other offers and takes no ids", "otherwise", "ids")
        _check_offer(path, preset.otherwise, "otherwise")


def _check_offer(path: Path, offer: Offer, *steps: str | int) -> None:
    for text in offer.ids:
        _check_printable(path, text, *steps, "ids")
    _check_printable(path, offer.title, *steps, "title")
    for text in offer.requires:
        _check_printable(path, text, *steps, "requires")
    if offer.exemption is ExemptionPath.NOT_NEEDED and offer.created_before is not None:
        problem = 'an offer whose exemption is "not-needed" is always let through: it takes no date'
        raise mistake(path, problem, *steps, "created_before")
    if offer.asks and offer.exemption is not ExemptionPath.REVIEW:
        raise mistake(
            path, f'only a review asks anything, and this exemption is "{offer.exemption}"', *steps, "asks"
        )
