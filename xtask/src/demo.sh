disk_facts vda

mkfs.ext4 -q -F /dev/vda
mount -t ext4 /dev/vda /mnt
fact ext4 "made and mounted"

mkdir /mnt/files
for file in $(seq 16); do
    dd if=/dev/urandom of=/mnt/files/$file bs=512k count=1
done
cd /mnt/files
sha256sum * >/tmp/sums
cd /
sync
umount /mnt
mount -t ext4 /dev/vda /mnt
cd /mnt/files
sha256sum -c /tmp/sums
cd /
fact sums "$(wc -l </tmp/sums) files of 512 KiB: all SHA-256 sums right after a remount"

fio_verify /mnt 16M
fact fio "2 jobs wrote 16 MiB each in random blocks of 4 KiB, and read back what they wrote"
umount /mnt
interrupt_facts vda
