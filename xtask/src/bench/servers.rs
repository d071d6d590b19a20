//! What is measured: our server, and the peers that Debian packages.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use client::BlockOptions;
use nix::sys::signal::Signal;
use serde_json::Value;
use testbed::{Process, Progress, Tool, output};

use super::load::{BLOCK, Completion, Driver, Load, queue_size};
use super::turns::{Contender, Turn};
use super::{DRIVER_CPU, SERVER_CPU, disk, vhost_user};

/// Bytes of a disk that has no file.
const DISK_SIZE: u64 = 512 << 20;
/// The plugin that exports memory.
const NBDKIT_MEMORY: &str = "usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-memory-plugin.so";
/// How long a server may take to listen.
const LIMIT: Duration = Duration::from_secs(20);
/// How long it may be between two looks for its socket.
const PAUSE: Duration = Duration::from_millis(5);

/// Where the blocks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Store {
    Null,
    Memory,
    File,
    /// An export of nbdkit's, of memory, over a UNIX socket.
    Nbd,
}

impl Store {
    /// Bytes of a disk, where a file has so many.
    pub(super) fn size(self, of_file: u64) -> u64 {
        if self == Self::File { of_file } else { DISK_SIZE }
    }
}

/// The folder of sockets and the file that all servers of a file serve.
pub(super) struct Place {
    pub(super) folder: PathBuf,
    pub(super) file: PathBuf,
}

impl Place {
    /// The socket of the NBD server.
    fn nbd(&self) -> PathBuf {
        self.folder.join("nbd.sock")
    }
}

/// A server whose disk is in use. Between turns it is stopped.
pub(super) struct Served {
    driver: Driver,
    detach: Box<dyn FnOnce() -> Result<()>>,
    server: Process,
    /// Where the server has its blocks from, if that is a process.
    _export: Option<Process>,
}

impl Contender for Served {
    fn turn(&mut self, turn: Turn) -> Result<f64> {
        self.server.signal(Signal::SIGCONT)?;
        let rate = self.driver.run(turn)?;
        self.server.signal(Signal::SIGSTOP)?;
        Ok(rate)
    }

    fn leave(self: Box<Self>) -> Result<()> {
        self.server.signal(Signal::SIGCONT)?;
        (self.detach)()
    }
}

/// A build of `vfio-user-blk`, which serves a disk to this thread. `name` is nobody else's.
pub(super) fn ours(program: &Path, name: &str, place: &Place, store: Store, poll: &str, load: Load) -> Result<Served> {
    let socket = place.folder.join(name);
    let export = export(place, store)?;
    let server = serve(program, place, store, poll, &socket)?;
    let mut disk = disk::Disk::attach(&socket, &options(load), data_size(load))?;
    let queue = disk.queues.pop().context("the server has no queue")?;
    let driver = Driver::new(queue, &disk.data, load)?;
    Ok(Served { driver, detach: Box::new(|| disk.detach()), server, _export: export })
}

/// `vfio-user-blk` with one device at `socket`.
fn serve(program: &Path, place: &Place, store: Store, poll: &str, socket: &Path) -> Result<Process> {
    let mut command = on(SERVER_CPU, Command::new(program));
    command.args(["serve", "--workers", "1", "--num-queues", "1", "--packed", "--in-order"]);
    command.args(["--poll", poll, "--socket-path"]).arg(socket);
    match store {
        Store::Null => command.args(["--store", "null", "--size", &DISK_SIZE.to_string()]),
        Store::Memory => command.args(["--store", "memory", "--size", &DISK_SIZE.to_string()]),
        // As fio has them.
        Store::File => command.arg("--blk-file").arg(&place.file).arg("--fixed-buffers"),
        Store::Nbd => command.args(["--nbd-uri", &format!("nbd+unix:///?socket={}", place.nbd().display())]),
    };
    let server = start("vfio-user-blk", &mut command, socket)?;
    if store == Store::Memory {
        fill(socket)?;
    }
    Ok(server)
}

/// `qemu-storage-daemon`, which exports a disk to this thread by vhost-user-blk, from an iothread that polls as long as it is set
/// to by default.
pub(super) fn qemu_storage_daemon(name: &str, place: &Place, store: Store, load: Load) -> Result<Served> {
    let socket = place.folder.join(name);
    let store_export = export(place, store)?;
    let mut command = on(SERVER_CPU, Tool::QemuStorageDaemon.command(&Progress::silent())?);
    let node = match store {
        Store::File => format!("file,filename={},aio=io_uring,cache.direct=on", place.file.display()),
        Store::Nbd => format!("nbd,server.type=unix,server.path={}", place.nbd().display()),
        _ => format!("null-co,read-zeroes=off,size={DISK_SIZE}"),
    };
    let export = format!("addr.type=unix,addr.path={},writable=on,num-queues=1,iothread=io", socket.display());
    command
        .args(["--object", "iothread,id=io"])
        .args(["--blockdev", &format!("driver={node},node-name=disk")])
        .args(["--export", &format!("vhost-user-blk,id=export,node-name=disk,{export}")]);
    let server = start("qemu-storage-daemon", &mut command, &socket)?;
    let vhost_user::Disk { front_end, queue, data } =
        vhost_user::Disk::attach(&socket, queue_size(load.depth), data_size(load))?;
    let driver = Driver::new(queue, &data, load)?;
    Ok(Served { driver, detach: Box::new(|| front_end.detach()), server, _export: store_export })
}

/// The export that a device of [`Store::Nbd`] has its blocks from, beside the driver: what serves the device has a processor of its
/// own. All of it was written once: else nbdkit's memory would be what is measured, which begins to be there as it is written.
fn export(place: &Place, store: Store) -> Result<Option<Process>> {
    if store != Store::Nbd {
        return Ok(None);
    }
    let mut command = on(DRIVER_CPU, Tool::Nbdkit.command(&Progress::silent())?);
    let plugin = Tool::Nbdkit.file(NBDKIT_MEMORY, &Progress::silent())?;
    command.args(["--foreground", "--newstyle", "--unix"]).arg(place.nbd()).arg(plugin);
    command.arg(format!("size={DISK_SIZE}"));
    let export = start("nbdkit", &mut command, &place.nbd())?;
    output(libnbd(place)?.args(["--name=fill", "--bs=1m", "--rw=write"]))?;
    Ok(Some(export))
}

/// fio as a client of the export, by libnbd.
fn libnbd(place: &Place) -> Result<Command> {
    let mut command = on(SERVER_CPU, Tool::Fio.command(&Progress::silent())?);
    command
        .args(["--ioengine=nbd", "--thread", "--output-format=json"])
        .arg(format!("--uri=nbd+unix:///?socket={}", place.nbd().display()))
        .arg(format!("--size={DISK_SIZE}"));
    Ok(command)
}

/// fio in place of a server and its driver: requests a second.
pub(super) fn fio_nbd(place: &Place, load: Load, turn: Turn) -> Result<f64> {
    let _export = export(place, Store::Nbd)?;
    let mut command = libnbd(place)?;
    command
        .args(["--name=bench", "--bs=4k", "--time_based", "--norandommap"])
        .arg("--random_generator=tausworthe64")
        .arg(format!("--rw={}", if load.write { "randwrite" } else { "randread" }))
        .arg(format!("--iodepth={}", load.depth))
        .arg(format!("--ramp_time={}ms", turn.warm_up.as_millis()))
        .arg(format!("--runtime={}ms", turn.length.as_millis()));
    rate(&command, load)
}

/// fio on the file itself, with all that io_uring has to be fast: requests a second.
pub(super) fn fio(place: &Place, load: Load, turn: Turn) -> Result<f64> {
    let mut command = on(SERVER_CPU, Tool::Fio.command(&Progress::silent())?);
    let pattern = if load.write { "randwrite" } else { "randread" };
    command
        .args(["--name=bench", "--ioengine=io_uring", "--direct=1", "--fixedbufs", "--registerfiles", "--bs=4k"])
        .args(["--time_based", "--norandommap", "--random_generator=tausworthe64", "--thread"])
        .args(["--allow_file_create=0", "--output-format=json"])
        .arg(format!("--filename={}", place.file.display()))
        .arg(format!("--rw={pattern}"))
        .arg(format!("--iodepth={}", load.depth))
        .arg(format!("--ramp_time={}ms", turn.warm_up.as_millis()))
        .arg(format!("--runtime={}ms", turn.length.as_millis()));
    rate(&command, load)
}

/// The rate in fio's report.
fn rate(fio: &Command, load: Load) -> Result<f64> {
    let said = output(fio)?;
    // Its client of NBD says that it is connected, before the report.
    let report = said.find('{').and_then(|start| said.get(start..)).unwrap_or_default();
    let report: Value = serde_json::from_str(report).context("fio's report")?;
    let way = if load.write { "write" } else { "read" };
    let rate = report.pointer(&format!("/jobs/0/{way}/iops")).and_then(Value::as_f64);
    rate.filter(|rate| *rate > 0.0).context("fio's report has no rate")
}

/// `command`, bound to a processor by util-linux's taskset.
pub(super) fn on(cpu: usize, command: Command) -> Command {
    let mut bound = Command::new("taskset");
    bound.args(["--cpu-list", &cpu.to_string()]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            bound.env(name, value);
        }
    }
    bound
}

/// Starts a server and waits for its socket.
pub(super) fn start(name: &str, command: &mut Command, socket: &Path) -> Result<Process> {
    // What a server before it has left, which was killed.
    let _not_there = std::fs::remove_file(socket);
    let process = Process::start(name, command.env("RUST_LOG", "warn"))?;
    let deadline = Instant::now() + LIMIT;
    while !socket.exists() {
        ensure!(Instant::now() < deadline, "{name} does not listen:\n{}", process.log());
        std::thread::sleep(PAUSE);
    }
    Ok(process)
}

/// Writes every block of a disk in memory, so that each page is there.
fn fill(socket: &Path) -> Result<()> {
    let mut disk = disk::Disk::attach(socket, &BlockOptions { queues: 1, ..BlockOptions::default() }, BLOCK)?;
    let queue = disk.queues.first_mut().context("the server has no queue")?;
    let piece = vec![0x5a; 1 << 20];
    for sector in (0..DISK_SIZE / 512).step_by(piece.len() / 512) {
        queue.write(sector, &piece)?;
    }
    disk.detach()
}

/// How our server's disk is driven: as the peer's, with the same features unless the load has more.
pub(super) fn options(load: Load) -> BlockOptions {
    BlockOptions {
        features: BlockOptions::FEATURES | load.rings,
        queues: 1,
        queue_size: queue_size(load.depth),
        interrupts: load.completion == Completion::Event,
        indirect_entries: 3,
        bounce_size: BLOCK,
        ..BlockOptions::default()
    }
}

pub(super) fn data_size(load: Load) -> usize {
    usize::from(queue_size(load.depth)) * BLOCK
}
