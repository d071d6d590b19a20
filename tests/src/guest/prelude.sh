# What a guest's script may use, besides busybox, fio, kexec and mkfs.ext4; in a root file system, all of e2fsprogs.

# The serial ports: the console, and the one for facts.
CONSOLE=/dev/ttyS0 FACTS=/dev/ttyS1
if [ -c /dev/ttyAMA0 ]; then
    CONSOLE=/dev/ttyAMA0 FACTS=/dev/ttyAMA1
fi

# fact KEY VALUE...: tells the host, on a serial port of its own.
fact() {
    # It cannot be opened while another process closes it.
    until echo "$*" >"$FACTS"; do usleep 1000; done 2>/dev/null
}

# disk_facts DISK: what the kernel sees of a disk (vda).
disk_facts() {
    fact capacity $(($(cat "/sys/block/$1/size") * 512))
    fact serial "$(cat "/sys/block/$1/serial")"
    fact read-only "$(cat "/sys/block/$1/ro")"
    fact queues "$(ls "/sys/block/$1/mq" | wc -l)"
}

# interrupt_facts DISK: "interrupt NAME CHIP COUNT" for each line of /proc/interrupts that belongs to the disk, with
# the count of all processors.
interrupt_facts() {
    awk -v device="$(basename "$(readlink "/sys/block/$1/device")")" '
        NR == 1 { cpus = NF }
        $0 ~ device "(-|,|$)" {
            count = 0
            for (cpu = 0; cpu < cpus; cpu++) count += $(cpu + 2)
            print "interrupt", $NF, $(cpus + 2), count
        }' /proc/interrupts >"$FACTS"
}

# fio_verify FOLDER SIZE: one job for each processor writes SIZE in random blocks of 4 KiB, and verifies what it reads
# back.
fio_verify() {
    jobs=$(nproc)
    report=$(fio --minimal --name=verify --directory="$1" --size="$2" --numjobs="$jobs" --group_reporting \
        --cpus_allowed="0-$((jobs - 1))" --cpus_allowed_policy=split \
        --rw=randwrite --bs=4k --ioengine=libaio --iodepth=16 --direct=1 \
        --verify=crc32c --do_verify=1 --verify_fatal=1)
    # Fields of fio's terse output, version 3.
    fact fio-errors "$(echo "$report" | cut -d ';' -f 5)"
    fact fio-read-iops "$(echo "$report" | cut -d ';' -f 8)"
    fact fio-write-iops "$(echo "$report" | cut -d ';' -f 49)"
}

# records FIRST LAST: prints 4096 bytes for each number, the number in decimal digits.
records() {
    for number in $(seq "$1" "$2"); do
        printf '%04096d' "$number"
    done
}

# files_in FOLDER: makes the folder, and 8 files of 512 KiB in it, of random bytes.
files_in() {
    mkdir -p "$1"
    for file in 1 2 3 4 5 6 7 8; do
        dd if=/dev/urandom of="$1/$file" bs=256k count=2
    done
}

# summed_files FOLDER: makes files in FOLDER/written, and FOLDER/sums of them, which the host compares with the image.
summed_files() {
    files_in "$1/written"
    (cd "$1" && sha256sum written/* >sums)
    sync
}

# files_survive_remount DISK FOLDER: makes ext4 and files on the disk, and reads the same after a remount.
files_survive_remount() {
    mkfs.ext4 -q -F "/dev/$1"
    mkdir -p "$2"
    mount -t ext4 "/dev/$1" "$2"
    files_in "$2"
    sha256sum "$2"/[1-8] >"/tmp/$1.sums"
    sync
    umount "$2"
    mount -t ext4 "/dev/$1" "$2"
    sha256sum -c "/tmp/$1.sums"
}
