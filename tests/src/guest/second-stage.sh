#!/bin/sh
# The only program of a Debian that is not installed yet, but for those of its packages that debootstrap has unpacked.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive
mount -o remount,rw /
exec </dev/ttyS0 >/dev/ttyS0 2>&1
# debootstrap removes the packages that it has installed.
mkdir /packages
ln /var/cache/apt/archives/*.deb /packages/
/debootstrap/debootstrap --second-stage || exec echo "second stage: failed"
passwd -d root
echo guest >/etc/hostname
echo "/dev/vda / ext4 defaults 0 1" >/etc/fstab
# There is no init that would shut down; the kernel makes file systems read-only, and powers off. debootstrap may have
# unmounted /proc.
[ -e /proc/mounts ] || mount -t proc proc /proc
sync
echo u >/proc/sysrq-trigger
until grep -q ' / ext4 ro' /proc/mounts; do
    sleep 1
done
echo "second stage: installed"
echo o >/proc/sysrq-trigger
sleep 60
