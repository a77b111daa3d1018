#!/bin/sh
# crontab.sh PROGRAM FILE present|absent [check]: the lines of FILE in the table of `crontab` or
# `scrontab`, or no longer, between two lines that name it; all else there stays. Says whether it changed.
set -eu
program=$1 file=$2 state=$3 check=${4:-}
before=$("$program" -l 2>&1) || case $before in
    # None yet. Whatever else it may say is no reason to write a new one over what there is.
    *[Nn]o\ crontab*) before='' ;;
    *)
        echo "$program: $before" >&2
        exit 1
        ;;
esac
after=$(printf '%s\n' "$before" | sed "/^# BEGIN modelfleet/,/^# END modelfleet/d")
if [ "$state" = present ]; then
    after=$(printf '%s\n' ${after:+"$after"} "# BEGIN modelfleet" "$(cat "$file")" "# END modelfleet")
fi
if [ "$before" = "$after" ]; then exit; fi
echo changed
if [ -z "$check" ]; then printf '%s\n' "$after" | "$program" -; fi
