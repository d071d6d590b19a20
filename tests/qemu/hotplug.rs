//! Disks that are plugged into a running guest, and pulled out of it.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use testbed::{Guest, Machine, Server, vfio_user};

use crate::{Disk, MIB, assert_every_queue_interrupts, cannot_run, testbed};

/// How many times a disk is plugged in.
const TIMES: usize = 50;

#[test]
fn a_disk_is_plugged_in() -> Result<()> {
    let disk = Disk::new(128 * MIB, &["--num-queues", "2"])?;
    let machine = Machine::new().device("pcie-root-port,id=root-port,chassis=1");
    let script = "
        fact waiting
        while ! [ -b /dev/vda ]; do usleep 100000; done 2>/dev/null
        files_survive_remount vda /mnt
        fio_verify /mnt 1M
        umount /mnt
        interrupt_facts vda";
    let mut guest = testbed()?.boot(&machine, script)?;
    guest.fact("waiting")?;
    guest.qmp()?.execute("device_add", plug("disk", &disk, "root-port"))?;
    guest.finish()?;
    assert_eq!(guest.facts("fio-errors"), ["0"]);
    assert_every_queue_interrupts(&guest, 2)
}

/// The device `id` on `bus`, as `device_add` takes it.
fn plug(id: &str, disk: &Disk, bus: &str) -> Value {
    let mut device = vfio_user(&disk.socket());
    device["id"] = json!(id);
    device["bus"] = json!(bus);
    device
}

/// One disk after the other comes and stays; each is used, while those before it are too. When the guest is gone, the
/// server holds what it held before.
#[test]
#[ignore = "long: cargo xtask guests"]
fn fifty_disks_are_plugged_in_one_after_the_other() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = |disk: usize| dir.path().join(format!("{disk}.sock"));
    let mut config = String::new();
    let mut machine = Machine::new().memory_mib(1024);
    for disk in 0..TIMES {
        let path = socket(disk);
        config += &format!(
            "[[device]]\nsocket_path = {path:?}\nstore = \"memory\"\nsize = \"16M\"\nserial = \"disk {disk}\"\n\n"
        );
        // Eight ports are the functions of a slot.
        let (slot, function) = (2 + disk / 8, disk % 8);
        machine = machine.device(&format!(
            "pcie-root-port,id=port{disk},chassis={disk},addr={slot:#x}.{function},multifunction=on,io-reserve=0"
        ));
    }
    let file = dir.path().join("config.toml");
    fs::write(&file, config)?;
    let server = Server::start(&["--config", &file.to_string_lossy()])?;
    let script = "
        set +x
        for index in $(seq 0 49); do
            fact waiting $index
            disk=
            while [ -z \"$disk\" ]; do
                usleep 20000
                disk=$(grep -lx \"disk $index\" /sys/block/vd*/serial 2>/dev/null | cut -d / -f 4) || true
            done
            records $((index * 64)) $((index * 64 + 63)) >/tmp/$index
            dd if=/tmp/$index of=/dev/$disk bs=4k oflag=direct 2>/dev/null
            echo 1 >/proc/sys/vm/drop_caches
            for before in 0 $((index / 2)) $index; do
                disk=$(grep -lx \"disk $before\" /sys/block/vd*/serial | cut -d / -f 4)
                dd if=/dev/$disk bs=4k count=64 iflag=direct 2>/dev/null | cmp - /tmp/$before
            done
            fact served $index
        done";
    let mut guest = testbed()?.boot(&machine, script)?;
    guest.fact("waiting")?;
    let before = held(&server)?;
    for number in 0..TIMES {
        if number > 0 {
            guest.fact("waiting")?;
        }
        let mut device = vfio_user(&socket(number));
        device["bus"] = json!(format!("port{number}"));
        guest.qmp()?.execute("device_add", device)?;
    }
    guest.finish()?;
    assert_eq!(guest.facts("served").len(), TIMES);
    drop(guest);
    holds_no_more(&server, &before)
}

/// The files that a server has open and its threads, by their names.
fn held(server: &Server) -> Result<(usize, Vec<String>)> {
    let process = format!("/proc/{}", server.process().id());
    let files = fs::read_dir(format!("{process}/fd"))?.count();
    let mut threads = Vec::new();
    for thread in fs::read_dir(format!("{process}/task"))? {
        // A thread may end meanwhile. The kernel's own for io_uring are listed, too; it keeps them for a while.
        let name = fs::read_to_string(thread?.path().join("comm")).unwrap_or_default();
        threads.extend((!name.starts_with("iou-")).then_some(name));
    }
    threads.sort();
    Ok((files, threads))
}

/// Asserts that `server` comes to hold what it held before.
fn holds_no_more(server: &Server, before: &(usize, Vec<String>)) -> Result<()> {
    for _ in 0..300 {
        if held(server)? == *before {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    bail!("the server held {before:?}, and holds {:?}", held(server)?)
}

/// In and out, with I/O between; as often as QEMU survives it.
///
/// QEMU 11.1 aborts: `vfio_user_instance_finalize` takes the MSI-X pending bits out of a BAR that is gone already. No
/// server can avoid that, but for one without MSI-X. The server has to survive it, and to serve the next client.
#[test]
fn a_disk_is_plugged_in_and_pulled_out() -> Result<()> {
    let disk = Disk::new(16 * MIB, &["--num-queues", "2"])?;
    let machine = Machine::new().device("pcie-root-port,id=root-port,chassis=1");
    let script = format!(
        "
        set +x
        for time in $(seq 1 {TIMES}); do
            fact waiting $time
            while ! [ -b /dev/vda ]; do usleep 20000; done
            [ $time = 1 ] || dd if=/dev/vda bs=4k count=64 iflag=direct 2>/dev/null | cmp - /tmp/written
            records $time $((time + 63)) >/tmp/written
            dd if=/tmp/written of=/dev/vda bs=4k oflag=direct 2>/dev/null
            fact served $time
            while [ -e /sys/block/vda ]; do usleep 20000; done
        done"
    );
    let mut guest = testbed()?.boot(&machine, &script)?;
    guest.fact("waiting")?;
    let before = held(&disk.server)?;
    for time in 0..TIMES {
        if time > 0 {
            guest.fact("waiting")?;
        }
        guest.qmp()?.execute("device_add", plug("disk", &disk, "root-port"))?;
        guest.fact("served")?;
        guest.qmp()?.execute("device_del", json!({ "id": "disk" }))?;
        if guest.qmp()?.event("DEVICE_DELETED").is_err() {
            let evidence = abort(&mut guest)?;
            drop(guest);
            is_served(&disk, &before)?;
            cannot_run(&format!("device_del no. {} ended QEMU {}: {evidence}", time + 1, testbed()?.qemu_version()));
            return Ok(());
        }
    }
    guest.finish()?;
    assert_eq!(guest.facts("served").len(), TIMES);
    drop(guest);
    is_served(&disk, &before)
}

/// What QEMU said when it ended itself in the known way.
fn abort(guest: &mut Guest) -> Result<String> {
    let status = guest.process().wait(Duration::from_secs(60))?;
    let log = guest.process().log();
    let evidence = log.lines().find(|line| line.contains("memory_region_del_subregion") && line.contains("Assertion"));
    evidence
        .map(str::to_owned)
        .with_context(|| format!("QEMU ended with {status}, for no reason that is known:\n{log}"))
}

fn is_served(disk: &Disk, held_before: &(usize, Vec<String>)) -> Result<()> {
    holds_no_more(&disk.server, held_before)?;
    let mut guest = disk.boot(Machine::new(), "files_survive_remount vda /mnt; fact served")?;
    guest.fact("served")?;
    guest.finish()
}
