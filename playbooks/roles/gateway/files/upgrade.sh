#!/bin/sh
# upgrade.sh FOLDER: NGINX goes over to the program and modules that are installed now, and nobody is
# refused meanwhile: the new one takes the open sockets, the old one finishes what it has.
# Not so a group's own (with bin/keep), which may be an image's or live of its environment, and starts no
# other: it leaves the port first, and finishes what it has within a minute.
set -eu
folder=$1
old=$(cat "$folder/nginx.pid")

is_new() { [ -s "$folder/nginx.pid" ] && [ "$(cat "$folder/nginx.pid")" != "$old" ]; }

# Wait for something for so many tenths of a second.
await() {
    left=$1
    shift
    until "$@"; do
        left=$((left - 1))
        if [ "$left" -le 0 ]; then return 1; fi
        sleep 0.1
    done
}
has_ended() { ! kill -0 "$old" 2> /dev/null; }

closing=$folder/current/closing
trap 'rm -f "$closing"' EXIT
# As before a reload (gateway.sh): only connections on which nobody asks are left to be closed.
finish_old() {
    touch "$closing"
    sleep 0.5
    kill -QUIT "$old"
    rm -f "$closing"
}

if [ -e "$folder/bin/keep" ]; then
    finish_old
    rm -f "$folder/nginx.pid" "$folder/started.pid"
    "$folder/bin/keep" > /dev/null
    await 600 has_ended || kill -TERM "$old"
    await 100 has_ended
    # It has taken the new one's file along.
    exec "$folder/bin/keep"
fi

kill -USR2 "$old"
await 100 is_new || {
    echo "NGINX did not start anew; the old one serves on: see $folder/error.log" >&2
    exit 1
}
finish_old
# One that still streams may take an hour, and is let.
await 600 has_ended || echo "the old NGINX still finishes its requests"
