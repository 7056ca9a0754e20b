"""A document in YAML, and a store's records as one. Pure.

PyYAML's nodes know their lines, and libyaml composes them in C. Nodes and values take about 40 times the size of
the text in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Final

import msgspec
import yaml

from portward.config.documents import Steps, brief, explained, field_name
from portward.errors import InputError
from portward.inventory.document import Document, Lists, keys_by_kind
from portward.store.codec import decode

# A record is at the third level of a document and holds at most one level more; the rest is room to report a
# mistake by its field.
_MAX_DEPTH: Final = 32
# Merge keys (<<) of merge keys double a mapping at each step; the widest record has eight fields.
_MAX_MERGED_KEYS: Final = 32
# How many records are written at once: enough for speed, few enough to need little memory.
_CHUNK_RECORDS: Final = 1_000

_TAG: Final = "tag:yaml.org,2002:"
_TAGS: Final = tuple(_TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map"))


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc] # C where it is built
    """YAML whose values are those that JSON has too, and in which no mapping has a key twice.

    Dates stay text, so that a wrong date is reported with its line like any other value. Depth and merges have
    bounds: libyaml's composer recurses for each level, so deep nesting would overflow the stack and end the
    process; merges of merges would fill the memory.
    """

    def __init__(self, name: str, text: str) -> None:
        """`name` is the file as the operator named it."""
        super().__init__(text)
        self._name = name
        self._depth = 0
        # Identities of the mappings that hold merged keys already. The root keeps all nodes alive.
        self._merged: set[int] = set()

    def descend_resolver(self, parent: yaml.Node | None, index: Any) -> None:
        """Called by the composer before each node."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            mark = None if parent is None else parent.start_mark
            raise yaml.composer.ComposerError(None, None, f"nested more than {_MAX_DEPTH} levels deep", mark)

    def ascend_resolver(self) -> None:
        """Called by the composer after each node."""
        self._depth -= 1

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Called by the constructor before it makes a mapping: refuses double keys and puts merged keys into it.

        A mapping comes again for each merge that names it. Once it holds merged keys, a key of its own that
        overrides one of these looks as if it stood twice.
        """
        if id(node) in self._merged:
            return
        self._refuse_double_key(node)
        merged = [value for key, value in node.value if key.tag == f"{_TAG}merge"]
        if not merged:
            return
        if len(merged) > 1 or any(len(value.value) > _MAX_MERGED_KEYS for value in merged):
            self._refuse_merge(node)
        super().flatten_mapping(node)
        if len(node.value) > _MAX_MERGED_KEYS:
            self._refuse_merge(node)
        self._merged.add(id(node))

    def _refuse_double_key(self, node: yaml.MappingNode) -> None:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # the constructor refuses it; as text, aliases in it would fill the memory
            line, name = key.start_mark.line + 1, key.value
            if name in lines:
                problem = f"stands twice in one mapping, first in line {lines[name]}"
                raise InputError(problem, file=self._name, line=line, field=field_name((name,)))
            lines[name] = line

    def _refuse_merge(self, node: yaml.Node) -> None:
        problem = f"<< makes a mapping of more than {_MAX_MERGED_KEYS} keys"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    def _checked(self, node: yaml.Node) -> Any:
        """The value of a scalar with a known tag. A tag that does not fit its text raises many kinds of errors."""
        try:
            return yaml.SafeLoader.yaml_constructors[node.tag](self, node)
        except (ValueError, LookupError):
            problem = f"{brief(node.value)} is no {node.tag.removeprefix(_TAG)} that can be read"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def _unknown(self, node: yaml.Node) -> Any:
        problem = f"the tag {brief(node.tag)} is not taken; a value stands here without one"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc] # as above
    """The way back: text that looks like a date needs no quotes."""


_Loader.yaml_constructors = {
    **{tag: _Loader._checked if tag in (f"{_TAG}bool", f"{_TAG}int", f"{_TAG}float") else construct
       for tag, construct in yaml.SafeLoader.yaml_constructors.items() if tag in _TAGS},
    None: _Loader._unknown,
}  # fmt: skip
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in _class.yaml_implicit_resolvers.items()
    }


class YamlDocument(Document):
    """A document in YAML. Keeps the tree of nodes, which know their lines."""

    def __init__(self, name: str, text: str) -> None:
        """Raises InputError for what is no YAML, or has other top-level keys than the three lists."""
        super().__init__(name)
        self._node, content = self._parsed(text)
        try:
            self._content = msgspec.convert(content, Lists)
        except msgspec.ValidationError as error:
            problem, steps = explained(str(error), Lists, content)
            raise self.mistake(problem, *steps) from None

    def line(self, steps: Steps) -> int:
        """See `Document`."""
        node, line = self._node, self._node.start_mark.line
        for step in steps:
            found = _step_into(node, step)
            if found is None:
                break
            line, node = found
        return int(line) + 1

    def _lists(self) -> Lists:
        return self._content

    def _parsed(self, text: str) -> tuple[yaml.Node, Any]:
        try:
            loader = _Loader(self.name, text)
        except yaml.YAMLError as error:  # a character that YAML does not allow
            raise self._malformed(error, text) from None
        try:
            node = loader.get_single_node()
            if node is None:
                raise InputError("the document is empty", file=self.name)
            return node, loader.construct_document(node)
        except yaml.YAMLError as error:
            raise self._malformed(error, text) from None
        finally:
            loader.dispose()

    def _malformed(self, error: yaml.YAMLError, text: str) -> InputError:
        if isinstance(error, yaml.MarkedYAMLError):
            mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
            return InputError(f"not YAML: {problem}", file=self.name, line=mark.line + 1 if mark else None)
        place = getattr(error, "position", None)
        line = None if place is None else text.encode().count(b"\n", 0, place) + 1
        return InputError(f"not YAML: {str(error).splitlines()[0]}", file=self.name, line=line)


def yaml_text(records: Mapping[str, str]) -> Iterator[str]:
    """A store's records (key → JSON) as pieces of a YAML document, without empty fields. Raises RecordError for a
    record that cannot be read, because it would be missing."""
    for kind, keys in keys_by_kind(records).items():
        yield f"{kind}:{'' if keys else ' []'}\n"
        left = iter(keys)
        while part := [_fields(key, records[key]) for key in islice(left, _CHUNK_RECORDS)]:
            yield yaml.dump(part, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000)


def _fields(key: str, body: str) -> dict[str, Any]:
    """The fields of a record that are not empty."""
    decode(key, body)
    fields: dict[str, Any] = msgspec.json.decode(body)
    return {name: value for name, value in fields.items() if value not in (None, "")}


def _step_into(node: yaml.Node, step: str | int) -> tuple[int, yaml.Node] | None:
    """The line (from 0) and the node of a mapping's key or of a list's item; None if there is none."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == step:
                return key.start_mark.line, value
    elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        found = node.value[step]
        return found.start_mark.line, found
    return None
