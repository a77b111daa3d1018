"""Runs inside the base: the real gateway's files before two models that answer with their name.

Reads bodies, one in hex a line, from stdin; prints status and text of each answer as JSON.
"""

import json
import subprocess
import sys
from pathlib import Path

import httpx

from reconciler.routes import render_gateway
from reconciler.spec import Fleet
from reconciler.state import Target
from tests.lab.config import GATEWAY, gateway_folder

FOLDER = Path("/", GATEWAY)
PORTS = {"tiny": 9001, "big": 9002}
MODEL = {"image": "x", "weights": "/x", "resources": {"gpus": 1, "memory": "1G"}, "replicas": 1}
FLEET = Fleet.model_validate(
    {
        "version": 1,
        "fleet": "demo",
        "slurm": {"partition": "gpu", "log_dir": "/logs"},
        "budget": {"gpus": 2},
        "images": {"x": {"runtime": "none", "path": "/x"}},
        "gateway": {"hosts": [{"name": "gateway"}]},
        "models": [{**MODEL, "name": name} for name in PORTS],
    }
)


def main() -> None:
    """Start both NGINX, ask, print."""
    models = "".join(
        f"server {{ listen 127.0.0.1:{port}; client_max_body_size 8m; return 200 {name}; }}\n"
        for name, port in PORTS.items()
    )
    conf = Path("/tmp/models.conf")
    conf.write_text(f"pid /tmp/models.pid; events {{}} http {{ access_log off; {models} }}")
    targets = [
        Target(model=name, job_id=port, submitted_at=1, address=f"127.0.0.1:{port}")
        for name, port in PORTS.items()
    ]
    gateway_folder(FOLDER)
    (FOLDER / "tmp").mkdir()
    for name, text in render_gateway(FLEET, targets).files.items():
        (FOLDER / "current" / name).write_text(text)
    for path in (conf, FOLDER / "current/nginx.conf"):
        subprocess.run(["nginx", "-c", str(path)], check=True)
    with httpx.Client(base_url="http://127.0.0.1:8080", trust_env=False) as client:
        found = [client.post("/v1/completions", content=bytes.fromhex(at)) for at in sys.stdin]
    json.dump([[answer.status_code, answer.text] for answer in found], sys.stdout)
    print((FOLDER / "error.log").read_text(), file=sys.stderr)


if __name__ == "__main__":
    main()
