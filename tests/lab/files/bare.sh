#!/bin/sh
# Runs inside a fresh debootstrap root: a site's host before it is provisioned. It has Slurm, sshd, the
# cluster's accounts and a mirror of Debian packages, as hosts of a lab reach no network; none of ours.
set -eu
export DEBIAN_FRONTEND=noninteractive
mirror=/srv/mirror

step() { echo "bare base: $*"; }

# Only while this is built; later a package starts what it brings, as on any host.
printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
chmod 0755 /usr/sbin/policy-rc.d
echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/unsafe-io
cat > /etc/apt/apt.conf.d/lab <<'APT'
APT::Install-Recommends "false";
Acquire::Languages "none";
Dpkg::Use-Pty "0";
APT

step "installing Slurm, sshd and what Ansible asks of a host"
apt-get update -q
apt-get install -q -y slurmctld slurmd slurm-client munge openssh-client openssh-server iproute2 \
    iputils-ping procps psmisc systemd sudo python3 python3-apt apt-utils

step "filling the mirror"
mkdir -p "$mirror/partial"
fetch() { apt-get install -q -y --download-only -o "Dir::Cache::archives=$mirror" "$@"; }
fetch nginx libnginx-mod-http-lua lua-cjson python3-venv git curl logrotate cron squashfuse
# Only sid has Apptainer (base.sh says more).
suite=$(awk '$1 == "deb" { print $3; exit }' /etc/apt/sources.list)
if [ "$suite" != bookworm ]; then
    sed -e "s/ $suite / sid /" -e 's/^deb /deb [check-valid-until=no] /' \
        /etc/apt/sources.list > /etc/apt/sources.list.d/sid.list
    printf 'Package: *\nPin: release n=sid\nPin-Priority: 50\n' > /etc/apt/preferences.d/sid
    apt-get update -q
    fetch apptainer/sid
    rm /etc/apt/sources.list.d/sid.list /etc/apt/preferences.d/sid
fi
rm -r "$mirror/partial" "$mirror/lock"
(cd "$mirror" && apt-ftparchive packages . > Packages)
echo "deb [trusted=yes] file:$mirror ./" > /etc/apt/sources.list
rm -rf /var/lib/apt/lists/*
apt-get update -q

step "making the cluster's accounts"
useradd --uid 2000 --create-home --shell /bin/bash fleet
useradd --uid 2001 --create-home --shell /bin/bash mallory
usermod --password '*' fleet
usermod --password '*' mallory
# Each host enables what it is for (host.sh); nothing of the real machine's is a host's to set.
systemctl --quiet disable slurmctld slurmd
systemctl --quiet mask systemd-modules-load systemd-udevd systemd-remount-fs
rm -f /etc/ssh/ssh_host_* /usr/sbin/policy-rc.d
