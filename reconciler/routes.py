"""Routed replicas to NGINX configuration: arguments in, text out, in a stable order.

The configuration's generation is a hash of everything rendered; NGINX answers it on a local
status address, so that what runs can be compared with what is wanted without any memory.
Routing by the body's `model`: ngx_http_lua_module reads the body in the access phase and sets where
proxy_pass goes, so that streaming and retries stay in the proxy module
(github.com/openresty/lua-nginx-module, nginx.org/en/docs/http/ngx_http_proxy_module.html).
"""

import hashlib
import json
import re
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import chain

from reconciler.naming import LABEL, REVISION, checked_address, checked_key_id, tls_name
from reconciler.spec import External, Fleet, Model, Tenant
from reconciler.state import Target, Trust

# Where a gateway answers its generation; loopback only, for the adapter on the same host.
STATUS_ADDRESS = "127.0.0.1:8091"
# A dead node's connections end after keep-alive gives up, some 14 s; a retry must still be
# allowed then. 30 s in all is what a client is promised.
_RETRY_WINDOW_S = 25

# A request may be what an engine dies of: it must not go through all of them.
_MOST_TRIES = 3

_BALANCE = "least_conn"
# Each gateway counts its own connections only: were all to choose their least busy replica, all
# would choose the same one.
_BALANCE_OF_SEVERAL = "random two least_conn"
# A replica that comes or goes moves only those words that were, or become, its own.
_STICKY = "hash $fleet_affinity consistent"

# One failure takes a replica out for 5 s: a dead node costs 2 s to each request that tries it.
_COUNTED = "max_fails=1 fail_timeout=5s"
# For when all are out (`ask_any` of gateway.lua).
_UNCOUNTED = "max_fails=0"

# Some thousand tenants: NGINX forgets the one that has not called for the longest.
_ZONE = "256k"
# `http2 on`, which NGINX before 1.25.1 does not know: gateway.sh writes it as that takes it.
_TLS = """\
    http2 on;
    ssl_certificate @CERTIFICATE@;
    ssl_certificate_key @KEY@;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_ciphers ECDHE+AESGCM:ECDHE+CHACHA20;
    ssl_session_cache shared:fleet_tls:2m;
    ssl_session_tickets off;
    add_header Strict-Transport-Security "max-age=31536000" always;
"""

# Where a model's `fallback` is asked. Of the headers only what any API like OpenAI's knows; and a
# key of ours that is refused there is no mistake of the caller.
_EXTERNAL = """\
    location @external {
        resolver @RESOLVERS@ ipv6=off;
        resolver_timeout 5s;
        proxy_pass $fleet_url;
        proxy_set_header Host $proxy_host;
        proxy_set_header Connection "";
        proxy_set_header Accept $http_accept;
        proxy_set_header Content-Type application/json;
        proxy_set_header X-Request-Id $fleet_request_id;
        proxy_set_header Authorization $fleet_authorization;
        proxy_hide_header X-Request-Id;
        proxy_hide_header Set-Cookie;
        proxy_connect_timeout 5s;
        proxy_ssl_verify on;
        proxy_ssl_verify_depth 4;
        proxy_ssl_trusted_certificate @AUTHORITIES@;
        proxy_ssl_name $proxy_host;
        proxy_ssl_server_name on;
        proxy_ssl_protocols TLSv1.2 TLSv1.3;
        proxy_intercept_errors on;
        error_page 401 403 404 500 502 503 =502 /.error;
        error_page 504 /.error;
        body_filter_by_lua_block { answer.watch() }
    }
"""

GENERATION_MARK = "@GENERATION@"

# Beside the others, of mode 0600: the key that protected replicas are shown, and who signs their
# certificates. They are the only secret ones, so they are no part of what is rendered here. The
# keys of models' fallbacks lie in the first one too.
KEY_FILE = "replica-key.conf"
AUTHORITY_FILE = "replica-authority.crt"
_PROTECTED = f"""
    proxy_ssl_verify on;
    proxy_ssl_trusted_certificate {AUTHORITY_FILE};
    proxy_ssl_name @TLS_NAME@;
    proxy_ssl_server_name on;
    proxy_ssl_protocols TLSv1.2 TLSv1.3;
    proxy_ssl_session_reuse on;"""

_MARK = re.compile(r"@([A-Z_]+)@")
_GATEWAY_CONF = files("reconciler").joinpath("gateway.conf").read_text(encoding="utf-8")
_GATEWAY_LUA = files("reconciler").joinpath("gateway.lua").read_text(encoding="utf-8")
_ANSWER_LUA = files("reconciler").joinpath("answer.lua").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayFiles:
    """The generated files by name, and their generation (12 hex digits).

    `secrets` are those that only their owner may read; the ids of what is in them are rendered.
    """

    generation: str
    files: Mapping[str, str]
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


def key_in_use(order: Sequence[str], targets: Iterable[Target]) -> str | None:
    """Return the id of the key to show to these targets, None if none of them is protected.

    It is the newest (last in `order`) that all of them take. Should there be none, as when somebody
    has meddled with the keys, it is the newest that most of them take.
    """
    taken = [frozenset(target.keys) for target in targets if target.keys]
    counts = [(sum(key in keys for keys in taken), at) for at, key in enumerate(order)]
    most, newest = max(counts, default=(0, 0))
    return order[newest] if most else None


def key_file(key: str | None, external: Mapping[str, str] = types.MappingProxyType({})) -> str:
    """Return the text of the file with the keys: what `Authorization` each upstream gets.

    `key` is what protected replicas are shown; `external` has the key of each model's fallback.
    """
    shown = {} if key is None else {r"model\.": key}
    shown |= {rf"external\.{model}$": text for model, text in sorted(external.items())}
    lines = "".join(f'    ~^{upstream} "Bearer {text}";\n' for upstream, text in shown.items())
    return f'map $fleet_upstream $fleet_authorization {{\n    default "";\n{lines}}}\n'


def render_gateway(
    fleet: Fleet,
    targets: Iterable[Target],
    trust: Trust | None = None,
    exhausted: Collection[str] = (),
    external: Mapping[str, str] = types.MappingProxyType({}),
) -> GatewayFiles:
    """Return what every gateway of the fleet runs when exactly `targets` get requests.

    `trust` must be given if any of them is protected, that is, has keys.
    `exhausted` names the tenants that have used up their tokens: they are answered 429.
    `external` has the id of the key for each model whose fallback may be asked.
    """
    ordered = tuple(sorted(set(targets)))
    # A model that is gone from the spec and still guarded is served by its name.
    by_model: dict[str, list[Target]] = {model.name: [] for model in fleet.models}
    for target in ordered:
        by_model.setdefault(target.model, []).append(target)
    parts = {
        "fleet.conf": _fleet_conf(fleet, by_model, trust, external),
        "fleet.json": _fleet_json(fleet, by_model, exhausted, external),
        "gateway.lua": _GATEWAY_LUA,
        "answer.lua": _ANSWER_LUA,
        "targets.json": _targets_json(fleet.fleet, ordered, trust, exhausted, external),
    }
    text = json.dumps(parts, sort_keys=True)
    generation = hashlib.sha256(text.encode()).hexdigest()[:12]
    # Not in what Lua reads: it does not need it, and a served name may read like the mark.
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


def _target(
    *,
    model: str,
    job_id: int,
    submitted_at: int,
    address: str,
    keys: Sequence[str] = (),
    weight: int = 1,
    canary: str = "",
) -> Target:
    """Return a target that may stand in a configuration again, whatever became of the file."""
    if not re.fullmatch(LABEL, model):
        raise ValueError(f"not a model: {model!r}")
    if not re.fullmatch(REVISION, canary or "0" * 8) or int(weight) < 1:
        raise ValueError(f"neither a revision nor a weight: {canary!r}, {weight!r}")
    return Target(
        model=model,
        job_id=int(job_id),
        submitted_at=int(submitted_at),
        address=checked_address(str(address)),
        keys=tuple(map(checked_key_id, keys)),
        weight=int(weight),
        canary=canary,
    )


def parse_exhausted(text: str) -> tuple[str, ...]:
    """Return the tenants that a `targets.json` refuses. Raises ValueError for anything else."""
    record = json.loads(text)
    return tuple(str(name) for name in record.get("exhausted", ()))


def parse_owner(text: str) -> str | None:
    """Return whose routes a `targets.json` has: a fleet's name, None where it does not say."""
    owner = json.loads(text).get("fleet")
    return None if owner is None else str(owner)


def _targets_json(
    fleet: str,
    targets: tuple[Target, ...],
    trust: Trust | None,
    exhausted: Collection[str],
    external: Mapping[str, str],
) -> str:
    # Another key, or another authority, is another generation.
    believed = None if trust is None else {"key": trust.key, "authority": trust.authority}
    others = f'"external": {json.dumps(external, sort_keys=True)},\n' if external else ""
    # A line each: diffs are readable, and the encoder's own indentation takes three times as long.
    rows = ",\n".join(json.dumps(_entry(target)) for target in targets)
    head = (
        f'{{"generation": "{GENERATION_MARK}",\n"fleet": {json.dumps(fleet)},\n'
        f'"trust": {json.dumps(believed)},\n'
        f'"exhausted": {json.dumps(sorted(exhausted))},\n{others}'
    )
    return f'{head}"targets": [\n{rows}\n]}}\n'


def _entry(target: Target) -> Mapping[str, object]:
    """Return what `_target` reads; by hand, as asdict's deep copies were half of the rendering."""
    options: dict[str, object] = {"weight": target.weight} if target.weight != 1 else {}
    if target.canary:
        options["canary"] = target.canary
    return options | {
        "model": target.model,
        "job_id": target.job_id,
        "submitted_at": target.submitted_at,
        "address": target.address,
        "keys": target.keys,
    }


def _fleet_conf(
    fleet: Fleet,
    by_model: Mapping[str, list[Target]],
    trust: Trust | None,
    external: Mapping[str, str],
) -> str:
    balance = _BALANCE if len(fleet.gateway.hosts) == 1 else _BALANCE_OF_SEVERAL
    models = {model.name: model for model in fleet.models}
    upstreams = [
        text
        for name, members in by_model.items()
        for text in _upstreams(name, models.get(name), members, balance)
    ]
    protected = "" if trust is None else _PROTECTED
    most = max(map(len, by_model.values()), default=0)
    gateway, tls = fleet.gateway, fleet.gateway.tls
    zones, limits = _limits(fleet)
    values = {
        "STATUS_ADDRESS": STATUS_ADDRESS,
        # A connection is accepted with its request: a worker that ends leaves none unread.
        "LISTEN": f"{gateway.listen} deferred" + (" ssl" if tls else ""),
        "TLS": _filled(_TLS, {"CERTIFICATE": tls.certificate, "KEY": tls.key}) if tls else "",
        "SERVER_NAME": gateway.server_name,
        "ZONES": zones,
        "LIMITS": limits,
        "BODY_MAX": gateway.body_max,
        "UPLOAD_MAX": gateway.upload_max,
        "RETRY_WINDOW": str(_RETRY_WINDOW_S),
        "TRIES": str(max(2, min(most, _MOST_TRIES))),
        "KEY_FILE": f"include {KEY_FILE};\n" if trust or external else "",
        "AUTHORIZATION": "$fleet_authorization" if trust or external else '""',
        "EXTERNAL": _external(gateway.external) if gateway.external and external else "",
        "PROTECTED": protected.replace("@TLS_NAME@", tls_name(fleet.fleet, "$fleet_model")),
        "DIRECTORY": fleet.gateway.directory,
        "REPLICAS": _replicas(chain.from_iterable(by_model.values())),
    }
    return "\n".join([*upstreams, _filled(_GATEWAY_CONF, values)])


def _replicas(targets: Iterable[Target]) -> str:
    """Return a map's lines from address to job; NGINX refuses an address that stands twice."""
    jobs = {target.address: target.job_id for target in sorted(targets, key=lambda t: t.job_id)}
    return "".join(f"    {address} {job_id};\n" for address, job_id in sorted(jobs.items()))


def _limits(fleet: Fleet) -> tuple[str, str]:
    """Return the zones in which NGINX counts, and who is limited by them.

    One for each value that a tenant has: NGINX knows no rate that differs by caller. An empty key
    is not counted, so a request counts in its own tenant's zones alone.
    """
    zones, limits = [], []
    for rate, burst in sorted({tenant.rate for tenant in fleet.tenants if tenant.rate}):
        zone = f"fleet_rate_{rate}_{burst}"
        zones += [
            f'map $fleet_rate ${zone} {{ default ""; {rate}_{burst} $fleet_tenant; }}\n',
            f"limit_req_zone ${zone} zone={zone}:{_ZONE} rate={rate}r/m;\n",
        ]
        above = f" burst={burst} nodelay" if burst else ""
        limits.append(f"    limit_req zone={zone}{above};\n")
    for most in sorted({tenant.concurrency for tenant in fleet.tenants if tenant.concurrency}):
        zone = f"fleet_concurrency_{most}"
        zones += [
            f'map $fleet_concurrency ${zone} {{ default ""; {most} $fleet_tenant; }}\n',
            f"limit_conn_zone ${zone} zone={zone}:{_ZONE};\n",
        ]
        limits.append(f"    limit_conn {zone} {most};\n")
    return "".join(zones), "".join(limits)


def _external(external: External) -> str:
    values = {"RESOLVERS": " ".join(external.resolvers), "AUTHORITIES": external.authorities}
    return _filled(_EXTERNAL, values)


def _filled(template: str, values: Mapping[str, str]) -> str:
    """Return a template with its marks replaced, in one pass: a value is never looked into."""
    return _MARK.sub(lambda mark: values.get(mark[1], mark[0]), template)


def _upstreams(
    name: str, model: Model | None, members: list[Target], balance: str
) -> Iterator[str]:
    """Yield a model's upstreams: of its protected replicas, and of those that are open."""
    rest, canary = _sides(model, members)
    for kind, protected in (("model", True), ("open", False)):
        some = [target for target in rest if bool(target.keys) is protected]
        tried = [target for target in canary if bool(target.keys) is protected]
        if some:
            yield _upstream(f"{kind}.{name}", some, balance)
        if some and model is not None and model.affinity is not None:
            yield _upstream(f"{kind}.{name}.sticky", some, _STICKY)
        if tried:
            # Only this way of choosing knows a backup: who steps in while a canary is away.
            yield _upstream(f"{kind}.{name}.canary", tried, _BALANCE, backup=some)
        if len(some + tried) > 1:
            yield _upstream(f"{kind}.{name}.any", some + tried, balance, failures=_UNCOUNTED)


def _sides(model: Model | None, members: list[Target]) -> tuple[list[Target], list[Target]]:
    """Return who serves a model, and apart from them its canary if that has a share of its own.

    There is nothing to share while one of the two has nobody.
    """
    share = model.canary.share if model is not None and model.canary is not None else None
    canary = [target for target in members if target.canary]
    rest = [target for target in members if not target.canary]
    return (rest, canary) if share is not None and canary and rest else (members, [])


def _upstream(
    name: str,
    members: Sequence[Target],
    balance: str,
    *,
    backup: Sequence[Target] = (),
    failures: str = _COUNTED,
) -> str:
    servers = "".join(
        [
            *(_server(target, failures) for target in members),
            *(_server(target, f"{failures} backup") for target in backup),
        ]
    )
    head = f"upstream {name} {{\n    zone {name} 128k;\n    {balance};\n"
    return f"{head}{servers}    keepalive 64;\n}}\n"


def _server(target: Target, options: str) -> str:
    weight = f" weight={target.weight}" if target.weight != 1 else ""
    return f"    server {target.address}{weight} {options};  # job {target.job_id}\n"


def _open_share(members: list[Target]) -> float:
    """Return which share of a model's replicas is open: some are while the fleet changes over."""
    return round(sum(not target.keys for target in members) / len(members), 3)


def _fleet_json(
    fleet: Fleet,
    by_model: Mapping[str, list[Target]],
    exhausted: Collection[str],
    external: Mapping[str, str],
) -> str:
    """Return what gateway.lua knows; names reach it as JSON, so no character of theirs is special.

    NGINX reads it once. A constant of the module would be made anew for each request: with 200
    models that took two thirds of all requests a second.
    """
    names = {name: model.name for model in fleet.models for name in model.names}
    wanted = {model.name for model in fleet.models for one in model.variants if one.replicas}
    states = {
        model.name: "starting" if model.name in wanted else "stopped" for model in fleet.models
    }
    for name, members in by_model.items():
        if members:
            states[name] = "ready"
    # A model that is gone from the spec and still guarded is served by its name.
    names |= {name: name for name in sorted(by_model) if name not in names}
    keys = {key: tenant.name for tenant in fleet.tenants for key in tenant.key_sha256}
    models = {model.name: model for model in fleet.models}
    sides = {name: _sides(models.get(name), members) for name, members in by_model.items()}
    record = {
        "fleet": fleet.fleet,
        "names": names,
        "listed": list(names),
        "states": states,
        "open": {name: _open_share(rest) for name, (rest, _) in sides.items() if rest},
        "canaries": {
            name: _canary(models[name], canary) for name, (_, canary) in sides.items() if canary
        },
        "affinity": {model.name: model.affinity for model in fleet.models if model.affinity},
        "external": {
            model.name: {
                "url": model.fallback.url.removeprefix("https://"),
                "model": model.fallback.model,
            }
            for model in fleet.models
            if model.fallback is not None and model.name in external
        },
        "keys": keys or None,
        "tenants": {tenant.name: _allowed(tenant) for tenant in fleet.tenants},
        "exhausted": sorted(exhausted),
    }
    return json.dumps(record, sort_keys=True) + "\n"


def _canary(model: Model, members: list[Target]) -> Mapping[str, object]:
    """Return what gateway.lua knows of a canary that has a share of its own."""
    share = model.canary.share if model.canary is not None else None
    revision = members[0].canary
    return {"share": share, "revision": revision, "open": _open_share(members)}


def _allowed(tenant: Tenant) -> Mapping[str, object]:
    """Return what gateway.lua knows of a tenant."""
    return {
        "models": tenant.models,
        "rate": "{}_{}".format(*tenant.rate) if tenant.rate else None,
        "concurrency": str(tenant.concurrency) if tenant.concurrency else None,
    }
