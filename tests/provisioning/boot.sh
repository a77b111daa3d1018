#!/bin/sh
# The first process of a bare host (site.py): a registry and a mirror, on its loopback.
set -eu
ip link set lo up
echo 127.0.0.1 registry.test mirror.test hub.test >> /etc/hosts
mkdir -p /srv/registry /shared/mirror
chmod 1777 /var/tmp /tmp

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=registry \
    -addext subjectAltName=DNS:registry.test -keyout /srv/registry.key -out /srv/registry.pem 2> /dev/null
cat /srv/registry.pem >> /etc/ssl/certs/ca-certificates.crt
# bcrypt, which is all that it takes, of the password in site.py.
# shellcheck disable=SC2016
echo 'puller:$2b$04$NvE/nGsa2pMp8VTchuF7weuBzBRfj5JcyOnSkRH0N.zqvHw2yhb/O' > /srv/htpasswd
cat > /srv/registry.yml <<'YAML'
version: 0.1
storage: {filesystem: {rootdirectory: /srv/registry}}
http: {addr: "127.0.0.1:5000", tls: {certificate: /srv/registry.pem, key: /srv/registry.key}}
auth: {htpasswd: {realm: test, path: /srv/htpasswd}}
YAML
cat > /srv/nginx.conf <<'CONF'
user root; daemon off; pid /run/mirror.pid; error_log /srv/mirror-error.log;
events {}
http { access_log /srv/mirror.log; server { listen 127.0.0.1:8000; root /shared/mirror; } }
CONF
nginx -c /srv/nginx.conf &
docker-registry serve /srv/registry.yml > /srv/registry.log 2>&1 &
wait
