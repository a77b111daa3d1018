"""Routed replicas to NGINX configuration: arguments in, text out, in a stable order.

The configuration's generation is a hash of everything rendered; NGINX answers it on a local
status address, so that what runs can be compared with what is wanted without any memory.
Routing by the body's `model`: ngx_http_js_module parses the body and redirects internally to a
named location, so that streaming and retries stay in the proxy module
(nginx.org/en/docs/http/ngx_http_js_module.html, ngx_http_proxy_module.html).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files

from reconciler.naming import LABEL, checked_address
from reconciler.spec import Fleet
from reconciler.state import Target

# Where a gateway answers its generation; loopback only, for the adapter on the same host.
STATUS_ADDRESS = "127.0.0.1:8091"
# Long prompts in JSON; njs can't read a body that was spilled to disk, so it is also the buffer.
_BODY_MAX = "8m"
# A dead node's connections end after keep-alive gives up, some 14 s; a retry must still be
# allowed then. 30 s in all is what a client is promised.
_RETRY_WINDOW_S = 25

_TOO_LARGE = {
    "message": f"The request is larger than {_BODY_MAX}.",
    "type": "invalid_request_error",
    "code": "request_too_large",
}

GENERATION_MARK = "@GENERATION@"

_MARK = re.compile(r"@([A-Z_]+)@")
_GATEWAY_CONF = files("reconciler").joinpath("gateway.conf").read_text(encoding="utf-8")
_GATEWAY_JS = files("reconciler").joinpath("gateway.js").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayFiles:
    """The generated files by name, and their generation (12 hex digits)."""

    generation: str
    files: Mapping[str, str]


def render_gateway(fleet: Fleet, targets: Iterable[Target]) -> GatewayFiles:
    """Return what every gateway of the fleet runs when exactly `targets` get requests."""
    ordered = tuple(sorted(set(targets)))
    # A model that is gone from the spec and still guarded is served by its name.
    by_model: dict[str, list[Target]] = {model.name: [] for model in fleet.models}
    for target in ordered:
        by_model.setdefault(target.model, []).append(target)
    parts = {
        "fleet.conf": _fleet_conf(fleet, by_model),
        "fleet.js": _GATEWAY_JS,
        "fleet.json": _fleet_json(fleet, by_model),
        "targets.json": _targets_json(ordered),
    }
    text = json.dumps(parts, sort_keys=True)
    generation = hashlib.sha256(text.encode()).hexdigest()[:12]
    # Not in what njs reads: it does not need it, and a served name may read like the mark.
    rendered = {
        name: part if name == "fleet.json" else part.replace(GENERATION_MARK, generation)
        for name, part in parts.items()
    }
    return GatewayFiles(generation=generation, files=rendered)


def parse_targets(text: str) -> tuple[str, tuple[Target, ...]]:
    """Return generation and targets of a `targets.json`. Raises ValueError for anything else."""
    try:
        record = json.loads(text)
        return str(record["generation"]), tuple(_target(**item) for item in record["targets"])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a targets.json: {error}") from error


def _target(*, model: str, job_id: int, submitted_at: int, address: str) -> Target:
    """Return a target that may stand in a configuration again, whatever became of the file."""
    if not re.fullmatch(LABEL, model):
        raise ValueError(f"not a model: {model!r}")
    return Target(
        model=model,
        job_id=int(job_id),
        submitted_at=int(submitted_at),
        address=checked_address(str(address)),
    )


def _targets_json(targets: tuple[Target, ...]) -> str:
    record = {"generation": GENERATION_MARK, "targets": [_entry(target) for target in targets]}
    return json.dumps(record, indent=1) + "\n"


def _entry(target: Target) -> Mapping[str, str | int]:
    """Return what `_target` reads; by hand, as asdict's deep copies were half of the rendering."""
    return {
        "model": target.model,
        "job_id": target.job_id,
        "submitted_at": target.submitted_at,
        "address": target.address,
    }


def _fleet_conf(fleet: Fleet, by_model: Mapping[str, list[Target]]) -> str:
    upstreams = [_upstream(name, members) for name, members in by_model.items() if members]
    most = max(map(len, by_model.values()), default=0)
    values = {
        "STATUS_ADDRESS": STATUS_ADDRESS,
        "LISTEN": str(fleet.gateway.listen),
        "SERVER_NAME": fleet.gateway.server_name,
        "TOO_LARGE": json.dumps({"error": _TOO_LARGE}),
        "BODY_MAX": _BODY_MAX,
        "RETRY_WINDOW": str(_RETRY_WINDOW_S),
        "TRIES": str(max(2, min(most, 5))),
    }
    return "\n".join([*upstreams, _filled(_GATEWAY_CONF, values)])


def _filled(template: str, values: Mapping[str, str]) -> str:
    """Return a template with its marks replaced, in one pass: a value is never looked into."""
    return _MARK.sub(lambda mark: values.get(mark[1], mark[0]), template)


def _upstream(model: str, members: list[Target]) -> str:
    # One failure takes a replica out for 5 s: a dead node costs 2 s to each request that tries it.
    servers = "".join(
        f"    server {t.address} max_fails=1 fail_timeout=5s;  # job {t.job_id}\n" for t in members
    )
    head = f"upstream model.{model} {{\n    zone model.{model} 128k;\n    least_conn;\n"
    return f"{head}{servers}    keepalive 64;\n}}\n"


def _fleet_json(fleet: Fleet, by_model: Mapping[str, list[Target]]) -> str:
    """Return what gateway.js knows; names reach it as JSON, so no character of theirs is special.

    NGINX reads it once. A constant of the module would be made anew for each request: with 200
    models that took two thirds of all requests a second.
    """
    names = {name: model.name for model in fleet.models for name in model.names}
    states = {model.name: "starting" if model.replicas else "stopped" for model in fleet.models}
    for name, members in by_model.items():
        if members:
            states[name] = "ready"
    # A model that is gone from the spec and still guarded is served by its name.
    names |= {name: name for name in sorted(by_model) if name not in names}
    record = {"fleet": fleet.fleet, "names": names, "listed": list(names), "states": states}
    return json.dumps(record, sort_keys=True) + "\n"
