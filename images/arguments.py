"""Write the schema of an engine's arguments, from the engine's own parser.

    python images/arguments.py vllm-cpu

starts the image, asks vLLM's parser for every option of `vllm serve`, and writes a JSON Schema to
`reconciler/engines/vllm-VERSION.json`, by which `fleet validate` checks the `args` of a spec
(reconciler/arguments.py).  The keys are the long options as a spec writes them; each schema says
which values batch.engine_argument turns into words that the parser takes.

This file runs twice: out here, and, alone, by the image's Python.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ENGINES = HERE.parents[1] / "reconciler" / "engines"
# Where the container sees this file, and the folder for the question and the answer.
INSIDE, EXCHANGE = "/mnt/arguments.py", "/mnt/exchange"

Schema = dict[str, Any]

_INT = r"[+-]?[0-9]+(_[0-9]+)*"
_SIZE = rf"{_INT}|[0-9]+(\.[0-9]+)?[kmgt]|[0-9]+[KMGT]"
_FLOAT = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"

# The kinds of values, each titled by the words that a user reads: "must be TITLE".
KINDS: dict[str, Schema] = {
    "switch": {"title": "true or false", "type": "boolean"},
    "flag": {"title": "true; to leave it off, remove it", "const": True},
    "int": {
        "title": "a whole number",
        "type": ["integer", "string"],
        "pattern": f"^({_INT})$",
    },
    "size": {
        "title": "a whole number, or one such as 8k (8,000) or 8K (8,192)",
        "type": ["integer", "string"],
        "pattern": f"^({_SIZE})$",
    },
    "length": {
        "title": "a whole number, one such as 8k (8,000) or 8K (8,192), or auto",
        "type": ["integer", "string"],
        "pattern": f"^({_SIZE}|[aA][uU][tT][oO])$",
    },
    "float": {
        "title": "a number",
        "type": ["number", "string"],
        "pattern": f"^({_FLOAT})$",
    },
    "text": {"title": "a text", "type": ["string", "number"]},
    "true-or-text": {
        "title": "true or a text",
        "anyOf": [{"const": True}, {"type": ["string", "number"]}],
    },
    "mapping-or-text": {"title": "a mapping or a text", "type": ["object", "string", "number"]},
    "json": {
        "title": "a mapping, or JSON in quotes",
        "type": ["object", "string"],
        "format": "json",
    },
    # A spec's list becomes several words, and so never a JSON array.
    "json-list": {
        "title": "a JSON array in quotes, such as '[\"*\"]'",
        "type": "string",
        "format": "json",
    },
    # In these vLLM expands numbers such as 8k before it reads the JSON.
    "config": {
        "title": "a mapping, or JSON in quotes",
        "type": ["object", "string"],
        "format": "json-with-sizes",
    },
    "lora": {
        "title": "NAME=PATH, a mapping with name and path, or a list of NAME=PATH",
        "anyOf": [
            {"$ref": "#/$defs/lora-module"},
            {"type": "object", "required": ["name", "path"]},
            {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/lora-module"}},
        ],
    },
    "lora-module": {
        "title": "NAME=PATH",
        "anyOf": [
            {"type": "string", "pattern": "^[^,]*=[^,]*$"},
            {"type": "string", "format": "json"},
        ],
    },
}
# The functions by which vLLM's parser reads one word, by name.
READERS = {
    "int": "int",
    "float": "float",
    "str": "text",
    "human_readable_int": "size",
    "human_readable_int_or_auto": "length",
    "union_dict_and_str": "mapping-or-text",
    "loads": "json",
    "parse_dataclass": "config",
}
# `optional_type` of vLLM: these two words mean None, whatever the type.
NONE_WORDS = ["", "None"]


class UnknownReader(Exception):
    """vLLM reads an option in a way that this script has to be taught first."""


def argument_schema(parser: argparse.ArgumentParser, version: str) -> Schema:
    """Return the JSON Schema of the parser's long options."""
    properties: dict[str, Schema] = {}
    short: dict[str, str] = {}
    for action in parser._actions:
        long = [name[2:] for name in action.option_strings if name.startswith("--")]
        if "help" not in long:
            properties |= {key: _rule(action, key) for key in long}
            short |= {n[1:]: long[0] for n in action.option_strings if not n.startswith("--")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Arguments of vllm serve, vLLM {version}",
        "x-engine": "vllm",
        "x-version": version,
        "x-short": short,
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": _definitions(properties),
    }


def _definitions(properties: dict[str, Schema]) -> dict[str, Schema]:
    """Return the kinds that the properties refer to, with what those refer to."""
    optional = {f"optional-{name}": _optional(kind) for name, kind in KINDS.items()}
    kinds = KINDS | optional
    text = json.dumps(properties)
    used: dict[str, Schema] = {}
    while found := {n: k for n, k in kinds.items() if n not in used and f'defs/{n}"' in text}:
        used |= found
        text = json.dumps(used)
    return used


def _optional(kind: Schema) -> Schema:
    return {
        "title": kind["title"],
        "anyOf": [{k: v for k, v in kind.items() if k != "title"}, {"enum": NONE_WORDS}],
    }


def _ref(kind: str) -> Schema:
    return {"$ref": f"#/$defs/{kind}"}


def _rule(action: argparse.Action, key: str) -> Schema:
    rule = _values(action, key)
    if type(action).__name__.startswith("Deprecated"):
        rule["deprecated"] = True
    return rule


def _values(action: argparse.Action, key: str) -> Schema:
    """Return the schema of an option's values, as a spec writes them."""
    if isinstance(action, argparse.BooleanOptionalAction):
        # `--no-x` is what `x: false` becomes; nothing becomes of `no-x: false`.
        return _ref("flag" if key.startswith("no-") else "switch")
    if type(action).__name__ == "LoRAParserAction":
        return _ref("lora")
    if action.nargs == 0:
        return _ref("flag")
    if action.nargs == "?" and action.const is True and _reader(action)[0] is str:
        return _ref("true-or-text")
    one = _one_value(action)
    if action.nargs == "+":
        return {
            "title": f"{_title(one)}, or a list of these",
            "anyOf": [one, {"type": "array", "minItems": 1, "items": one}],
        }
    if action.nargs is None:
        return one
    raise UnknownReader(f"{action.option_strings}: nargs={action.nargs!r}")


def _title(rule: Schema) -> str:
    if "enum" in rule:
        return "one of " + ", ".join(str(item) for item in rule["enum"] if item not in NONE_WORDS)
    name = rule["$ref"].rpartition("/")[2].removeprefix("optional-")
    return str(KINDS[name]["title"])


def _one_value(action: argparse.Action) -> Schema:
    """Return the schema of a value that is one word."""
    reader, optional = _reader(action)
    if action.choices is not None:
        return _choice(action, reader, optional)
    name = getattr(reader, "__name__", "")
    if name == "<lambda>":  # it splits or folds a text
        kind = "text"
    elif name not in READERS:
        raise UnknownReader(f"{action.option_strings}: type={name}")
    else:
        kind = READERS[name]
    if kind == "json" and isinstance(action.default, list):
        kind = "json-list"
    # A text takes any word already.
    rule = _ref(f"optional-{kind}" if optional and "text" not in kind else kind)
    return rule | (_known_keys(reader) if name == "parse_dataclass" else {})


def _reader(action: argparse.Action) -> tuple[Any, bool]:
    """Return what reads a word, without vLLM's wrappers, and whether a word may mean None."""
    reader: Any = action.type or str
    optional = False
    while reader.__name__ in ("_optional_type", "_parse_type"):
        optional = optional or reader.__name__ == "_optional_type"
        reader = reader.__closure__[0].cell_contents
    return reader, optional


def _choice(action: argparse.Action, reader: Callable[[str], Any], optional: bool) -> Schema:
    choices = [choice for choice in action.choices or () if choice is not None]
    if reader is int:
        return {"enum": sorted(choices), "type": "integer"}
    spellings = {word for c in choices for word in (c, c.replace("_", "-")) if reader(word) == c}
    return {"enum": sorted(spellings) + (NONE_WORDS if optional else [])}


def _known_keys(reader: Any) -> Schema:
    """Return the keys that a configuration may have, if it refuses all others."""
    cls = reader.__defaults__[0]
    if getattr(cls, "__pydantic_config__", {}).get("extra") != "forbid":
        return {}
    return {"propertyNames": {"enum": sorted(f.name for f in dataclasses.fields(cls) if f.init)}}


def verdict(parser: argparse.ArgumentParser, words: Sequence[str]) -> str | None:
    """Return what the parser says against a command line, None if it takes it."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser.parse_args([*words])
    except SystemExit:
        return said.getvalue().strip().rpartition("\n")[2]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def inside(exchange: Path) -> None:
    """Answer, in the image: the schema, and the parser's verdict on each command line asked."""
    from importlib.metadata import version

    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = FlexibleArgumentParser()
    parser = make_arg_parser(command.add_subparsers().add_parser("serve"))
    lines = json.loads((exchange / "question.json").read_text())
    answer = {
        # 0.32.0+cpu: a build of 0.32.0.
        "schema": argument_schema(parser, version("vllm").partition("+")[0]),
        "verdicts": [verdict(command, words) for words in lines],
    }
    (exchange / "answer.json").write_text(json.dumps(answer))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the image's vLLM says: its schema, and to each command line None or why not."""

    schema: Schema
    verdicts: Sequence[str | None]


def ask(name: str, lines: Sequence[Sequence[str]] = ()) -> Answer:
    """Start the image of this name once and ask its parser."""
    # Run as a script, Python finds this folder and not the checkout, where the lab is.
    sys.path.insert(0, str(HERE.parents[1]))
    from images.build import image
    from tests.lab import in_base

    with tempfile.TemporaryDirectory() as folder:
        exchange = Path(folder)
        (exchange / "question.json").write_text(json.dumps(lines))
        binds = {image(name): "/mnt/image.sif", HERE: INSIDE, exchange: EXCHANGE}
        apptainer = ["apptainer", "exec", "--cleanenv", "--containall", "--no-mount", "home"]
        mounts = ["--bind", INSIDE, "--bind", EXCHANGE]
        argv = [*apptainer, *mounts, "/mnt/image.sif", "python", INSIDE, EXCHANGE]
        in_base(argv, binds=binds, capture=True)
        answer = json.loads((exchange / "answer.json").read_text())
    return Answer(**answer)


def text(schema: Schema) -> str:
    """Return a schema as its file holds it."""
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write the schema of the engine in the image named on the command line."""
    if len(arguments) == 1 and Path(arguments[0]).is_absolute():
        inside(Path(arguments[0]))
        return 0
    if len(arguments) != 1:
        print("usage: arguments.py vllm-cpu", file=sys.stderr)
        return 2
    schema = ask(arguments[0]).schema
    file = ENGINES / f"{schema['x-engine']}-{schema['x-version']}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text(schema), encoding="utf-8")
    print(file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
