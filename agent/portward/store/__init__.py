"""The policy store: where an operator's policy is kept, with a log of who changed what and when.

Invariants:

- A batch of writes is one revision, all of it or nothing. It is written only if the store is still at the revision
  that the writer has read, so no change is lost.
- The log only grows, and its entries form a chain of hashes.
- A record that cannot be read costs only its own subscription or attachment.

In reading order: `values` and `protocol`, what every store takes, returns and does · `codec`, how keys and records
are written · `validity`, what a valid record may contain · `backends`, which stores there are · `sqlite/`, the one
that is a file · `notifier`, how its followers wake · `update`, read, decide and write again after a conflict ·
`lookup`, the records of one subscription or address · `chain`, the hashes and the check of the log · `flips`, how
many customers a change turns over · `confirmation`, how an operator confirms such a change · `packed`, attachments
without objects, for bulk loads · `unreadable`, the records that cannot be read.
"""
