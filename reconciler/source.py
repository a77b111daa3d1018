"""YAML text to plain values, with the position of each: YAML 1.2's core schema, strictly.

Differences from PyYAML's own loader, each because a fleet spec must mean what it looks like:
`no` and `on` are words, `10:30` is a string, a key given twice is an error, and every value's
line and column is kept so that a mistake can be pointed at. Tags have no meaning and are refused.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from reconciler.errors import Problem

Path = tuple[str | int, ...]

# The values of a few thousand models stay below this; an alias bomb does not.
_MAX_VALUES = 100_000
# A spec is some ten levels deep. libyaml's composer recurses in C, where too deep is a crash.
_MAX_DEPTH = 100

# Python refuses to write more than 4,300 digits; so long a number is a mistake anyway.
_MAX_NUMBER = 1000

_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULL = {"", "~", "null", "Null", "NULL"}
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)")
_OCTAL_OR_HEX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
)


@dataclass(frozen=True, slots=True)
class Source:
    """One YAML file's value, and where each part of it stands."""

    file: str
    value: Any
    positions: dict[Path, tuple[int, int]] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    def problem(self, path: Path, message: str) -> Problem:
        """Return a problem at `path`, or at the nearest enclosing value that has a position."""
        while path and path not in self.positions:
            path = path[:-1]
        line, column = self.positions.get(path, (1, 1))
        return Problem(self.file, line, column, message)


def parse(file: str, text: str) -> Source:
    """Return the value of a YAML text. Mistakes come back as `problems`, never as an exception."""
    reader = _Reader(file)
    try:
        refusals = tuple(_refusals(file, text))
        if refusals:
            return Source(file, None, problems=refusals)
        node = yaml.compose(text, Loader=yaml.CSafeLoader)
        value = None if node is None else reader.read(node, ())
    except yaml.YAMLError as error:
        return Source(file, None, problems=(_syntax_problem(file, text, error),))
    except RecursionError:  # an alias inside its own anchor
        return Source(file, None, problems=(Problem(file, 1, 1, "nested too deeply"),))
    return Source(file, value, reader.positions, tuple(reader.problems))


def _refusals(file: str, text: str) -> Iterator[Problem]:
    """Yield what the composer would crash on, or silently take for something else."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            yield Problem(file, *_position(event), "nested too deeply")
            return
        if getattr(event, "tag", None) is not None:
            yield Problem(file, *_position(event), "a tag (!...) has no meaning here; remove it")


def _syntax_problem(file: str, text: str, error: yaml.YAMLError) -> Problem:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        what = error.problem or "not valid YAML"
        return Problem(file, mark.line + 1, mark.column + 1, f"YAML syntax: {what}")
    if isinstance(error, yaml.reader.ReaderError):
        # libyaml counts bytes.
        before = text.encode()[: error.position].decode(errors="replace")
        line = before.count("\n") + 1
        column = len(before) - (before.rfind("\n") + 1) + 1
        return Problem(file, line, column, "YAML syntax: a character that YAML does not allow")
    return Problem(file, 1, 1, "YAML syntax: not valid YAML")


class _Reader:
    """Turns composed nodes into values; one per file."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.positions: dict[Path, tuple[int, int]] = {}
        self.problems: list[Problem] = []
        self._count = 0

    def read(self, node: yaml.Node, path: Path) -> Any:
        self.positions.setdefault(path, _position(node))
        self._count += 1
        if self._count > _MAX_VALUES:
            raise yaml.MarkedYAMLError(problem="too many values", problem_mark=node.start_mark)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, at)) for at, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)  # noqa: S101 - the third and last kind of node
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for key, item in self._pairs(node):
            if key.value in value:
                self._problem(key, f"{shown(key.value)} is given twice; keep one")
                continue
            # The key's position: it is what a reader looks for when told of `replicas`.
            self.positions[(*path, key.value)] = _position(key)
            value[key.value] = self.read(item, (*path, key.value))
        return value

    def _pairs(self, node: yaml.MappingNode) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        for key, item in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield key, item
            else:
                self._problem(key, "a key must be a plain word")

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text: str = node.value
        return text if node.style else core_scalar(text)  # quoted or a block: always text

    def _problem(self, node: yaml.Node, message: str) -> None:
        self.problems.append(Problem(self.file, *_position(node), message))


def core_scalar(text: str) -> Any:
    """Return a plain scalar's value by YAML 1.2's core schema; digits may be grouped by `_`."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if len(text) > _MAX_NUMBER:
        return text
    if _INT.fullmatch(text):
        return int(text)
    if _OCTAL_OR_HEX.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        number = float(text)
        return number if math.isfinite(number) else text
    return text


def shown(value: object) -> str:
    """Return a value of a spec as one short line of ASCII: messages go to terminals and logs."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint at the known word that is most like this one, or nothing."""
    import difflib  # not at the top: a spec without a mistake needs none

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def _position(part: yaml.Node | yaml.Event) -> tuple[int, int]:
    mark = part.start_mark
    return (1, 1) if mark is None else (mark.line + 1, mark.column + 1)
