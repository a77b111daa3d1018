#!/bin/sh
# standin-sif.sh SIF: runs inside the base; the stand-in engine and what it needs, as an image.
set -eu
root=/tmp/rootfs
mkdir -p $root/usr/bin $root/usr/lib $root/usr/lib64 $root/opt/modelfleet $root/etc $root/tmp $root/proc $root/sys $root/dev
for folder in bin lib lib64; do ln -s usr/$folder $root/$folder; done
cp -a /usr/bin/dash /usr/bin/sh /usr/bin/env /usr/bin/python3* $root/usr/bin
cp -a /usr/lib/python3.[0-9]* $root/usr/lib
cp -a /opt/modelfleet/venv $root/opt/modelfleet
rm -rf $root/opt/modelfleet/venv/lib/python3*/site-packages/ansible*
cp /etc/passwd /etc/group $root/etc
mkdir -p $root/opt/tests/lab
cp -a /mnt/tests/fixtures $root/opt/tests
install -m 0755 /mnt/tests/lab/standin.py $root/opt/tests/lab
printf '#!/bin/sh\nexec /opt/tests/lab/standin.py "$@"\n' > $root/usr/bin/vllm
chmod 0755 $root/usr/bin/vllm
{ echo /usr/bin/python3; echo /usr/bin/dash; find $root/usr/lib $root/usr/lib64 $root/opt -name '*.so'; } |
    xargs ldd 2> /dev/null | sed -n 's|^\t.*=> \(/[^ ]*\) .*|\1|p; s|^\t\(/[^ ]*\) .*|\1|p' | sort -u > /tmp/libraries
xargs -a /tmp/libraries cp --parents -L -t $root
apptainer build --mksquashfs-args "-comp zstd -Xcompression-level 1 -no-progress" "$1" $root
