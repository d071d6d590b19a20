//! `cargo xtask demo`: a disk for a guest, from nothing to verified I/O.

use std::fmt::Display;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use testbed::{Guest, Machine, Progress, Server, Testbed};

const SCRIPT: &str = include_str!("demo.sh");

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Keep serving the disk afterwards, and print the command that boots a guest with a shell.
    #[arg(long)]
    keep: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let progress = Progress::stderr();
    let testbed = Testbed::open(&progress)?;
    let step = progress.step("building the server");
    Server::build()?;
    step.done("done");

    let dir = tempfile::tempdir().context("cannot make a temporary folder")?;
    let (socket, disk) = (dir.path().join("blk0.sock"), dir.path().join("disk.img"));
    let server = Server::start(&[
        "--socket-path",
        &socket.to_string_lossy(),
        "--blk-file",
        &disk.to_string_lossy(),
        "--size",
        "1G",
        "--num-queues",
        "2",
        "--serial",
        "demo",
    ])?;
    let machine = Machine::new().vfio_user(&socket);
    let step = progress.step("booting a guest");
    let mut guest = testbed.boot(&machine, SCRIPT)?;
    // The facts at which something new begins.
    for (fact, next) in [("boot", "looking at the disk"), ("capacity", "ext4 and files"), ("sums", "fio")] {
        guest.fact(fact)?;
        step.note(next);
    }
    guest.finish()?;
    step.done("done");

    println!("\nQEMU {}\n", testbed.qemu_version());
    report(&guest)?;
    if options.keep {
        println!("\nThe disk is served until Ctrl-C. A guest with a shell:\n");
        println!("{}", testbed.shell_command(&machine, dir.path())?);
        let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot wait for signals")?;
        signals.wait();
        return Ok(());
    }
    let status = server.stop()?;
    ensure!(status.success(), "the server ended with {status}");
    check_image(&testbed, &disk)?;
    row("afterwards", "the server has ended on SIGTERM, e2fsck finds the image clean");
    Ok(())
}

/// Prints what the guest has told, and fails if it lacks something.
fn report(guest: &Guest) -> Result<()> {
    let fact = |key: &str| guest.facts(key).pop().with_context(|| format!("the guest has told no {key:?}"));
    let capacity: u64 = fact("capacity")?.parse().context("capacity")?;
    row("guest", format!("Linux {}, booted in {} s", fact("kernel")?, fact("boot")?));
    row("disk", format!("{} MiB, serial {:?}, {} queues", capacity >> 20, fact("serial")?, fact("queues")?));
    row("ext4", fact("ext4")?);
    row("files", fact("sums")?);
    let (write, read) = (fact("fio-write-iops")?, fact("fio-read-iops")?);
    row("fio", format!("{}; {write} writes/s, {read} reads/s", fact("fio")?));
    let interrupts = guest.facts("interrupt");
    ensure!(!interrupts.is_empty(), "the guest has told no interrupts");
    for interrupt in interrupts {
        let (line, count) = interrupt.rsplit_once(' ').context("interrupt")?;
        row("interrupts", format!("{count:>6} on {line}"));
    }
    Ok(())
}

fn check_image(testbed: &Testbed, disk: &Path) -> Result<()> {
    let check = testbed.e2fsck().arg("-fn").arg(disk).output().context("cannot run e2fsck")?;
    let text = String::from_utf8_lossy(&check.stdout);
    ensure!(check.status.success(), "e2fsck: {}\n{text}", check.status);
    Ok(())
}

fn row(name: &str, value: impl Display) {
    println!("  {name:<12}{value}");
}
