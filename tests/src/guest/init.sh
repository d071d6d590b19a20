#!/bin/busybox sh
# The guest's first process: runs /script, tells how it ended, and powers off.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /lib/modules/*; do
    insmod "$module"
done

. /prelude.sh
fact boot "$(cut -d ' ' -f 1 /proc/uptime)"
fact kernel "$(uname -r)"

# A subshell, so that the script's end is not ours. Traced on the console, for whom reads it after a failure.
(set -eux; . /script) </dev/ttyS0
fact exit $?
sync
poweroff -f
