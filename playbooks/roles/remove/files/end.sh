#!/bin/sh
# end.sh FOLDER: a group's NGINX finishes what it has, for a minute at most, and ends.
set -eu
folder=$1
# What cron has begun.
exec 9> "$folder/keep.lock"
flock 9
pid=$(cat "$folder/nginx.pid" 2> /dev/null) || exit 0
if [ "$(cat "/proc/$pid/comm" 2> /dev/null)" != nginx ]; then exit; fi
echo ended
kill -QUIT "$pid"
tries=0
while kill -0 "$pid" 2> /dev/null; do
    tries=$((tries + 1))
    if [ "$tries" -eq 600 ]; then kill -TERM "$pid"; fi
    sleep 0.1
done
