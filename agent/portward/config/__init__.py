"""portward.toml, and the tools that read every TOML, JSON and YAML document.

Invariants: a mistake is an InputError with file, line, field and what would be right, and as many mistakes
as possible are reported at once. No read is unbounded, and none waits for another process.

In reading order: `keys`, every key with its default (pure) · `load`, reads the file · `interface_lists`, which
interfaces no configuration may name together (pure) · `paths`, `endpoint` and `store_url`, the meaning of paths,
addresses and URLs in it · `template`, a file with every key · `documents`, values and error texts of any document
(pure) · `toml` and `tomlsyntax`, TOML with the lines of its mistakes (pure) · `files`, bounded reads.
"""
