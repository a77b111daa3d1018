"""A submission to the text of its batch script: arguments in, text out.

Every sbatch option is an #SBATCH line, so the script alone is enough to submit the job again.
What comes from the spec is quoted by shlex for bash; what stands on an #SBATCH line is a word
that the spec has checked. Bash 4.2 and newer, curl, and Slurm's own commands are all it needs.
"""

import json
import shlex
from collections.abc import Iterator
from importlib.resources import files

from pydantic import TypeAdapter, ValidationError

from reconciler.naming import LOG_NAME, submit_comment, tls_name
from reconciler.plan import Submit
from reconciler.spec import Fleet, Image, Model
from reconciler.state import Credentials, Recipe

# The job's own half of the script; the rendered half above it only sets variables.
_BODY = files("reconciler").joinpath("replica.sh").read_text(encoding="utf-8")

_RECIPE = "# recipe: "
_RECIPES = TypeAdapter(Recipe)

# Where weights appear inside the container; one place, so that no host path reaches the engine.
_WEIGHTS_INSIDE = "/models"


def batch_script(recipe: Recipe, submit: Submit, credentials: Credentials | None = None) -> str:
    """Return the whole script of one replica; without credentials it is open to everybody."""
    fleet, model, program = recipe.fleet, recipe.model, recipe.program
    image = fleet.images[model.image]
    comment = submit_comment(
        submit.name,
        gpus=model.resources.gpus_total,
        commit=recipe.commit,
        succeeds=submit.succeeds,
        protect=model.protect,
        keys=credentials.keys if credentials else (),
        placement=fleet.slurm_for(model).placement,
        avoids=submit.exclude,
    )
    return "\n".join(
        [
            "#!/bin/bash",
            *_sbatch_lines(fleet, model, submit, comment),
            # Slurm keeps it as long as the job: a lost memory finds it there again.
            f"{_RECIPE}{_RECIPES.dump_json(recipe, exclude_defaults=True).decode()}",
            "",
            # Without its closing brace: the job adds what it says of itself.
            f"comment_base={shlex.quote(comment.removesuffix('}'))}",
            f"program={shlex.quote(program)}",
            f"image_cache={shlex.quote(_image_cache(fleet, image))}",
            f"weights={shlex.quote(model.weights)}",
            f"node_count={model.resources.nodes}",
            f"drain_timeout_s={fleet.drain_timeout_s(model)}",
            _array("names", [*model.names]),
            _array("launch", _launch(image, model, program)),
            _array("arguments", _arguments(fleet, model)),
            _array("environment", [f"{key}={value}" for key, value in _environment(model).items()]),
            f"contained={'true' if image.runtime == 'apptainer' else 'false'}",
            f"secrets={shlex.quote(credentials.folder if credentials else '')}",
            _array("keys", [*credentials.keys] if credentials else []),
            f"tls_name={tls_name(fleet.fleet, model.name)}",
            "",
            _BODY,
        ]
    )


def read_recipe(script: str) -> Recipe | None:
    """Return the recipe in a script that `batch_script` made, None if it has none that is known."""
    lines = (line for line in script.split("\n") if line.startswith(_RECIPE))
    try:
        return _RECIPES.validate_json(next(lines, "").removeprefix(_RECIPE))
    except ValidationError:
        return None


def _sbatch_lines(fleet: Fleet, model: Model, submit: Submit, comment: str) -> Iterator[str]:
    slurm = fleet.slurm_for(model)
    walltime_s, nodes = submit.walltime_s, model.resources.nodes
    options = {
        "job-name": str(submit.name),
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.walltime if walltime_s is None else slurm_time(walltime_s),
        "exclude": ",".join(submit.exclude) or None,
        "nodes": str(nodes),
        "ntasks": str(nodes),
        "ntasks-per-node": "1" if nodes > 1 else None,
        # These three are for each node.
        "cpus-per-task": str(model.resources.cpus),
        "mem": model.resources.memory,
        "gres": f"gpu:{model.resources.gpus}",
        # Slurm itself never has two jobs of one name and user RUNNING.
        "dependency": "singleton",
        # sbatch's parser takes single quotes; a comment of ours holds none (naming.py).
        "comment": f"'{comment}'",
        "output": f"'{slurm.log_dir}/{LOG_NAME}'",
    }
    for option, value in options.items():
        if value is not None:
            yield f"#SBATCH --{option}={value}"
    # A requeue keeps the id, waits two minutes and moves; a new job is quicker and clearer.
    yield "#SBATCH --no-requeue"


def slurm_time(seconds: int) -> str:
    """Return a duration as sbatch reads it: D-HH:MM:SS."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-{hour:02}:{minute:02}:{second:02}"


def _array(name: str, words: list[str]) -> str:
    return f"{name}=({' '.join(map(shlex.quote, words))})"


def _launch(image: Image, model: Model, program: str) -> list[str]:
    """Return the words before the engine's own: the container's, or the program's path."""
    if image.runtime == "none":
        return [program]
    nv = ["--nv"] if model.resources.gpus else []
    return [
        *("apptainer", "exec", *nv, "--cleanenv", "--containall", "--no-mount", "home"),
        *("--bind", f"{model.weights}:{_WEIGHTS_INSIDE}:ro"),
        *("--workdir", "@SCRATCH@", program, "vllm"),
    ]


def _image_cache(fleet: Fleet, image: Image) -> str:
    return fleet.image_cache or "" if image.runtime == "apptainer" else ""


def _arguments(fleet: Fleet, model: Model) -> list[str]:
    image = fleet.images[model.image]
    weights = model.weights if image.runtime == "none" else _WEIGHTS_INSIDE
    words = ["serve", weights, f"--shutdown-timeout={fleet.drain_timeout_s(model)}"]
    for key, value in model.args.items():
        words += engine_argument(key, value)
    return words


def engine_argument(key: str, value: object) -> list[str]:
    """Return the words of one engine argument: true is a flag, false its --no- form."""
    flag = f"--{key}"
    if value is True:
        return [flag]
    if value is False:
        return [f"--no-{key}"]
    if isinstance(value, list):
        return [flag, *(_word(item) for item in value)]
    # One word with `=`: a value with a leading dash stays a value.
    return [f"{flag}={_word(value)}"]


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _environment(model: Model) -> dict[str, str]:
    """Return what the engine's environment holds besides what the job script adds."""
    return {
        # Longer than NGINX keeps an idle connection (60 s): else it reuses one that just closed.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",
        **model.env,
    }
