#!/bin/sh
# Runs inside the lab's base, whose writes are kept: what the bench alone needs on top of it.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y wrk libnginx-mod-http-js
python3 -m venv /opt/bench
/opt/bench/bin/pip install --quiet --disable-pip-version-check --no-index --find-links /mnt/wheels \
    --require-hashes --no-deps --requirement /mnt/bench/requirements.lock
rm -rf /var/lib/apt/lists/*
