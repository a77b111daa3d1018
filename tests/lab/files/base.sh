#!/bin/sh
# Runs inside a fresh debootstrap root: all that every lab host has, except the Python packages.
set -eu
export DEBIAN_FRONTEND=noninteractive

step() { echo "base: $*"; }

# Nothing may start here: the daemons belong to the hosts.
printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
chmod 0755 /usr/sbin/policy-rc.d
# A half-built base is thrown away, so no write has to reach the disk in order.
echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/unsafe-io
cat > /etc/apt/apt.conf.d/lab <<'APT'
APT::Install-Recommends "false";
APT::Keep-Downloaded-Packages "true";
Acquire::Languages "none";
Dpkg::Use-Pty "0";
APT

# Only sid has Apptainer, whose libc is too new for bookworm. Sid's line is this suite's own with
# another name, at a priority (50) below what is installed (100), so nothing else comes from it
# unless Apptainer cannot do without. A mirror may lag behind sid, whose lists expire in a week:
# that is forgiven; their signature is checked all the same.
sources=/etc/apt/sources.list
suite=$(awk '$1 == "deb" { print $3; exit }' "$sources")
if [ "$suite" != bookworm ]; then
    sed -e "s/ $suite / sid /" -e 's/^deb /deb [check-valid-until=no] /' "$sources" > /tmp/sid
    if [ "$suite" = sid ]; then : > "$sources"; fi
    mv /tmp/sid /etc/apt/sources.list.d/sid.list
    printf 'Package: *\nPin: release n=sid\nPin-Priority: 50\n' > /etc/apt/preferences.d/sid
fi

step "installing Slurm, NGINX, sshd and tools"
apt-get update -q
apt-get install -q -y slurmctld slurmd slurm-client slurmrestd munge nginx libnginx-mod-http-lua lua-cjson \
    openssh-client openssh-server curl iproute2 iputils-ping procps psmisc python3 python3-venv squashfs-tools \
    squashfuse fuse3 tini jq openssl ca-certificates debootstrap debian-archive-keyring git

if [ "$suite" != bookworm ]; then
    step "installing Apptainer"
    libc=$(dpkg-query -W -f '${Version}' libc6)
    apt-get install -q -y apptainer/sid
    if [ "$libc" != "$(dpkg-query -W -f '${Version}' libc6)" ]; then
        step "Apptainer replaced libc $libc: this base is no longer $suite" >&2
        exit 1
    fi
    # For machines that lack CAP_SYS_RESOURCE or cannot mount devpts in a user namespace.
    sed -i -e 's/^root default capabilities = .*/root default capabilities = no/' \
        -e 's/^mount devpts = .*/mount devpts = no/' /etc/apptainer/apptainer.conf
fi

step "making users"
useradd --uid 2000 --create-home --shell /bin/bash fleet
useradd --uid 2001 --create-home --shell /bin/bash mallory
# "*" is no password; the default "!" is a locked account, which sshd without PAM turns away.
usermod --password '*' fleet
usermod --password '*' mallory
# The checkout belongs to whoever cloned it, and git reads only one's own without this.
git config --system --add safe.directory '*'
rm -f /etc/ssh/ssh_host_*
