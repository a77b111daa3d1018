#!/bin/sh
# drain.sh USER HOME FLEET SPEC TIMEOUT: apply the spec with no replica of any model, and wait until none
# is left. FLEET is the command, of the environment in HOME; without a USER we are the account.
set -eu
user=$1 home=$2 fleet=$3 spec=$4 timeout=$5
python=$(readlink -f "$home/current")/venv/bin/python
empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
cp -RL "$spec/." "$empty/"
if [ -n "$user" ]; then chown -R "$user" "$empty"; fi
models=$("$python" - "$empty" <<'PYTHON'
import pathlib
import sys

import yaml

for path in sorted(pathlib.Path(sys.argv[1]).rglob("*.yaml")):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    one = [content] if path.parent.name == "models" else []
    for model in content.get("models", one) if path.parent.name != "tenants" else []:
        for key in ("canary", "suspend", "protect"):
            model.pop(key, None)
        model["replicas"] = 0
        print("--allow-destroy", model["name"])
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
PYTHON
)
# shellcheck disable=SC2086
set -- "$fleet" apply "$empty" --wait --timeout "$timeout" $models
if [ -n "$user" ]; then set -- runuser -u "$user" -- "$@"; fi
"$@"
