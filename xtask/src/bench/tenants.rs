//! What devices of one server cost while they are idle, and what a busy one does to another.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use client::BlockOptions;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{SysconfVar, sysconf};
use testbed::{Process, binary};

use super::load::{Completion, Driver, Load, MAX_DEPTH};
use super::servers::{Place, data_size, on, options, start};
use super::turns::{Contender, Turn};
use super::{SERVER_CPU, disk};

/// Devices of a server that has many.
const DEVICES: usize = 1000;
/// Bytes of a disk.
const DISK_SIZE: u64 = 64 << 20;
/// Requests of the neighbour between two looks at the one whose time is taken: what the driver does for the
/// one hardly counts for the other.
const SLICE: u16 = 4;
/// How long a server may take from the last attachment until it is quiet.
const SETTLE: Duration = Duration::from_secs(1);

/// What an idle server takes.
pub(super) struct Idle {
    /// Bytes of a server with one device that is attached.
    pub(super) one_device: f64,
    /// Bytes of each further one.
    pub(super) further_device: f64,
    /// The part of a core that all of them take.
    pub(super) cpu: f64,
}

/// Raises the limit of open files as far as it goes: a thousand devices and drivers have thousands.
fn raise_file_limit() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("cannot raise the limit of open files")
}

/// Attaches drivers to one device and to a thousand, and looks at the server for `duration`.
pub(super) fn idle(place: &Place, duration: Duration) -> Result<Idle> {
    raise_file_limit()?;
    let (one, _) = idle_server(place, 1, Duration::ZERO)?;
    let (many, cpu) = idle_server(place, DEVICES, duration)?;
    Ok(Idle { one_device: one, further_device: (many - one) / (DEVICES - 1) as f64, cpu })
}

/// A server with a device at each of `sockets`, all on one worker.
fn serve(place: &Place, sockets: &[PathBuf]) -> Result<Process> {
    let mut config = "workers = 1\n".to_owned();
    for socket in sockets {
        config +=
            &format!("[[device]]\nsocket_path = {socket:?}\nstore = \"null\"\nsize = {DISK_SIZE}\nnum_queues = 1\n");
    }
    let path = place.folder.join("devices.toml");
    fs::write(&path, config).context("cannot write a configuration")?;
    let last = sockets.last().context("no device")?;
    let mut command = on(SERVER_CPU, std::process::Command::new(binary()?));
    start("vfio-user-blk", command.args(["serve", "--config"]).arg(&path), last)
}

/// Bytes resident, and the part of a core, of a server with `devices` devices.
fn idle_server(place: &Place, devices: usize, duration: Duration) -> Result<(f64, f64)> {
    let sockets: Vec<_> = (0..devices).map(|device| place.folder.join(format!("{device}.sock"))).collect();
    let server = serve(place, &sockets)?;
    let options = BlockOptions { queues: 1, bounce_size: 4096, ..BlockOptions::default() };
    let mut disks = Vec::new();
    for socket in &sockets {
        let mut disk = disk::Disk::attach(socket, &options, 4096)?;
        // Each has had something to do.
        disk.queues.first_mut().context("a device without a queue")?.read(0, &mut [0; 512])?;
        disks.push(disk);
    }
    std::thread::sleep(SETTLE);
    let (before, started) = (cpu_seconds(server.id())?, Instant::now());
    std::thread::sleep(duration);
    let cpu = (cpu_seconds(server.id())? - before) / started.elapsed().as_secs_f64().max(f64::MIN_POSITIVE);
    Ok((resident(server.id())?, cpu))
}

/// Bytes of a process that are resident, without the memory that guests share with it.
fn resident(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("the server is gone")?;
    let kib = |name: &str| -> f64 {
        let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_suffix("kB")?.trim().parse().ok());
        value.unwrap_or(0.0)
    };
    Ok((kib("RssAnon:") + kib("RssFile:")) * 1024.0)
}

/// The processor time of a process, in seconds.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("the server is gone")?;
    // utime and stime are fields 14 and 15; the name, field 2, may contain blanks and ends with the last bracket.
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields.split_whitespace()).context("/proc/PID/stat")?;
    let ticks: f64 = fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    Ok(ticks / sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")? as f64)
}

/// Two devices on one worker, and one thread that drives both.
pub(super) struct Beside {
    victim: Driver,
    neighbour: Driver,
    /// How many requests the neighbour has in flight.
    neighbours: u16,
    /// Of the victim's requests, in nanoseconds.
    latencies: Vec<u64>,
    disks: [disk::Disk; 2],
    server: Process,
}

impl Beside {
    /// Attaches to both devices of a server at `name`, which is nobody else's.
    pub(super) fn start(name: &str, place: &Place, neighbours: u16) -> Result<Self> {
        let sockets = ["a", "b"].map(|device| place.folder.join(format!("{name}-{device}.sock")));
        let server = serve(place, &sockets)?;
        let attach = |socket: &Path, depth| -> Result<_> {
            let load = Load { write: false, depth, completion: Completion::Poll, rings: 0, size: DISK_SIZE };
            let mut disk = disk::Disk::attach(socket, &options(load), data_size(load))?;
            let queue = disk.queues.pop().context("a device without a queue")?;
            Ok((Driver::new(queue, &disk.data, load)?, disk))
        };
        let (victim, one) = attach(&sockets[0], 1)?;
        let (neighbour, other) = attach(&sockets[1], neighbours.clamp(1, MAX_DEPTH))?;
        Ok(Self { victim, neighbour, neighbours, latencies: Vec::new(), disks: [one, other], server })
    }

    fn run_for(&mut self, duration: Duration) -> Result<()> {
        self.latencies.clear();
        let end = Instant::now() + duration;
        let mut started = Instant::now();
        while started < end {
            self.victim.fill()?;
            while self.victim.complete()? == 0 {
                if self.neighbours > 0 {
                    self.neighbour.submit(SLICE)?;
                    self.neighbour.take(SLICE)?;
                }
            }
            self.latencies.push(started.elapsed().as_nanos() as u64);
            started = Instant::now();
        }
        Ok(())
    }
}

impl Contender for Beside {
    /// The time that 99 of 100 requests at depth 1 take at most, in nanoseconds, while the device beside it, on the same
    /// worker, has its requests in flight.
    fn turn(&mut self, turn: Turn) -> Result<f64> {
        self.server.signal(Signal::SIGCONT)?;
        self.run_for(turn.warm_up)?;
        self.run_for(turn.length)?;
        self.neighbour.drain()?;
        self.server.signal(Signal::SIGSTOP)?;
        self.latencies.sort_unstable();
        let p99 = self.latencies.get(self.latencies.len() * 99 / 100);
        p99.map(|p99| *p99 as f64).context("no request has completed")
    }

    fn leave(self: Box<Self>) -> Result<()> {
        self.server.signal(Signal::SIGCONT)?;
        self.disks.into_iter().try_for_each(disk::Disk::detach)
    }
}
