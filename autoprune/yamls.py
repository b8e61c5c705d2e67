"""YAML without surprises: the scalars of YAML 1.2's core schema, no aliases, repeated keys or tags, all bounded.

Knows text alone; files are read and written elsewhere. `on`, `no` and `1:30` are texts, `1e-3` is a number.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from autoprune.errors import AutopruneError

DEPTH_LIMIT = 50
NODE_LIMIT = 500_000
"""Texts, numbers, lists and mappings of one file, about 40,000 units of a policy. Each takes 20 microseconds and 600
bytes: ten million, which 10 MB can hold, would take minutes and the memory of the machine.
"""
DIRECTIVE_LIMIT = 10
"""Lines such as `%YAML 1.2`; all are read before anything can be refused."""

_TAG = "tag:yaml.org,2002:"
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_NULL = re.compile(r"~|null|Null|NULL|")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that autoprune does not take."""


class _Loader(yaml.SafeLoader):
    """Composes a tree of nodes; values are made from it by `_value`."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own name
    depth = 0
    nodes = 0
    directives = 0

    def fetch_directive(self) -> None:
        """A line that begins with `%`, refusing very many."""
        self.directives += 1
        if self.directives > DIRECTIVE_LIMIT:
            mark: Any = self.get_mark()
            raise _Refused(problem=f"more than {DIRECTIVE_LIMIT} directives (%NAME)", problem_mark=mark)
        super().fetch_directive()

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """One node, refusing aliases, deep nesting and very many."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(problem="aliases (*name) are not allowed; write it out", problem_mark=mark)
        if self.depth >= DEPTH_LIMIT:
            raise _Refused(problem=f"nested deeper than {DEPTH_LIMIT} levels", problem_mark=mark)
        self.nodes += 1
        if self.nodes > NODE_LIMIT:
            raise _Refused(problem=f"more than {NODE_LIMIT} texts, numbers, lists and mappings", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this reader, or one of YAML 1.1, would take for something else; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        """Write every value out."""
        return True

    def represent_text(self, data: str) -> ScalarNode:
        """A text; one with line breaks or invisible characters is escaped, for quotes alone would fold them."""
        return self.represent_scalar(_TAG + "str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


for _kind, _pattern, _first in (
    ("bool", _BOOL, list("tTfF")),
    ("null", _NULL, ["~", "n", "N", ""]),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern.pattern})\Z"), _first)


def parse(text: str, *, name: str, error: type[AutopruneError]) -> object:
    """The one document in `text`. Raises `error` with `name`, line and column."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        return None if node is None else _value(node)
    except yaml.MarkedYAMLError as bad:
        raise error(f"{name}{_where(bad)}: {_why(bad)}") from bad
    except yaml.YAMLError as bad:
        raise error(f"{name}: is not a YAML file: {' '.join(str(bad).split())}") from bad
    except (
        ValueError,
        ArithmeticError,
        IndexError,
        RecursionError,
    ) as bad:  # PyYAML's scanner on escapes outside Unicode
        raise error(f"{name}: is not a YAML file: {bad!s:.200}") from bad


def text(value: object) -> str:
    """`value` as YAML in its own order, innermost lists and mappings on one line."""
    return str(
        yaml.dump(value, Dumper=_Dumper, default_flow_style=None, sort_keys=False, width=2**31 - 1, allow_unicode=True)
    )


def is_unicode(text: str) -> bool:
    """Whether it can be written down: it holds no half characters (lone surrogates)."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _value(node: Node) -> object:
    if isinstance(node, MappingNode):
        return _mapping(node)
    if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
        return [_value(item) for item in node.value]
    if isinstance(node, ScalarNode):
        return _scalar(node)
    raise _Refused(problem=f"the tag {node.tag!r:.60} is not allowed", problem_mark=node.start_mark)


def _mapping(node: MappingNode) -> dict[object, object]:
    if node.tag != _TAG + "map":
        raise _Refused(problem=f"the tag {node.tag!r:.60} is not allowed", problem_mark=node.start_mark)
    content: dict[object, object] = {}
    for key_node, value_node in node.value:
        key = _value(key_node)
        if not isinstance(key, str):
            raise _Refused(
                problem=f"the key {key_node.value!r:.60} is not a text; quote it", problem_mark=key_node.start_mark
            )
        if key in content:
            raise _Refused(problem=f"the key {key!r:.80} is given twice; keep one", problem_mark=key_node.start_mark)
        content[key] = _value(value_node)
    return content


def _scalar(node: ScalarNode) -> object:
    kind, written = node.tag.removeprefix(_TAG), str(node.value)
    if kind == "str":
        if not is_unicode(written):
            raise _Refused(problem="half a character (a lone surrogate)", problem_mark=node.start_mark)
        return written
    if kind == "null" and _NULL.fullmatch(written):
        return None
    if kind == "bool" and _BOOL.fullmatch(written):
        return written.lower() == "true"
    if kind == "int" and _INT.fullmatch(written) and len(written) <= 4000:
        return int(written)
    if kind == "float" and _FLOAT.fullmatch(written):
        return float(written.lower().replace(".inf", "inf").replace(".nan", "nan"))
    raise _Refused(problem=f"cannot read {written!r:.60} as {node.tag!r:.60}", problem_mark=node.start_mark)


def _where(bad: yaml.MarkedYAMLError) -> str:
    mark = bad.problem_mark or bad.context_mark
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""


def _why(bad: yaml.MarkedYAMLError) -> str:
    reason = bad.problem or "is not YAML"
    if isinstance(bad, _Refused):
        return reason
    return f"not valid YAML: {' '.join(filter(None, [bad.context, reason])):.300}"
