#!/bin/sh
# nginx-sif.sh DEFINITION SIF: runs inside the base; an image of the definition, over a Debian laid here in
# place of a registry's.
set -eu
suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
debootstrap --variant=minbase --cache-dir=/var/cache/apt/archives "$suite" /tmp/rootfs > /dev/null
# No device can be made in a user namespace, and Apptainer mounts its own.
rm -rf /tmp/rootfs/dev/*
echo root:1:65536 | tee /etc/subuid > /etc/subgid
sed -e 's/^Bootstrap:.*/Bootstrap: localimage/' -e 's|^From:.*|From: /tmp/rootfs|' "$1" > /tmp/image.def
apptainer build --fakeroot --mksquashfs-args "-comp zstd -Xcompression-level 1 -no-progress" "$2" /tmp/image.def
