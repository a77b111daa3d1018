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
        "fleet.js": _fleet_js(fleet, by_model),
        "targets.json": _targets_json(ordered),
    }
    text = json.dumps(parts, sort_keys=True)
    generation = hashlib.sha256(text.encode()).hexdigest()[:12]
    # Not in the njs module: it does not need it, and a served name may read like the mark.
    files = {
        name: part if name == "fleet.js" else part.replace(GENERATION_MARK, generation)
        for name, part in parts.items()
    }
    return GatewayFiles(generation=generation, files=files)


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
    server = (
        _SERVER.replace("@LISTEN@", str(fleet.gateway.listen))
        .replace("@SERVER_NAME@", fleet.gateway.server_name)
        .replace("@TOO_LARGE@", json.dumps({"error": _TOO_LARGE}))
        .replace("@BODY_MAX@", _BODY_MAX)
        .replace("@RETRY_WINDOW@", str(_RETRY_WINDOW_S))
        .replace("@TRIES@", str(max(2, min(most, 5))))
    )
    return "\n".join([*upstreams, _STATUS_SERVER, server])


def _upstream(model: str, members: list[Target]) -> str:
    # One failure takes a replica out for 5 s: a dead node costs 2 s to each request that tries it.
    servers = "".join(
        f"    server {t.address} max_fails=1 fail_timeout=5s;  # job {t.job_id}\n" for t in members
    )
    head = f"upstream model.{model} {{\n    zone model.{model} 128k;\n    least_conn;\n"
    return f"{head}{servers}    keepalive 64;\n}}\n"


def _fleet_js(fleet: Fleet, by_model: Mapping[str, list[Target]]) -> str:
    """Return the njs module; names reach it as JSON, so no character of theirs is special."""
    upstreams: dict[str, str | None] = {}
    listed = []
    for model in fleet.models:
        ready = bool(by_model[model.name])
        state = "ready" if ready else "starting" if model.replicas else "stopped"
        for name in model.names:
            upstreams[name] = f"model.{model.name}" if ready else None
            listed.append({"id": name, "object": "model", "owned_by": fleet.fleet, "state": state})
    for name in sorted(by_model.keys() - {model.name for model in fleet.models}):
        upstreams[name] = f"model.{name}"
        listed.append({"id": name, "object": "model", "owned_by": fleet.fleet, "state": "ready"})
    listing = json.dumps({"object": "list", "data": listed})
    return (
        # JSON.parse: in an object literal the key "__proto__" would not be a key.
        f"const UPSTREAMS = JSON.parse({json.dumps(json.dumps(upstreams, sort_keys=True))});\n"
        f"const MODELS = {json.dumps(listing)};\n{_FLEET_JS}"
    )


_STATUS_SERVER = f"""\
server {{
    listen {STATUS_ADDRESS};
    access_log off;
    default_type text/plain;
    location = /generation {{ return 200 {GENERATION_MARK}; }}
}}
"""

_SERVER = """\
js_import fleet from fleet.js;
js_var $fleet_upstream;

server {
    listen @LISTEN@;
    server_name @SERVER_NAME@;
    server_tokens off;
    client_max_body_size @BODY_MAX@;
    client_body_buffer_size @BODY_MAX@;
    default_type application/json;

    error_page 413 = @too_large;
    location @too_large {
        return 413 '@TOO_LARGE@';
    }

    location = /v1/models { js_content fleet.models; }
    location /v1/ { js_content fleet.route; }
    location / { js_content fleet.notFound; }

    location @replicas {
        proxy_pass http://$fleet_upstream;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host $host;
        proxy_set_header Authorization "";
        proxy_buffering off;
        gzip off;
        proxy_read_timeout 3600s;
        proxy_send_timeout 60s;
        proxy_connect_timeout 2s;
        proxy_socket_keepalive on;
        proxy_next_upstream error timeout http_502 http_503 http_504 non_idempotent;
        proxy_next_upstream_tries @TRIES@;
        proxy_next_upstream_timeout @RETRY_WINDOW@s;
        proxy_intercept_errors off;
    }
}
"""

_FLEET_JS = """\
// Sends a request to the upstream of the model that its JSON body names.
function error(r, status, code, message) {
    r.headersOut['Content-Type'] = 'application/json';
    const body = {message: message, type: 'invalid_request_error', code: code};
    r.return(status, JSON.stringify({error: body}));
}

function notFound(r) {
    error(r, 404, 'not_found', 'No such path; the OpenAI API is below /v1/.');
}

function route(r) {
    if (r.method !== 'POST') {
        return error(r, 405, 'method_not_allowed', 'Use POST here.');
    }
    let body;
    try {
        body = JSON.parse(r.requestText);
    } catch (e) {
        return error(r, 400, 'invalid_json', 'The request body is not JSON.');
    }
    if (body === null || typeof body.model !== 'string' || !body.model) {
        return error(r, 400, 'model_required', 'The request body must name a model.');
    }
    if (!Object.prototype.hasOwnProperty.call(UPSTREAMS, body.model)) {
        return error(r, 404, 'model_not_found', 'No such model; GET /v1/models lists them.');
    }
    if (UPSTREAMS[body.model] === null) {
        r.headersOut['Retry-After'] = '10';
        return error(r, 503, 'model_not_ready', 'No replica of this model is ready; try again.');
    }
    r.variables.fleet_upstream = UPSTREAMS[body.model];
    r.internalRedirect('@replicas');
}

function models(r) {
    r.headersOut['Content-Type'] = 'application/json';
    r.return(200, MODELS);
}

export default {route, models, notFound};
"""
