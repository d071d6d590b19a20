//! Machines of other shapes: many disks, little and much memory, memory that comes later.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;
use testbed::{Machine, Server, output};

use crate::{Disk, MIB, create_image, image, testbed};

#[test]
#[ignore = "long: cargo xtask guests"]
fn a_guest_has_eight_disks() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = |name: String| dir.path().join(name);
    let mut config = String::new();
    let mut machine = Machine::new();
    for disk in 0..8 {
        let (socket, image) = (path(format!("{disk}.sock")), path(format!("{disk}.img")));
        create_image(&image, 64 * MIB)?;
        config += &format!("[[device]]\nsocket_path = {socket:?}\nblk_file = {image:?}\nserial = \"disk {disk}\"\n\n");
        machine = machine.vfio_user(&socket);
    }
    fs::write(path("config.toml".to_owned()), config)?;
    let server = Server::start(&["--config", &path("config.toml".to_owned()).to_string_lossy()])?;

    // All of them work at the same time.
    let script = "
        for disk in a b c d e f g h; do
            disk_facts vd$disk
            files_survive_remount vd$disk /mnt/$disk
        done
        for disk in a b c d e f g h; do
            fio_verify /mnt/$disk 1M &
        done
        wait
        umount /mnt/?";
    let mut guest = testbed()?.boot(&machine, script)?;
    guest.finish()?;
    assert_eq!(guest.facts("serial"), (0..8).map(|disk| format!("disk {disk}")).collect::<Vec<_>>());
    assert_eq!(guest.facts("fio-errors"), ["0"; 8]);
    assert!(server.stop()?.success());
    for disk in 0..8 {
        let check = testbed()?.e2fsck().arg("-fn").arg(path(format!("{disk}.img"))).output()?;
        assert!(check.status.success(), "{disk}: {}", String::from_utf8_lossy(&check.stdout));
    }
    Ok(())
}

/// A guest with this much memory fills most of it with what it reads from the disk, and writes from there.
fn a_guest_has(memory_mib: u32) -> Result<()> {
    let dir = tempfile::tempdir()?;
    write_noise(&image(dir.path()), u64::from(memory_mib) * MIB / 2)?;
    let disk = Disk::serve(dir, &["--num-queues", "2"])?;
    let copy = Disk::new(u64::from(memory_mib) * MIB / 2, &["--num-queues", "2"])?;
    let machine = Machine::new().memory_mib(memory_mib).vfio_user(&disk.socket());
    let mut guest = copy.boot(machine, COPY)?;
    guest.finish()?;
    assert_copied(&disk, &copy)
}

/// Copies a disk to another one through the page cache, which stays for as long as the disks are open.
const COPY: &str = "
    exec 8</dev/vda 9</dev/vdb
    dd if=/dev/vda of=/dev/vdb bs=1M conv=notrunc
    sync
    fact cached $(awk '$1 == \"Buffers:\" { print $2 }' /proc/meminfo)";

#[test]
#[ignore = "long: cargo xtask guests"]
fn a_guest_has_256_mib() -> Result<()> {
    a_guest_has(256)
}

#[test]
#[ignore = "long: cargo xtask guests"]
fn a_guest_has_1_gib() -> Result<()> {
    a_guest_has(1024)
}

#[test]
#[ignore = "long: cargo xtask guests"]
fn a_guest_has_4_gib() -> Result<()> {
    a_guest_has(4096)
}

#[test]
fn memory_that_is_plugged_in_is_used_for_the_disk() -> Result<()> {
    let dir = tempfile::tempdir()?;
    write_noise(&image(dir.path()), 512 * MIB)?;
    let disk = Disk::serve(dir, &["--num-queues", "2"])?;
    let copy = Disk::new(512 * MIB, &["--num-queues", "2"])?;
    let machine = Machine::new().memory_mib(384).more_memory_mib(1024).vfio_user(&disk.socket());
    let script = format!(
        "
        fact waiting
        while [ $(awk '$1 == \"MemTotal:\" {{ print $2 }}' /proc/meminfo) -lt 1000000 ]; do usleep 100000; done
        {COPY}"
    );
    let mut guest = copy.boot(machine, &script)?;
    guest.fact("waiting")?;
    let qmp = guest.qmp()?;
    let backend = json!({ "qom-type": "memory-backend-memfd", "id": "more", "share": true, "size": 1024 * MIB });
    qmp.execute("object-add", backend)?;
    qmp.execute("device_add", json!({ "driver": "pc-dimm", "memdev": "more" }))?;
    guest.finish()?;
    // More than there was: the page cache is in the memory that came later.
    let cached: u64 = guest.facts("cached").concat().parse()?;
    assert!(cached * 1024 > 384 * MIB, "{cached} KiB");
    assert_copied(&disk, &copy)
}

/// Fills the file `path` with `size` bytes that repeat nowhere.
fn write_noise(path: &Path, size: u64) -> Result<()> {
    let mut file = std::io::BufWriter::new(File::create(path)?);
    // SplitMix64: each state is another one's only successor.
    for index in 0..size / 8 {
        let mut word = index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        file.write_all(&word.to_le_bytes())?;
    }
    file.flush().with_context(|| format!("cannot write {}", path.display()))
}

fn assert_copied(disk: &Disk, copy: &Disk) -> Result<()> {
    output(Command::new("cmp").arg(disk.image()).arg(copy.image())).map(drop)
}
