//! What the machine itself can do, of which every server is a multiple.

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::load::{BLOCK, Random, on_cpu, pin};
use super::{DRIVER_CPU, SERVER_CPU};

/// What is copied from.
const MEMORY: usize = 512 << 20;
/// Blocks that are copied to, in turns, as a driver's buffers are.
const TARGETS: usize = 32;
/// What ends a conversation.
const OVER: u64 = u64::MAX;

/// A value alone in its cache line, and in the one that is prefetched with it.
#[repr(align(128))]
struct Line(AtomicU64);

/// Nanoseconds until a cache line that was written for another core is back, written by that core.
pub(super) fn cache_line(duration: Duration) -> Result<f64> {
    let line = Line(AtomicU64::new(0));
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            pin(SERVER_CPU)?;
            let mut next = 1;
            loop {
                match line.0.load(Ordering::Acquire) {
                    OVER => return Ok(()),
                    value if value == next => {
                        line.0.store(next + 1, Ordering::Release);
                        next += 2;
                    }
                    _ => spin_loop(),
                }
            }
        });
        let here = scope.spawn(|| {
            let measured = pin(DRIVER_CPU).map(|()| {
                let mut value = 0;
                per_turn(duration, 256, || {
                    line.0.store(value + 1, Ordering::Release);
                    value += 2;
                    while line.0.load(Ordering::Acquire) != value {
                        spin_loop();
                    }
                })
            });
            line.0.store(OVER, Ordering::Release);
            measured
        });
        join(here).and_then(|nanoseconds| join(other).map(|()| nanoseconds))
    })
}

/// Nanoseconds until a thread that sleeps on another core has been woken by an eventfd, and has woken us.
pub(super) fn eventfd(duration: Duration) -> Result<f64> {
    let (there, back) = (EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?, EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
    let (there, back) = (&there, &back);
    std::thread::scope(|scope| {
        let other = scope.spawn(move || {
            pin(SERVER_CPU)?;
            // A count of more than one is the end.
            while there.read()? == 1 {
                back.write(1)?;
            }
            Ok(())
        });
        let here = scope.spawn(move || {
            let mut failed = None;
            let measured = pin(DRIVER_CPU).map(|()| {
                per_turn(duration, 16, || {
                    failed = there.write(1).and_then(|_| back.read()).err();
                })
            });
            there.write(2)?;
            failed.map_or(measured, |error| Err(error.into()))
        });
        join(here).and_then(|nanoseconds| join(other).map(|()| nanoseconds))
    })
}

/// Memory that is copied from.
pub(super) struct Memory(Vec<u8>);

impl Memory {
    pub(super) fn new() -> Self {
        // Every page is written, so that each is there.
        Self((0..MEMORY / 8).flat_map(|word| (word as u64).to_ne_bytes()).collect())
    }

    /// Nanoseconds that one core takes to copy a block from anywhere.
    pub(super) fn copy(&self, duration: Duration) -> Result<f64> {
        on_cpu(SERVER_CPU, || {
            let mut target = vec![0u8; TARGETS * BLOCK];
            let mut random = Random::new();
            let mut turn = 0;
            Ok(per_turn(duration, 256, || {
                let from = random.below((MEMORY / BLOCK) as u64) as usize * BLOCK;
                turn = (turn + 1) % TARGETS;
                if let (Some(from), Some(to)) =
                    (self.0.get(from..from + BLOCK), target.get_mut(turn * BLOCK..(turn + 1) * BLOCK))
                {
                    to.copy_from_slice(from);
                    black_box(to);
                }
            }))
        })
    }
}

/// Nanoseconds of a turn, in which the clock is read once in `turns`.
fn per_turn(duration: Duration, turns: u32, mut turn: impl FnMut()) -> f64 {
    for _ in 0..turns {
        turn();
    }
    let started = Instant::now();
    let mut done = 0u64;
    loop {
        for _ in 0..turns {
            turn();
        }
        done += u64::from(turns);
        let elapsed = started.elapsed();
        if elapsed >= duration {
            return elapsed.as_nanos() as f64 / done as f64;
        }
    }
}

fn join<T>(thread: std::thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|_| anyhow::bail!("a measuring thread panicked"))
}
