#!/bin/sh
# One cycle, for a timer or cron: the newest spec if there is one, else the last, then `fleet apply`.
set -eu
if [ -x /usr/local/libexec/modelfleet-pull ]; then
    /usr/local/libexec/modelfleet-pull || echo "the last good spec is still in use" >&2
fi
exec /usr/local/bin/fleet apply
