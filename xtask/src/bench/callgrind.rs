//! Instructions that a served request takes, counted by valgrind's callgrind.
//!
//! The server is the binary as it ships, with one worker that always polls. Only the rounds of the one queue's task are
//! counted, from taking requests to publishing them; rounds that find nothing cost the same each and are subtracted. The driver, outside
//! of valgrind, publishes all requests of a batch at once and the next batch after the last is back, so that each batch is one
//! round, and the count the same each time.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use client::{BlockOptions, BlockQueue, BlockRequest, RequestType};
use nix::sys::signal::Signal;
use testbed::{Process, Progress, Tool, binary};

use super::disk::{Disk, scattered};

/// What is counted: all that a worker does for a queue in one round. How it begins and ends; in between is the format of the
/// queue.
const ROUND: [&str; 2] = ["<vfio_user_blk::block::BlockQueue", " as vfio_user_blk::worker::QueueTask>::run"];
/// The same for callgrind, in which a pattern may not have the blanks of the name.
const ROUND_PATTERN: &str = "*block::BlockQueue*QueueTask*::run";
/// The C library's names for copying memory.
const COPIES: [&str; 2] = ["memcpy", "memmove"];
/// How long valgrind may take to start, a batch to be served, and valgrind to end.
const LIMIT: Duration = Duration::from_secs(120);
/// How long the server looks at an empty queue to tell what that costs.
const IDLE: Duration = Duration::from_millis(500);
/// Bytes of a request.
const BLOCK: usize = 4096;

/// A load to count the instructions of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub(super) store: &'static str,
    pub(super) kind: RequestType,
    /// Requests in a batch.
    pub(super) depth: u16,
    /// Pages of data that are mapped each for itself, none beside the next, as behind an IOMMU; 0 if all data is mapped as one.
    pub(super) mappings: u32,
    /// [`BlockOptions::PACKED`] and [`BlockOptions::IN_ORDER`], or neither.
    pub(super) rings: u64,
}

/// Instructions a request.
#[derive(Debug)]
pub(super) struct Counted {
    /// Those of all functions together.
    pub(super) all: f64,
    /// Those of the C library's functions that copy memory.
    pub(super) copying: f64,
    /// Those of each function itself, without what it calls.
    pub(super) functions: Vec<(String, f64)>,
}

/// Counts the instructions that `requests` requests take, or a few more: whole batches.
pub(super) fn count(load: Load, requests: u32, progress: &Progress) -> Result<Counted> {
    let batches = requests.div_ceil(load.depth.into());
    let idle = profile(load, 0, progress)?;
    let busy = profile(load, batches, progress)?;
    let idle_rounds = idle.rounds()?;
    let empty_rounds = busy
        .rounds()?
        .checked_sub(batches.into())
        .context("a batch was not served in a round of its own; is the machine overloaded?")?;
    let requests = f64::from(batches) * f64::from(load.depth);
    let of_request = |function: &str, cost: u64| {
        let of_empty_round = idle.cost.get(function).map_or(0.0, |cost| *cost as f64 / idle_rounds as f64);
        (cost as f64 - of_empty_round * empty_rounds as f64) / requests
    };
    let mut functions: Vec<_> =
        busy.cost.iter().map(|(function, cost)| (function.clone(), of_request(function, *cost))).collect();
    functions.sort_by(|(_, one), (_, other)| other.total_cmp(one));
    let is_copy = |function: &str| COPIES.iter().any(|name| function.contains(name));
    Ok(Counted {
        all: functions.iter().map(|(_, cost)| cost).sum(),
        copying: functions.iter().filter(|(function, _)| is_copy(function)).map(|(_, cost)| cost).sum(),
        functions,
    })
}

/// Serves `batches` batches under callgrind.
fn profile(load: Load, batches: u32, progress: &Progress) -> Result<Profile> {
    let dir = tempfile::tempdir().context("cannot make a temporary folder")?;
    let (socket, out) = (dir.path().join("blk.sock"), dir.path().join("callgrind.out"));
    let valgrind = Tool::Valgrind.command(progress)?;
    std::thread::scope(|scope| {
        // In a thread of its own, which takes the refusal with it, and its children, when it ends.
        let measured = scope.spawn(|| {
            refuse_io_uring()?;
            serve(valgrind, load, batches, &socket, &out)
        });
        measured.join().unwrap_or_else(|_| bail!("the driver's thread panicked"))
    })?;
    let text = fs::read_to_string(&out).context("callgrind has left no profile")?;
    Ok(Profile::parse(&text))
}

/// Has the kernel refuse io_uring to this thread and its children, as many a container does. A thread that waits in an
/// io_uring stops all threads under valgrind, which lets one run at a time; without one the server waits by other means.
fn refuse_io_uring() -> Result<()> {
    use seccompiler::{SeccompAction, SeccompFilter, TargetArch};
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let errno = u32::try_from(nix::libc::ENOSYS)?;
    let rules = [(nix::libc::SYS_io_uring_setup, Vec::new())].into();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno), architecture)?;
    let program: seccompiler::BpfProgram = filter.try_into()?;
    seccompiler::apply_filter(&program).context("cannot refuse io_uring to the server")
}

fn serve(valgrind: Command, load: Load, batches: u32, socket: &Path, out: &Path) -> Result<()> {
    let mut command = valgrind;
    command
        .args(["--tool=callgrind", "--fair-sched=yes", "--compress-strings=no", "--compress-pos=no"])
        .arg(format!("--toggle-collect={ROUND_PATTERN}"))
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(binary()?)
        // Valgrind makes its own system calls in the server's threads.
        .args(["serve", "--sandbox", "off", "--workers", "1", "--num-queues", "1", "--poll", "always", "--size", "64M"])
        .args(["--packed", "--in-order"])
        .args(["--store", load.store, "--socket-path"])
        .arg(socket)
        .env("RUST_LOG", "warn");
    let mut server = Process::start("valgrind", &command)?;
    server.wait_for(&["listening on"], LIMIT)?;
    let features = BlockOptions::FEATURES | load.rings;
    let options = BlockOptions { features, queues: 1, queue_size: 128, interrupts: false, ..BlockOptions::default() };
    let mut disk = Disk::attach(socket, &options, usize::from(load.depth) * BLOCK)?;
    if batches == 0 {
        std::thread::sleep(IDLE);
    } else {
        disk.scatter(load.mappings)?;
    }
    let queue = disk.queues.first_mut().context("the server has no queue")?;
    for number in 0..batches {
        batch(queue, &disk.data, load, number)?;
    }
    disk.detach()?;
    server.signal(Signal::SIGTERM)?;
    let status = server.wait(LIMIT)?;
    ensure!(status.success(), "the server ended with {status}:\n{}", server.log());
    Ok(())
}

/// Publishes a batch and waits until all of it is back.
fn batch(queue: &mut BlockQueue, data: &client::Buffer, load: Load, number: u32) -> Result<()> {
    for index in 0..usize::from(load.depth) {
        let segment = match load.mappings {
            0 => data.segment(index * BLOCK, BLOCK)?,
            mappings => {
                let request = number * u32::from(load.depth) + index as u32;
                // Anywhere among them: a multiplication by a number that is prime to most.
                scattered((u64::from(request) * 2_654_435_761 % u64::from(mappings)) as u32)
            }
        };
        queue.submit(&BlockRequest { kind: load.kind, sector: (index * BLOCK / 512) as u64, data: &[segment] })?;
    }
    queue.publish()?;
    let deadline = Instant::now() + LIMIT;
    let mut left = load.depth;
    while left > 0 {
        match queue.poll()? {
            Some(completion) => {
                ensure!(completion.status == 0, "a request failed with status {}", completion.status);
                left -= 1;
            }
            None => {
                ensure!(Instant::now() < deadline, "the server has not answered within {LIMIT:?}");
                std::thread::yield_now();
            }
        }
    }
    Ok(())
}

/// What callgrind has counted.
#[derive(Debug, Default, PartialEq)]
struct Profile {
    /// Instructions of each function itself.
    cost: BTreeMap<String, u64>,
    /// How often each function was called.
    calls: BTreeMap<String, u64>,
}

impl Profile {
    /// Reads callgrind's format, without its compression of names and positions.
    fn parse(text: &str) -> Self {
        let mut profile = Self::default();
        let (mut function, mut callee) = ("", "");
        let mut of_callee = false;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix("fn=") {
                function = name;
            } else if let Some(name) = line.strip_prefix("cfn=") {
                callee = name;
            } else if let Some(calls) = line.strip_prefix("calls=") {
                let count = calls.split(' ').next().and_then(|count| count.parse::<u64>().ok()).unwrap_or(0);
                *profile.calls.entry(callee.to_owned()).or_default() += count;
                // The next line is what the callee took.
                of_callee = true;
            } else if line.starts_with(|first: char| first.is_ascii_digit()) {
                let cost = line.split(' ').nth(1).and_then(|cost| cost.parse::<u64>().ok()).unwrap_or(0);
                if !std::mem::take(&mut of_callee) {
                    *profile.cost.entry(function.to_owned()).or_default() += cost;
                }
            }
        }
        profile
    }

    /// How often the queue was given a round.
    fn rounds(&self) -> Result<u64> {
        let [begin, end] = ROUND;
        let is_round = |name: &&String| name.starts_with(begin) && name.ends_with(end);
        let rounds = self.calls.iter().filter(|(name, _)| is_round(name)).map(|(_, calls)| calls).sum();
        ensure!(rounds > 0, "callgrind has seen no call of {begin}...{end}: has it another name now?");
        Ok(rounds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_costs_and_calls_are_told_apart() {
        let text = "version: 1\nevents: Ir\n\nob=/bin/server\nfl=a.rs\nfn=run\n10 5\n11 7\nfi=b.rs\n3 1\nfe=a.rs\n\
                    cfi=c.rs\ncfn=copy\ncalls=4 20\n12 400\n13 2\n\nfl=c.rs\nfn=copy\n20 400\n\ntotals: 415\n";
        let profile = Profile::parse(text);
        assert_eq!(profile.cost, BTreeMap::from([("run".to_owned(), 15), ("copy".to_owned(), 400)]));
        assert_eq!(profile.calls, BTreeMap::from([("copy".to_owned(), 4)]));
    }
}
