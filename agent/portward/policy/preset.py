"""A cloud's published policy as data: its ports, its internal destinations, and which offers may send.

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
    """How a subscription gets an exemption."""

    NOT_NEEDED = "not-needed"
    SELF_SERVICE = "self-service"
    REVIEW = "review"
    NEVER = "never"


class ReviewQuestion(StrEnum):
    """A detail that a request for review must state, beside the reason why mail cannot go through a relay."""

    MAIL_SOFTWARE = "mail-software"
    VOLUME = "volume"
    REVERSE_DNS = "reverse-dns"
    AUTHENTICATION = "authentication"
    TERMS = "terms"


class Offer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rule for the subscriptions with one of these offers.

    With `exemption = "not-needed"` they may always send. Otherwise a subscription may send if it was created
    before `created_before`, or if it has an exemption. `requires` lists conditions for the exemption, as text.
    `asks` lists what a request for review must state, beside its justification.
    """

    ids: tuple[str, ...] = ()
    title: str
    exemption: ExemptionPath
    created_before: date | None = None
    requires: tuple[str, ...] = ()
    asks: tuple[ReviewQuestion, ...] = ()


class Preset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """A policy.

    `ports` are the *policy ports*: the TCP ports that the policy covers. `internal` are the destinations that are
    not on the Internet. `otherwise` is the rule for offers that are not listed; without it they can never send.
    `restart` is the text for a customer on how to restart a machine so that a grant counts; empty if no restart is
    needed. With `paas_blocked`, workload `paas` is blocked whatever the offer. `request` is the text for a
    customer on how to ask for a review, as the end of a sentence.
    """

    name: str
    title: str
    source: str
    source_date: date
    # Mail uses four ports (25, 465, 587, 2525), so a long list is a mistake.
    ports: Annotated[tuple[Port, ...], Meta(min_length=1, max_length=15)]
    internal: tuple[Network, ...]
    restart: str = ""
    paas_blocked: bool = False
    request: str = ""
    offers: tuple[Offer, ...] = ()
    otherwise: Offer | None = None

    def offer(self, id_: str) -> Offer | None:
        """The rule for the offer with this id; None if the preset has none."""
        return self._by_id.get(id_, self.otherwise)

    @cached_property
    def _by_id(self) -> dict[str, Offer]:
        return {id_: offer for offer in self.offers for id_ in offer.ids}

    @cached_property
    def digest(self) -> str:
        """A SHA-256 checksum (64 hex digits) of the whole preset. If it changes, verdicts may change."""
        return sha256(msgspec.json.encode(self, enc_hook=enc_hook)).hexdigest()
