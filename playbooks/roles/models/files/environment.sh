#!/bin/sh
# environment.sh FOLDER PYTHON [PIP-ARGUMENT]...: a Python environment of the lock in the folder.
# Killed at any time, the next run begins anew.
set -eu
folder=$1 python=$2
shift 2
cd "$folder"
rm -rf venv
"$python" -m venv venv
venv/bin/python -m pip --quiet --disable-pip-version-check install "$@" \
    --require-hashes --no-deps --only-binary :all: --requirement huggingface.lock
venv/bin/python -c 'import huggingface_hub'
touch complete
