//! One queue's load.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use client::{BlockQueue, BlockRequest, Buffer, GuestMemory, RequestType, Segment};
use hdrhistogram::Histogram;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use quanta::Clock;
use vfio_user_blk::config::{BenchArgs, CompletionMode, Workload};

use super::pattern::{Random, Region, fill};
use super::report::histogram;

/// The most completions that are taken before as many requests are put in their place: the device works on those while the next
/// are taken, and need not wait for all.
const GROUP: u64 = 8;
/// How long a request may take before the server counts as hung.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Polls without a completion between two looks at the clock.
const POLLS_BEFORE_CLOCK: u32 = 1 << 20;

/// What others may look at while a queue runs.
#[derive(Debug, Default)]
pub(super) struct Counters {
    done: AtomicU64,
}

impl Counters {
    /// Requests that have completed.
    pub(super) fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }
}

/// What a queue has measured.
pub(super) struct QueueResult {
    /// Nanoseconds of each request.
    pub(super) latency: Histogram<u64>,
    pub(super) kicks: u64,
    pub(super) interrupts: u64,
    /// Blocks read whose contents were checked.
    pub(super) verified: u64,
}

/// A request in flight.
#[derive(Clone, Copy)]
struct Running {
    /// Which of the data buffers it uses.
    buffer: usize,
    block: u64,
    write: bool,
    /// The clock when it was submitted.
    started: u64,
}

/// One queue, ready to run.
pub(super) struct QueueBench {
    queue: BlockQueue,
    region: Region,
    workload: Workload,
    completion: CompletionMode,
    cpu: Option<usize>,
    counters: Arc<Counters>,
    clock: Clock,
    random: Random,
    /// The next block of a sequential run.
    next: u64,
    buffers: Vec<(Buffer, Segment)>,
    /// Buffers that no request uses.
    free: Vec<bool>,
    in_flight: usize,
    /// The buffer that the last request with this tag used: with the same one again, its descriptors stay as they are.
    home: Vec<usize>,
    running: Vec<Option<Running>>,
    check: Option<Check>,
    latency: Histogram<u64>,
}

/// What was written where.
struct Check {
    /// How often each block was written in this run; 0 for one whose contents are unknown.
    versions: Vec<u32>,
    /// Whether a request for the block is in flight.
    busy: Vec<bool>,
    expected: Vec<u8>,
    found: Vec<u8>,
    verified: u64,
}

impl QueueBench {
    pub(super) fn new(
        index: usize,
        queue: BlockQueue,
        region: Region,
        memory: &GuestMemory,
        arguments: &BenchArgs,
    ) -> Result<Self> {
        let bs = usize::try_from(arguments.bs.0)?;
        let depth = usize::from(arguments.depth);
        let buffers = (0..depth)
            .map(|_| {
                let buffer = memory.allocate(bs, 4096)?;
                let segment = buffer.segment(0, bs)?;
                Ok((buffer, segment))
            })
            .collect::<Result<Vec<_>, client::Error>>()
            .context("no memory for the data")?;
        let blocks = usize::try_from(region.blocks)?;
        let check = arguments.verify.then(|| Check {
            versions: vec![0; blocks],
            busy: vec![false; blocks],
            expected: vec![0; bs],
            found: vec![0; bs],
            verified: 0,
        });
        let slots = usize::from(queue.ring().size());
        Ok(Self {
            queue,
            region,
            workload: arguments.rw,
            completion: arguments.completion,
            cpu: arguments.cpu.map(|first| first + index),
            counters: Arc::default(),
            clock: Clock::new(),
            random: Random::new(index as u64 + 1),
            next: 0,
            free: vec![true; depth],
            in_flight: 0,
            home: (0..slots).map(|slot| slot % depth).collect(),
            buffers,
            running: vec![None; slots],
            check,
            latency: histogram()?,
        })
    }

    pub(super) fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Runs until `stop`, then waits for what is in flight.
    pub(super) fn run(mut self, stop: &AtomicBool) -> Result<QueueResult> {
        if let Some(cpu) = self.cpu {
            let mut set = CpuSet::new();
            set.set(cpu).with_context(|| format!("there is no processor {cpu}"))?;
            sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("cannot run on processor {cpu}"))?;
        }
        loop {
            if !stop.load(Ordering::Relaxed) {
                self.submit()?;
            }
            if self.in_flight == 0 {
                break;
            }
            self.wait()?;
            self.complete()?;
        }
        Ok(QueueResult {
            latency: self.latency,
            kicks: self.queue.kicks(),
            interrupts: self.queue.interrupts(),
            verified: self.check.map_or(0, |check| check.verified),
        })
    }

    /// Fills the queue up.
    fn submit(&mut self) -> Result<()> {
        let started = self.clock.raw();
        while let Some((head, buffer)) = self.buffer() {
            let (block, write) = self.choose();
            let sector = self.region.sector(block);
            let (memory, segment) = &self.buffers[buffer];
            if let Some(check) = &mut self.check {
                check.busy[block as usize] = true;
                if write {
                    check.versions[block as usize] += 1;
                    fill(&mut check.expected, sector, check.versions[block as usize]);
                    memory.write(0, &check.expected)?;
                }
            }
            let kind = if write { RequestType::Write } else { RequestType::Read };
            let tag = self.queue.submit(&BlockRequest { kind, sector, data: &[*segment] })?;
            (self.home[head], self.free[buffer]) = (buffer, false);
            self.in_flight += 1;
            self.running[tag.index()] = Some(Running { buffer, block, write, started });
        }
        Ok(self.queue.publish()?)
    }

    /// The head of the next request and a buffer for it, if there is to be one more.
    fn buffer(&self) -> Option<(usize, usize)> {
        let head = usize::from(self.queue.ring().next_head()?);
        let home = self.home[head];
        if self.free[home] {
            return Some((head, home));
        }
        let other = || self.free.iter().position(|free| *free);
        if self.in_flight < self.free.len() { other().map(|other| (head, other)) } else { None }
    }

    fn choose(&mut self) -> (u64, bool) {
        let write = match self.workload {
            Workload::Read | Workload::Randread => false,
            Workload::Write | Workload::Randwrite => true,
            Workload::Randrw => self.random.next() >> 63 != 0,
        };
        loop {
            let block = match self.workload {
                Workload::Read | Workload::Write => {
                    let block = self.next;
                    self.next = if block + 1 == self.region.blocks { 0 } else { block + 1 };
                    block
                }
                _ => self.random.below(self.region.blocks),
            };
            // Two at once on one block would leave open what is there afterwards.
            if !self.check.as_ref().is_some_and(|check| check.busy[block as usize]) {
                return (block, write);
            }
        }
    }

    /// Waits for a completion.
    fn wait(&mut self) -> Result<()> {
        if self.completion == CompletionMode::Event {
            if !self.queue.ring().has_used() && !self.queue.wait(TIMEOUT)? {
                bail!("no completion and no interrupt came within {TIMEOUT:?}; the server hangs or a wakeup was lost");
            }
            return Ok(());
        }
        let mut since = None;
        let mut polls = 0u32;
        while !self.queue.ring().has_used() {
            std::hint::spin_loop();
            polls += 1;
            if polls == POLLS_BEFORE_CLOCK {
                polls = 0;
                let since = *since.get_or_insert_with(|| self.clock.now());
                if since.elapsed() > TIMEOUT {
                    bail!("no completion came within {TIMEOUT:?}; the server hangs");
                }
            }
        }
        Ok(())
    }

    /// Takes what has completed.
    fn complete(&mut self) -> Result<()> {
        let now = self.clock.raw();
        let mut done = 0;
        while done < GROUP {
            let Some(completion) = self.queue.poll()? else { break };
            let Some(running) = self.running[completion.tag.index()].take() else {
                bail!("the server completed a request that is not in flight");
            };
            let sector = self.region.sector(running.block);
            if completion.status != 0 {
                let what = if running.write { "write" } else { "read" };
                bail!("a {what} at sector {sector} failed with status {}", completion.status);
            }
            if let Some(check) = &mut self.check {
                check.end(&running, sector, &self.buffers[running.buffer].0)?;
            }
            self.latency.saturating_record(self.clock.delta_as_nanos(running.started, now));
            self.free[running.buffer] = true;
            self.in_flight -= 1;
            done += 1;
        }
        self.counters.done.store(self.counters.done() + done, Ordering::Relaxed);
        Ok(())
    }
}

impl Check {
    /// Looks at what a request has read, where this run has written it.
    fn end(&mut self, running: &Running, sector: u64, buffer: &Buffer) -> Result<()> {
        let block = running.block as usize;
        self.busy[block] = false;
        if running.write || self.versions[block] == 0 {
            return Ok(());
        }
        fill(&mut self.expected, sector, self.versions[block]);
        buffer.read(0, &mut self.found)?;
        self.verified += 1;
        if let Some(at) = self.expected.iter().zip(&self.found).position(|(expected, found)| expected != found) {
            bail!("wrong data: byte {at} of the block at sector {sector} (write {})", self.versions[block]);
        }
        Ok(())
    }
}
