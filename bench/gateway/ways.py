"""The ways from client to stand-in that are compared: what each one runs, started and ended.

All of this runs in the layer over the lab's base, with a loopback of its own, as its user `fleet`.
What ours is rendered from has all that this checkout's spec knows of; plain NGINX and njs get the
same limits and the same TLS, on both sides.
"""

import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from reconciler.adapters.nginx import NginxGateways
from reconciler.routes import render_gateway
from reconciler.spec import Fleet, Gateway
from reconciler.state import Target
from tests.lab.config import GATEWAY, GATEWAY_CONF, gateway_folder
from tests.lab.wait import LabError, tail, wait_for

CONF = Path(__file__).parent / "conf"
RUN = Path("/run/bench")
_ROUTERS = Path("/opt/bench/bin")
_GATEWAY = Path("/", GATEWAY)

CERTIFICATE, CERTIFICATE_KEY = RUN / "certificate.pem", RUN / "certificate.key"
KEY = "bench-key"
MODEL = "tiny"
OTHERS = ("vllm-router", "litellm")
# A thousand requests at once and a hundred thousand a second are within every limit: what a limit
# costs is measured, not what it refuses.
_RATE, _CONCURRENCY = 100_000, 10_000
# What a gateway knows of must not slow down what it passes on.
_OTHER_MODELS = 199
_REPLICAS = (9001, 9002, 9003, 9004)
PORTS = {
    "direct": 8100,
    "nginx": 8101,
    "ours": 8102,
    "njs": 8103,
    "vllm-router": 8104,
    "litellm": 8105,
}

_ANSWER = {
    "id": "bench",
    "object": "chat.completion",
    "created": 1,
    "model": MODEL,
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "Once upon a time. " * 40},
        }
    ],
    "usage": {"prompt_tokens": 5, "completion_tokens": 160, "total_tokens": 165},
}
_LITELLM = f"""\
model_list:
  - model_name: {MODEL}
    litellm_params:
      model: openai/{MODEL}
      api_base: http://127.0.0.1:{_REPLICAS[0]}/v1
      api_key: none
general_settings: {{master_key: {KEY}}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Where clients reach the stand-in, and by which name they call themselves."""

    url: str
    key: str = KEY

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def context(self) -> ssl.SSLContext | None:
        """How a client of ours checks who answers; None without TLS."""
        if not self.url.startswith("https:"):
            return None
        return ssl.create_default_context(cafile=str(CERTIFICATE))


def spec(*, tls: bool) -> dict[str, Any]:
    """Return what ours is rendered from: five tenants, each limited; TLS to the clients or not."""
    gateway: dict[str, Any] = {
        "listen": PORTS["ours"],
        "directory": str(_GATEWAY),
        "hosts": [{"name": "gateway"}],
    }
    if tls and has_tls():
        gateway["tls"] = {"certificate": str(CERTIFICATE), "key": str(CERTIFICATE_KEY)}
    known = {"tenants": _tenants(), "replica_access": "open"}
    model = {"image": "engine", "weights": "/models", "resources": {"gpus": 1, "memory": "4G"}}
    return {
        "version": 1,
        "fleet": "bench",
        "slurm": {"partition": "gpu", "log_dir": "/shared/logs"},
        "budget": {"gpus": 8},
        "images": {"engine": {"runtime": "none", "path": "/opt/engine"}},
        "gateway": gateway,
        "models": [
            {**model, "name": MODEL, "served_names": ["org/Tiny"], "replicas": len(_REPLICAS)},
            *({**model, "name": f"other-{at}", "replicas": 0} for at in range(_OTHER_MODELS)),
        ],
        **{name: value for name, value in known.items() if name in Fleet.model_fields},
    }


def has_limits() -> bool:
    """Whether this checkout's spec knows tenants."""
    return "tenants" in Fleet.model_fields


def has_tls() -> bool:
    """Whether this checkout's gateway speaks TLS to clients."""
    return "tls" in Gateway.model_fields


def _tenants() -> list[dict[str, Any]]:
    return [
        {
            "name": f"tenant-{at}",
            "key_sha256": [hashlib.sha256(key.encode()).hexdigest()],
            "requests_per_second": _RATE,
            "burst": _CONCURRENCY,
            "concurrency": _CONCURRENCY,
        }
        for at, key in enumerate((KEY, "second", "third", "fourth", "fifth"))
    ]


def chat(kib: int) -> bytes:
    """A chat request of so many KiB, as clients send it: one long message."""
    message = {"role": "user", "content": ""}
    record = {"model": MODEL, "messages": [message], "stream": False}
    message["content"] = "x" * (1024 * kib - len(json.dumps(record)))
    return json.dumps(record).encode()


def chat_stream() -> bytes:
    """A chat request for a stream. The stand-in knows it by less than 500 bytes."""
    messages = [{"role": "user", "content": "Once"}]
    return json.dumps({"model": MODEL, "messages": messages, "stream": True}).encode()


def completion() -> bytes:
    """What the stand-in takes a second for."""
    return json.dumps({"model": MODEL, "prompt": "Once", "stream": False}).encode()


@contextmanager
def running(names: Sequence[str], *, tls: bool) -> Iterator[Mapping[str, Way]]:
    """Start the stand-in and these ways to it; enter once each of them has answered.

    LabError names what did not come up.
    """
    scheme = "https" if tls else "http"
    ways = {name: Way(url=f"{scheme}://127.0.0.1:{PORTS[name]}") for name in names}
    if tls:
        _make_certificate()
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name in {"direct": None, **ways}:
            folder = RUN / name
            folder.mkdir(parents=True, exist_ok=True)
            argv = _START[name](folder, tls)
            with (folder / "log").open("wb") as log:
                started[name] = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_ENV
                )
            if name == "ours":
                wait_for("NGINX's process", (_GATEWAY / "nginx.pid").exists)
                _change(tls)
            if name in ways:
                _wait(name, started[name], ways[name])
        yield ways
    finally:
        for program in reversed(started.values()):
            program.terminate()
        for program in started.values():
            program.wait(30)


def _wait(name: str, program: subprocess.Popen[bytes], way: Way) -> None:
    wait_for(name, lambda: program.poll() is not None or _answers(way), timeout_s=90)
    if program.poll() is not None:
        raise LabError(f"{name} has ended: {tail(RUN / name / 'log', 5)}")


def _answers(way: Way) -> bool:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {way.key}"}
    url, verify = f"{way.url}/v1/chat/completions", way.context or True
    try:
        answer = httpx.post(url, content=chat(1), headers=headers, verify=verify, trust_env=False)
        return bool(answer.is_success and answer.json()["choices"])
    except (httpx.HTTPError, ValueError, KeyError):
        return False


def _make_certificate() -> None:
    """Make what every way shows its clients; they are told to trust just that."""
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=bench"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE"),
            *("-keyout", str(CERTIFICATE_KEY), "-out", str(CERTIFICATE)),
        ],
        check=True,
        capture_output=True,
    )


def _change(tls: bool) -> None:
    """Let the real adapter put ours into place, as the reconciler does."""
    fleet = Fleet.model_validate(spec(tls=tls))
    targets = [
        Target(model=MODEL, job_id=port, submitted_at=port, address=f"127.0.0.1:{port}")
        for port in _REPLICAS
    ]
    NginxGateways(fleet.gateway, fleet.fleet).change("gateway", render_gateway(fleet, targets))


def _nginx(conf: Path) -> list[str]:
    return ["nginx", "-c", str(conf), "-g", "daemon off;"]


def _direct(folder: Path, tls: bool) -> list[str]:
    listen = [f"listen 127.0.0.1:{port} backlog=4096;" for port in _REPLICAS]
    listen.append(f"listen 127.0.0.1:{PORTS['direct']}{' ssl' if tls else ''} backlog=4096;")
    values = {
        "FOLDER": folder,
        "CONF": CONF,
        "LISTEN": "\n        ".join(listen),
        "TLS": _TLS if tls else "",
        "ANSWER": json.dumps(_ANSWER),
    }
    conf = folder / "nginx.conf"
    conf.write_text(_filled("backend.conf", values))
    return _nginx(conf)


def _ours(_: Path, _tls: bool) -> list[str]:
    shutil.rmtree(_GATEWAY)
    gateway_folder(_GATEWAY)
    (_GATEWAY / "tmp").mkdir()
    return _nginx(_GATEWAY / "current/nginx.conf")


def _plain(folder: Path, tls: bool) -> list[str]:
    return _by_hand(folder, PORTS["nginx"], tls=tls)


def _njs(folder: Path, tls: bool) -> list[str]:
    """Plain NGINX and the routing of gateway.lua in njs, before the same proxy module."""
    record = spec(tls=tls)
    others = {model["name"]: "stopped" for model in record["models"][1:]}
    fleet = {
        "names": {name: name for name in (MODEL, *others)} | {"org/Tiny": MODEL},
        "states": {MODEL: "ready", **others},
        "keys": {
            key: tenant["name"]
            for tenant in record.get("tenants", [])
            for key in tenant["key_sha256"]
        },
    }
    (folder / "fleet.json").write_text(json.dumps(fleet))
    head = _filled("njs.conf", {"FOLDER": folder, "CONF": CONF})
    route = "    location / { js_content route.route; }"
    modules = ("ngx_http_js_module",)
    return _by_hand(folder, PORTS["njs"], tls=tls, head=head, route=route, modules=modules)


def _by_hand(
    folder: Path,
    port: int,
    *,
    tls: bool,
    head: str = "",
    route: str = "",
    modules: Sequence[str] = (),
) -> list[str]:
    """An NGINX with our base configuration and, in place of what is generated, plain.conf."""
    limited = has_limits()
    who = "$fleet_tenant" if route else "$http_authorization"
    values = {
        "FOLDER": folder,
        "LISTEN": f"127.0.0.1:{port} ssl" if tls else f"127.0.0.1:{port}",
        "TLS": _TLS if tls else "",
        "HEAD": head,
        "ROUTE": route,
        "LOCATION": "@replicas" if route else "/",
        "ZONES": _ZONES.format(who=who) if limited else "",
        "LIMITS": _LIMITS if limited else "",
        "SERVERS": "".join(f"    server 127.0.0.1:{port} max_fails=1;\n" for port in _REPLICAS),
    }
    base = GATEWAY_CONF.read_text(encoding="utf-8").replace(str(_GATEWAY), str(folder))
    loads = "".join(f"load_module modules/{name}.so;\n" for name in modules)
    (folder / "nginx.conf").write_text(loads + base)
    (folder / "fleet.conf").write_text(_filled("plain.conf", values))
    (folder / "tmp").mkdir(exist_ok=True)
    return _nginx(folder / "nginx.conf")


_TLS = f"""\
    ssl_certificate {CERTIFICATE};
    ssl_certificate_key {CERTIFICATE_KEY};
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_session_cache shared:tls:10m;"""
_ZONES = f"""\
limit_req_zone {{who}} zone=rate:1m rate={_RATE}r/s;
limit_conn_zone {{who}} zone=concurrency:1m;"""
_LIMITS = f"""\
    limit_req zone=rate burst={_CONCURRENCY} nodelay;
    limit_conn concurrency {_CONCURRENCY};"""


def _vllm_router(_: Path, _tls: bool) -> list[str]:
    urls = [f"http://127.0.0.1:{port}" for port in _REPLICAS]
    listen = ("--host", "127.0.0.1", "--port", str(PORTS["vllm-router"]))
    # Its cheapest policy, and no line for each request: its best case.
    cheap = ("--policy", "round_robin", "--log-level", "warning")
    return [str(_ROUTERS / "vllm-router"), *listen, *cheap, "--worker-urls", *urls]


def _litellm(folder: Path, _tls: bool) -> list[str]:
    (folder / "config.yaml").write_text(_LITELLM)
    listen = ("--host", "127.0.0.1", "--port", str(PORTS["litellm"]))
    workers = ("--num_workers", str(os.cpu_count()))
    return [str(_ROUTERS / "litellm"), "--config", str(folder / "config.yaml"), *listen, *workers]


# Prices are read from its package, not fetched; it logs errors alone: its best case.
_ENV = {
    **os.environ,
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOG": "ERROR",
    "LITELLM_MODE": "PRODUCTION",
}
_START: Mapping[str, Callable[[Path, bool], list[str]]] = {
    "direct": _direct,
    "nginx": _plain,
    "ours": _ours,
    "njs": _njs,
    "vllm-router": _vllm_router,
    "litellm": _litellm,
}
WAYS = tuple(_START)


def _filled(template: str, values: Mapping[str, object]) -> str:
    text = (CONF / template).read_text(encoding="utf-8")
    return re.sub(r"@([A-Z_]+)@", lambda mark: str(values[mark[1]]), text)
