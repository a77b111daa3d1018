#!/bin/sh
# lab-daemon start|stop|kill DAEMON, on a lab host: each daemon as the user that a site runs it as.
set -eu
action=$1 daemon=$2
gateway=/var/lib/modelfleet/gateway

as() { # USER COMMAND...
    user=$1
    shift
    setpriv --reuid="$user" --regid="$user" --init-groups -- "$@"
}

start() {
    case $daemon in
        sshd) /usr/sbin/sshd ;;
        munged)
            install -d -o munge -g munge -m 0755 /run/munge
            chown munge: /etc/munge/munge.key
            as munge /usr/sbin/munged ;;
        slurmctld)
            install -d -o slurm -g slurm /run/slurm /var/lib/slurm/slurmctld /var/log/slurm
            as slurm /usr/sbin/slurmctld ;;
        slurmd)
            install -d -m 0755 /run/slurm /var/lib/slurm/slurmd
            install -d -o slurm -g slurm /var/log/slurm
            /usr/sbin/slurmd ;;
        slurmrestd)
            install -d -o fleet -g fleet -m 0700 /run/slurmrestd
            plugin=slurmctld # which 22.05 has no name for
            /usr/sbin/slurmrestd -s list 2>&1 | grep -q "$plugin" || plugin=openapi/v0.0.38
            as fleet setsid --fork /usr/sbin/slurmrestd -a rest_auth/local -s "$plugin" \
                unix:/run/slurmrestd/slurmrestd.socket > /run/slurmrestd/log 2>&1 ;;
        nginx)
            install -d -o fleet -g fleet "$gateway/tmp" /var/log/nginx
            chown -hR fleet: "$gateway"
            as fleet /usr/sbin/nginx -c "$gateway/current/nginx.conf" ;;
        *) echo "lab-daemon: no daemon $daemon" >&2; exit 2 ;;
    esac
}

finish() { # SIGNAL: send it, and return when the last such process is gone
    pkill "-$1" --exact "$daemon" || return 0
    timeout 20 pidwait --exact "$daemon" || test $? = 1 # 1: it was gone before we looked
}

case $action in
    start) start ;;
    stop) finish TERM ;;
    kill) finish KILL ;;
    *) echo "lab-daemon: start, stop or kill" >&2; exit 2 ;;
esac
