#!/bin/sh
# group.sh USER FOLDER: runs on the login host of a bare lab: what any cluster's has beside Slurm, and a
# group's account with a folder on its disk, a key for ssh and its own build of NGINX. (That is Debian's,
# unpacked in its home.)
set -eu
user=$1 folder=$2
apt-get install -qq -y apptainer squashfuse cron curl git logrotate python3-venv > /dev/null
# As base.sh does, for machines that lack CAP_SYS_RESOURCE or can't mount devpts in a user namespace.
sed -i -e 's/^root default capabilities = .*/root default capabilities = no/' \
    -e 's/^mount devpts = .*/mount devpts = no/' /etc/apptainer/apptainer.conf
install -d -o "$user" -g "$user" "$folder"
runuser -u "$user" -- sh -eu <<'UNPACK'
cd
mkdir -m 0700 .ssh software
for deb in /srv/mirror/*nginx*.deb /srv/mirror/*lua*.deb; do
    if [ -e "$deb" ]; then dpkg -x "$deb" software; fi
done
share=$PWD/software/usr/share/nginx
rm -f "$share/modules"
ln -s "$PWD/software/usr/lib/nginx/modules" "$share/modules"
cat > nginx <<BUILD
#!/bin/sh
# Where its Lua finds what Debian would have below /usr.
export LUA_PATH="$PWD/software/usr/share/lua/5.1/?.lua;;"
export LUA_CPATH="$(echo "$PWD"/software/usr/lib/*/lua/5.1)/?.so;;"
export LD_LIBRARY_PATH="$(echo "$PWD"/software/usr/lib/*-linux-gnu)"
exec $PWD/software/usr/sbin/nginx -p $share/ "\$@"
BUILD
chmod 0755 nginx
UNPACK
install -o "$user" -g "$user" -m 0600 /root/.ssh/authorized_keys "/home/$user/.ssh/authorized_keys"
