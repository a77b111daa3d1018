#!/bin/sh
# environment.sh FOLDER PYTHON WHEEL LOCK [PIP-ARGUMENT]...: a Python environment of a wheel, in the
# folder that holds it. Killed at any time, the next run begins anew.
set -eu
folder=$1 python=$2 wheel=$3 lock=$4
shift 4
cd "$folder"
rm -rf venv
"$python" -m venv venv
pip() { venv/bin/python -m pip --quiet --disable-pip-version-check "$@"; }
pip install "$@" --require-hashes --no-deps --requirement "$lock"
pip install --no-index --no-deps "$wheel"
venv/bin/python -m compileall -q venv/lib
venv/bin/fleet --version
touch complete
# Three remain: a command that runs now may still read an earlier one.
find "${folder%/*}" -mindepth 2 -maxdepth 2 -name complete -printf '%T@ %h\n' | sort -rn |
    tail -n +4 | cut -d' ' -f2- | xargs -r -d '\n' rm -rf
