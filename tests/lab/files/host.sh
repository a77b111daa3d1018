#!/bin/sh
# host.sh STATE HOST ADDRESS BASE [SOURCE:TARGET:MODE]...
# A host's first process: builds its root, starts its daemons, writes its PID to fd 3, then reaps.
set -eu
umask 022
state=$1 host=$2 address=$3 lower=$4
shift 4
# As in outer.sh: the real machine's number for us.
read -r pid _ < /proc/self/stat

disk=$state/ram/$host
root=$disk/root
new=$([ -d "$disk" ] || echo yes)
mkdir -p "$disk/upper" "$disk/work" "$root"
mount -t overlay -o "lowerdir=$lower,upperdir=$disk/upper,workdir=$disk/work" overlay "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs -o mode=0755 tmpfs "$root/run" # munged refuses a /run that others may write
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"

# Its own devices: nothing of the real machine's, and fuse for everyone, for Apptainer.
dev=$root/dev
mount -t tmpfs -o mode=0755 tmpfs "$dev"
for node in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0 fuse:10:229; do
    minor=${node##*:} major=${node#*:}
    mknod -m 0666 "$dev/${node%%:*}" c "${major%:*}" "$minor"
done
mkdir "$dev/pts" "$dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5 devpts "$dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$dev/shm"
ln -s pts/ptmx "$dev/ptmx"
ln -s /proc/self/fd "$dev/fd"
for stream in 0:stdin 1:stdout 2:stderr; do
    ln -s "/proc/self/fd/${stream%:*}" "$dev/${stream#*:}"
done
case $host in gpu*)
    # Pretend GPUs: Slurm only asks for a character device; these are /dev/null by another name.
    for gpu in 0 1 2 3; do mknod -m 0666 "$dev/nvidia$gpu" c 1 3; done ;;
esac

for bind in "$@"; do
    source=${bind%%:*} mode=${bind##*:} target=${bind#*:}
    target=$root${target%:*}
    if [ -d "$source" ]; then mkdir -p "$target"; else mkdir -p "${target%/*}"; touch "$target"; fi
    mount --bind "$source" "$target"
    mount -o "remount,bind,$mode" "$target"
done
# Only once: a host that is powered on again finds its disk as it was.
for files in ${new:+all "$host"}; do
    if [ -d "$state/files/$files" ]; then cp -r --preserve=mode "$state/files/$files/." "$root/"; fi
done

cd "$root"
mkdir -p mnt/.old
pivot_root . mnt/.old
umount --lazy /mnt/.old
cd /

# A bare host is a site's own: Debian's units start what it is for.
if [ ! -e /usr/local/sbin/lab-daemon ]; then
    echo "$host" > /etc/hostname
    ip link set lo up
    ip address add "$address/24" dev eth0
    ip link set eth0 up
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    # What the kernel has of the network is the host's, all else the real machine's.
    mount --bind /proc/sys /proc/sys
    mount --bind /proc/sys/net /proc/sys/net
    mount -o remount,bind,ro /proc/sys
    chown munge: /etc/munge/munge.key
    case $host in
        login) SYSTEMD_OFFLINE=1 systemctl --quiet enable slurmctld ;;
        gateway*) if id fleet > /dev/null 2>&1; then userdel --remove fleet; fi ;; # no part of the cluster
        *) SYSTEMD_OFFLINE=1 systemctl --quiet enable slurmd ;;
    esac
    echo "$pid" >&3
    exec 3>&-
    exec env -i container=lab /lib/systemd/systemd
fi

# If a daemon does not start, its last words are ours.
trap 'tail -n 3 /var/log/slurm/*.log /var/lib/modelfleet/gateway/error.log 2> /dev/null' EXIT

hostname "$host"
ip link set lo up
ip address add "$address/24" dev eth0
ip link set eth0 up
echo 0 2147483647 > /proc/sys/net/ipv4/ping_group_range # ping for everyone, without a capability
chown -R fleet: /home/fleet
mkdir -p /run/sshd

start() { for daemon in "$@"; do lab-daemon start "$daemon" 3>&-; done; }
case $host in
    login) start sshd munged slurmctld slurmrestd ;;
    gateway*)
        # A replica behind a cut link is noticed within seconds, as on a site's gateway.
        cd /proc/sys/net/ipv4
        echo 5 > tcp_keepalive_time
        echo 3 > tcp_keepalive_intvl
        echo 3 > tcp_keepalive_probes
        echo 5 > tcp_retries2
        cd /
        start sshd nginx ;;
    *) start sshd munged slurmd ;;
esac
echo "$pid" >&3
exec 3>&-
exec tini -- sleep infinity
