//! More than one: devices of a server, queues of a device.

use std::fs;

use anyhow::Result;
use testbed::{Machine, Server};

use crate::{Disk, MIB, assert_every_queue_interrupts, create_image, testbed};

#[test]
fn one_server_has_two_disks() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    let mut config = String::new();
    for (disk, size) in [("one", 64 * MIB), ("two", 96 * MIB)] {
        create_image(&path(&format!("{disk}.img")), size)?;
        let (socket, image) = (path(&format!("{disk}.sock")), path(&format!("{disk}.img")));
        config += &format!("[[device]]\nsocket_path = {socket:?}\nblk_file = {image:?}\nserial = \"{disk}\"\n\n");
    }
    fs::write(path("config.toml"), config)?;
    let _server = Server::start(&["--config", &path("config.toml").to_string_lossy()])?;

    let machine = Machine::new().vfio_user(&path("one.sock")).vfio_user(&path("two.sock"));
    let script = "
        disk_facts vda
        disk_facts vdb
        files_survive_remount vda /mnt/a
        files_survive_remount vdb /mnt/b
        fio_verify /mnt/a 2M &
        one=$!
        fio_verify /mnt/b 2M
        wait $one";
    let mut guest = testbed()?.boot(&machine, script)?;
    guest.finish()?;
    assert_eq!(guest.facts("serial"), ["one", "two"]);
    assert_eq!(guest.facts("capacity"), [(64 * MIB).to_string(), (96 * MIB).to_string()]);
    assert_eq!(guest.facts("fio-errors"), ["0", "0"]);
    Ok(())
}

#[test]
fn four_processors_use_four_queues() -> Result<()> {
    let disk = Disk::new(128 * MIB, &["--num-queues", "4"])?;
    let script = "
        disk_facts vda
        files_survive_remount vda /mnt
        fio_verify /mnt 1M
        umount /mnt
        interrupt_facts vda";
    let mut guest = disk.boot(Machine::new().cpus(4), script)?;
    guest.finish()?;
    assert_eq!(guest.facts("queues"), ["4"]);
    assert_eq!(guest.facts("fio-errors"), ["0"]);
    assert_every_queue_interrupts(&guest, 4)
}
