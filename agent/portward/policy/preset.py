"""A cloud's published policy as data: which ports, which destinations are internal, which offers may send.

A preset is a TOML file under `rules/policy/`, or an operator's own; `policy.presets` reads it. Its keys are the
fields of the structs here. Pure.
"""

from __future__ import annotations

from datetime import date
from enum import StrEnum
from functools import cached_property
from hashlib import sha256
from typing import Annotated

import msgspec
from msgspec import Meta

from portward.config.documents import enc_hook
from portward.model import Network

Port = Annotated[int, Meta(ge=1, le=65_535)]


class ExemptionPath(StrEnum):
    """How an exemption can be had."""

    NOT_NEEDED = "not-needed"
    SELF_SERVICE = "self-service"
    REVIEW = "review"
    NEVER = "never"


class ReviewQuestion(StrEnum):
    """What a request for review has to tell, beside the reason why mail cannot go through a relay."""

    MAIL_SOFTWARE = "mail-software"
    VOLUME = "volume"
    REVERSE_DNS = "reverse-dns"
    AUTHENTICATION = "authentication"
    TERMS = "terms"


class Offer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What holds for the subscriptions of some offers.

    With `exemption = "not-needed"` they are always let through. Else those created before `created_before`
    are, and the others as their exemption says. `requires` are conditions of the path, in words; `asks` is what
    a request for review has to tell, beside its justification.
    """

    ids: tuple[str, ...] = ()
    title: str
    exemption: ExemptionPath
    created_before: date | None = None
    requires: tuple[str, ...] = ()
    asks: tuple[ReviewQuestion, ...] = ()


class Preset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """A policy. `otherwise` holds for offers that are not listed; without it they can never send.

    `internal` are the destinations that are not on the Internet. `restart` says how a machine is restarted
    for a grant to count; empty where none is needed. `paas_blocked`: workload `paas` is blocked whatever the
    offer. `request` says how a review is asked for, as the end of a sentence.
    """

    name: str
    title: str
    source: str
    source_date: date
    # Mail has four (25, 465, 587, 2525): a long list is a mistake, and each port of it would be judged.
    ports: Annotated[tuple[Port, ...], Meta(min_length=1, max_length=15)]
    internal: tuple[Network, ...]
    restart: str = ""
    paas_blocked: bool = False
    request: str = ""
    offers: tuple[Offer, ...] = ()
    otherwise: Offer | None = None

    def offer(self, id_: str) -> Offer | None:
        """What holds for an offer; None where the preset does not know it."""
        return self._by_id.get(id_, self.otherwise)

    @cached_property
    def _by_id(self) -> dict[str, Offer]:
        return {id_: offer for offer in self.offers for id_ in offer.ids}

    @cached_property
    def digest(self) -> str:
        """A checksum (64 hex digits) of all that the preset says: another one, other verdicts."""
        return sha256(msgspec.json.encode(self, enc_hook=enc_hook)).hexdigest()
