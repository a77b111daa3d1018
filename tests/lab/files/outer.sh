#!/bin/sh
# outer.sh STATE HOLD...
# The first process of a lab, in new mount, network and PID namespaces: a bridge for the hosts' links
# and memory for their disks (Slurm's fsyncs are then free). When it ends, the kernel ends the lab:
# every process, mount, namespace and link. HOLD decides when that is.
set -eu
state=$1
shift
# /proc is still the real machine's, so this is the PID by which the real machine knows us.
read -r pid _ < /proc/self/stat
mount -t tmpfs -o mode=0755 tmpfs "$state/ram"
mkdir "$state/ram/cgroup" # for the hosts of a bare lab
mount -t cgroup2 cgroup2 "$state/ram/cgroup"
# Without the delay a port forwards at once, not after 15 s of learning.
ip link add bridge type bridge forward_delay 0
ip link set bridge up
ip link set lo up
echo "$pid"
exec > /dev/null
# Not exec: a shell that waits for its command also reaps what else is left to it.
"$@"
exit
