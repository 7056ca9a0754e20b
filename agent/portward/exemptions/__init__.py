"""Exemptions: how a customer gets the permission to send, and loses it.

Invariants: an action is decided on the records that it replaces, and a grant needs either self-service or
an anti-fraud check that was passed.

In reading order: `lifecycle`, the states and actions (pure) · `service`, the verbs on a store (pure) · `fraud`,
runs the provider's anti-fraud check.
"""
