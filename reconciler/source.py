"""YAML text to plain values, with the position of each: YAML 1.2's core schema, strictly.

Differences from PyYAML's own loader, each because a fleet spec must mean what it looks like:
`no` and `on` are words, `10:30` is a string, a key given twice is an error, and every value's
line and column is kept so that a mistake can be pointed at. Tags have no meaning and are refused.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from reconciler.errors import Problem

Path = tuple[str | int, ...]

# The values of a few thousand models stay below this; an alias bomb does not.
_MAX_VALUES = 100_000
# A spec is some ten levels deep.
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
    reader = _Reader(file, yaml.CSafeLoader(text))
    try:
        value = reader.document()
    except _TooDeep as error:
        return Source(file, None, problems=(error.problem,))
    except yaml.YAMLError as error:
        return Source(file, None, problems=(_syntax_problem(file, text, error),))
    return Source(file, value, reader.positions, tuple(reader.problems))


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


class _TooDeep(Exception):
    """A text is nested too deeply."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem


class _Reader:
    """Turns a parser's events into values; one per file.

    Not PyYAML's composer: it recurses in C, where too deep is a crash, it takes a tag for what it
    makes of a value without one, and it costs as much again as parsing.
    """

    def __init__(self, file: str, parser: yaml.CSafeLoader) -> None:
        self.file = file
        self.positions: dict[Path, tuple[int, int]] = {}
        self.problems: list[Problem] = []
        self._parser = parser
        self._events: list[Any] = []  # as far as they were read; aliases go back among them
        self._at = 0
        self._anchors: dict[str, int] = {}  # name -> where its value begins among the events
        self._count = 0

    def document(self) -> Any:
        """Return the one document's value, None for an empty text. Raises YAMLError."""
        self._next()  # the stream's start
        if isinstance(self._next(), yaml.StreamEndEvent):
            return None
        value = self._value(())
        self._next()  # the document's end
        more = self._next()
        if not isinstance(more, yaml.StreamEndEvent):
            raise _error("but found another document", more)
        return value

    def _peek(self) -> Any:
        if self._at == len(self._events):
            self._events.append(self._parser.get_event())
        return self._events[self._at]

    def _next(self) -> Any:
        event = self._peek()
        self._at += 1
        return event

    def _value(self, path: Path) -> Any:
        event = self._next()
        if isinstance(event, yaml.AliasEvent):
            return self._again(event, path)
        self._look_at(event)
        self.positions.setdefault(path, _position(event))
        self._count += 1
        if self._count > _MAX_VALUES:
            raise _error("too many values", event)
        if isinstance(event, yaml.ScalarEvent):
            text: str = event.value
            return text if event.style else core_scalar(text)  # quoted or a block: always text
        if len(path) >= _MAX_DEPTH:
            raise _TooDeep(Problem(self.file, *_position(event), "nested too deeply"))
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        return self._sequence(path)

    def _again(self, alias: yaml.AliasEvent, path: Path) -> Any:
        """Read the value of an anchor where its alias stands."""
        if alias.anchor not in self._anchors:
            raise _error("found undefined alias", alias)
        goes_on, self._at = self._at, self._anchors[alias.anchor]
        value = self._value(path)
        self._at = goes_on
        return value

    def _look_at(self, event: Any) -> None:
        """Remember an event's anchor and refuse its tag."""
        here = self._at - 1
        if event.anchor is not None and self._anchors.setdefault(event.anchor, here) != here:
            raise _error(f"the anchor &{event.anchor} is given twice", event)
        if event.tag is not None:
            self._problem(event, "a tag (!...) has no meaning here; remove it")

    def _sequence(self, path: Path) -> list[Any]:
        value: list[Any] = []
        while not isinstance(self._peek(), yaml.SequenceEndEvent):
            value.append(self._value((*path, len(value))))
        self._at += 1
        return value

    def _mapping(self, path: Path) -> dict[str, Any]:
        value: dict[str, Any] = {}
        while not isinstance(key := self._peek(), yaml.MappingEndEvent):
            word = self._key()
            if word is None:
                self._problem(key, "a key must be a plain word")
                self._value(path)
            elif word in value:
                self._problem(key, f"{shown(word)} is given twice; keep one")
                self._value(path)
            else:
                inner = (*path, word)
                # The key's position: it is what a reader looks for when told of `replicas`.
                self.positions[inner] = _position(key)
                value[word] = self._value(inner)
        self._at += 1
        return value

    def _key(self) -> str | None:
        """Return a key's text, None for a key that has none."""
        key = self._peek()
        if isinstance(key, yaml.AliasEvent) and key.anchor in self._anchors:
            self._at += 1
            key = self._events[self._anchors[key.anchor]]
        elif isinstance(key, yaml.ScalarEvent):
            self._at += 1
            self._look_at(key)
        else:
            self._value(())
        return str(key.value) if isinstance(key, yaml.ScalarEvent) else None

    def _problem(self, event: Any, message: str) -> None:
        self.problems.append(Problem(self.file, *_position(event), message))


def _error(message: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=message, problem_mark=event.start_mark)


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


def _position(event: Any) -> tuple[int, int]:
    mark = event.start_mark
    return (1, 1) if mark is None else (mark.line + 1, mark.column + 1)
