#!/bin/sh
# power-on.sh STATE HOST ADDRESS BASE [SOURCE:TARGET:MODE]...
# Runs in the lab's outer namespaces: a new network namespace with a link to the bridge, and a host in
# it. A new namespace at each power-on, because sockets of the old one would still say goodbye.
# Prints what host.sh prints: the host's PID, once it is up.
set -eu
state=$1 host=$2
net=$state/ram/$host.net ready=$state/ram/$host.ready
ip link delete "$host" 2> /dev/null || true
umount "$net" 2> /dev/null || true
: > "$net"
# (unshare --net=FILE would look up a PID of this namespace in the real machine's /proc.)
unshare --net mount --bind /proc/self/ns/net "$net"
ip link add "$host" type veth peer name eth0 netns "$net"
ip link set "$host" master bridge up
rm -f "$ready"
mkfifo "$ready"
unshare="unshare --mount --uts --pid --ipc --fork --kill-child"
# A base without `fleet` is bare: its host runs systemd, in control groups of its own.
if [ ! -e "$4/usr/local/bin/fleet" ]; then
    groups=$state/ram/cgroup/modelfleet-lab-${state##*/}/$host
    mkdir -p "$groups"
    echo 0 > "$groups/cgroup.procs"
    unshare="$unshare --cgroup"
fi
# shellcheck disable=SC2086
nsenter --net="$net" $unshare \
    sh "${0%/*}/host.sh" "$@" 3> "$ready" >> "$state/log/$host" 2>&1 < /dev/null &
# One line, or nothing if the host died before.
timeout 30 head -n 1 "$ready"
