#!/bin/sh
# modelfleet-test-base USER FOLDER FILE: whether NGINX takes FILE as the base of the generation that
# it serves. As the account that it runs as: what root tested would leave files that are root's.
# Without a USER that is us, and NGINX is the folder's own.
set -eu
user=$1 folder=$2 file=$3 beside=/tmp
if [ -z "$user" ]; then
    # Where the NGINX of an image can read it. (Root never writes there, nor runs what lies there.)
    PATH=$folder/bin:$PATH beside=$folder
fi
stage=$(mktemp -d "$beside/part.XXXXXX")
trap 'rm -rf "$stage"' EXIT
cp -R "$folder/current/." "$stage/"
rm -f "$stage/nginx.conf"
cp "$file" "$stage/nginx.conf"
set -- nginx -t -q -e stderr -c "$stage/nginx.conf"
if [ -n "$user" ]; then
    chown -R "$user:" "$stage"
    set -- runuser -u "$user" -- "$@"
fi
"$@"
