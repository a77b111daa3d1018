#!/bin/sh
# Runs inside the base: the Python packages, from wheels fetched outside, and the command `fleet`.
set -eu
venv=/opt/modelfleet/venv
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-index --find-links /mnt/wheels \
    --require-hashes --no-deps --requirement /mnt/requirements.lock
mkdir -p /opt/modelfleet/src
for site in "$venv"/lib/python3*/site-packages; do
    echo /opt/modelfleet/src > "$site/modelfleet.pth"
done
printf '#!/bin/sh\nexec %s -m reconciler "$@"\n' "$venv/bin/python" > /usr/local/bin/fleet
chmod 0755 /usr/local/bin/fleet
