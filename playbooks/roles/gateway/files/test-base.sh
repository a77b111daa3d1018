#!/bin/sh
# modelfleet-test-base USER FOLDER FILE: whether NGINX takes FILE as the base of the generation that
# it serves. As the account that it runs as: what root tested would leave files that are root's.
set -eu
user=$1 folder=$2 file=$3
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
cp -R "$folder/current/." "$stage/"
rm -f "$stage/nginx.conf"
cp "$file" "$stage/nginx.conf"
chown -R "$user:" "$stage"
runuser -u "$user" -- nginx -t -q -e stderr -c "$stage/nginx.conf"
