//! What a Linux guest makes of each fault: the table of docs/faults.md.

use anyhow::{Result, ensure};
use serde_json::json;
use testbed::{Guest, Machine};

use crate::MIB;
use crate::storage::Controlled;

/// One at a time: `hung BLOCK` has a block read in the background, and tells how it is a second later: D for one that waits
/// for its disk. `ended` waits for it, and tells its exit status. `phase MIB` waits until the host says so, by the disk's size.
const SCRIPT: &str = r#"
    phase() { while [ $(cat /sys/block/vda/size) != $(($1 * 2048)) ]; do usleep 10000; done; }
    reads() { dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct skip=$1; }
    hung() { dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct skip=$1 & pid=$!; sleep 1; fact state $(sed 's/.*) //' /proc/$pid/stat | cut -d ' ' -f 1); }
    ended() { status=0; wait $pid || status=$?; fact ended $status; }
    now() { sed 's/\..*//' /proc/uptime; }

    status=0; reads 0 2>/tmp/eio || status=$?
    fact eio $status $(grep -c 'Input/output error' /tmp/eio)
    status=0; dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct seek=1 conv=notrunc 2>/tmp/enospc || status=$?
    fact enospc $status $(grep -c 'Input/output error' /tmp/enospc)
    fact errors $(dmesg | grep -c 'I/O error, dev vda')

    hung 2
    ended

    fact ready; phase 65
    hung 100
    first=$pid
    hung 200
    ended; pid=$first; ended

    fact ready; phase 66
    before=$(now); reads 300; fact late $(($(now) - before))

    fact ready; phase 67
    for sector in $(seq 400 420); do reads $sector; done
    fact spurious $(dmesg | grep -c 'nobody cared')

    fact ready; phase 68
    hung 500
    first=$pid
    hung 600
    ended; pid=$first; ended

    fact ready; phase 69
    fact sane; usleep 500000
    hung 700
    fact told $(dmesg | grep -ci 'reset')
    ended
"#;

#[test]
#[ignore = "long: cargo xtask guests"]
fn a_guest_and_each_fault() -> Result<()> {
    let rules = "poll = \"never\"\n\
         [[device.fault]]\nfault = \"eio\"\non = [\"read\"]\nsectors = \"0-7\"\n\
         [[device.fault]]\nfault = \"enospc\"\non = [\"write\"]\nsectors = \"8-15\"\n\
         [[device.fault]]\nfault = \"stuck\"\non = [\"read\"]\nsectors = \"16-23\"\n";
    // One processor, and so one queue: the second request is of the same as the first.
    let disk = Controlled::new(64 * MIB, rules)?;
    let mut guest = disk.disk.boot(Machine::new().cpus(1), SCRIPT)?;
    let mut size = 64;
    // Rules of interrupts and kicks, which concern all: none is there while the guest is told to go on, but for this one.
    let mut begin = |guest: &mut Guest, rule: &[&str]| -> Result<()> {
        guest.fact("ready")?;
        disk.ctl(&["fault", "remove", "disk", "--all"])?;
        if !rule.is_empty() {
            disk.ctl(&[&["fault", "add", "disk"], rule].concat())?;
        }
        size += 1;
        disk.ctl(&["resize", "disk", &format!("{size}M")]).map(drop)
    };
    // An I/O error for both, as virtio has no other.
    assert_eq!(guest.fact("eio")?, "1 1");
    assert_eq!(guest.fact("enospc")?, "1 1");
    ensure!(guest.fact("errors")?.parse::<u32>()? >= 2);

    assert_eq!(guest.fact("state")?, "D", "stuck");
    disk.ctl(&["fault", "release", "disk"])?;
    assert_eq!(guest.fact("ended")?, "0", "stuck");

    begin(&mut guest, &["lost-interrupt", "--every", "1000"])?;
    // Only the first is lost; but with EVENT_IDX a driver that has not heard of a request wants no interrupt for the next.
    assert_eq!([guest.fact("state")?, guest.fact("state")?], ["D", "D"], "lost-interrupt");
    disk.ctl(&["fault", "remove", "disk", "--all"])?;
    assert_eq!([guest.fact("ended")?, guest.fact("ended")?], ["0", "0"], "lost-interrupt");

    begin(&mut guest, &["late-interrupt", "--latency", "3s"])?;
    ensure!((2..60).contains(&guest.fact("late")?.parse::<u32>()?));

    begin(&mut guest, &["spurious-interrupt", "--latency", "1ms"])?;
    assert_eq!(guest.fact("spurious")?, "0");

    begin(&mut guest, &["lost-kick", "--every", "1000"])?;
    // The same: nobody has taken the first, so that the driver need not kick for the second.
    assert_eq!([guest.fact("state")?, guest.fact("state")?], ["D", "D"], "lost-kick");
    disk.ctl(&["fault", "remove", "disk", "--all"])?;
    assert_eq!([guest.fact("ended")?, guest.fact("ended")?], ["0", "0"], "lost-kick");

    begin(&mut guest, &[])?;
    guest.fact("sane")?;
    disk.ctl(&["fault", "trigger", "disk", "needs-reset"])?;
    assert_eq!(guest.fact("state")?, "D", "needs-reset");
    println!("needs-reset, in the guest's log: {} lines", guest.fact("told")?);

    // The guest has lost its disk; its machine goes on.
    disk.ctl(&["fault", "trigger", "disk", "close-session"])?;
    let status = guest.qmp()?.execute("query-status", json!({}))?;
    println!("after close-session: {status}");
    assert_eq!(status["status"], "running");
    println!("ended: {:?}", guest.facts("ended"));
    guest.process().kill()?;
    Ok(())
}
