//! Clients that go without a word, or that can't be served: the server is there for the next one. And a server that goes
//! without a word.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::Signal;
use testbed::Machine;

use crate::{Disk, MIB};

/// Writes numbered records, and tells which of them are flushed. Behind the records, the disk is kept busy, so that requests
/// are in flight when somebody is killed.
const WRITE_RECORDS: &str = "
    while true; do dd if=/dev/zero of=/dev/vda bs=64k seek=1024 count=512 oflag=direct conv=notrunc; done 2>/dev/null &
    set +x
    for number in $(seq 1 10000); do
        records $number $number | dd of=/dev/vda bs=4096 seek=$number conv=notrunc,fsync 2>/dev/null || break
        fact flushed $number
    done";

#[test]
fn what_was_flushed_is_there_after_the_server_was_killed() -> Result<()> {
    let disk = Disk::new(128 * MIB, &["--num-queues", "2"])?;
    let mut guest = disk.boot(Machine::new(), WRITE_RECORDS)?;
    for _ in 0..50 {
        guest.fact("flushed")?;
    }
    disk.server.process().signal(Signal::SIGKILL)?;
    // What it had told until then is in the pipe.
    guest.process().kill()?;
    let flushed: u32 = guest.facts("flushed").last().map_or(Ok(0), |number| number.parse())?;
    assert!((50..10000).contains(&flushed), "{flushed}");

    let image = File::open(disk.image())?;
    for number in 1..=flushed {
        let mut record = [0; 4096];
        image.read_exact_at(&mut record, u64::from(number) * 4096)?;
        assert_eq!(String::from_utf8_lossy(&record), format!("{number:04096}"), "record {number} of {flushed}");
    }
    Ok(())
}

#[test]
fn what_was_flushed_is_there_after_qemu_was_killed() -> Result<()> {
    let disk = Disk::new(128 * MIB, &["--num-queues", "2"])?;
    let mut guest = disk.boot(Machine::new(), WRITE_RECORDS)?;
    for _ in 0..50 {
        guest.fact("flushed")?;
    }
    guest.process().kill()?;
    let flushed: u32 = guest.facts("flushed").last().map_or(Ok(0), |number| number.parse())?;
    drop(guest);
    assert!((50..10000).contains(&flushed), "{flushed}");

    let script = format!(
        "
        set +x
        dd if=/dev/vda of=/tmp/found bs=4096 skip=1 count={flushed}
        records 1 {flushed} >/tmp/expected
        cmp /tmp/expected /tmp/found
        files_survive_remount vda /mnt
        fact intact {flushed}"
    );
    let mut guest = disk.boot(Machine::new(), &script)?;
    guest.fact("intact")?;
    guest.finish()
}

#[test]
fn a_client_whose_memory_is_private_is_told_what_to_do() -> Result<()> {
    is_told_what_to_do(Machine::new().private_memory())
}

#[test]
fn a_client_whose_memory_is_no_file_is_told_what_to_do() -> Result<()> {
    is_told_what_to_do(Machine::new().anonymous_memory())
}

/// The server's log says what is wrong with the memory of `machine`, and the next client is served.
fn is_told_what_to_do(machine: Machine) -> Result<()> {
    let disk = Disk::new(128 * MIB, &[])?;
    let mut guest = disk.boot(machine, "")?;
    disk.server.process().wait_for(&["ERROR", "share=on"], Duration::from_secs(120))?;
    guest.process().kill()?;
    drop(guest);

    let mut guest = disk.boot(Machine::new(), "files_survive_remount vda /mnt; fact served")?;
    guest.fact("served")?;
    guest.finish()
}
