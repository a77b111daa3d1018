"""The batch script: whatever a spec says arrives at the engine as it is written, and nowhere else.

The scripts are not only read: bash runs their first half, and the arrays are compared.
"""

import fcntl
import json
import os
import re
import shlex
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from reconciler.batch import batch_script, engine_argument, read_recipe
from reconciler.naming import ReplicaName, parse_comment
from reconciler.plan import Reason, Submit
from reconciler.spec import Fleet
from reconciler.state import Credentials, Recipe
from tests.unit.build import KEYS, fleet, model_record

SIF = {"images": {"engine": {"name": "vllm"}}, "image_dir": "/images"}
COMMIT = "0123456789ab"
CREDENTIALS = Credentials(folder="/shared/secrets/demo", keys=KEYS)
BODY = files("reconciler").joinpath("replica.sh").read_text(encoding="utf-8")

NASTY = [
    *("", " ", "a b", "a\nb", "\n", "'", '"', "'\"'\"'", "`id`", "$(id)", "${HOME}", "$HOME"),
    *("\\", "\\n", "a\\", "*", "?", "[a]", "~", "~root", "!", "!!", "#", "a #b", ";", "; id #"),
    *("&", "|", "<x", ">x", "(", ")", "{a,b}", "=", "a=b", ",", "%s", "%x", "é", "日本語", "🙂"),
    *("-x", "--port", "--port=1", "-", "--", "\t", "\u2028", "\x1b[31m", "\x7f", "@SCRATCH@"),
    *("x' #SBATCH --uid=0", "\n#SBATCH --uid=0\n", "EOF", "true", "null", "0", "1e3"),
]


def script_of(wanted: Fleet, program: str = "/opt/engine") -> str:
    model = wanted.models[0]
    name = ReplicaName(fleet="demo", model=model.name, revision="0123abcd", ordinal=3)
    submit = Submit(name=name, gpus=model.resources.gpus_total, reason=Reason.MISSING)
    recipe = Recipe.of(wanted, model, digest="sha", program=program, commit=COMMIT)
    return batch_script(recipe, submit, CREDENTIALS)


def script(program: str = "/opt/engine", top: dict[str, Any] | None = None, **keys: Any) -> str:
    return script_of(fleet(model_record(**keys), **(top or {})), program)


def run_head(text: str) -> dict[str, list[str]]:
    """Run the script's own lines without the job's half; return the variables that they set."""
    head = text.removesuffix(BODY)
    assert head != text
    show = "".join(
        f'printf \'%s\\0\' {variable} "${{#{variable}[@]}}" "${{{variable}[@]}}"\n'
        for variable in VARIABLES
    )
    done = subprocess.run(
        ["bash", "-s"], input=(head + show).encode(), capture_output=True, check=True
    )
    assert done.stderr == b""
    words = done.stdout.decode().split("\0")
    found = {}
    for variable in VARIABLES:
        assert words.pop(0) == variable
        count = int(words.pop(0))
        found[variable] = [words.pop(0) for _ in range(count)]
    assert words == [""]
    return found


VARIABLES = (
    *("comment_base", "names", "launch", "arguments", "environment", "contained", "node_count"),
    "image_cache",
)


def sbatch_lines(text: str) -> list[str]:
    """The options as sbatch finds them: `#SBATCH` lines up to the first command."""
    lines = []
    for line in text.splitlines()[1:]:
        if line.startswith("#SBATCH"):
            lines.append(line.removeprefix("#SBATCH "))
        elif line and not line.startswith("#"):
            break
    return lines


GOLDEN = """\
#!/bin/bash
#SBATCH --job-name=demo.tiny.0123abcd.3
#SBATCH --partition=gpu
#SBATCH --time=4:00:00
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=4G
#SBATCH --gres=gpu:1
#SBATCH --dependency=singleton
#SBATCH --comment='{"v":1,"fleet":"demo","model":"tiny","revision":"0123abcd",\
"commit":"0123456789ab","gpus":1,"keys":["aaaaaaaa","bbbbbbbb"],"placement":"0cc83a45"}'
#SBATCH --output='/shared/logs/%x.%j.log'
#SBATCH --no-requeue
# recipe: ...

comment_base='{"v":1,"fleet":"demo","model":"tiny","revision":"0123abcd",\
"commit":"0123456789ab","gpus":1,"keys":["aaaaaaaa","bbbbbbbb"],"placement":"0cc83a45"'
program=/images/vllm.sif
image_cache=''
weights=/models/tiny
node_count=1
drain_timeout_s=60
names=(tiny org/Tiny)
launch=(apptainer exec --nv --cleanenv --containall --no-mount home \
--bind /models/tiny:/models:ro --workdir @SCRATCH@ /images/vllm.sif vllm)
arguments=(serve /models --shutdown-timeout=60 --max-model-len=512 --enforce-eager)
environment=(VLLM_HTTP_TIMEOUT_KEEP_ALIVE=120 HF_HUB_OFFLINE=1)
contained=true
secrets=/shared/secrets/demo
keys=(aaaaaaaa bbbbbbbb)
tls_name=tiny.demo.modelfleet.internal

"""


def test_script_of_a_contained_model_is_as_reviewed() -> None:
    """The whole first half of a script, line by line; the job's half follows unchanged."""
    text = script(
        program="/images/vllm.sif",
        top=SIF,
        served_names=["org/Tiny"],
        args={"max-model-len": 512, "enforce-eager": True},
        env={"HF_HUB_OFFLINE": "1"},
    )
    assert re.sub(r"# recipe: .*", "# recipe: ...", text) == GOLDEN + BODY


def test_script_of_a_program_on_the_host_names_its_path() -> None:
    """runtime none starts the program itself, with the weights where they are."""
    found = run_head(script())
    assert found["launch"] == ["/opt/engine"]
    assert found["arguments"][:2] == ["serve", "/models/tiny"]
    assert found["contained"] == ["false"]


def test_script_passes_bash_and_shellcheck(tmp_path: Path) -> None:
    """Bash can read every script, and shellcheck has nothing to say about it."""
    scripts = (script(args={"x": NASTY[2]}), script(top=SIF), script(resources=RANKS))
    for number, text in enumerate(scripts):
        path = tmp_path / f"{number}.sh"
        path.write_text(text, encoding="utf-8")
        # SC2317, SC2329: what only a trap calls seems unreachable.
        check = ["shellcheck", "--shell=bash", "--exclude=SC2317,SC2329", str(path)]
        for argv in (["bash", "-n", str(path)], check):
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *((True, ["--x"]), (False, ["--no-x"]), (0, ["--x=0"]), (1, ["--x=1"])),
        *((-1, ["--x=-1"]), (0.5, ["--x=0.5"]), ("", ["--x="]), ("-1", ["--x=-1"])),
        *(("true", ["--x=true"]), ("a b", ["--x=a b"]), (["a", 1], ["--x", "a", "1"])),
        *(([True, 0.5], ["--x", "true", "0.5"]), ({}, ["--x={}"])),
        ({"a": [1, None, {"b": "é '\""}]}, ['--x={"a": [1, null, {"b": "\\u00e9 \'\\""}]}']),
    ],
)
def test_R15_argument_of_any_type_has_its_form(value: object, words: list[str]) -> None:
    """true is a flag, false its --no- form, a list several words, a mapping one word of JSON."""
    assert engine_argument("x", value) == words


def test_R15_arguments_arrive_intact() -> None:
    """Quotes, newlines, `$()`, unicode, dashes: each text is one word, as it stands in the spec."""
    args: dict[str, Any] = {f"a{n}": text for n, text in enumerate(NASTY)}
    args |= {f"d{n}": {text: [text]} for n, text in enumerate(NASTY)}
    args |= {"l": [text for text in NASTY if not text.startswith("-")]}
    found = run_head(script(args=args))["arguments"]
    expected = [f"--a{n}={text}" for n, text in enumerate(NASTY)]
    expected += [f"--d{n}={json.dumps({text: [text]})}" for n, text in enumerate(NASTY)]
    expected += ["--l", *args["l"]]
    assert found == ["serve", "/models/tiny", "--shutdown-timeout=60", *expected]


LINES = [text for text in NASTY if text and text.isprintable()]


def test_R15_names_and_environment_arrive_intact() -> None:
    """What clients call a model, and what the engine's environment holds, is not touched."""
    names = [f"n{text}" for text in LINES]
    env = {f"E{n}": text for n, text in enumerate(LINES)}
    found = run_head(script(served_names=names, env=env))
    assert found["names"] == ["tiny", *names]
    pairs = [f"{key}={value}" for key, value in env.items()]
    assert found["environment"] == ["VLLM_HTTP_TIMEOUT_KEEP_ALIVE=120", *pairs]


PATHS = [f"/{text}" for text in LINES if not set(text) & set(":,\\")]


@pytest.mark.parametrize("path", PATHS)
def test_R37_path_with_special_characters_is_one_word(path: str) -> None:
    """Weights and programs may lie anywhere; nothing of their paths is shell."""
    top = {"images": {"engine": {"runtime": "none", "path": path}}}
    host = run_head(script(program=path, top=top, weights=path))
    assert host["launch"] == [path]
    assert host["arguments"][1] == path
    contained = run_head(script(program=f"{path}/x.sif", top=SIF, weights=path))
    assert contained["launch"][-2:] == [f"{path}/x.sif", "vllm"]
    assert f"{path}:/models:ro" in contained["launch"]
    cached = run_head(script(program=f"{path}/x.sif", top={**SIF, "image_cache": path}))
    assert cached["image_cache"] == [path]


def test_R37_no_string_of_a_spec_reaches_sbatch() -> None:
    """The options that sbatch reads are the same whatever the free texts of a spec hold."""
    attack = "x\n#SBATCH --uid=0\n"
    plain = script(args={"a": "x"})
    evil = script(
        args={"a": attack, "b": [attack], "c": {attack: attack}},
        served_names=["#SBATCH --uid=0"],
        env={"A": "#SBATCH --uid=0"},
        weights="/#SBATCH --uid=0",
    )
    assert sbatch_lines(evil) == sbatch_lines(plain)
    assert len(sbatch_lines(plain)) == 12


def log_line(folder: str) -> str:
    slurm = {"partition": "gpu", "walltime": "4:00:00", "log_dir": folder}
    [line] = [line for line in sbatch_lines(script(top={"slurm": slurm})) if "output" in line]
    return line


@pytest.mark.parametrize("path", [path for path in PATHS if "'" not in path])
def test_R37_log_folder_is_one_quoted_word(path: str) -> None:
    """On an #SBATCH line only a single quote could end what single quotes hold."""
    assert log_line(path) == f"--output='{path}/%x.%j.log'"


def test_R37_log_folder_with_a_quote_is_refused() -> None:
    """It could end the word and begin another option of sbatch."""
    with pytest.raises(ValueError, match="without a single quote"):
        log_line("/a' --uid=0 '")


def test_slurm_options_of_the_spec_are_sbatch_lines() -> None:
    """Account and QOS stand there when given; a model's own values win."""
    slurm = {"partition": "a,b", "account": "ai", "qos": "high", "log_dir": "/logs"}
    own = {"partition": "long", "walltime": "2-00:00:00"}
    lines = sbatch_lines(script(top={"slurm": slurm}, slurm=own))
    assert {"--partition=long", "--account=ai", "--qos=high", "--time=2-00:00:00"} <= set(lines)


def test_recipe_of_a_script_is_found_in_it_again() -> None:
    """Slurm keeps the script as long as the job lives, whatever strings the spec holds."""
    args = {f"a{at}": text for at, text in enumerate(NASTY) if "\0" not in text}
    wanted = fleet(model_record(args=args, served_names=["a 'b'"]), fleet="demo")
    recipe = Recipe.of(wanted, wanted.models[0], digest="sha", program="/opt/x", commit=COMMIT)
    name = ReplicaName(fleet="demo", model="tiny", revision=recipe.revision, ordinal=0)
    text = batch_script(recipe, Submit(name=name, gpus=1, reason=Reason.MISSING))
    assert read_recipe(text) == recipe
    assert batch_script(recipe, Submit(name=name, gpus=1, reason=Reason.MISSING)) == text


@pytest.mark.parametrize("script", ["", "#!/bin/bash\n", "# recipe: {}\n", "# recipe: \n"])
def test_script_without_a_recipe_has_none(script: str) -> None:
    """A script of an older program, or of another one."""
    assert read_recipe(script) is None


def test_R23_resources_are_asked_for_as_written() -> None:
    """Three GPUs are three GPUs, of Slurm and in the comment that the budget is counted from."""
    text = script(resources={"gpus": 3, "cpus": 5, "memory": "7G"}, replicas=1)
    assert {"--gres=gpu:3", "--cpus-per-task=5", "--mem=7G"} <= set(sbatch_lines(text))
    [comment] = [line for line in sbatch_lines(text) if line.startswith("--comment=")]
    parsed = parse_comment(comment.removeprefix("--comment='").removesuffix("'"))
    assert parsed is not None
    assert (parsed.gpus, parsed.commit, parsed.run) == (3, COMMIT, None)


def test_several_nodes_are_asked_for_with_what_each_must_have() -> None:
    """GPUs, cores and memory are per node, one rank on each; the comment counts all GPUs."""
    text = script(resources={"nodes": 2, "gpus": 4, "cpus": 5, "memory": "7G"}, replicas=1)
    lines = sbatch_lines(text)
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set(lines)
    assert {"--gres=gpu:4", "--cpus-per-task=5", "--mem=7G"} <= set(lines)
    [comment] = [line for line in lines if line.startswith("--comment=")]
    parsed = parse_comment(comment.removeprefix("--comment='").removesuffix("'"))
    assert parsed is not None
    assert parsed.gpus == 8
    assert run_head(text)["node_count"] == ["2"]


RANKS = {"nodes": 2, "gpus": 1, "memory": "1G"}


@pytest.mark.parametrize(
    ("rank", "more"),
    [("0", ["--host", "10.0.0.1", "--port", "20001"]), ("1", ["--headless"])],
)
def test_rank_of_several_is_told_where_the_first_is(rank: str, more: list[str]) -> None:
    """Each rank gets the spec's words, its own, and who it is; and the address of its own node."""
    show = """#!/bin/bash
printf '%s\\0' "$VLLM_HOST_IP" "$A" "$@"
"""
    text = script(program="/bin/sh", resources=RANKS, args={"a": "x y"}, env={"A": "it's"})
    found = functions(
        text,
        *(f"node=10.0.0.{int(rank) + 1} master=10.0.0.1 master_port=20000 rank={rank}",),
        *(f"launch=(bash -c {shlex.quote(show)} engine)", f"start_rank {shlex.join(more)}"),
        'wait "$engine"',
    ).split("\0")[:-1]
    identity = ["--nnodes", "2", "--node-rank", rank]
    master = ["--master-addr", "10.0.0.1", "--master-port", "20000"]
    words = ["serve", "/models/tiny", "--shutdown-timeout=60", "--a=x y", *more, *identity, *master]
    assert found == [f"10.0.0.{int(rank) + 1}", "it's", *words]


def test_engine_of_one_node_is_told_of_no_rank() -> None:
    """Nothing of several nodes reaches an engine that has one."""
    found = functions(
        script(),
        "node=10.0.0.1",
        "launch=(bash -c 'echo ${VLLM_HOST_IP-none} \"$@\"' engine)",
        "start_rank --host 10.0.0.1",
        'wait "$engine"',
    )
    assert found == "none serve /models/tiny --shutdown-timeout=60 --host 10.0.0.1\n"


def functions(text: str, *commands: str) -> str:
    """Run commands after a script's first half and its functions; return what they print."""
    head = text.partition("\ntrap clean_up EXIT\n")[0]
    done = subprocess.run(
        ["bash", "-s"],
        input="\n".join([head, *commands]),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


def test_job_has_one_name_and_is_never_requeued() -> None:
    """Slurm holds a second job of the name back; a requeue would keep the id and move."""
    lines = sbatch_lines(script())
    assert "--job-name=demo.tiny.0123abcd.3" in lines
    assert {"--dependency=singleton", "--no-requeue"} <= set(lines)


def test_comment_that_the_job_completes_is_ours() -> None:
    """The job's own comment is the submitted one plus what it says of itself, and is read back."""
    found = run_head(script())["comment_base"][0]
    function = re.search(r"^comment\(\) \{.*?^\}", BODY, re.MULTILINE | re.DOTALL)
    assert function is not None
    variables = (
        "address=10.0.0.1:20000 trap_ready=true ready=null draining=false "
        "SLURMD_NODENAME=node1 SLURM_RESTART_COUNT=2"
    )
    done = subprocess.run(
        ["bash", "-uc", f"comment_base=$1 {variables}\n{function[0]}\ncomment", "bash", found],
        capture_output=True,
        text=True,
        check=True,
    )
    comment = parse_comment(done.stdout)
    assert comment is not None
    assert comment.run is not None
    assert (comment.gpus, comment.run.node, comment.run.restarts) == (1, "node1", 2)
    assert (comment.run.address, comment.run.ready_at) == ("10.0.0.1:20000", None)
    assert (comment.run.trap_ready, comment.run.draining) == (True, False)


CACHE = """set -u
say() { :; }
{function}
image_cache=$1 program=$2 launch=(apptainer "$2" vllm)
use_copy
printf '%s\n' "${launch[@]}"
"""


def launched(cache: Path, program: Path) -> list[str]:
    """Have the job's half use a copy of its image; return what it then starts."""
    found = re.search(r"^use_copy\(\) \{.*?^\}", BODY, re.MULTILINE | re.DOTALL)
    assert found is not None
    argv = ["bash", "-c", CACHE.replace("{function}", found[0]), "bash", str(cache), str(program)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_image_is_copied_once_and_the_copies_that_no_job_runs_go(tmp_path: Path) -> None:
    """A job has its copy locked as long as it lives; where there is no room, none is left half."""
    cache, program = tmp_path / "cache", tmp_path / "new.sif"
    program.write_text("new")
    cache.mkdir(mode=0o700)
    for name in ("idle.sif", "busy.sif"):
        (cache / name).write_text("old")
    with (cache / "busy.sif.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert launched(cache, program) == ["apptainer", str(cache / "new.sif"), "vllm"]
    assert {path.name for path in cache.glob("*.sif")} == {"busy.sif", "new.sif"}
    program.unlink()
    assert launched(cache, program)[1] == str(cache / "new.sif")
    absent = tmp_path / "absent.sif"
    assert launched(cache, absent)[1] == str(absent)
    assert not list(cache.glob("*.part"))


def test_cache_that_another_user_made_is_not_used(tmp_path: Path) -> None:
    """They could say what runs here."""
    program = tmp_path / "new.sif"
    program.write_text("new")
    link, other = tmp_path / "link", tmp_path / "other"
    other.mkdir()
    link.symlink_to(tmp_path)
    os.chown(other, 1, 1)
    for cache in (link, other):
        assert launched(cache, program)[1] == str(program)
