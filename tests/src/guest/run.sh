#!/bin/busybox sh
# Runs /script, tells how it ended, and powers off. In a root file system, it is the only program but the packages'.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
export LD_LIBRARY_PATH=/usr/lib/x86_64-linux-gnu/ceph:/usr/lib/aarch64-linux-gnu/ceph
/bin/busybox --install -s /bin
mount -t tmpfs tmp /tmp

. /prelude.sh
fact boot "$(cut -d ' ' -f 1 /proc/uptime)"
fact kernel "$(uname -r)"
grep -q ' / ext4 ' /proc/mounts && fact root ext4

# A subshell, so that the script's end is not ours. Traced on the console, for whom reads it after a failure.
(set -eux; . /script) <"$CONSOLE"
status=$?
sync
# What was written last must be on the disk before "exit" is told; in the initramfs there is nothing to remount.
mount -o remount,ro / 2>/dev/null
fact exit $status
poweroff -f
