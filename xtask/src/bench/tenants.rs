//! What devices of one server cost while they are idle, and what a busy one does to another.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use client::BlockOptions;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{SysconfVar, sysconf};
use testbed::binary;

use super::load::{Completion, Driver, Load, MAX_DEPTH, on_cpu};
use super::servers::{Place, data_size, on, options, start};
use super::{DRIVER_CPU, SERVER_CPU, disk};

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

/// Bytes resident, and the part of a core, of a server with `devices` devices.
fn idle_server(place: &Place, devices: usize, duration: Duration) -> Result<(f64, f64)> {
    let sockets: Vec<_> = (0..devices).map(|device| place.folder.join(format!("{device}.sock"))).collect();
    let mut config = "workers = 1\n".to_owned();
    for socket in &sockets {
        config +=
            &format!("[[device]]\nsocket_path = {socket:?}\nstore = \"null\"\nsize = {DISK_SIZE}\nnum_queues = 1\n");
    }
    let path = place.folder.join("devices.toml");
    fs::write(&path, config).context("cannot write a configuration")?;
    let last = sockets.last().context("no device")?;
    let mut command = on(SERVER_CPU, std::process::Command::new(binary()?));
    let server = start("vfio-user-blk", command.args(["serve", "--config"]).arg(&path), last)?;
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

/// The time that 99 of 100 requests at depth 1 take at most, in nanoseconds, while the device beside it, on the same
/// worker, has `neighbours` requests in flight. One thread drives both.
pub(super) fn beside(place: &Place, neighbours: u16, duration: Duration) -> Result<f64> {
    let sockets = ["a.sock", "b.sock"].map(|name| place.folder.join(name));
    let mut config = "workers = 1\n".to_owned();
    for socket in &sockets {
        config +=
            &format!("[[device]]\nsocket_path = {socket:?}\nstore = \"null\"\nsize = {DISK_SIZE}\nnum_queues = 1\n");
    }
    let path = place.folder.join("devices.toml");
    fs::write(&path, config).context("cannot write a configuration")?;
    let mut command = on(SERVER_CPU, std::process::Command::new(binary()?));
    let _server = start("vfio-user-blk", command.args(["serve", "--config"]).arg(&path), &sockets[1])?;
    let load = |depth| Load { write: false, depth, completion: Completion::Poll, size: DISK_SIZE };
    let (alone, flood) = (load(1), load(neighbours.clamp(1, MAX_DEPTH)));
    on_cpu(DRIVER_CPU, || {
        let mut one = disk::Disk::attach(&sockets[0], &options(alone), data_size(alone))?;
        let mut other = disk::Disk::attach(&sockets[1], &options(flood), data_size(flood))?;
        let queues = one.queues.first_mut().zip(other.queues.first_mut()).context("a device without a queue")?;
        let mut victim = Driver::new(queues.0, &one.data, alone)?;
        let mut neighbour = Driver::new(queues.1, &other.data, flood)?;
        let mut latencies = Vec::new();
        let end = Instant::now() + duration;
        while Instant::now() < end {
            let started = Instant::now();
            victim.fill()?;
            while victim.complete()? == 0 {
                if neighbours > 0 {
                    neighbour.submit(SLICE)?;
                    neighbour.take(SLICE)?;
                }
            }
            latencies.push(started.elapsed().as_nanos() as u64);
        }
        while neighbour.in_flight() > 0 {
            neighbour.complete()?;
        }
        // The first ones find a server that has slept.
        let warm = latencies.len() / 10;
        let latencies = latencies.get_mut(warm..).unwrap_or_default();
        latencies.sort_unstable();
        latencies.get(latencies.len() * 99 / 100).map(|p99| *p99 as f64).context("no request has completed")
    })
}
