#!/bin/sh
# The command `fleet`. Who may read them gets the site's settings: spec, state folder, PATH.
set -eu
settings=/etc/modelfleet/fleet.env
if [ -r "$settings" ]; then
    set -a
    # shellcheck source=/dev/null
    . "$settings"
    set +a
fi
# By its own name: what runs goes on with what it began with, whatever becomes current.
exec "$(readlink -f /opt/modelfleet/current)/venv/bin/fleet" "$@"
