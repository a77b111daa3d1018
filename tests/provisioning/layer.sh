#!/bin/sh
# Runs inside the lab's base, whose writes are kept: a registry, and what an image of it is made of.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y docker-registry busybox-static
rm -rf /var/lib/apt/lists/*
