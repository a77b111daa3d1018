#!/bin/sh
# enter.sh LOWER UPPER [SOURCE:TARGET]... -- COMMAND...
# Runs inside new mount and PID namespaces: makes LOWER the root and runs COMMAND there. With UPPER
# (a folder on the disk) every write goes to it; with UPPER empty, to LOWER itself. The root is a
# mount point that was pivoted to: in a plain chroot Apptainer finds no parent mount point.
set -eu
umask 022
lower=$1 upper=$2
shift 2
if [ -n "$upper" ]; then
    root=$upper/root
    mkdir -p "$upper/upper" "$upper/work" "$root"
    mount -t overlay -o "lowerdir=$lower,upperdir=$upper/upper,workdir=$upper/work" overlay "$root"
else
    root=$lower
    mount --bind "$root" "$root"
fi
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=0755 tmpfs "$root/run"
while [ "$1" != -- ]; do
    source=${1%%:*} target=$root${1#*:}
    if [ -d "$source" ]; then mkdir -p "$target"; else touch "$target"; fi
    mount --rbind "$source" "$target"
    shift
done
shift
cat /etc/resolv.conf > "$root/etc/resolv.conf"
cd "$root"
mkdir -p mnt/.old
pivot_root . mnt/.old
umount --lazy /mnt/.old
exec "$@"
