//! A guest's disk whose storage fails, loses its power, or grows, while an operator watches.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testbed::{Machine, Server, binary, output};

use crate::{Disk, MIB, create_image, image, socket, testbed};

/// A disk of zeroes whose server is told what to do.
pub(crate) struct Controlled {
    pub(crate) disk: Disk,
    control: PathBuf,
}

impl Controlled {
    /// With these lines in the device's table of the configuration.
    pub(crate) fn new(size: u64, device: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        create_image(&image(dir.path()), size)?;
        let (control, config) = (dir.path().join("control.sock"), dir.path().join("config.toml"));
        let (socket, image) = (socket(dir.path()), image(dir.path()));
        let text = format!(
            "control_socket = {control:?}\n\n[[device]]\nname = \"disk\"\nsocket_path = {socket:?}\nblk_file = {image:?}\n\
             num_queues = 2\n{device}\n"
        );
        fs::write(&config, text)?;
        let server = Server::start(&["--config", &config.to_string_lossy()])?;
        Ok(Self { disk: Disk { dir, server }, control })
    }

    /// What `ctl` says.
    pub(crate) fn ctl(&self, words: &[&str]) -> Result<String> {
        output(Command::new(binary()?).arg("ctl").arg("--socket").arg(&self.control).args(words))
    }
}

#[test]
fn ext4_survives_a_storage_that_fails_and_is_told_to_go_on() -> Result<()> {
    let faults = "on_error = \"hold\"\n[[device.fault]]\nfault = \"eio\"\non = [\"write\"]\nevery = 40\n\
                  [[device.fault]]\nfault = \"enospc\"\non = [\"write\", \"flush\"]\nevery = 31";
    let controlled = Controlled::new(128 * MIB, faults)?;
    let script = "
        mkfs.ext4 -q -F /dev/vda
        mount -t ext4 /dev/vda /mnt
        for round in 1 2 3 4; do
            summed_files /mnt
            (cd /mnt && sha256sum -c sums)
        done
        umount /mnt
        fact errors $(dmesg | grep -ci 'I/O error')";
    let mut guest = controlled.disk.boot(Machine::new(), script)?;
    let mut held = 0;
    // An operator who does not let the guest wait for long.
    for _ in 0..6000 {
        if !guest.facts("exit").is_empty() {
            break;
        }
        thread::sleep(Duration::from_millis(50));
        held += u32::from(controlled.ctl(&["list"])?.contains("holds "));
        controlled.ctl(&["resume", "disk"])?;
    }
    guest.finish()?;
    assert_eq!(guest.facts("errors"), ["0"], "the guest was told of them");
    assert!(held > 0, "nothing failed");
    controlled.disk.assert_summed_files(0)
}

#[test]
fn ext4_keeps_what_was_synced_when_the_power_is_cut_and_any_other_writes_are_lost() -> Result<()> {
    loses_nothing_that_was_synced("reorder", 1)
}

#[test]
#[ignore = "long: cargo xtask guests"]
fn ext4_keeps_what_was_synced_when_the_power_is_cut_in_any_way() -> Result<()> {
    for seed in 2..4 {
        for mode in ["drop", "tear", "reorder"] {
            loses_nothing_that_was_synced(mode, seed)?;
        }
    }
    Ok(())
}

/// The power goes while a guest writes files and has each of them synced, and others that it does not.
fn loses_nothing_that_was_synced(mode: &str, seed: u32) -> Result<()> {
    let controlled = Controlled::new(96 * MIB, "power_cut = true")?;
    let script = "
        mkfs.ext4 -q -F -J size=4 /dev/vda
        mount -t ext4 -o commit=1 /dev/vda /mnt
        mkdir /mnt/noise
        set +x
        (number=0; while true; do
            number=$((number + 1))
            records $number $((number + 7)) >/mnt/noise/$((number % 50)) || break
            [ $((number % 10)) != 0 ] || rm -f /mnt/noise/$((number % 7))
        done) &
        for number in $(seq 1 300); do
            records $number $((number + 7)) | dd of=/mnt/$number bs=32k conv=fsync 2>/dev/null || break
            fact synced $number
        done
        sleep 1000";
    let mut guest = controlled.disk.boot(Machine::new(), script)?;
    for _ in 0..25 {
        guest.fact("synced")?;
    }
    let told = controlled.ctl(&["power-cut", "disk", "--mode", mode, "--seed", &seed.to_string()])?;
    ensure!(told.contains("its power was cut"), "{told}");
    // What it had told until then is in the pipe.
    guest.process().kill()?;
    let synced: u32 = guest.facts("synced").last().context("nothing was synced")?.parse()?;
    drop(guest);

    // As it is found when the machine starts anew: by the journal alone.
    let file_system = controlled.disk.image();
    let check = testbed()?.e2fsck().arg("-fp").arg(&file_system).output()?;
    let said = String::from_utf8_lossy(&check.stdout);
    assert!(check.status.code().is_some_and(|code| code <= 1), "{mode} {seed}: {said}");
    assert!(said.contains("recovering journal"), "{mode} {seed}: {said}");
    let check = testbed()?.e2fsck().arg("-fn").arg(&file_system).output()?;
    assert!(check.status.success(), "{mode} {seed}: {}", String::from_utf8_lossy(&check.stdout));
    let found = tempfile::tempdir()?;
    for number in 1..=synced {
        let request = format!("dump /{number} {number}");
        output(testbed()?.debugfs().arg("-R").arg(request).arg(&file_system).current_dir(found.path()))?;
        let records: String = (number..=number + 7).map(|record| format!("{record:04096}")).collect();
        assert!(fs::read_to_string(found.path().join(number.to_string()))? == records, "{mode} {seed}: file {number}");
    }
    Ok(())
}

#[test]
fn a_guest_sees_at_once_that_its_disk_has_grown() -> Result<()> {
    let controlled = Controlled::new(64 * MIB, "")?;
    let script = "
        mkfs.ext4 -q -F /dev/vda
        mount -t ext4 /dev/vda /mnt
        disk_facts vda
        while [ $(cat /sys/block/vda/size) = $((64 * 2048)) ]; do usleep 10000; done
        disk_facts vda
        records 1 1 | dd of=/dev/vda bs=4096 seek=$((96 * 256 - 1)) conv=notrunc,fsync
        umount /mnt
        fact grown";
    let mut guest = controlled.disk.boot(Machine::new(), script)?;
    guest.fact("capacity")?;
    controlled.ctl(&["resize", "disk", "96M"])?;
    guest.finish()?;
    assert_eq!(guest.facts("capacity"), [(64 * MIB).to_string(), (96 * MIB).to_string()]);
    let bytes = fs::read(controlled.disk.image())?;
    assert_eq!(bytes.len() as u64, 96 * MIB);
    assert!(bytes.ends_with(format!("{:04096}", 1).as_bytes()));
    Ok(())
}
