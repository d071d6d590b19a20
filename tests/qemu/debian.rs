//! A whole Debian on the disk: installed there, booted to a login, used, shut down.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use testbed::{Machine, output};

use crate::{Disk, image, testbed};

#[test]
#[ignore = "long: cargo xtask guests"]
fn debian_is_installed_on_the_disk_by_debootstrap_and_boots_to_a_login() -> Result<()> {
    let dir = tempfile::tempdir()?;
    testbed()?.write_debootstrap(&image(dir.path()))?;
    let disk = Disk::serve(dir, &["--num-queues", "2"])?;
    let machine = Machine::new().memory_mib(1024).vfio_user(&disk.socket()).kernel_argument("root=/dev/vda rw");

    // dpkg unpacks, syncs and renames, hundreds of times.
    let mut console = testbed()?.console(&machine.clone().kernel_argument("init=/second-stage"))?;
    while !console.line("I: ")?.contains("I: Base system installed successfully") {}
    console.line("second stage: installed")?;
    let status = console.process().wait(Duration::from_secs(60))?;
    assert!(status.success(), "{status}");
    drop(console);
    // Its file system is whole, but not without orphans: the C library that the installer itself ran by is replaced. The
    // next mount removes them.

    let mut console = testbed()?.console(&machine.kernel_argument("init=/sbin/init"))?;
    console.line("Debian GNU/Linux 13 guest ttyS0")?;
    console.type_line("root")?;
    console.line("ABSOLUTELY NO WARRANTY")?;
    // Some packages once more, over what runs: unpack, sync, rename. Then everything is compared with what the packages say.
    for command in [
        "cd /; dpkg --install /packages/[a-d]*.deb >/dev/null && echo installed: $?",
        "sync; echo 1 >/proc/sys/vm/drop_caches; cat /var/lib/dpkg/info/*.md5sums | md5sum -c --quiet; echo compared: $?",
    ] {
        console.type_line(command)?;
    }
    console.line("installed: 0")?;
    console.line("compared: 0")?;
    console.type_line("poweroff")?;
    let status = console.process().wait(Duration::from_secs(300))?;
    assert!(status.success(), "{status}");
    let check = testbed()?.e2fsck().arg("-fn").arg(disk.image()).output()?;
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));

    // The same from outside.
    let found = tempfile::tempdir()?;
    let image = disk.image();
    for request in ["rdump /usr .", "rdump /var/lib/dpkg/info ."] {
        output(testbed()?.debugfs().args(["-R", request]).arg(&image).current_dir(found.path()))?;
    }
    let compare = "cat info/*.md5sums | grep '  usr/' | md5sum -c --quiet";
    output(Command::new("sh").args(["-euc", compare]).current_dir(found.path())).map(drop)
}
