"""The policy: which subscriptions may send, by a preset.

Invariants: a decision depends only on its inputs, so the agent, the verbs and the tests get the same one.

In reading order: `preset`, a policy as data · `decide`, the decision on a source (both pure) · `remedy`, what a
reason means for the customer (pure) · `presets`, reads the files.
"""
