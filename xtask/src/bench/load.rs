//! The load: one thread that keeps requests in flight on one queue. Every server gets the same one.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use client::{BlockQueue, BlockRequest, Buffer, RequestType, Segment};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::turns::Turn;

/// Bytes of a request.
pub(super) const BLOCK: usize = 4096;
/// The same in sectors.
const SECTORS: u64 = BLOCK as u64 / 512;
/// The most requests in flight.
pub(super) const MAX_DEPTH: u16 = 256;
/// How long a request may take before the server counts as hung.
const LIMIT: Duration = Duration::from_secs(30);
/// The most completions that are taken, and replaced by as many requests, before the device is shown those: while it works on them, the
/// next are taken. Who took and replaced all at once would have the device wait meanwhile, and then wait for the device.
const GROUP: u16 = 8;
/// Rounds between two looks at the clock.
const ROUNDS: u32 = 64;

/// How the driver learns of completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Completion {
    /// It looks at the used ring all the time.
    Poll,
    /// It sleeps until it is interrupted.
    Event,
}

/// What is asked of a disk: blocks of 4 KiB, anywhere.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    /// Reads or writes.
    pub(super) write: bool,
    /// Requests in flight.
    pub(super) depth: u16,
    pub(super) completion: Completion,
    /// What is negotiated besides, of [`BlockOptions::PACKED`](client::BlockOptions::PACKED) and
    /// [`BlockOptions::IN_ORDER`](client::BlockOptions::IN_ORDER).
    pub(super) rings: u64,
    /// Bytes of the disk.
    pub(super) size: u64,
}

/// A xorshift generator.
#[derive(Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    /// A number below `bound`.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((u128::from(self.0) * u128::from(bound)) >> 64) as u64
    }
}

/// One queue and what is in flight on it.
pub(super) struct Driver {
    queue: BlockQueue,
    /// A block of memory for each entry of the queue, so that a descriptor stays as it is from request to request.
    blocks: Vec<Segment>,
    load: Load,
    random: Random,
    in_flight: u16,
}

impl Driver {
    pub(super) fn new(queue: BlockQueue, data: &Buffer, load: Load) -> Result<Self> {
        let blocks = (0..usize::from(queue.ring().size()))
            .map(|entry| data.segment(entry * BLOCK, BLOCK))
            .collect::<Result<_, _>>()?;
        Ok(Self { queue, blocks, load, random: Random::new(), in_flight: 0 })
    }

    /// Requests a second, of a turn with this load.
    pub(super) fn run(&mut self, turn: Turn) -> Result<f64> {
        self.run_for(turn.warm_up)?;
        let started = Instant::now();
        let done = self.run_for(turn.length)?;
        let elapsed = started.elapsed();
        self.drain()?;
        Ok(done as f64 / elapsed.as_secs_f64())
    }

    /// Waits until nothing is in flight.
    pub(super) fn drain(&mut self) -> Result<()> {
        while self.in_flight > 0 {
            self.wait()?;
            self.complete()?;
        }
        Ok(())
    }

    fn run_for(&mut self, duration: Duration) -> Result<u64> {
        let end = Instant::now() + duration;
        let mut done = 0;
        while Instant::now() < end {
            for _ in 0..ROUNDS {
                self.fill()?;
                self.wait()?;
                done += u64::from(self.take(GROUP)?);
            }
        }
        Ok(done)
    }

    /// Has as many requests in flight as there are to be.
    pub(super) fn fill(&mut self) -> Result<()> {
        self.submit(self.load.depth)
    }

    /// Adds `most` requests at most.
    pub(super) fn submit(&mut self, most: u16) -> Result<()> {
        for _ in 0..most.min(self.load.depth - self.in_flight) {
            let entry = self.queue.ring().next_head();
            let block =
                entry.and_then(|entry| self.blocks.get(usize::from(entry))).context("the queue is too small")?;
            let sector = self.random.below(self.load.size / BLOCK as u64) * SECTORS;
            let kind = if self.load.write { RequestType::Write } else { RequestType::Read };
            self.queue.submit(&BlockRequest { kind, sector, data: std::slice::from_ref(block) })?;
            self.in_flight += 1;
        }
        Ok(self.queue.publish()?)
    }

    /// Waits for a completion.
    fn wait(&mut self) -> Result<()> {
        if self.queue.ring().has_used() {
            return Ok(());
        }
        if self.load.completion == Completion::Event {
            ensure!(self.queue.wait(LIMIT)?, "no completion and no interrupt within {LIMIT:?}");
            return Ok(());
        }
        let mut looks = 0u32;
        let mut deadline = None;
        while !self.queue.ring().has_used() {
            std::hint::spin_loop();
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(1 << 20) {
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + LIMIT);
                ensure!(Instant::now() < deadline, "no completion within {LIMIT:?}");
            }
        }
        Ok(())
    }

    /// Takes what has completed; how many.
    pub(super) fn complete(&mut self) -> Result<u16> {
        self.take(u16::MAX)
    }

    /// Takes `most` completions at most; how many.
    pub(super) fn take(&mut self, most: u16) -> Result<u16> {
        let mut done = 0;
        while done < most {
            let Some(completion) = self.queue.poll()? else { break };
            ensure!(completion.status == 0, "a request failed with status {}", completion.status);
            done += 1;
        }
        self.in_flight -= done;
        Ok(done)
    }
}

/// The entries of a queue for `depth` requests, each in a descriptor and an indirect table.
pub(super) fn queue_size(depth: u16) -> u16 {
    depth.next_power_of_two().clamp(16, MAX_DEPTH)
}

/// Binds this thread to a processor.
pub(super) fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu).with_context(|| format!("there is no processor {cpu}"))?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("cannot run on processor {cpu}"))
}

/// Runs `work` on a thread that is bound to a processor.
pub(super) fn on_cpu<T: Send>(cpu: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            pin(cpu)?;
            work()
        });
        thread.join().unwrap_or_else(|_| anyhow::bail!("a measuring thread panicked"))
    })
}
