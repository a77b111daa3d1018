"""The ways from client to stand-in that are compared: what each one runs, started and ended.

All of this runs in the layer over the lab's base, with a loopback of its own, as its user `fleet`.
"""

import hashlib
import json
import os
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.gateway.load import TOKEN
from reconciler.adapters.nginx import NginxGateways
from reconciler.routes import render_gateway
from reconciler.spec import Fleet
from reconciler.state import Target
from tests.lab.config import GATEWAY, GATEWAY_CONF, gateway_folder
from tests.lab.wait import LabError, tail, wait_for

CONF = Path(__file__).parent / "conf"
RUN = Path("/run/bench")
_ROUTERS = Path("/opt/bench/bin")
_GATEWAY = Path("/", GATEWAY)

MODEL = "tiny"
OTHERS = ("vllm-router", "litellm")
# A thousand requests at once and a hundred thousand a second are within every limit: what a limit
# costs is measured, not what it refuses.
_RATE, _CONCURRENCY = 1_000_000, 10_000
_REPLICAS = (9001, 9002, 9003, 9004)
PORTS = {
    "direct": _REPLICAS[0],
    "nginx": 8101,
    "ours": 8102,
    "lua": 8103,
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
general_settings: {{master_key: {TOKEN}}}
"""


def production() -> dict[str, Any]:
    """The spec that ours is rendered from: with all that the reader of this checkout knows of."""
    known = {
        "tenants": [
            {
                "name": f"tenant-{at}",
                "key_sha256": [hashlib.sha256(key.encode()).hexdigest()],
                "requests_per_second": _RATE,
                "burst": _CONCURRENCY,
                "concurrency": _CONCURRENCY,
            }
            for at, key in enumerate((TOKEN, "second", "third", "fourth", "fifth"))
        ],
        "replica_access": "open",
    }
    model = {"image": "engine", "weights": "/models", "resources": {"gpus": 1, "memory": "4G"}}
    return {
        "version": 1,
        "fleet": "bench",
        "slurm": {"partition": "gpu", "log_dir": "/shared/logs"},
        "budget": {"gpus": 8},
        "images": {"engine": {"runtime": "none", "path": "/opt/engine"}},
        "gateway": {
            "listen": PORTS["ours"],
            "directory": str(_GATEWAY),
            "hosts": [{"name": "gateway"}],
        },
        "models": [
            {**model, "name": MODEL, "served_names": ["org/Tiny"], "replicas": len(_REPLICAS)},
            *({**model, "name": f"other-{at}", "replicas": 0} for at in range(9)),
        ],
        **{name: value for name, value in known.items() if name in Fleet.model_fields},
    }


def body(kib: int, *, stream: bool = False) -> bytes:
    """A chat request of so many KiB, as clients send it: one long message."""
    record = {
        "model": MODEL,
        "messages": [{"role": "user", "content": ""}],
        "prompt": "Once",
        "stream": stream,
    }
    record["messages"][0]["content"] = "x" * max(0, 1024 * kib - len(json.dumps(record)))
    return json.dumps(record).encode()


@contextmanager
def running(names: Sequence[str]) -> Iterator[Mapping[str, str]]:
    """Start the stand-in and these ways to it; enter with their URLs once each has answered.

    LabError names what did not come up.
    """
    programs = {name: _START[name] for name in ("direct", *names)}
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, start in programs.items():
            folder = RUN / name
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "log").open("wb") as log:
                started[name] = subprocess.Popen(
                    start(folder), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_ENV
                )
            _wait(name, started[name], folder)
        yield {name: f"http://127.0.0.1:{PORTS[name]}" for name in names}
    finally:
        for program in reversed(started.values()):
            program.terminate()
        for program in started.values():
            program.wait(30)


def _wait(name: str, program: subprocess.Popen[bytes], folder: Path) -> None:
    if name == "ours":
        wait_for("NGINX's process", (_GATEWAY / "nginx.pid").exists)
        _change()
    try:
        wait_for(name, lambda: program.poll() is not None or _answers(name), timeout_s=90)
    except LabError:
        pass
    else:
        if program.poll() is None:
            return
    raise LabError(f"{name} does not answer: {tail(folder / 'log', 5)}")


def _answers(name: str) -> bool:
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORTS[name]}/v1/chat/completions",
        data=body(1),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            said = json.loads(answer.read())
    except (OSError, ValueError):
        return False
    return bool(said["choices"] and said["model"])


def _change() -> None:
    """Let the real adapter put ours into place, as the reconciler does."""
    fleet = Fleet.model_validate(production())
    targets = [
        Target(model=MODEL, job_id=port, submitted_at=port, address=f"127.0.0.1:{port}")
        for port in _REPLICAS
    ]
    NginxGateways(fleet.gateway).change("gateway", render_gateway(fleet, targets))


def _nginx(conf: Path) -> list[str]:
    return ["nginx", "-c", str(conf), "-g", "daemon off;"]


def _direct(folder: Path) -> list[str]:
    listen = "".join(f"        listen 127.0.0.1:{port} backlog=4096;\n" for port in _REPLICAS)
    values = {"FOLDER": folder, "CONF": CONF, "LISTEN": listen, "ANSWER": json.dumps(_ANSWER)}
    conf = folder / "nginx.conf"
    conf.write_text(_filled("backend.conf", values))
    return _nginx(conf)


def _ours(_: Path) -> list[str]:
    gateway_folder(_GATEWAY)
    (_GATEWAY / "tmp").mkdir()
    return _nginx(_GATEWAY / "current/nginx.conf")


def _plain(folder: Path) -> list[str]:
    return _by_hand(folder, PORTS["nginx"])


def _lua(folder: Path) -> list[str]:
    record = production()
    others = {model["name"]: "stopped" for model in record["models"][1:]}
    fleet = {
        "names": {name: name for name in (MODEL, *others)} | {"org/Tiny": MODEL},
        "states": {MODEL: "ready", **others},
        "keys": {
            key: tenant["name"] for tenant in record.get("tenants", []) for key in tenant["key_sha256"]
        },
    }
    head = _filled("lua.conf", {"FLEET": json.dumps(fleet), "CONF": CONF})
    route = "        rewrite_by_lua_block { route() }"
    modules = "".join(
        f"load_module modules/{name}.so;\n" for name in ("ndk_http_module", "ngx_http_lua_module")
    )
    return _by_hand(folder, PORTS["lua"], head=head, route=route, modules=modules)


def _by_hand(
    folder: Path, port: int, *, head: str = "", route: str = "", modules: str = ""
) -> list[str]:
    """An NGINX with our base configuration and, in place of what is generated, plain.conf."""
    limited = "tenants" in production()
    who = "$fleet_tenant" if route else "$http_authorization"
    values = {
        "FOLDER": folder,
        "LISTEN": f"127.0.0.1:{port}",
        "HEAD": head,
        "ROUTE": route,
        "SCHEME": "http",
        "TLS": "",
        "PROXY_TLS": "",
        "ZONES": _ZONES.format(who=who) if limited else "",
        "LIMITS": _LIMITS if limited else "",
        "SERVERS": "".join(f"    server 127.0.0.1:{port} max_fails=1;\n" for port in _REPLICAS),
    }
    base = GATEWAY_CONF.read_text().replace(str(_GATEWAY), str(folder))
    (folder / "nginx.conf").write_text(modules + base)
    (folder / "fleet.conf").write_text(_filled("plain.conf", values))
    (folder / "tmp").mkdir(exist_ok=True)
    return _nginx(folder / "nginx.conf")


_ZONES = f"""\
limit_req_zone {{who}} zone=rate:1m rate={_RATE}r/s;
limit_conn_zone {{who}} zone=concurrency:1m;"""
_LIMITS = f"""\
    limit_req zone=rate burst={_CONCURRENCY} nodelay;
    limit_conn concurrency {_CONCURRENCY};"""


def _vllm_router(_: Path) -> list[str]:
    urls = [f"http://127.0.0.1:{port}" for port in _REPLICAS]
    listen = ("--host", "127.0.0.1", "--port", str(PORTS["vllm-router"]))
    # Its cheapest policy, and no line for each request: its best case.
    cheap = ("--policy", "round_robin", "--log-level", "warning")
    return [str(_ROUTERS / "vllm-router"), *listen, *cheap, "--worker-urls", *urls]


def _litellm(folder: Path) -> list[str]:
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
_START: Mapping[str, Callable[[Path], list[str]]] = {
    "direct": _direct,
    "nginx": _plain,
    "ours": _ours,
    "lua": _lua,
    "vllm-router": _vllm_router,
    "litellm": _litellm,
}


def _filled(template: str, values: Mapping[str, object]) -> str:
    text = (CONF / template).read_text(encoding="utf-8")
    return re.sub(r"@([A-Z_]+)@", lambda mark: str(values[mark[1]]), text)
