//! Linux guests under QEMU, with the server as an operator runs it.
//!
//! Each test has its own server, disk image and guest. What the functions in the guests' scripts do is said in
//! `src/guest/prelude.sh`.

mod debian;
mod devices;
mod disconnect;
mod faults;
mod firmware;
mod first_path;
mod hotplug;
mod interrupts;
mod iommu;
mod lifecycle;
mod linux;
mod machines;
mod read_only;
mod reset;
mod storage;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow};
use tempfile::TempDir;
use testbed::{Guest, Machine, Progress, Server, Testbed, output};

const MIB: u64 = 1 << 20;

/// QEMU and the guest, fetched by the first test that needs them.
fn testbed() -> Result<&'static Testbed> {
    static TESTBED: OnceLock<Result<Testbed, String>> = OnceLock::new();
    let testbed = TESTBED.get_or_init(|| Testbed::open(&Progress::stderr()).map_err(|error| format!("{error:#}")));
    testbed.as_ref().map_err(|error| anyhow!(error.clone()))
}

/// Tells `cargo xtask guests` on standard output why a guest cannot do what a test is about.
fn cannot_run(why: &str) {
    println!("cannot run: {why}");
}

/// A server with one disk.
struct Disk {
    dir: TempDir,
    server: Server,
}

impl Disk {
    /// Serves an image of zeros.
    fn new(size: u64, options: &[&str]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        create_image(&image(dir.path()), size)?;
        Self::serve(dir, options)
    }

    /// Serves the file `disk.img` in `dir`.
    fn serve(dir: TempDir, options: &[&str]) -> Result<Self> {
        let (socket, image) = (socket(dir.path()), image(dir.path()));
        let (socket, image) = (socket.to_string_lossy(), image.to_string_lossy());
        let arguments = [&["--socket-path", &*socket, "--blk-file", &*image], options].concat();
        Ok(Self { server: Server::start(&arguments)?, dir })
    }

    fn socket(&self) -> PathBuf {
        socket(self.dir.path())
    }

    fn image(&self) -> PathBuf {
        image(self.dir.path())
    }

    /// Boots `machine` with the disk, and runs `script`.
    fn boot(&self, machine: Machine, script: &str) -> Result<Guest> {
        testbed()?.boot(&machine.vfio_user(&self.socket()), script)
    }

    /// Asserts that the ext4 file system from byte `offset` of the image on is clean, and that what the guest's
    /// `summed_files` wrote is in it.
    fn assert_summed_files(&self, offset: u64) -> Result<()> {
        let file_system = format!("{}?offset={offset}", self.image().display());
        let check = testbed()?.e2fsck().arg("-fn").arg(&file_system).output()?;
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));

        let found = tempfile::tempdir()?;
        for request in ["rdump /written .", "dump /sums sums"] {
            output(testbed()?.debugfs().args(["-R", request, &file_system]).current_dir(found.path()))?;
        }
        let sums = output(Command::new("sha256sum").args(["-c", "sums"]).current_dir(found.path()))?;
        assert_eq!(sums.lines().filter(|line| line.ends_with(": OK")).count(), 8, "{sums}");
        Ok(())
    }
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("blk0.sock")
}

fn image(dir: &Path) -> PathBuf {
    dir.join("disk.img")
}

fn create_image(path: &Path, size: u64) -> Result<()> {
    File::create(path)?.set_len(size).with_context(|| format!("cannot make {}", path.display()))
}

/// A line of the guest's /proc/interrupts.
#[derive(Debug)]
struct Interrupt {
    name: String,
    chip: String,
    count: u64,
}

/// What the guest's `interrupt_facts` told.
fn interrupts(guest: &Guest) -> Result<Vec<Interrupt>> {
    let parse = |fact: &String| {
        let [name, chip, count] = fact.split(' ').collect::<Vec<_>>().try_into().ok()?;
        Some(Interrupt { name: name.to_owned(), chip: chip.to_owned(), count: count.parse().ok()? })
    };
    let facts = guest.facts("interrupt");
    facts.iter().map(|fact| parse(fact).with_context(|| format!("not an interrupt: {fact}"))).collect()
}

/// Asserts that `queues` request queues interrupt on their own MSI-X vectors, and each of them did.
fn assert_every_queue_interrupts(guest: &Guest, queues: usize) -> Result<()> {
    let interrupts = interrupts(guest)?;
    for queue in 0..queues {
        let name = format!("virtio0-req.{queue}");
        let interrupt = interrupts.iter().find(|interrupt| interrupt.name == name);
        let interrupt = interrupt.with_context(|| format!("no {name} in {interrupts:?}"))?;
        assert!(interrupt.chip.contains("PCI-MSI"), "{interrupt:?}");
        assert!(interrupt.count > 0, "{interrupt:?}");
    }
    assert_eq!(interrupts.len(), queues + 1, "the queues' and the configuration's: {interrupts:?}");
    Ok(())
}
