"""The fleet spec: what is wanted. Strict models, and the folder reader that finds every mistake.

A folder holds `fleet.yaml`, any number of `models/*.yaml` (one model a file) and of
`tenants/*.yaml` (one tenant a file), read as one.
"""

import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from reconciler import source
from reconciler.arguments import check_arguments, unchecked
from reconciler.errors import Problem, SpecError
from reconciler.naming import LABEL, LABEL_MAX, checked_address

# The folders of a spec, each with one of these a file.
_FOLDERS = ("models", "tenants")

_DURATION = re.compile(r"(?:(?P<days>[0-9]{1,6})-)?(?P<clock>[0-9]{1,9}(?::[0-9]{1,9}){0,2})")
# Of a name and no address: NGINX compares a certificate with names.
_URL = re.compile(
    r"https://([a-z0-9-]+\.)*[a-z0-9-]*[a-z][a-z0-9-]*(:(?P<port>[1-9][0-9]{0,4}))?"
    r"(/[A-Za-z0-9._~-]+)*"
)
_MEMORY = re.compile(r"[1-9][0-9]{0,8}[MGT]")


def parse_duration(text: str) -> int:
    """Return the seconds of a Slurm time: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S (sbatch(1)).

    Raises ValueError for anything else, such as UNLIMITED, INVALID or N/A.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError("must be a Slurm time such as 30:00, 12:00:00 or 1-00:00:00")
    parts = [int(part) for part in match["clock"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


def _quoted_duration(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        # Not TypeError: only a ValueError is a problem of the spec to pydantic.
        raise ValueError(  # noqa: TRY004
            f'needs a unit: write "{value}:00" for minutes, or "1-00:00:00" for a day'
        )
    return value


def _checked_duration(text: str) -> str:
    if parse_duration(text) <= 0:
        raise ValueError("must be longer than nothing")
    return text


def _checked_memory(text: str) -> str:
    if _MEMORY.fullmatch(text) is None:
        raise ValueError("must be a size with its unit, such as 64G or 512M")
    return text


def _checked_path(text: str) -> str:
    if not text.startswith("/") or any(c in text for c in ":,\\") or not text.isprintable():
        raise ValueError("must be an absolute path without ':', ',' or backslash")
    return text


def _checked_log_dir(text: str) -> str:
    # It stands between single quotes on an #SBATCH line, where nothing can escape one.
    if "'" in text:
        raise ValueError("must be an absolute path without a single quote")
    return text


def _checked_url(text: str) -> str:
    match = _URL.fullmatch(text)
    if match is None or len(text) > 500 or int(match["port"] or 0) > 65535:
        raise ValueError("must be https:// and a name, with :port and /path if need be")
    return text


def _checked_resolver(text: str) -> str:
    try:
        checked_address(text if ":" in text else f"{text}:53")
    except ValueError:
        raise ValueError("must be an IPv4 address, with :port if need be") from None
    return text


def _not_empty(items: tuple[str, ...]) -> tuple[str, ...]:
    if not items:
        raise ValueError("must list one at least")
    return items


def _one_line(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("must be one line of printable text")
    return text


Label = Annotated[str, Field(pattern=rf"^{LABEL}$", max_length=LABEL_MAX)]
# What reaches an #SBATCH line unquoted.
SlurmWord = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,+-]*$", max_length=200)]
Duration = Annotated[str, BeforeValidator(_quoted_duration), AfterValidator(_checked_duration)]
Memory = Annotated[str, AfterValidator(_checked_memory)]
AbsolutePath = Annotated[str, AfterValidator(_checked_path)]
LogDir = Annotated[AbsolutePath, AfterValidator(_checked_log_dir)]
Line = Annotated[str, AfterValidator(_one_line)]
Version = Annotated[str, Field(pattern=r"^[0-9][0-9A-Za-z.+-]*$", max_length=LABEL_MAX)]
Access = Literal["protected", "open"]
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
ArgName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]*$")]
# true -> --flag, false -> --no-flag, a list -> several words, a mapping -> one word of JSON.
ArgScalar = bool | int | float | str
ArgValue = ArgScalar | list[ArgScalar] | dict[str, Any]
# Of a walltime: cycles, reloads and Slurm's own clock take a while too.
MARGIN_S = 60.0
# Bounded, so that no sum or product of them overflows what clocks and plans can hold.
Positive = Annotated[int, Field(ge=1, le=1_000_000)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]
Percent = Annotated[int, Field(ge=0, le=100)]
Weight = Annotated[int, Field(ge=1, le=100)]
# What stands unquoted in NGINX's configuration.
NginxPath = Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/@+-]+$", max_length=500)]
NginxSize = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5}[km]$")]
# NGINX takes whole requests a minute.
Rate = Annotated[float, Field(ge=0.02, le=100_000)]
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9-]{0,63}$")]
ExternalUrl = Annotated[str, AfterValidator(_checked_url)]
Resolver = Annotated[str, AfterValidator(_checked_resolver)]
KeyHash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A name's ordinal has six digits at most (naming.py): a job beyond them would be foreign to us.
Replicas = Annotated[int, Field(ge=0, le=10_000)]


def _digest(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class Strict(BaseModel):
    """Unknown keys and wrong types are errors; values never change after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Slurm(Strict):
    """Where jobs go. Slurm's own words. An edit moves what waits, and nothing that runs."""

    partition: SlurmWord
    account: SlurmWord | None = None
    qos: SlurmWord | None = None
    walltime: Duration = "1-00:00:00"
    log_dir: LogDir = Field(description="where jobs write their logs; must exist on the nodes")

    @property
    def placement(self) -> str:
        """The first 8 hex digits of the digest of what decides where and when a job starts."""
        words = self.model_dump(exclude_none=True, exclude={"log_dir"})
        return _digest({**words, "walltime": parse_duration(self.walltime)})


class SlurmOverride(Strict):
    """A model's own values in place of the fleet's."""

    partition: SlurmWord | None = None
    account: SlurmWord | None = None
    qos: SlurmWord | None = None
    walltime: Duration | None = None


class Budget(Strict):
    """What the fleet may hold at most, surge included."""

    gpus: Count


class Image(Strict):
    """What runs an engine: a SIF by the name of its manifest, or a program on the host."""

    runtime: Literal["apptainer", "none"] = "apptainer"
    name: Label | None = Field(None, description="of the manifest `<image_dir>/<name>.json`")
    path: AbsolutePath | None = Field(None, description="of the program, for `runtime: none`")
    version: Version | None = Field(None, description="of the engine; checks its arguments")


class GatewayHost(Strict):
    """One NGINX; `ssh` names the host it runs on, none means this host."""

    name: Label
    ssh: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.@-]*$")] | None = None


class GatewayTls(Strict):
    """TLS to the clients; without it the site encrypts in front of the gateway, or nobody does."""

    certificate: NginxPath = Field(description="PEM file on the gateway, with its chain")
    key: NginxPath = Field(description="PEM file on the gateway, readable to NGINX")


class External(Strict):
    """How a gateway reaches what lies outside, for models that have a `fallback`."""

    resolvers: Annotated[tuple[Resolver, ...], Field(strict=False), AfterValidator(_not_empty)] = (
        Field(description="DNS servers as IPv4, or IPv4:port; NGINX does not read resolv.conf")
    )
    authorities: NginxPath = Field(
        "/etc/ssl/certs/ca-certificates.crt",
        description="PEM file on the gateway: whose certificates are believed",
    )


class Gateway(Strict):
    """The one address of all models."""

    listen: Annotated[int, Field(ge=1, le=65535)] = 8080
    server_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9.-]*$")] = "_"
    tls: GatewayTls | None = None
    body_max: NginxSize = Field("8m", description="of a JSON request; a gateway holds it in memory")
    upload_max: NginxSize = Field("64m", description="of a request to /m/MODEL/, such as audio")
    directory: NginxPath = "/var/lib/modelfleet/gateway"
    external: External | None = Field(None, description="what a `fallback` of a model needs")
    hosts: Annotated[tuple[GatewayHost, ...], Field(strict=False)]


class Rollout(Strict):
    """How a new revision replaces the old one."""

    max_surge: Count = 1
    max_unavailable: Count = 0


class Defaults(Strict):
    """Values for models that don't give their own."""

    startup_timeout_s: Positive = 1200
    drain_timeout_s: Positive = 600
    rollout: Rollout = Rollout()


class Resources(Strict):
    """What one replica holds."""

    nodes: Positive = Field(
        1, description="more than one: the engine's ranks run one to a node, behind one endpoint"
    )
    gpus: Positive = Field(1, description="on each node")
    cpus: Positive = Field(8, description="on each node")
    memory: Memory = Field(description="on each node")

    @property
    def gpus_total(self) -> int:
        """What one replica holds of the budget: the GPUs of all its nodes."""
        return self.nodes * self.gpus


class Abort(Strict):
    """When a canary is given up: how much worse than the rest of its model it may be."""

    requests: Positive = Field(100, description="that each side must have had, in an hour")
    errors_percent: Percent = Field(5, description="that more of its requests fail, of all")
    first_byte_percent: Count = Field(
        50, description="that its median time to the first byte is longer"
    )


class Canary(Strict):
    """A second revision of a model, served beside the first: what differs, and how many of it."""

    replicas: Replicas = 1
    share: Percent | None = Field(
        None, description="percent of the requests; without: as any other replica"
    )
    abort: Abort = Field(Abort(), description="with a share")
    weight: Weight | None = Field(None, description="default: the model's own")
    image: Label | None = None
    weights: AbsolutePath | None = None
    args: dict[ArgName, ArgValue] = Field({}, description="laid over the model's own")
    env: dict[EnvName, Line] = Field({}, description="laid over the model's own")


class Fallback(Strict):
    """Who answers while no replica of a model is ready: an API like OpenAI's, somewhere else."""

    url: ExternalUrl = Field(description="up to and with /v1, if it has that")
    model: Line = Field(description="what the model is called there")
    key_file: AbsolutePath = Field(
        description="on the host that runs fleet: one line, the key; mode 0600"
    )


class Model(Strict):
    """One model and how many replicas of it are wanted."""

    name: Label
    served_names: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    engine: Literal["vllm"] = "vllm"
    image: Label
    weights: AbsolutePath
    args: dict[ArgName, ArgValue] = {}
    env: dict[EnvName, Line] = {}
    resources: Resources
    replicas: Replicas
    canary: Canary | None = None
    weight: Weight = Field(1, description="of each replica when its gateway chooses one")
    affinity: HeaderName | None = Field(
        None,
        description="`tenant`, or a request's header: equal ones go to one replica while it serves",
    )
    fallback: Fallback | None = None
    suspend: bool = False
    protect: bool = Field(False, description="its jobs outlive its block in this spec")
    slurm: SlurmOverride = SlurmOverride()
    startup_timeout_s: Positive | None = None
    drain_timeout_s: Positive | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Every word that a client may put in `model`; the model's own name is the first."""
        return (self.name, *self.served_names)

    @property
    def variants(self) -> "tuple[Model, ...]":
        """The model without its canary, and the canary as a model of its own if there is one."""
        if self.canary is None:
            return (self,)
        plain = self.model_copy(update={"canary": None})
        changed = {
            "replicas": self.canary.replicas,
            "weight": self.canary.weight or self.weight,
            "image": self.canary.image or self.image,
            "weights": self.canary.weights or self.weights,
            "args": self.args | self.canary.args,
            "env": self.env | self.canary.env,
        }
        return (plain, plain.model_copy(update=changed))

    def revision(self, image_digest: str, access: Access = "protected") -> str:
        """Return the first 8 hex digits of the digest of only the fields that need a restart.

        `access` is the fleet's `replica_access`: to change it is a new revision of every model.
        """
        restarts = {
            "schema": 1,
            "engine": self.engine,
            "image": image_digest,
            "weights": self.weights,
            "served_names": self.served_names,
            "args": self.args,
            "env": self.env,
            "resources": self.resources.model_dump(exclude_defaults=True),
        }
        if access != "protected":
            restarts["replica_access"] = access
        return _digest(restarts)


class Tenant(Strict):
    """Who may call the gateway, with which keys, for which models, how often."""

    name: Label
    key_sha256: Annotated[tuple[KeyHash, ...], Field(strict=False)] = Field(
        description="of its keys, each valid; `fleet tenant add` and `rotate` write them"
    )
    models: Annotated[tuple[Label, ...], Field(strict=False)] | None = Field(
        None, description="that it may use; without this key: all"
    )
    requests_per_second: Rate | None = Field(
        None, description="on each gateway, to the nearest whole request a minute"
    )
    burst: Count | None = Field(
        None, description="requests above that rate at once; default: one second's"
    )
    concurrency: Positive | None = Field(None, description="requests at once, on each gateway")
    tokens_per_day: Annotated[int, Field(ge=0, le=10**15)] | None = Field(
        None, description="prompt and completion, per UTC day, on all gateways together"
    )

    @property
    def rate(self) -> tuple[int, int] | None:
        """Requests a minute and the burst above, None without a limit."""
        if self.requests_per_second is None:
            return None
        burst = self.burst if self.burst is not None else math.ceil(self.requests_per_second)
        return round(self.requests_per_second * 60), burst


class Fleet(Strict):
    """All that is wanted, of one spec folder."""

    version: Literal[1]
    fleet: Label
    slurm: Slurm
    budget: Budget
    image_dir: AbsolutePath | None = Field(None, description="where the images' manifests are")
    image_cache: AbsolutePath | None = Field(
        None, description="a folder of each node's own disk, where jobs keep copies of their images"
    )
    images: dict[Label, Image]
    gateway: Gateway
    defaults: Defaults = Defaults()
    blast_radius: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="the share of ready replicas that fewer `replicas` may end unasked"
    )
    replica_access: Access = Field(
        "protected",
        description="protected: TLS and a key between gateway and replicas; "
        "open: neither, whoever reaches a node may use its replicas",
    )
    secret_dir: AbsolutePath | None = Field(
        None,
        description="of keys and certificates; login hosts and nodes see it, "
        "and only the fleet's own user may (mode 0700)",
    )
    models: Annotated[tuple[Model, ...], Field(strict=False)]
    tenants: Annotated[tuple[Tenant, ...], Field(strict=False)] = Field(
        (), description="none at all: whoever reaches the gateway may use every model"
    )

    def model(self, name: str) -> Model | None:
        """Return the model of that name, or None if the spec has none."""
        return next((model for model in self.models if model.name == name), None)

    def only(self, model: Model) -> "Fleet":
        """Return this fleet with one model and its image alone, and nobody who may call it."""
        images = {model.image: self.images[model.image]}
        return self.model_copy(update={"models": (model,), "images": images, "tenants": ()})

    def slurm_for(self, model: Model) -> Slurm:
        """Return the Slurm options of a model: its own, else the fleet's."""
        return self.slurm.model_copy(update=model.slurm.model_dump(exclude_none=True))

    def startup_timeout_s(self, model: Model) -> int:
        """Return how long a job of the model may run before it must be ready."""
        return model.startup_timeout_s or self.defaults.startup_timeout_s

    def drain_timeout_s(self, model: Model) -> int:
        """Return how long a replica of the model may take to finish its requests."""
        return model.drain_timeout_s or self.defaults.drain_timeout_s

    def least_walltime_s(self, model: Model) -> int:
        """Return the shortest walltime that is worth a start."""
        return self.startup_timeout_s(model) + self.drain_timeout_s(model) + round(MARGIN_S)


def load_fleet(folder: Path) -> Fleet:
    """Read a spec folder. Raises SpecError with every mistake that can be found at once."""
    return read_fleet(folder)[0]


def read_fleet(folder: Path) -> tuple[Fleet, tuple[Problem, ...]]:
    """Read a spec folder as load_fleet does; return the warnings too, each with its place."""
    merged = _Merged(folder)
    if merged.problems:
        raise SpecError(merged.problems)
    try:
        fleet = Fleet.model_validate(merged.value)
    except ValidationError as error:
        places = {_place(item): item for item in reversed(error.errors())}
        raise SpecError([merged.problem(*_explained(*pair)) for pair in places.items()]) from None
    problems = [merged.problem(path, message) for path, message in impossibilities(fleet)]
    if problems:
        raise SpecError(problems)
    return fleet, tuple(sorted(merged.problem(*warning) for warning in warnings(fleet)))


def place_of(folder: Path, path: source.Path) -> Problem:
    """Return where a part of a spec that load_fleet reads stands; the message is empty."""
    return _Merged(folder).problem(path, "")


def _files(folder: Path) -> Iterator[source.Source]:
    """Yield each file of a folder. One that can't be listed is a mistake, never an empty one."""
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return
    except OSError as error:
        yield _unreadable(folder, f"can't be read: {error.strerror}")
        return
    for path in paths:
        if path.suffix == ".yaml":
            yield _read(path)
        elif path.suffix == ".yml":
            yield _unreadable(path, "would not be read: rename it to end in .yaml")


def _read(path: Path) -> source.Source:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        message = "no such file; a spec folder holds fleet.yaml (give the folder, not the file)"
        return _unreadable(path, message)
    except OSError as error:
        return _unreadable(path, f"can't be read: {error.strerror}")
    except UnicodeDecodeError as error:
        return _unreadable(path, f"byte {error.start} is not UTF-8")
    return source.parse(str(path), text)


def _unreadable(path: Path, message: str) -> source.Source:
    return source.Source(str(path), None, problems=(Problem(str(path), 1, 1, message),))


class _Merged:
    """`fleet.yaml` and the files of its folders as one value; knows where each part came from."""

    def __init__(self, folder: Path) -> None:
        self._main = _read(folder / "fleet.yaml")
        self._extra: dict[str | int, list[source.Source]] = {
            kind: list(_files(folder / kind)) if folder.is_dir() else [] for kind in _FOLDERS
        }
        sources = [self._main, *(part for parts in self._extra.values() for part in parts)]
        self.problems = [problem for part in sources for problem in part.problems] or [
            part.problem((), "is empty or not a mapping; see docs/architecture.md for the shape")
            for part in sources
            if not isinstance(part.value, dict)
        ]
        self.value = dict(self._main.value) if isinstance(self._main.value, dict) else {}
        self._inline: dict[str | int, int] = {}
        for kind in _FOLDERS:
            self._merge(kind)

    def _merge(self, kind: str) -> None:
        """Append a folder's values to what fleet.yaml itself lists of that kind."""
        inline = self.value.get(kind)
        if inline is None:
            inline = []
        self._inline[kind] = len(inline) if isinstance(inline, list) else 0
        if isinstance(inline, list):
            self.value[kind] = [*inline, *(part.value for part in self._extra[kind])]

    def problem(self, path: source.Path, message: str) -> Problem:
        if len(path) > 1 and path[0] in self._extra and isinstance(path[1], int):
            extra = path[1] - self._inline[path[0]]
            if extra >= 0:
                return self._extra[path[0]][extra].problem(path[2:], message)
        return self._main.problem(path, message)


def _place(error: Any) -> source.Path:
    """Return where a pydantic error is, without the words that pydantic adds to the place."""
    place: source.Path = error["loc"]
    if place[-1:] == ("[key]",) and error["type"] != "extra_forbidden":
        place = place[:-1]
    if _is_argument(place):
        # Each type of the union that was tried adds its name.
        place = (*place[:4], *(part for part in place[4:] if isinstance(part, int)))
    return place


def _is_argument(place: source.Path) -> bool:
    return len(place) > 3 and place[0] == "models" and place[2] == "args"


# What people may put where a secret's place or hash belongs.
_SECRET = {"env", "key_sha256", "key_file"}
_WRONG_TYPE = {
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "string_type": "must be a text; put it in quotes",
}


def _explained(path: source.Path, error: Any) -> tuple[source.Path, str]:
    """Return where a pydantic error is and one line that says what to do."""
    key = str(path[-1]) if path else ""
    kind = error["type"]
    if kind == "extra_forbidden":
        hint = source.did_you_mean(key, _keys_at(Fleet, path[:-1]))
        return path, f"unknown key {source.shown(key)}{hint}"
    if kind == "missing":
        return path[:-1], f'"{key}" is missing'
    where = "".join(c if c.isprintable() else "?" for c in ".".join(map(str, path)))
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = _WRONG_TYPE.get(kind, message)
    if _is_argument(path) and error["loc"][-1] != "[key]":
        message = "must be true, false, a number, a text, a list or a mapping of these"
    if kind == "string_pattern_mismatch" and LABEL in error["ctx"]["pattern"]:
        message = "must be a DNS label: lower case letters, digits and inner hyphens"
    given = error.get("input")
    # What stands there may be a secret, such as a key in place of its hash; errors go to logs.
    plain = isinstance(given, str | int | float | bool) and not _SECRET & {*path}
    return path, f"{where}: {message}" + (f" (given: {source.shown(given)})" if plain else "")


def _keys_at(model: type[BaseModel], path: source.Path) -> tuple[str, ...]:
    """Return the keys that the spec knows at `path`."""
    for part in path:
        if part not in model.model_fields:
            continue  # an index, or a free key such as an image's name: no step into another model
        inner = next(_models_in(model.model_fields[str(part)].annotation), None)
        if inner is None:
            return ()
        model = inner
    return tuple(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        for inner in typing.get_args(annotation):
            yield from _models_in(inner)


def impossibilities(fleet: Fleet) -> Iterator[tuple[source.Path, str]]:
    """Yield what is well formed and yet can't be: where, and what to do."""
    if not fleet.models:
        yield ("models",), "no model at all: to stop everything, give each model replicas: 0"
    if not fleet.gateway.hosts:
        yield ("gateway", "hosts"), "no gateway: nobody could reach the models"
    hosts = [host.name for host in fleet.gateway.hosts]
    for at, host in enumerate(hosts):
        if host in hosts[:at]:
            yield ("gateway", "hosts", at, "name"), f'two gateways are named "{host}"'
    if fleet.defaults.rollout == Rollout(max_surge=0, max_unavailable=0):
        message = "max_surge and max_unavailable can't both be 0: no rollout could ever take a step"
        yield ("defaults", "rollout"), message
    if fleet.replica_access == "protected" and fleet.secret_dir is None:
        message = (
            '"secret_dir" is missing: a folder of mode 0700 that login hosts and nodes see, for '
            "the replicas' keys and certificates (or, for replicas without: replica_access: open)"
        )
        yield (), message
    yield from _name_clashes(fleet)
    for name, image in fleet.images.items():
        yield from _image_mistakes(fleet, name, image)
    for at, model in enumerate(fleet.models):
        here: source.Path = ("models", at)
        if model.image not in fleet.images:
            hint = source.did_you_mean(model.image, fleet.images)
            yield (*here, "image"), f'no image "{model.image}" under images{hint}'
        needed_gpus = model.resources.gpus_total
        if needed_gpus > fleet.budget.gpus:
            message = f"one replica needs {needed_gpus} GPUs, the budget is {fleet.budget.gpus}"
            yield (*here, "resources", "gpus"), message
        needed = fleet.least_walltime_s(model)
        if parse_duration(fleet.slurm_for(model).walltime) < needed:
            message = f"the walltime must be {needed} s at least: startup and drain timeout"
            yield (*here, "name"), f"{message}, and a minute beside them"
        yield from _argument_mistakes(fleet, model, here)
        yield from _canary_mistakes(fleet, model, (*here, "canary"))
        if model.fallback is not None and fleet.gateway.external is None:
            message = "a fallback needs gateway.external: its resolvers, such as [10.0.0.53]"
            yield (*here, "fallback"), message
    yield from _tenant_mistakes(fleet)
    wanted = _wanted_gpus(fleet)
    if wanted > fleet.budget.gpus:
        message = f"all replicas together need {wanted} GPUs, the budget is {fleet.budget.gpus}"
        yield ("budget", "gpus"), message


def _wanted_gpus(fleet: Fleet) -> int:
    variants = (variant for model in fleet.models for variant in model.variants)
    return sum(variant.replicas * variant.resources.gpus_total for variant in variants)


def _no_room(fleet: Fleet) -> Iterator[tuple[source.Path, str]]:
    """Yield the models whose replicas can't be replaced one by one: no rollout, no rollover."""
    room = fleet.budget.gpus - _wanted_gpus(fleet)
    if fleet.defaults.rollout.max_unavailable:
        return
    for at, model in enumerate(fleet.models):
        needs = model.resources.gpus_total
        if model.replicas and needs > room:
            message = (
                f"the budget leaves {room} GPUs beside all replicas, and a new one of this model "
                f"needs {needs} before an old one goes: give it more, or rollout.max_unavailable"
            )
            yield ("models", at, "resources", "gpus"), message


def warnings(fleet: Fleet) -> Iterator[tuple[source.Path, str]]:
    """Yield what may be wrong and can't be told: where, and why."""
    if not fleet.tenants:
        message = "no tenants: whoever reaches the gateway may use every model"
        yield ("gateway",), f"{message}; `fleet tenant add` makes one"
    yield from _no_room(fleet)
    for name, image in fleet.images.items():
        variants = (variant for model in fleet.models for variant in model.variants)
        engines = {variant.engine for variant in variants if variant.image == name and variant.args}
        for engine in sorted(engines):
            why = unchecked(engine, image.version)
            if why is not None:
                yield ("images", name, "version"), why


# Engine arguments that identify or place a replica: two answers to one question can't both hold.
_OURS = frozenset(
    {"host", "port", "served-model-name", "shutdown-timeout", "api-key", "model", "config"}
    | {"ssl-certfile", "ssl-keyfile", "ssl-ca-certs", "ssl-cert-reqs"}
    | {"nnodes", "node-rank", "master-addr", "master-port", "headless"}
)
# A secret as an argument can be read by every user of its node.
_PUBLIC = {"hf-token": "HF_TOKEN"}
# Their product is how many ranks an engine has.
_PARALLEL = (
    *("tensor-parallel-size", "pipeline-parallel-size"),
    *("prefill-context-parallel-size", "data-parallel-size"),
)


def _ranks(args: Mapping[str, ArgValue]) -> int | None:
    """Return how many ranks the engine will have, None if an argument is no whole number."""
    given = {key.replace("_", "-"): value for key, value in args.items()}
    sizes = [given.get(name, 1) for name in _PARALLEL]
    whole = [size for size in sizes if type(size) is int]
    return math.prod(whole) if len(whole) == len(sizes) else None


def _canary_mistakes(
    fleet: Fleet, model: Model, here: source.Path
) -> Iterator[tuple[source.Path, str]]:
    if model.canary is None:
        return
    plain, canary = model.variants
    if canary.image not in fleet.images:
        hint = source.did_you_mean(canary.image, fleet.images)
        yield (*here, "image"), f'no image "{canary.image}" under images{hint}'
    if plain.revision(plain.image) == canary.revision(canary.image):
        yield here, "the canary differs in nothing from its model; change something or remove it"
    known = {message for _, message in _argument_mistakes(fleet, plain, here)}
    for path, message in _argument_mistakes(fleet, canary, here):
        if message not in known:
            yield path, message


def _argument_mistakes(
    fleet: Fleet, model: Model, here: source.Path
) -> Iterator[tuple[source.Path, str]]:
    """Yield each argument of a model that its engine could not be given, or would not take."""
    for key, message in _unfit_arguments(model.args):
        yield (*here, "args", key), message
    ranks = _ranks(model.args)
    if ranks is not None and ranks % model.resources.nodes:
        message = (
            f"tensor-parallel-size times pipeline-parallel-size, in args, is {ranks}: "
            f"it must be a multiple of the {model.resources.nodes} nodes"
        )
        yield (*here, "resources", "nodes"), message
    for path, message in _refused_arguments(fleet, model):
        yield (*here, "args", *path), message


def _unfit_arguments(args: Mapping[str, ArgValue]) -> Iterator[tuple[str, str]]:
    """Yield what could not arrive at the engine as it is written: which argument, and why."""
    flags: set[str] = set()
    for key, value in args.items():
        flag = key.replace("_", "-")
        if flag in _OURS:
            yield key, f'"{key}" is set by fleet for each replica; remove it'
        if flag in _PUBLIC and isinstance(value, str):
            yield key, f'every user of a node can read "{key}"; use {_PUBLIC[flag]} under env'
        if flag in flags:
            yield key, f'"{key}" is given twice, with - and with _; keep one'
        flags.add(flag)
        items = value if isinstance(value, list) else [value]
        words = [item for item in items if isinstance(item, str)]
        if any(c in word for word in words for c in "\0\r"):
            yield key, f'"{key}" holds a NUL or a carriage return, which no batch script can carry'
        if value == []:
            yield key, f'"{key}" is an empty list; remove it'
        if isinstance(value, list) and any(word.startswith("-") for word in words):
            yield key, f'a word of "{key}" starts with "-": the engine would take it for an option'


def _refused_arguments(fleet: Fleet, model: Model) -> Iterator[tuple[source.Path, str]]:
    """Yield what the engine's version would not take, where the spec says which one it is."""
    image = fleet.images.get(model.image)
    if image is not None and image.version is not None:
        yield from check_arguments(model.engine, image.version, model.args)


def _name_clashes(fleet: Fleet) -> Iterator[tuple[source.Path, str]]:
    owner: dict[str, str] = {}
    for at, model in enumerate(fleet.models):
        for index, name in enumerate(model.names):
            where = (
                ("models", at, "name") if index == 0 else ("models", at, "served_names", index - 1)
            )
            if name in owner:
                yield where, f'"{name}" is already served by the model {owner[name]}'
            if name.startswith("-"):
                yield where, f'"{name}" starts with "-": the engine would take it for an option'
            owner.setdefault(name, model.name)


def _tenant_mistakes(fleet: Fleet) -> Iterator[tuple[source.Path, str]]:
    owner: dict[str, str] = {}
    names = [tenant.name for tenant in fleet.tenants]
    models = [model.name for model in fleet.models]
    for at, tenant in enumerate(fleet.tenants):
        here: source.Path = ("tenants", at)
        if tenant.name in names[:at]:
            yield (*here, "name"), f'two tenants are named "{tenant.name}"'
        if not tenant.key_sha256:
            yield (*here, "key_sha256"), "no key: nobody could call as this tenant; remove it"
        for index, key in enumerate(tenant.key_sha256):
            if key in owner:
                yield (*here, "key_sha256", index), f'already a key of the tenant "{owner[key]}"'
            owner.setdefault(key, tenant.name)
        for index, name in enumerate(tenant.models or ()):
            if name not in models:
                hint = source.did_you_mean(name, models)
                yield (*here, "models", index), f'no model "{name}" under models{hint}'
        if tenant.burst is not None and tenant.requests_per_second is None:
            yield (*here, "burst"), "burst needs requests_per_second: there is no rate to be above"


def _image_mistakes(fleet: Fleet, name: str, image: Image) -> Iterator[tuple[source.Path, str]]:
    here: source.Path = ("images", name)
    if image.runtime == "none" and (image.path is None or image.name is not None):
        yield here, "runtime none needs a path, and no name"
    if image.runtime == "apptainer" and (image.name is None or image.path is not None):
        yield here, "runtime apptainer needs a name, and no path"
    if image.runtime == "apptainer" and fleet.image_dir is None:
        yield here, "image_dir is missing: the folder that holds the images and their manifests"


def json_schema() -> Mapping[str, Any]:
    """Return the JSON Schema of `fleet.yaml`, for editors."""
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, **_closed(Fleet.model_json_schema())}


def _closed(part: Any) -> Any:
    """Return a schema in which a mapping with patterns for its keys takes no other keys.

    pydantic refuses a key that fails its pattern, and leaves that out of the schema.
    """
    if isinstance(part, list):
        return [_closed(item) for item in part]
    if not isinstance(part, dict):
        return part
    closed = {"additionalProperties": False} if "patternProperties" in part else {}
    return {key: _closed(value) for key, value in part.items()} | closed
