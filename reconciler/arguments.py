"""Engine arguments against what the engine's own parser takes, before anything is submitted.

`engines/ENGINE-VERSION.json` is a JSON Schema that images/arguments.py makes from the real engine's
parser. It describes values as a spec writes them; batch.engine_argument makes the words of them.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

from reconciler.source import Path, did_you_mean, shown

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

# Not importlib.resources: what it imports takes as long as all of YAML.
_ENGINES = File(__file__).with_name("engines")
# A jsonschema validator. Its protocol leaves out `descend`, which checks one value with one part of
# the schema: half the time of looking for each argument among all 400 options.
Checker = Any

# A message is one line of a terminal or a log.
_LIST_MAX = 100
# How vLLM expands a number inside the JSON of a configuration.
_SIZE_IN_JSON = re.compile(r"\b[0-9]+(?:\.[0-9]+)?[kKmMgGtT]\b")
# The second for a text that is nested too deeply to be read.
_NOT_JSON = (ValueError, RecursionError)


def check_arguments(
    engine: str, version: str, args: Mapping[str, Any]
) -> Iterator[tuple[Path, str]]:
    """Yield each argument that this version of the engine would refuse: where in `args`, and why.

    Nothing is yielded for a version that has no schema; `unchecked` says so. Underscores and
    hyphens are the same, and `config.key` is a key of the mapping `config`, as in vLLM.
    """
    schema = _schema(engine, version) if args else None
    if schema is None:
        return
    for key, value in args.items():
        for path, message in _mistakes(schema, key, value):
            yield (key, *path), message


def unchecked(engine: str, version: str | None) -> str | None:
    """Return why arguments for this version can't be checked, None if they can."""
    if version is None:
        return "no version is given, arguments are not checked"
    if _schema(engine, version) is not None:
        return None
    known = " or ".join(versions(engine)) or "none"
    return f"arguments are not checked: {engine} {version} has no schema here (there is: {known})"


def versions(engine: str) -> list[str]:
    """Return the versions of the engine whose arguments can be checked."""
    names = [item.name for item in _ENGINES.iterdir()]
    prefix, suffix = f"{engine}-", ".json"
    return sorted(n[len(prefix) : -len(suffix)] for n in names if n.startswith(prefix))


@functools.cache
def _schema(engine: str, version: str) -> Any:
    """Return the schema of an engine's version, None if there is none; read once."""
    # Compared with names that exist, so that no version can become a path to elsewhere.
    if version not in versions(engine):
        return None
    text = (_ENGINES / f"{engine}-{version}.json").read_text(encoding="utf-8")
    return json.loads(text)


@functools.cache
def _checker(engine: str, version: str) -> Checker:
    """Return the validator of an engine's version; built once, as that takes milliseconds."""
    # Not at the top: a spec whose arguments are all plain is checked 50 ms faster.
    import jsonschema

    formats = jsonschema.FormatChecker(formats=())
    formats.checks("json", raises=_NOT_JSON)(_is_json)
    formats.checks("json-with-sizes", raises=_NOT_JSON)(_is_json_with_sizes)
    base = jsonschema.Draft202012Validator
    # To JSON Schema 8192.0 is an integer; the word 8192.0 is none to an engine.
    types = base.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    strict: Any = jsonschema.validators.extend(base, type_checker=types)  # type: ignore[no-untyped-call]
    return strict(_schema(engine, version), format_checker=formats)


def _is_json(value: object) -> bool:
    """Tell whether a text is JSON. Raises one of _NOT_JSON, json's own, if not."""
    if isinstance(value, str):
        json.loads(value)
    return True


def _is_json_with_sizes(value: object) -> bool:
    return _is_json(_SIZE_IN_JSON.sub("0", value) if isinstance(value, str) else value)


def plainly_fits(value: object, rule: Mapping[str, Any], schema: Any) -> bool:
    """Tell whether a value is one that a rule takes at first sight.

    False says nothing: jsonschema decides then, and finds the words for a mistake.
    """
    if "$ref" in rule:
        rule = schema["$defs"][rule["$ref"].rpartition("/")[2]] | {
            word: item for word, item in rule.items() if word != "$ref"
        }
    if not rule.keys() <= _PLAIN_WORDS:
        return False
    if "anyOf" in rule and not any(plainly_fits(value, part, schema) for part in rule["anyOf"]):
        return False
    types = rule.get("type", [])
    if types and _JSON_TYPES.get(type(value)) not in ([types] if isinstance(types, str) else types):
        return False
    choices = [rule["const"]] if "const" in rule else rule.get("enum")
    # To Python 1 is True.
    if choices is not None and (type(value), value) not in ((type(one), one) for one in choices):
        return False
    # These two say something of texts only.
    return not (isinstance(value, str) and rule.keys() & {"pattern", "format"})


_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object"}
_PLAIN_WORDS = frozenset(
    {"anyOf", "const", "deprecated", "enum", "format", "pattern", "title", "type"}
)


def _mistakes(schema: Any, key: str, value: Any) -> Iterator[tuple[Path, str]]:
    head, *inner = key.split(".")
    option = head.replace("_", "-")
    if option not in schema["properties"]:
        engine = f"{schema['x-engine']} {schema['x-version']}"
        yield (), f"{engine} has no argument {shown(key)}{_hint(option, schema)}"
    elif inner and isinstance(value, bool | list):
        # As a bare flag it would swallow the next word; of several words it would take one.
        yield (), f'"{key}" can\'t be {_kind(value)} after a dot: make "{head}" a mapping'
    else:
        rule = schema["properties"][option]
        for name in reversed(inner):
            value = {name: value}
        if plainly_fits(value, rule, schema):
            return
        if "propertyNames" in rule:
            value = _decoded(value)
        checker = _checker(schema["x-engine"], schema["x-version"])
        # One line for each place, as a value may be wrong for several reasons.
        errors = checker.descend(value, rule, path=option)
        yield from dict(_explained(error, key, schema) for error in errors).items()


def _decoded(value: object) -> object:
    """Return what a JSON text says, so that its keys are checked too, or the value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(_SIZE_IN_JSON.sub("0", value))
    except _NOT_JSON:
        return value


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else shown(value)


def _explained(error: "ValidationError", key: str, schema: Any) -> tuple[Path, str]:
    """Return where an error is below its argument, and one line that says what is expected."""
    option = str(error.path[0])
    rule = schema["properties"][option]
    if "propertyNames" in error.schema_path:
        wrong = str(error.instance)
        hint = did_you_mean(wrong, rule["propertyNames"]["enum"])
        return (wrong,), f'"{option}" has no key {shown(wrong)}{hint}'
    value: Any = error.instance
    given = f" (given: {shown(value)})" if isinstance(value, str | int | float) else ""
    words = [word for word in rule.get("enum", ()) if isinstance(word, str)]
    hint = did_you_mean(value, words) if isinstance(value, str) else ""
    return (), f'"{key}" must be {_expected(rule, schema)}{given}{hint}'


def _expected(rule: Any, schema: Any) -> str:
    """Return in plain words what a rule wants."""
    if "$ref" in rule:
        return str(schema["$defs"][rule["$ref"].rpartition("/")[2]]["title"])
    if "title" in rule:
        return _cut(rule["title"])
    # The two words for "none at all" are taken and not advertised.
    return _cut(
        "one of " + ", ".join(str(item) for item in rule["enum"] if item not in ("", "None"))
    )


def _cut(text: str) -> str:
    return text if len(text) <= _LIST_MAX else text[:_LIST_MAX].rpartition(",")[0] + ", ..."


def _hint(option: str, schema: Any) -> str:
    """Return a suggestion for an unknown argument: a short option's long name, or one like it."""
    known = schema["properties"]
    begun = [name for name in known if name.startswith(option)]
    if option in schema["x-short"]:
        return f'; did you mean "{schema["x-short"][option]}"?'
    return f'; did you mean "{begun[0]}"?' if len(begun) == 1 else did_you_mean(option, known)
