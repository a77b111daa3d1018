"""Every mistake of a spec is one clear line with its place; what is right means what it looks like.

All broken specs go through the real command line: exit code 1, one line a mistake, no traceback.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from reconciler.cli import main
from reconciler.spec import (
    Fleet,
    Model,
    impossibilities,
    json_schema,
    load_fleet,
    parse_duration,
)
from tests.unit.build import fleet, model_record, revision

SPECS = Path(__file__).parents[2] / "specs"

GOOD = """\
version: 1
fleet: demo
slurm: {partition: gpu, walltime: 4:00:00, log_dir: /shared/logs}
budget: {gpus: 4}
images:
  engine: {runtime: none, path: /opt/engine}
gateway: {hosts: [{name: gateway}]}
secret_dir: /shared/secrets
models:
  - name: tiny
    image: engine
    weights: /models/tiny
    resources: {gpus: 1, cpus: 2, memory: 4G}
    replicas: 2
"""


def validate(folder: Path) -> list[str]:
    """Run `fleet validate` on a wrong spec and return its lines, without the folder's name."""
    result = CliRunner().invoke(main, ["validate", str(folder)])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert all(line.startswith(f"{folder}/") for line in lines), lines
    return [line.removeprefix(f"{folder}/") for line in lines]


def validate_text(folder: Path, text: str | bytes) -> list[str]:
    data = text.encode() if isinstance(text, str) else text
    (folder / "fleet.yaml").write_bytes(data)
    return validate(folder)


def edited(*pairs: tuple[str, str]) -> str:
    text = GOOD
    for old, new in pairs:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


def load(folder: Path, text: str) -> Fleet:
    (folder / "fleet.yaml").write_text(text, encoding="utf-8")
    return load_fleet(folder)


def test_good_spec_is_accepted_and_summarised(tmp_path: Path) -> None:
    """A right spec says in one line what it asks for."""
    (tmp_path / "fleet.yaml").write_text(GOOD)
    result = CliRunner().invoke(main, ["validate", str(tmp_path)])
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path}: fleet demo, 1 model, 2 replicas\n"


LABEL = "must be a DNS label: lower case letters, digits and inner hyphens"
ARGUMENT = "must be true, false, a number, a text, a list or a mapping of these"

BROKEN: dict[str, tuple[str, str, str]] = {
    "R16-key-misspelled": (
        *("    replicas: 2", "    replica: 2\n    replicas: 2"),
        '14:5: unknown key "replica"; did you mean "replicas"?',
    ),
    "R16-key-at-the-top": (
        *("budget:", "badget: 1\nbudget:"),
        '4:1: unknown key "badget"; did you mean "budget"?',
    ),
    "R16-key-of-nothing-like-it": (
        *("budget:", "zzz: 1\nbudget:"),
        '4:1: unknown key "zzz"',
    ),
    "R16-key-named-like-a-type": (*("budget:", "list: 1\nbudget:"), '4:1: unknown key "list"'),
    "R16-key-in-resources": (
        *("cpus: 2", "cpu: 2"),
        '13:26: unknown key "cpu"; did you mean "cpus"?',
    ),
    "R16-key-of-an-image": (
        *("path: /opt", "paths: a, path: /opt"),
        '6:27: unknown key "paths"; did you mean "path"?',
    ),
    "R37-key-with-an-escape": (
        *("budget:", '"\\e[31m\\n": 1\nbudget:'),
        '4:1: unknown key "\\u001b[31m\\n"',
    ),
    "missing-field": (*("    weights: /models/tiny\n", ""), '10:5: "weights" is missing'),
    "wrong-type": (
        *("replicas: 2", 'replicas: "2"'),
        '14:5: models.0.replicas: must be a whole number (given: "2")',
    ),
    "float-for-a-count": (
        *("replicas: 2", "replicas: 2.0"),
        "14:5: models.0.replicas: must be a whole number (given: 2.0)",
    ),
    "bool-for-a-count": (
        *("replicas: 2", "replicas: true"),
        "14:5: models.0.replicas: must be a whole number (given: true)",
    ),
    "negative-count": (
        *("replicas: 2", "replicas: -2"),
        "14:5: models.0.replicas: should be greater than or equal to 0 (given: -2)",
    ),
    "count-beyond-ordinals": (
        *("replicas: 2", "replicas: 10001"),
        "14:5: models.0.replicas: should be less than or equal to 10000 (given: 10001)",
    ),
    "bad-label": (*("fleet: demo", "fleet: Demo"), f'2:1: fleet: {LABEL} (given: "Demo")'),
    "bad-label-of-an-image": (
        *("  engine: {", "  En.gine: {"),
        f'6:3: images.En.gine: {LABEL} (given: "En.gine")',
    ),
    "null-argument": (
        *("replicas: 2", "replicas: 2\n    args: {x: }"),
        f"15:12: models.0.args.x: {ARGUMENT}",
    ),
    "null-beside-a-mapping": (
        *("replicas: 2", "replicas: 2\n    args: {dict: {a: 1}, x: null}"),
        f"15:26: models.0.args.x: {ARGUMENT}",
    ),
    "walltime-without-unit": (
        *("4:00:00", "30"),
        '3:25: slurm.walltime: needs a unit: write "30:00" for minutes, or "1-00:00:00" for a day '
        "(given: 30)",
    ),
    "walltime-unlimited": (
        *("4:00:00", "UNLIMITED"),
        "3:25: slurm.walltime: must be a Slurm time such as 30:00, 12:00:00 or 1-00:00:00 "
        '(given: "UNLIMITED")',
    ),
    "walltime-of-nothing": (
        *("4:00:00", "0:00"),
        '3:25: slurm.walltime: must be longer than nothing (given: "0:00")',
    ),
    "walltime-too-short": (
        *("4:00:00", "30:59"),
        "10:5: the walltime must be 1860 s at least: startup and drain timeout, and a minute "
        "beside them",
    ),
    "memory-without-unit": (
        *("4G", "4000"),
        "13:35: models.0.resources.memory: must be a text; put it in quotes (given: 4000)",
    ),
    "memory-of-nothing": (
        *("4G", "0G"),
        "13:35: models.0.resources.memory: must be a size with its unit, such as 64G or 512M "
        '(given: "0G")',
    ),
    "path-relative": (
        *("/models/tiny", "models/tiny"),
        "12:5: models.0.weights: must be an absolute path without ':', ',' or backslash "
        '(given: "models/tiny")',
    ),
    "image-unknown": (
        *("image: engine", "image: engin"),
        '11:5: no image "engin" under images; did you mean "engine"?',
    ),
    "image-of-two-kinds": (
        *("{runtime: none, path", "{runtime: none, name: x, path"),
        "6:3: runtime none needs a path, and no name",
    ),
    "image-without-its-folder": (
        *("{runtime: none, path: /opt/engine}", "{name: x}"),
        "6:3: image_dir is missing: the folder that holds the images and their manifests",
    ),
    "budget-too-small": (
        *("gpus: 4", "gpus: 1"),
        "4:10: all replicas together need 2 GPUs, the budget is 1",
    ),
    "no-model": (
        GOOD[GOOD.index("models:") :],
        "models: []\n",
        "9:1: no model at all: to stop everything, give each model replicas: 0",
    ),
    "no-gateway": (
        *("[{name: gateway}]", "[]"),
        "7:11: no gateway: nobody could reach the models",
    ),
    "R37-fallback-to-an-address": (
        *("replicas: 2", "replicas: 2\n    fallback: {url: 'https://1.2', model: m, key_file: /k}"),
        "15:16: models.0.fallback.url: must be https:// and a name, with :port and /path if need "
        'be (given: "https://1.2")',
    ),
    "R36-key-in-place-of-its-file": (
        *("replicas: 2", "replicas: 2\n    fallback: {url: 'https://a', model: m, key_file: sk-1}"),
        "15:44: models.0.fallback.key_file: must be an absolute path without ':', ',' or backslash",
    ),
    "R37-resolver-that-is-none": (
        *("[{name: gateway}]", "[{name: gateway}], external: {resolvers: ['1.2.3.400']}"),
        "7:60: gateway.external.resolvers.0: must be an IPv4 address, with :port if need be "
        '(given: "1.2.3.400")',
    ),
    "no-resolver": (
        *("[{name: gateway}]", "[{name: gateway}], external: {resolvers: []}"),
        "7:48: gateway.external.resolvers: must list one at least",
    ),
    "fallback-without-a-resolver": (
        *(
            "replicas: 2",
            "replicas: 2\n    fallback: {url: 'https://a.b/v1', model: m, key_file: /k}",
        ),
        "15:5: a fallback needs gateway.external: its resolvers, such as [10.0.0.53]",
    ),
    "gateways-not-a-list": (*("[{name: gateway}]", "{}"), "7:11: gateway.hosts: must be a list"),
    "gateway-named-twice": (
        *("[{name: gateway}]", "[{name: gateway}, {name: gateway, ssh: other}]"),
        '7:37: two gateways are named "gateway"',
    ),
    "rollout-that-can-not-move": (
        *("budget:", "defaults: {rollout: {max_surge: 0}}\nbudget:"),
        "4:12: max_surge and max_unavailable can't both be 0: no rollout could ever take a step",
    ),
    "nodes-without-ranks": (
        *("gpus: 1,", "gpus: 1, nodes: 2,"),
        "13:26: tensor-parallel-size times pipeline-parallel-size, in args, is 1: "
        "it must be a multiple of the 2 nodes",
    ),
    "nodes-beyond-the-budget": (
        GOOD[GOOD.index("    resources") :],
        "    resources: {nodes: 3, gpus: 2, memory: 4G}\n    replicas: 0\n"
        "    args: {pipeline-parallel-size: 3}\n",
        "13:27: one replica needs 6 GPUs, the budget is 4",
    ),
    "argument-of-a-rank": (
        *("replicas: 2", "replicas: 2\n    args: {node_rank: 1}"),
        '15:12: "node_rank" is set by fleet for each replica; remove it',
    ),
    "argument-of-ours": (
        *("replicas: 2", "replicas: 2\n    args: {served_model_name: x}"),
        '15:12: "served_model_name" is set by fleet for each replica; remove it',
    ),
    "R36-secret-as-an-argument": (
        *("replicas: 2", "replicas: 2\n    args: {hf-token: hf_secret}"),
        '15:12: every user of a node can read "hf-token"; use HF_TOKEN under env',
    ),
    "argument-in-two-spellings": (
        *("replicas: 2", "replicas: 2\n    args: {max-model-len: 1, max_model_len: 2}"),
        '15:30: "max_model_len" is given twice, with - and with _; keep one',
    ),
    "R15-argument-list-with-an-option": (
        *("replicas: 2", "replicas: 2\n    args: {x: [a, --trust-remote-code]}"),
        '15:12: a word of "x" starts with "-": the engine would take it for an option',
    ),
    "R15-argument-with-an-empty-list": (
        *("replicas: 2", "replicas: 2\n    args: {x: []}"),
        '15:12: "x" is an empty list; remove it',
    ),
    "R37-argument-with-nul": (
        *("replicas: 2", 'replicas: 2\n    args: {x: "a\\0b"}'),
        '15:12: "x" holds a NUL or a carriage return, which no batch script can carry',
    ),
    "R37-argument-with-dos-line-end": (
        *("replicas: 2", 'replicas: 2\n    args: {x: ["a\\r\\nb"]}'),
        '15:12: "x" holds a NUL or a carriage return, which no batch script can carry',
    ),
    "R37-served-name-like-an-option": (
        *("replicas: 2", "replicas: 2\n    served_names: [--trust-remote-code]"),
        '15:20: "--trust-remote-code" starts with "-": the engine would take it for an option',
    ),
    "served-name-clash": (
        *("replicas: 2", "replicas: 2\n    served_names: [a, tiny]"),
        '15:23: "tiny" is already served by the model tiny',
    ),
    "R37-log-dir-with-a-quote": (
        *("log_dir: /shared/logs", "log_dir: /a' --uid=0 '"),
        "3:44: slurm.log_dir: must be an absolute path without a single quote "
        "(given: \"/a' --uid=0 '\")",
    ),
    "R37-partition-with-a-line-end": (
        *("partition: gpu", 'partition: "gpu\\n#SBATCH --uid=0"'),
        "3:9: slurm.partition: String should match pattern '^[A-Za-z0-9_][A-Za-z0-9_.,+-]*$' "
        '(given: "gpu\\n#SBATCH --uid=0")',
    ),
    "R37-server-name-with-a-semicolon": (
        *("gateway: {", 'gateway: {server_name: "a; }", '),
        "7:11: gateway.server_name: String should match pattern '^[A-Za-z0-9_][A-Za-z0-9.-]*$' "
        '(given: "a; }")',
    ),
    "R37-ssh-like-an-option": (
        *("{name: gateway}", "{name: gateway, ssh: -oProxyCommand=x}"),
        "7:35: gateway.hosts.0.ssh: String should match pattern "
        "'^[A-Za-z0-9_][A-Za-z0-9_.@-]*$' (given: \"-oProxyCommand=x\")",
    ),
    "R36-secret-in-an-environment": (
        *("replicas: 2", 'replicas: 2\n    env: {HF_TOKEN: "hf_secret\\n"}'),
        "15:11: models.0.env.HF_TOKEN: must be one line of printable text",
    ),
}


@pytest.mark.parametrize(("old", "new", "line"), BROKEN.values(), ids=BROKEN.keys())
def test_spec_with_one_mistake_prints_its_one_line(
    old: str, new: str, line: str, tmp_path: Path
) -> None:
    """A mistake is one line, `file:line:column: message`, and exit code 1."""
    assert validate_text(tmp_path, edited((old, new))) == [f"fleet.yaml:{line}"]


YAML: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "1:1: is empty or not a mapping"),
    "only-a-comment": ("# soon\n", "1:1: is empty or not a mapping"),
    "a-list-at-the-top": ("- a\n- b\n", "1:1: is empty or not a mapping"),
    "a-word-at-the-top": ("hello\n", "1:1: is empty or not a mapping"),
    "duplicate-key": (GOOD + "fleet: other\n", '15:1: "fleet" is given twice; keep one'),
    "tab": ("version: 1\nfleet:\n\tname: x\n", "3:1: YAML syntax: found character"),
    "nul": (b"version: 1\nfl\xc3\xa9et: a\0b\n", "2:9: YAML syntax: a character that YAML"),
    "not-utf-8": (b"version: 1\nfleet: \xff\n", "1:1: byte 18 is not UTF-8"),
    "utf-16": ("version: 1".encode("utf-16"), "1:1: byte 0 is not UTF-8"),
    "half-written": (GOOD[: GOOD.index(", log_dir")], "4:1: YAML syntax: did not find expected"),
    "two-documents": ("a: 1\n---\nb: 2\n", "2:1: YAML syntax: "),
    "deep-nesting": ("a: " + "[" * 200_000, "1:103: nested too deeply"),
    "deep-blocks": ("".join(" " * n + "a:\n" for n in range(200)), "101:101: nested too deeply"),
    "alias-in-itself": ("a: &a [*a]\n", "1:4: nested too deeply"),
    "tag": ("a: !!python/object/apply:os.system [x]\n", "1:4: a tag (!...) has no meaning here"),
    "tag-of-a-string": ("a: !!str 1\n", "1:4: a tag (!...) has no meaning here; remove it"),
    "mapping-as-a-key": ("? {a: b}\n: 1\n", "1:3: a key must be a plain word"),
    "anchor-given-twice": ("a: &a 1\nb: &a 2\n", "2:4: YAML syntax: the anchor &a is given twice"),
    "mapping-as-a-later-key": ("a: 1\n? {b: 1}\n: 2\n", "2:3: a key must be a plain word"),
    "sequence-as-a-key": ("? [b, {c: 1}]\n: [2]\na: 1\n", "1:3: a key must be a plain word"),
    "undefined-alias": ("a: *b\n", "1:4: YAML syntax: found undefined alias"),
    "alias-bomb": (
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)),
        "1:37: YAML syntax: too many values",
    ),
}


@pytest.mark.parametrize(("text", "line"), YAML.values(), ids=YAML.keys())
def test_R35_file_that_is_no_spec_prints_one_line(
    text: str | bytes, line: str, tmp_path: Path
) -> None:
    """A file that is empty, half-written or hostile is refused with its place, never a crash."""
    [printed] = validate_text(tmp_path, text)
    assert printed.startswith(f"fleet.yaml:{line}")


@pytest.mark.parametrize("number", ["9" * 5000, "-" + "9" * 999, "0x" + "f" * 9000, "1_", "1__0"])
def test_number_that_is_none_or_too_long_prints_one_line(number: str, tmp_path: Path) -> None:
    """A number that no count can be is a mistake like any other."""
    [line] = validate_text(tmp_path, edited(("replicas: 2", f"replicas: {number}")))
    assert line.startswith("fleet.yaml:14:5: models.0.replicas: ")
    assert len(line) < 200


def test_spec_with_several_mistakes_prints_them_all_in_order(tmp_path: Path) -> None:
    """All mistakes of all files are printed at once, in the order of files and lines."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "b.yaml").write_text(
        "name: big\nimage: engine\nweights: x\nresources: {memory: 1G}\nreplicas: 1\nhello: 1\n"
    )
    text = edited(("fleet: demo", "fleet: DEMO"), ("replicas: 2", "replicas: two"))
    places = [line.split(": ")[0] for line in validate_text(tmp_path, text)]
    assert places == ["fleet.yaml:2:1", "fleet.yaml:14:5", "models/b.yaml:3:1", "models/b.yaml:6:1"]


def test_mistake_in_a_model_file_has_its_own_place(tmp_path: Path) -> None:
    """What is impossible in models/*.yaml is reported there, with the key's line and column."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "big.yaml").write_text(
        "name: tiny\nimage: engine\nweights: /w\nresources: {gpus: 9, memory: 1G}\nreplicas: 0\n"
    )
    assert validate_text(tmp_path, GOOD) == [
        'models/big.yaml:1:1: "tiny" is already served by the model tiny',
        "models/big.yaml:4:13: one replica needs 9 GPUs, the budget is 4",
    ]


def test_model_files_are_read_as_one_spec_in_order(tmp_path: Path) -> None:
    """fleet.yaml and models/*.yaml are one spec; editors' hidden files are no models."""
    (tmp_path / "models").mkdir()
    record = "image: engine\nweights: /w\nresources: {memory: 1G}\nreplicas: 0\n"
    for name in ("zeta", "alpha"):
        (tmp_path / "models" / f"{name}.yaml").write_text(f"name: {name}\n{record}")
    (tmp_path / "models" / ".#zeta.yaml").symlink_to("nowhere")
    (tmp_path / "models" / "README.md").write_text("hello")
    assert [m.name for m in load(tmp_path, GOOD).models] == ["tiny", "alpha", "zeta"]
    alone = GOOD[: GOOD.index("models:")]
    assert [m.name for m in load(tmp_path, alone).models] == ["alpha", "zeta"]
    assert [m.name for m in load(tmp_path, alone + "models:\n").models] == ["alpha", "zeta"]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda f: (f / "models").write_text("x"), "models:1:1: can't be read: Not a directory"),
        (
            lambda f: ((f / "models").mkdir(), (f / "models/a.yml").touch()),
            "models/a.yml:1:1: would not be read: rename it to end in .yaml",
        ),
        (
            lambda f: (f / "models/a.yaml").mkdir(parents=True),
            "models/a.yaml:1:1: can't be read: Is a directory",
        ),
        (
            lambda f: ((f / "models").mkdir(), (f / "models/a.yaml").touch()),
            "models/a.yaml:1:1: is empty or not a mapping; see docs/architecture.md for the shape",
        ),
    ],
    ids=["folder-is-a-file", "other-suffix", "file-is-a-folder", "empty-file"],
)
def test_R35_model_folder_that_can_not_be_read_is_never_no_models(
    make: Any, line: str, tmp_path: Path
) -> None:
    """A model that could not be read is an error: it must not look as if it were deleted."""
    make(tmp_path)
    assert validate_text(tmp_path, GOOD) == [line]


def test_R35_folder_without_a_spec_is_refused(tmp_path: Path) -> None:
    """An empty folder, or a file given for the folder, is an error that says what to give."""
    message = "fleet.yaml:1:1: no such file; a spec folder holds fleet.yaml"
    [line] = validate(tmp_path)
    assert line.startswith(message)
    (tmp_path / "fleet.yaml").write_text(GOOD)
    [line] = validate(tmp_path / "fleet.yaml")
    assert line.startswith(message)


def test_problems_as_json_say_the_same(tmp_path: Path) -> None:
    """`validate --json` gives file, line, column and message of each mistake."""
    (tmp_path / "fleet.yaml").write_text(edited(("fleet: demo", "fleet: Demo")))
    result = CliRunner().invoke(main, ["validate", "--json", str(tmp_path)])
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "problems": [
            {
                "file": f"{tmp_path}/fleet.yaml",
                "line": 2,
                "column": 1,
                "message": f'fleet: {LABEL} (given: "Demo")',
            }
        ]
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("no", "no"), ("on", "on"), ("yes", "yes"), ("y", "y"), ("10:30", "10:30")],
        *[("1:30:00", "1:30:00"), ("2026-01-01", "2026-01-01"), ("007", "007"), ("1e", "1e")],
        *[("0b1", "0b1"), (".inf", ".inf"), (".nan", ".nan"), ("1.2.3", "1.2.3"), ("=", "=")],
        *[("true", True), ("False", False), ("0", 0), ("-1", -1), ("1_000", 1000), ("0x1F", 31)],
        *[("0o17", 15), ("1.5", 1.5), ("1e3", 1000.0), (".5", 0.5), ("'1'", "1"), ('"no"', "no")],
        *[
            ("'true'", "true"),
            ("{a: [1, x]}", {"a": [1, "x"]}),
            ("|\n        a\n        b", "a\nb\n"),
        ],
        *[("<<", "<<"), ("9" * 999, int("9" * 999)), ("1e999", "1e999")],
    ],
)
def test_yaml_value_means_what_it_looks_like(text: str, value: object, tmp_path: Path) -> None:
    """YAML 1.2's core schema: `no` is a word, 10:30 a text, quotes always make a text."""
    spec = GOOD + f"    args:\n      x: {text}\n"
    [found] = load(tmp_path, spec).models[0].args.values()
    assert (found, type(found)) == (value, type(value))


def test_alias_of_one_value_is_read_twice(tmp_path: Path) -> None:
    """Aliases are allowed: they repeat a value, and nothing merges."""
    spec = GOOD + "    args: {x: &a {k: 1}, y: *a}\n"
    assert load(tmp_path, spec).models[0].args == {"x": {"k": 1}, "y": {"k": 1}}


def test_file_with_byte_order_mark_and_dos_lines_is_read(tmp_path: Path) -> None:
    """An editor's byte order mark and line ends change nothing."""
    (tmp_path / "fleet.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_fleet(tmp_path) == Fleet.model_validate(load_fleet(tmp_path).model_dump())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *[("1", 60), ("90", 5400), ("1:30", 90), ("0:01", 1), ("1:2:3", 3723)],
        *[("12:00:00", 43_200), ("1-0", 86_400), ("1-2", 93_600), ("1-2:3", 93_780)],
        *[("1-2:3:4", 93_784), ("0-0:0:1", 1), ("365-00:00:00", 31_536_000), ("00:00", 0)],
    ],
)
def test_R07_duration_in_every_form_of_slurm_is_read(text: str, seconds: int) -> None:
    """M, M:S, H:M:S, D-H, D-H:M and D-H:M:S, as sbatch(1) reads them."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *("", "UNLIMITED", "INVALID", "Partition_Limit", "N/A", "NONE", "-1", "1-", "-", ":"),
        *("1:", ":1", "1:2:3:4", "1-2:3:4:5", "1-2-3", "1.5", "1h", " 1", "1 ", "1\n", "+1"),
        *("\u0661", "1\u0660:00", "9" * 5000, "1_0"),
    ],
)
def test_R07_duration_that_is_none_is_refused(text: str) -> None:
    """Slurm's words for no time, and everything else, are no duration."""
    with pytest.raises(ValueError, match="must be a Slurm time"):
        parse_duration(text)


BASE: dict[str, Any] = model_record(
    served_names=["org/Tiny"], args={"a": 1, "b": [True, "x"]}, env={"K": "v"}
)

# Literal: if one of these changes, an upgrade of the software restarts every replica there is.
GOLDEN = {
    "07066c05": Model.model_validate(BASE),
    "beadb2a3": Model.model_validate(model_record()),
}


def test_revision_of_golden_models_never_changes() -> None:
    """The digest of a model is the same in every release of this software."""
    assert [model.revision("sha256:0") for model in GOLDEN.values()] == list(GOLDEN)


@pytest.mark.parametrize(
    "changed",
    [
        *({"weights": "/w"}, {"served_names": []}, {"served_names": ["org/tiny"]}),
        *(
            {"args": {"a": 1}},
            {"args": {"a": 1, "b": [True, "y"]}},
            {"args": {**BASE["args"], "c": 1}},
        ),
        *({"args": {**BASE["args"], "a": "1"}}, {"args": {**BASE["args"], "a": 1.0}}),
        *({"args": {**BASE["args"], "a": True}}, {"env": {}}, {"env": {"K": "w"}}),
        *(
            {"resources": {**BASE["resources"], key: value}}
            for key, value in (("gpus", 2), ("cpus", 3), ("memory", "5G"))
        ),
    ],
    ids=str,
)
def test_revision_changes_with_what_needs_a_restart(changed: dict[str, Any]) -> None:
    """A field that the engine is started with makes a new revision."""
    was, now = Model.model_validate(BASE), Model.model_validate({**BASE, **changed})
    assert was.revision("sha256:0") != now.revision("sha256:0")


def test_revision_changes_with_the_image() -> None:
    """The image's content, not its name in the spec, is part of the revision."""
    model = Model.model_validate(BASE)
    assert model.revision("sha256:0") != model.revision("sha256:1")
    renamed = Model.model_validate({**BASE, "image": "other"})
    assert model.revision("sha256:0") == renamed.revision("sha256:0")


RESTARTS_NOTHING: dict[str, Any] = {
    "protect": True,
    "name": "other",
    "image": "other",
    "replicas": 7,
    "canary": {"replicas": 1, "env": {"A": "b"}},
    "weight": 3,
    "affinity": "X-Session-Id",
    "fallback": {"url": "https://api.example.org/v1", "model": "m", "key_file": "/etc/key"},
    "suspend": True,
    "slurm": {"partition": "long", "account": "a", "qos": "q", "walltime": "9:00:00"},
    "startup_timeout_s": 5,
    "drain_timeout_s": 5,
}
RESTARTS = {"engine", "weights", "served_names", "args", "env", "resources"}


@pytest.mark.parametrize("field", RESTARTS_NOTHING)
def test_revision_stays_with_what_needs_no_restart(field: str) -> None:
    """Counts, timeouts and where Slurm puts the next job restart nothing."""
    was = Model.model_validate(BASE)
    now = Model.model_validate({**BASE, field: RESTARTS_NOTHING[field]})
    assert now != was
    assert was.revision("sha256:0") == now.revision("sha256:0")


def test_revision_rule_names_every_field() -> None:
    """A new field must be put on one of the two lists above."""
    assert RESTARTS | set(RESTARTS_NOTHING) == set(Model.model_fields)


def test_revision_stays_when_the_same_is_written_differently() -> None:
    """The order of keys, and a default that is written out, change nothing."""
    swapped = {**BASE, "args": dict(reversed(BASE["args"].items()))}
    short = {**BASE, "resources": {"cpus": 2, "memory": "4G"}}
    revisions = {Model.model_validate(r).revision("x") for r in (BASE, swapped, short)}
    assert len(revisions) == 1


@pytest.mark.parametrize("folder", sorted(path.parent for path in SPECS.glob("*/fleet.yaml")))
def test_spec_of_this_repository_loads(folder: Path) -> None:
    """Every spec that is shipped is right."""
    assert load_fleet(folder).models


def test_slurm_options_of_a_model_win_over_the_fleets() -> None:
    """A model's own Slurm keys replace the fleet's; the others stay."""
    wanted = fleet(model_record(slurm={"partition": "long"}))
    slurm = wanted.slurm_for(wanted.models[0])
    assert (slurm.partition, slurm.walltime) == ("long", "4:00:00")


def test_R23_gpu_count_need_not_be_a_power_of_two() -> None:
    """Three GPUs, or seven, are counts like any other."""
    record = model_record(resources={"gpus": 3, "memory": "4G"}, replicas=2)
    assert fleet(record, budget={"gpus": 7}).models[0].resources.gpus == 3


def test_gpus_of_several_nodes_are_counted_on_each() -> None:
    """`gpus` is per node; the budget counts those of all nodes, and one node is the default."""
    record = model_record(resources={"nodes": 3, "gpus": 2, "memory": "4G"}, replicas=1)
    assert fleet(record).models[0].resources.gpus_total == 6
    assert fleet().models[0].resources.gpus_total == 1


def test_one_node_is_no_new_revision() -> None:
    """A spec that says what was always so restarts nothing; more nodes do."""
    plain, one, two = (
        model_record(resources={"gpus": 1, "cpus": 2, "memory": "4G", **more})
        for more in ({}, {"nodes": 1}, {"nodes": 2})
    )
    assert revision(fleet(plain)) == revision(fleet(one)) != revision(fleet(two))


@pytest.mark.parametrize(
    ("args", "mistakes"),
    [
        ({}, 1),
        ({"tensor-parallel-size": 3}, 1),
        ({"tensor-parallel-size": 4}, 0),
        ({"tensor_parallel_size": 2}, 0),
        ({"tensor-parallel-size": 3, "pipeline-parallel-size": 2}, 0),
        ({"tensor-parallel-size": 3, "data-parallel-size": 2}, 0),
        ({"tensor-parallel-size": "8"}, 0),
    ],
)
def test_ranks_must_fill_the_nodes_evenly(args: dict[str, Any], mistakes: int) -> None:
    """vLLM refuses any other number, minutes later; what is no plain number is left to it."""
    record = model_record(resources={"nodes": 2, "memory": "4G"}, replicas=1, args=args)
    found = [place for place, _ in impossibilities(fleet(record))]
    assert found == [("models", 0, "resources", "nodes")] * mistakes


def test_schema_names_every_key_and_forbids_others() -> None:
    """The JSON Schema for editors refuses unknown keys as the reader does."""
    schema = json_schema()
    assert set(schema["properties"]) == set(Fleet.model_fields)
    objects = [schema, *schema["$defs"].values()]
    assert all(part["additionalProperties"] is False for part in objects)


def test_did_you_mean_of_a_huge_key_is_one_short_line(tmp_path: Path) -> None:
    """A key of any length is shown in part: an error stays one readable line."""
    [line] = validate_text(tmp_path, GOOD + f"{'k' * 1000}: 1\n")
    assert re.fullmatch(r'fleet.yaml:15:1: unknown key "k+\.\.\.', line)


@pytest.mark.parametrize(
    ("old", "new", "warns"),
    [
        ("gpus: 4", "gpus: 3", False),
        ("gpus: 4", "gpus: 2", True),
        ("models:", "defaults: {rollout: {max_unavailable: 1}}\nmodels:", False),
    ],
)
def test_budget_without_room_for_a_successor_is_a_warning(
    old: str, new: str, warns: bool, tmp_path: Path
) -> None:
    """Such a fleet can be served, and then neither rolled nor kept over a walltime's end."""
    text = GOOD.replace(old, new, 1).replace("gpus: 4", "gpus: 2")
    (tmp_path / "fleet.yaml").write_text(text, encoding="utf-8")
    result = CliRunner().invoke(main, ["validate", str(tmp_path)])
    assert result.exit_code == 0
    assert ("warning: the budget leaves 0 GPUs beside" in result.stderr) == warns
