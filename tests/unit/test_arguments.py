"""Engine arguments are checked before anything is submitted, in words that say what to write."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from reconciler import arguments
from reconciler.arguments import check_arguments, plainly_fits, unchecked, versions
from reconciler.cli import main
from reconciler.spec import load_fleet
from tests.unit.build import fleet

SPECS = Path(__file__).parents[2] / "specs"
VERSION = "0.32.0"
CHECKED = {"engine": {"runtime": "none", "path": "/opt/engine", "version": VERSION}}


def mistakes(**args: Any) -> list[tuple[tuple[str | int, ...], str]]:
    """What is wrong with arguments of vLLM 0.32; `__` stands for a hyphen."""
    return list(
        check_arguments("vllm", VERSION, {k.replace("__", "-"): v for k, v in args.items()})
    )


def mistake(**args: Any) -> str:
    [(_, message)] = mistakes(**args)
    return message


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("max-modle-len", '; did you mean "max-model-len"?'),
        ("max_modle_len", '; did you mean "max-model-len"?'),
        ("enforce-eagr", '; did you mean "enforce-eager"?'),
        ("tp", '; did you mean "tensor-parallel-size"?'),
        ("max-model", '; did you mean "max-model-len"?'),
        ("zzz", ""),
        ("help", ""),
    ],
)
def test_unknown_argument_is_a_mistake_with_a_suggestion(key: str, hint: str) -> None:
    """Misspelled, short or cut off: vLLM would end at once, so it is said before, with the name."""
    [(path, message)] = check_arguments("vllm", VERSION, {key: 1})
    assert path == (key,)
    assert message == f'vllm 0.32.0 has no argument "{key}"{hint}'


VALUES: tuple[Any, ...] = (
    *(True, False, 0, 1, 2, 8, 16, -1, 8192, 10**12, 0.0, 0.5, 1.0, 16.0),
    *("", "a", "1", "16", "16k", "0.9", "auto", "None", "true", "float16", "{}", "[1]", "a=b"),
    *({}, {"a": 1}, {"level": 3}, [], [1], ["a"], ["a=b", "c"], [True], [{}]),
)


def test_value_that_fits_at_first_sight_fits_the_schema() -> None:
    """The short way takes nothing that jsonschema would refuse, for any argument there is."""
    schema = arguments._schema("vllm", VERSION)
    checker = arguments._checker("vllm", VERSION)
    plain = 0
    for option, rule in schema["properties"].items():
        for value in (*VALUES, *rule.get("enum", ())):
            if plainly_fits(value, rule, schema):
                plain += 1
                assert not [*checker.descend(value, rule, path=option)], (option, value)
    assert plain > 1000


def test_plain_arguments_need_no_jsonschema() -> None:
    """What most specs hold is checked without the 50 ms that its import takes."""
    common = {"max-model-len": 8192, "gpu-memory-utilization": 0.9, "dtype": "bfloat16"}
    more = {"enforce-eager": True, "tensor-parallel-size": 2, "quantization": "fp8"}
    program = (
        "import sys; from reconciler.arguments import check_arguments\n"
        f"assert not [*check_arguments('vllm', '{VERSION}', {common | more})]\n"
        "sys.exit('jsonschema' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


SIZE = "a whole number, or one such as 8k (8,000) or 8K (8,192)"
LENGTH = "a whole number, one such as 8k (8,000) or 8K (8,192), or auto"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("max-num-seqs", "many", 'a whole number (given: "many")'),
        ("max-num-seqs", "16k", 'a whole number (given: "16k")'),
        ("max-num-seqs", True, "a whole number (given: true)"),
        ("max-num-seqs", 16.0, "a whole number (given: 16.0)"),
        ("max-num-seqs", [16], "a whole number"),
        ("max-model-len", 1e6, f"{LENGTH} (given: 1000000.0)"),
        ("max-model-len", "8 k", f'{LENGTH} (given: "8 k")'),
        ("max-num-batched-tokens", "1.5K", f'{SIZE} (given: "1.5K")'),
        ("max-num-batched-tokens", "auto", f'{SIZE} (given: "auto")'),
        ("gpu-memory-utilization", "90%", 'a number (given: "90%")'),
        ("chat-template", True, "a text (given: true)"),
        ("enforce-eager", "true", 'true or false (given: "true")'),
        ("enforce-eager", 1, "true or false (given: 1)"),
        ("disable-log-stats", False, "true; to leave it off, remove it (given: false)"),
        ("no-enforce-eager", False, "true; to leave it off, remove it (given: false)"),
        (
            *("dtype", "flaot16"),
            "one of auto, bfloat16, float, float16, float32, half"
            ' (given: "flaot16"); did you mean "float16"?',
        ),
        ("max-lora-rank", 7, "one of 1, 8, 16, 32, 64, 128, 256, 320, 512 (given: 7)"),
        ("max-lora-rank", "7", 'one of 1, 8, 16, 32, 64, 128, 256, 320, 512 (given: "7")'),
        ("compilation-config", 3, "a mapping, or JSON in quotes (given: 3)"),
        (
            *("compilation-config", '{"mode": 3'),
            'a mapping, or JSON in quotes (given: "{\\"mode\\": 3")',
        ),
        ("speculative-config", ["a"], "a mapping, or JSON in quotes"),
        ("allowed-origins", ["*"], "a JSON array in quotes, such as '[\"*\"]'"),
        ("cudagraph-capture-sizes", [1, "x"], "a whole number, or a list of these"),
        ("cudagraph-capture-sizes", [], "a whole number, or a list of these"),
        ("middleware", ["a", "b"], "a text"),
        ("lora-modules", ["a"], "NAME=PATH, a mapping with name and path, or a list of NAME=PATH"),
    ],
)
def test_mistyped_argument_says_what_is_expected(key: str, value: object, expected: str) -> None:
    """One plain line, and where a short value was given, that value."""
    [(path, message)] = check_arguments("vllm", VERSION, {key: value})
    assert path == (key,)
    assert message == f'"{key}" must be {expected}'


@pytest.mark.parametrize(
    "args",
    [
        {"max-model-len": 8192, "dtype": "bfloat16", "enforce-eager": True},
        {"max_model_len": "8k", "kv_cache_memory_bytes": "64M", "max-num-seqs": "16"},
        {"max-model-len": "auto", "max-num-batched-tokens": "1.5k"},
        {"enable-prefix-caching": False, "no-enable-chunked-prefill": True},
        {"disable-log-stats": True, "hf-token": True, "revision": "main"},
        {"gpu-memory-utilization": 0.9, "cpu-offload-gb": 4},
        {"compilation-config": {"mode": 3, "pass_config": {"a": True}}},
        {"compilation-config": '{"mode": 3}', "kv-events-config": '{"hwm": 8k}'},
        {"compilation_config.mode": 3, "hf-overrides.rope_parameters.factor": 2.0},
        {"hf-overrides": {"a": 1}, "additional-config": "text", "allowed-origins": '["*"]'},
        {"cudagraph-capture-sizes": [1, 2, 4], "lora-modules": ["a=/a", '{"name": "b"}']},
        {"cudagraph-capture-sizes": 4, "lora-modules": {"name": "a", "path": "/a"}},
        {"moe-backend": "deep-gemm", "speculative-config": "None"},
    ],
)
def test_arguments_that_vllm_takes_are_no_mistakes(args: dict[str, Any]) -> None:
    """Hyphens or underscores, mappings or JSON, 8k: all that the real parser takes."""
    assert list(check_arguments("vllm", VERSION, args)) == []


def test_keys_of_a_configuration_are_checked_too() -> None:
    """A misspelled key in a mapping has its own place; in a JSON text, the text's."""
    assert mistakes(kv__transfer__config={"kv_rol": "x", "kv_port": 1, "a": 2}) == [
        (
            ("kv-transfer-config", "kv_rol"),
            '"kv-transfer-config" has no key "kv_rol"; did you mean "kv_role"?',
        ),
        (("kv-transfer-config", "a"), '"kv-transfer-config" has no key "a"'),
    ]
    line = '"compilation-config" has no key "mdoe"; did you mean "mode"?'
    assert mistake(compilation_config='{"mdoe": 3}') == line
    assert mistake(**{"compilation-config.mdoe": 3}) == line


@pytest.mark.parametrize(("value", "shown"), [(True, "true"), (False, "false"), ([1], "a list")])
def test_flag_or_list_after_a_dot_is_refused(value: object, shown: str) -> None:
    """vLLM would take the next option for its value, or drop all words but the first."""
    assert mistake(**{"compilation_config.mode": value}) == (
        f'"compilation_config.mode" can\'t be {shown} after a dot:'
        ' make "compilation_config" a mapping'
    )


def test_every_mistake_of_a_model_is_found() -> None:
    """Several wrong arguments give several lines, each at its own."""
    found = mistakes(max__num__seqs="x", zzz=1, dtype="auto", seed=True)
    assert [path for path, _ in found] == [("max-num-seqs",), ("zzz",), ("seed",)]


def test_message_of_a_huge_value_is_one_short_line() -> None:
    """Whatever was given is shown in part, and a long list of choices is cut."""
    assert len(mistake(all2all__backend="x\n" * 5000)) < 250
    assert len(mistake(**{"k" * 5000: 1})) < 150


def test_json_that_is_nested_too_deeply_is_a_mistake_like_any_other() -> None:
    """No text in a spec ends in a traceback."""
    deep = "[" * 100_000
    for key in ("compilation-config", "default-chat-template-kwargs"):
        assert mistake(**{key: deep}).startswith(f'"{key}" must be a mapping, or JSON in quotes')


def test_version_without_a_schema_is_no_mistake_and_said() -> None:
    """A newer engine can run; only that nobody checked is worth a word."""
    assert list(check_arguments("vllm", "99.0", {"zzz": 1})) == []
    assert unchecked("vllm", VERSION) is None
    assert unchecked("vllm", "99.0") == (
        "arguments are not checked: vllm 99.0 has no schema here (there is: 0.32.0)"
    )
    assert unchecked("vllm", None) == "no version is given, arguments are not checked"
    assert versions("vllm") == [VERSION]


SPEC = """\
version: 1
fleet: demo
slurm: {partition: gpu, log_dir: /shared/logs}
budget: {gpus: 4}
gateway: {hosts: [{name: gateway}]}
images:
  engine: {runtime: none, path: /opt/engine}
models:
  - name: tiny
    image: engine
    weights: /models/tiny
    resources: {memory: 4G}
    replicas: 2
    args: {}
tenants:
  - {name: alice, key_sha256: [0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a]}
"""


def validate(folder: Path, *pairs: tuple[str, str], as_json: bool = False) -> Result:
    """Run `fleet validate` on an edited spec."""
    text = SPEC
    for old, new in pairs:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "fleet.yaml").write_text(text, encoding="utf-8")
    return CliRunner().invoke(main, ["validate", str(folder), *(["--json"] if as_json else [])])


def version(text: str) -> tuple[str, str]:
    return "/opt/engine}", f"/opt/engine, version: {text}}}"


def test_wrong_argument_fails_validate_at_its_place(tmp_path: Path) -> None:
    """`fleet validate` names file, line and column of the argument, and exits with 1."""
    wrong = ("args: {}", "args: {seed: 1, enforce-eagr: true, eplb-config: {windowsize: 3}}")
    result = validate(tmp_path, version(VERSION), wrong)
    assert result.exit_code == 1
    assert result.stderr.replace(str(tmp_path), "").splitlines() == [
        "/fleet.yaml:14:21: vllm 0.32.0 has no argument"
        ' "enforce-eagr"; did you mean "enforce-eager"?',
        '/fleet.yaml:14:55: "eplb-config" has no key "windowsize"; did you mean "window_size"?',
    ]


UNCHECKED = [
    ((), 3, "no version is given, arguments are not checked"),
    (
        *((version("0.31.0"),), 46),
        "arguments are not checked: vllm 0.31.0 has no schema here (there is: 0.32.0)",
    ),
]


@pytest.mark.parametrize(("edits", "column", "why"), UNCHECKED)
def test_unchecked_arguments_are_a_warning_and_exit_0(
    edits: tuple[tuple[str, str], ...], column: int, why: str, tmp_path: Path
) -> None:
    """Nothing is wrong as far as anyone can tell: one line on stderr, and success."""
    edits = (("args: {}", "args: {zzz: 1}"), *edits)
    result = validate(tmp_path, *edits)
    assert result.exit_code == 0
    assert result.stderr == f"{tmp_path}/fleet.yaml:7:{column}: warning: {why}\n"
    record = json.loads(validate(tmp_path, *edits, as_json=True).stdout)
    place = {"file": f"{tmp_path}/fleet.yaml", "line": 7, "column": column}
    assert record == {"problems": [], "warnings": [{**place, "message": why}]}


def test_model_without_arguments_needs_no_version(tmp_path: Path) -> None:
    """Where nothing is given, nothing is left unchecked."""
    result = validate(tmp_path)
    assert (result.exit_code, result.stderr) == (0, "")


def test_version_of_an_image_does_not_change_a_revision() -> None:
    """Naming the version restarts nothing: the image's digest says what runs."""
    plain, named = fleet(), fleet(images=CHECKED)
    assert plain.models[0].revision("digest") == named.models[0].revision("digest")


@pytest.mark.parametrize("version", ["../../x", "", "v0.32.0", "0.32.0/../x", 0.32])
def test_version_that_is_none_is_refused(version: object) -> None:
    """A version names a file of ours; a number has lost its zeros."""
    with pytest.raises(ValueError, match=r"images\.engine\.version"):
        fleet(images={"engine": {"name": "x", "version": version}})


@pytest.mark.parametrize("folder", sorted(path.parent for path in SPECS.glob("*/fleet.yaml")))
def test_every_argument_in_a_spec_of_this_repository_is_checked(folder: Path) -> None:
    """The specs name their engine's version, and use only arguments that it has."""
    shipped = load_fleet(folder)
    for model in shipped.models:
        version = shipped.images[model.image].version
        assert unchecked(model.engine, version) is None
        assert list(check_arguments(model.engine, str(version), model.args)) == []


def test_arguments_of_100_models_are_checked_in_a_moment() -> None:
    """The schema is read once; ten arguments of a model take some tenths of a millisecond."""
    args = {
        "max-model-len": "8k",
        "dtype": "bfloat16",
        "enforce-eager": True,
        "gpu-memory-utilization": 0.9,
        "tensor-parallel-size": 2,
        "max-num-seqs": 16,
        "enable-prefix-caching": True,
        "tool-call-parser": "hermes",
        "compilation-config": {"mode": 3},
        "kv-cache-dtype": "fp8",
    }
    began = time.process_time()
    assert not any(list(check_arguments("vllm", VERSION, args)) for _ in range(100))
    # 30 ms; a validator for each model would take 300 ms.
    assert time.process_time() - began < 0.25
