#!/bin/busybox sh
# The guest's first process: goes on in the root file system that the kernel was told of, or stays in the initramfs.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /lib/modules/*; do
    insmod "$module"
done

argument() {
    sed -n "s/.*\<$1=\([^ ]*\).*/\1/p" /proc/cmdline
}
root=$(argument root) init=$(argument init)
[ -n "$root" ] || exec /run.sh
while ! [ -b "$root" ]; do
    usleep 100000
done
mount -t ext4 "$root" /mnt
[ -n "$init" ] || cp /run.sh /prelude.sh /script /mnt/
for folder in proc sys dev; do
    mount -o move /$folder /mnt/$folder
done
exec switch_root /mnt "${init:-/run.sh}"
