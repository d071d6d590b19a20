//! `vfio-user-blk bench`: a load on any vfio-user virtio-blk server, without a VM.
//!
//! Each queue has a thread that keeps `depth` requests in flight and takes the time of each. The clock is read once for
//! all requests that are found completed together, so that it costs little at any rate.

mod pattern;
mod queue;
mod report;

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use client::{BlockDriver, BlockOptions, Client, GuestMemory, NotifyMethod};
use vfio_user_blk::config::{BenchArgs, CompletionMode, Kick, Switch, Workload};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use pattern::Region;
use queue::{Counters, QueueBench};
use report::Report;

const SECTOR: u64 = 512;
/// Where the driver's memory lies; any address would do.
const MEMORY_IOVA: u64 = 0x1_0000_0000;
/// What queues and headers need beside the data buffers, generously: bytes for each entry of a queue.
const OVERHEAD: usize = 1024;
/// The smallest queue that is worth a driver's while.
const MIN_QUEUE_SIZE: u16 = 16;

/// Runs the load and prints what came of it.
pub(crate) fn run(arguments: &BenchArgs) -> Result<()> {
    let bench = Bench::prepare(arguments)?;
    let report = bench.run(arguments)?;
    let text = if arguments.json { report.json() } else { report.table() };
    writeln!(io::stdout(), "{text}").context("cannot write to standard output")
}

struct Bench {
    driver: BlockDriver,
    queues: Vec<QueueBench>,
    _memory: GuestMemory,
}

impl Bench {
    fn prepare(arguments: &BenchArgs) -> Result<Self> {
        let path = arguments.socket_path.display();
        let client = Arc::new(Client::connect(&arguments.socket_path).with_context(|| format!("cannot use {path}"))?);
        let bs = usize::try_from(arguments.bs.0).context("--bs is too large")?;
        let entries = if arguments.no_indirect { 3 } else { 1 };
        let needed = (arguments.depth * entries).next_power_of_two().max(MIN_QUEUE_SIZE);
        let queue_size = arguments.queue_size.unwrap_or(needed);
        let data = bs.checked_mul(arguments.depth.into()).context("--bs times --depth is too large")?;
        let each = data + OVERHEAD * usize::from(queue_size) + (256 << 10);
        let size = (each * usize::from(arguments.queues)).next_multiple_of(1 << 21);
        let memory = GuestMemory::new(size, MEMORY_IOVA).context("no memory for the requests' buffers")?;
        client.dma_map(&memory.dma_map(), Some(memory.fd())).context("the server does not map our memory")?;

        let (driver, queues) = BlockDriver::start(client, &memory, &options(arguments, queue_size))
            .with_context(|| format!("cannot start the disk at {path}"))?;
        for ((switch, feature), name) in switches(arguments).into_iter().zip(["--packed", "--in-order"]) {
            let missing = switch == Some(Switch::On) && driver.features() & feature == 0;
            ensure!(!missing, "the disk does not offer what {name} on asks for");
        }
        let region = region(arguments, &driver)?;
        ensure!(
            queues.len() >= usize::from(arguments.queues),
            "the disk has {} queues; ask for no more by --queues",
            queues.len()
        );
        for queue in &queues {
            let slots = queue.ring().size() / entries;
            ensure!(
                slots >= arguments.depth,
                "the disk's queues hold {slots} such requests; ask for no more by --depth"
            );
        }
        let parts = region.split(arguments.queues);
        let queues = parts
            .into_iter()
            .zip(queues)
            .enumerate()
            .map(|(index, (part, queue))| QueueBench::new(index, queue, part, &memory, arguments))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { driver, queues, _memory: memory })
    }

    fn run(self, arguments: &BenchArgs) -> Result<Report> {
        let stop = AtomicBool::new(false);
        let counters: Vec<Arc<Counters>> = self.queues.iter().map(QueueBench::counters).collect();
        let started = Instant::now();
        let results = thread::scope(|scope| {
            let threads: Vec<_> = self
                .queues
                .into_iter()
                .map(|queue| {
                    let stop = &stop;
                    scope.spawn(move || {
                        let result = queue.run(stop);
                        // One that fails ends the others too.
                        stop.fetch_or(result.is_err(), Ordering::Relaxed);
                        result
                    })
                })
                .collect();
            watch(arguments, &counters, &stop, started);
            stop.store(true, Ordering::Relaxed);
            let ended = threads.into_iter().map(|thread| match thread.join() {
                Ok(result) => result,
                Err(_) => bail!("a queue's thread panicked"),
            });
            ended.collect::<Result<Vec<_>>>()
        })?;
        let report = Report::new(arguments, started.elapsed(), results)?;
        self.driver.stop().context("the disk does not reset")?;
        Ok(report)
    }
}

/// The features that may be demanded.
fn switches(arguments: &BenchArgs) -> [(Option<Switch>, u64); 2] {
    [(arguments.packed, BlockOptions::PACKED), (arguments.in_order, BlockOptions::IN_ORDER)]
}

fn options(arguments: &BenchArgs, queue_size: u16) -> BlockOptions {
    let mut features = BlockOptions::FEATURES | BlockOptions::PACKED | BlockOptions::IN_ORDER;
    if arguments.no_event_idx {
        features &= !(1 << VIRTIO_RING_F_EVENT_IDX);
    }
    if arguments.no_indirect {
        features &= !(1 << VIRTIO_RING_F_INDIRECT_DESC);
    }
    for (switch, feature) in switches(arguments) {
        if switch == Some(Switch::Off) {
            features &= !feature;
        }
    }
    BlockOptions {
        features,
        queues: arguments.queues,
        queue_size,
        notify: match arguments.kick {
            Kick::Message => NotifyMethod::Posted,
            Kick::Ioeventfd => NotifyMethod::IoEventFd,
            Kick::Mapped => NotifyMethod::Mapped,
        },
        interrupts: arguments.completion == CompletionMode::Event,
        indirect_entries: 3,
        bounce_size: 4096,
    }
}

/// The part of the disk to use, in requests.
fn region(arguments: &BenchArgs, driver: &BlockDriver) -> Result<Region> {
    let config = driver.config().context("cannot read the disk's configuration")?;
    let block = u64::from(config.blk_size.unwrap_or(SECTOR as u32));
    let (bs, capacity) = (arguments.bs.0, config.capacity.saturating_mul(SECTOR));
    ensure!(bs > 0 && bs.is_multiple_of(block), "--bs must be a multiple of the disk's block size, {block} bytes");
    let size = arguments.size.map_or(capacity, |size| size.0);
    ensure!(size <= capacity, "--size is more than the disk has, {capacity} bytes");
    let blocks = size / bs;
    let least = u64::from(arguments.queues) * u64::from(arguments.depth);
    ensure!(blocks >= least, "{size} bytes are too few for {least} requests of {bs} bytes in flight");
    let read_only = driver.has_feature(virtio_bindings::virtio_blk::VIRTIO_BLK_F_RO);
    let writes = !matches!(arguments.rw, Workload::Read | Workload::Randread);
    ensure!(!(read_only && writes), "the disk is read-only; use --rw read or randread");
    Ok(Region { first: 0, blocks, sectors_per_block: bs / SECTOR })
}

/// Waits for the time to be over, or a queue to fail, and says each second how it goes.
fn watch(arguments: &BenchArgs, counters: &[Arc<Counters>], stop: &AtomicBool, started: Instant) {
    let end = started + Duration::from_secs(arguments.seconds.into());
    let (terminal, mut last) = (io::stderr().is_terminal(), 0);
    let mut next = started;
    while !stop.load(Ordering::Relaxed) && Instant::now() < end {
        next = (next + Duration::from_secs(1)).min(end);
        thread::sleep(next.saturating_duration_since(Instant::now()));
        let done: u64 = counters.iter().map(|counters| counters.done()).sum();
        let line = format!(
            "{:3} of {} s  {:>10} IOPS",
            started.elapsed().as_secs(),
            arguments.seconds,
            report::grouped(done - last)
        );
        // Nobody reads it if this fails.
        let _unseen = if terminal { write!(io::stderr(), "\r{line}") } else { writeln!(io::stderr(), "{line}") };
        last = done;
    }
    if terminal {
        let _unseen = writeln!(io::stderr());
    }
}
