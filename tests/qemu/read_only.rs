//! A disk that may not be written.

use std::fs;

use anyhow::Result;
use testbed::Machine;

use crate::{Disk, image};

#[test]
fn a_read_only_disk_reads_right_and_refuses_writes() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let contents: String = (1..=1024).map(|number| format!("{number:04096}")).collect();
    fs::write(image(dir.path()), &contents)?;
    let disk = Disk::serve(dir, &["--read-only"])?;
    let script = "
        disk_facts vda
        if dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=notrunc,fsync; then
            fact write accepted
        else
            fact write refused
        fi
        set +x
        records 1 1024 >/tmp/expected
        cmp /tmp/expected /dev/vda
        fact read right";
    let mut guest = disk.boot(Machine::new(), script)?;
    guest.finish()?;
    assert_eq!(guest.facts("read-only"), ["1"]);
    assert_eq!(guest.facts("write"), ["refused"]);
    assert_eq!(guest.facts("read"), ["right"]);
    assert!(fs::read_to_string(disk.image())? == contents, "the image has changed");
    Ok(())
}
