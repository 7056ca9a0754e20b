"""The inventory: an operator's subscriptions, attachments and exemptions as YAML or JSON, in and out.

What always holds:

- Everything is checked before anything is written. A mistake is reported with file, line, field and what would be
  right; up to 20 mistakes at once.
- A key that is not declared, or that occurs twice in one mapping, is refused.
- An export that is applied again changes nothing.
- Only `files` reads files.

In reading order: `document`, one document and its records · `yaml_document` and `json_document`, the two formats ·
`days`, days where a time is expected · `records`, the checks of each record and of all together · `files`, how
inventories are read · `difference`, what an inventory would change in a store.
"""
