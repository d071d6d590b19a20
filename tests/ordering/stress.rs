//! Real threads, real memory, real eventfds: the device's queue as it ships and a driver, each asleep whenever it finds
//! nothing, woken only by the other. A wakeup that is lost ends the run.
//!
//! Each side draws by lot how long it dawdles before it publishes and before it falls asleep, so that the two decisions
//! often fall together, and whether it asks to be woken or polls.
//!
//! `STRESS_ROUNDS`: how many requests go there and back in each format, in order apart (400,000). `STRESS_FORMAT`: only
//! `split` or `packed` queues. `STRESS_PATIENCE`: how many seconds with
//! news and without a wakeup mean that it is lost (10), more than any pause of a busy machine. `STRESS_SEED`: another
//! number draws other lots (0).

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failure is the result of a test")]

mod bell;
mod lot;
mod rig;

use std::fmt::Debug;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::{Duration, Instant};
use std::{env, thread};

use bell::{Bell, GaveUp, Patience};
use client::{Ring, Segment};
use lot::Lot;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use rig::{BASE, Format, Packed, Rig, Split, pop};
use virtio::memory::{GuestMemory, PinnedBuffers};
use virtio::queue::{Armed, Signal, Written};

const SIZE: u16 = 8;

/// One run of the course.
struct Course {
    format: &'static str,
    rounds: u64,
    seed: u64,
    /// Requests in flight at most, drawn anew time and again.
    depth: RangeInclusive<u16>,
    event_idx: bool,
    in_order: bool,
    /// How often to look at a bell before sleeping in earnest: not at all if the other side needs our core.
    looks: u32,
    patience: Patience,
    kick: Bell,
    interrupt: Bell,
}

/// What a side did about a wakeup before it took something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// It polled, or something was there already.
    No,
    /// It asked, and then found something: the other side may have seen the question in time or not.
    AtTheSameTime,
    /// It asked in time, and slept.
    Yes,
}

/// A question, and how many wakeups had arrived when it was asked.
#[derive(Clone, Copy, Debug)]
struct Question {
    asked: Asked,
    received: u64,
}

/// What a side has done. At depth 1 all lists have an entry a request.
#[derive(Default)]
struct Account {
    asked: Vec<Question>,
    /// For each publication, whether it woke the other side for it.
    told: Vec<bool>,
    /// Wakeups that have arrived.
    received: u64,
    /// How often they found nothing.
    for_nothing: u64,
}

/// A side that does not go on.
#[derive(Debug)]
#[expect(dead_code, reason = "shown when the test fails")]
struct Stuck {
    why: GaveUp,
    /// How many requests it had done with.
    rounds: u64,
}

impl Course {
    /// Sleeps until there is `news`. Its question stands meanwhile: a wakeup that comes late, for something that was
    /// found before, takes nothing away from it.
    fn sleep(&self, bell: &Bell, lot: &mut Lot, account: &mut Account, news: impl Fn() -> bool) -> Result<(), GaveUp> {
        loop {
            let looks = if lot.one_in(64) { 0 } else { self.looks };
            account.received += bell.sleep(looks, &self.patience, &news)?;
            if news() {
                return Ok(());
            }
            account.for_nothing += 1;
        }
    }

    fn poll(&self, news: impl Fn() -> bool) -> Result<(), GaveUp> {
        let mut looks = 0u32;
        while !news() {
            looks += 1;
            if looks.is_multiple_of(1024) {
                self.patience.check()?;
                thread::yield_now();
            }
        }
        Ok(())
    }

    fn device<Q: Format>(&self, mut queue: Q, mut memory: GuestMemory) -> Result<Account, Stuck> {
        let (mut account, mut lot) = (Account::default(), Lot::new(self.seed));
        let (mut heads, mut completed) = (Vec::new(), 0);
        let mut buffers = PinnedBuffers::default();
        while completed < self.rounds {
            let stuck = |why| Stuck { why, rounds: completed };
            let mut head = pop(&mut queue, &mut memory, &mut buffers).unwrap();
            let received = account.received;
            let mut asked = Asked::No;
            if head.is_none() {
                asked = if lot.one_in(3) {
                    self.poll(|| queue.has_news()).map_err(stuck)?;
                    Asked::No
                } else {
                    lot.dawdle();
                    match queue.arm() {
                        Armed::Work => Asked::AtTheSameTime,
                        Armed::Sleep => {
                            self.sleep(&self.kick, &mut lot, &mut account, || queue.has_news()).map_err(stuck)?;
                            Asked::Yes
                        }
                    }
                };
                head = pop(&mut queue, &mut memory, &mut buffers).unwrap();
            }
            account.asked.push(Question { asked, received });
            while let Some(taken) = head {
                heads.push(taken);
                head = if lot.one_in(2) { pop(&mut queue, &mut memory, &mut buffers).unwrap() } else { None };
            }
            lot.dawdle();
            completed += heads.len() as u64;
            for head in heads.drain(..) {
                queue.complete(head, Written::All(0));
            }
            let signal = queue.publish();
            if signal == Signal::Needed {
                self.interrupt.ring();
            }
            account.told.push(signal == Signal::Needed);
        }
        Ok(account)
    }

    fn driver(&self, mut driver: Ring) -> Result<Account, Stuck> {
        let (mut account, mut lot) = (Account::default(), Lot::new(!self.seed));
        let (mut added, mut taken) = (0, 0);
        while taken < self.rounds {
            let stuck = |why| Stuck { why, rounds: taken };
            let received = account.received;
            let in_advance = driver.in_flight() == 0 && lot.one_in(4);
            if in_advance {
                assert!(!driver.enable_interrupts(), "something was used that is not there");
            }
            let depth = self.depth.start() + lot.below(u32::from(self.depth.end() - self.depth.start()) + 1) as u16;
            while driver.in_flight() < depth && added < self.rounds {
                driver.add(&[Segment { iova: BASE, len: 1 }], &[]).unwrap();
                added += 1;
                if driver.in_flight() < depth && added < self.rounds && lot.one_in(2) {
                    continue;
                }
                let told = driver.publish();
                if told {
                    self.kick.ring();
                }
                account.told.push(told);
            }
            let asked = if in_advance {
                self.sleep(&self.interrupt, &mut lot, &mut account, || driver.has_used()).map_err(stuck)?;
                Asked::Yes
            } else if lot.one_in(3) {
                self.poll(|| driver.has_used()).map_err(stuck)?;
                Asked::No
            } else {
                lot.dawdle();
                if driver.enable_interrupts() {
                    Asked::AtTheSameTime
                } else {
                    self.sleep(&self.interrupt, &mut lot, &mut account, || driver.has_used()).map_err(stuck)?;
                    Asked::Yes
                }
            };
            account.asked.push(Question { asked, received });
            if !self.event_idx || driver.packed().is_some() {
                // With the event index nothing need be said in a split queue: the entry that was asked for has gone by. In a
                // packed one the same descriptor comes again soon.
                driver.disable_interrupts();
            }
            while driver.take().unwrap().is_some() {
                taken += 1;
            }
        }
        Ok(account)
    }

    fn run<Q: Format>(self) {
        let start = Instant::now();
        let Rig { queue, memory, driver } = Rig::<Q>::new(SIZE, self.event_idx, 0, self.in_order);
        let (split, packed) = (driver.split().cloned(), driver.packed().cloned());
        let ring = || {
            let split = split.as_ref().map(|ring| {
                let avail = (ring.avail_idx(), ring.avail_flags(), ring.used_event());
                let used = (ring.used_idx(), ring.used_flags(), ring.avail_event());
                format!("avail: idx, flags, used_event {avail:?}; used: idx, flags, avail_event {used:?}")
            });
            let packed = packed.as_ref().map(|ring| {
                let events = (ring.driver_event(), ring.device_event());
                let descriptors: Vec<_> = (0..SIZE).map(|index| ring.descriptor(index)).collect();
                format!("events of driver and device: {events:?}; {descriptors:?}")
            });
            split.or(packed).unwrap_or_default()
        };
        let (device, driver) = thread::scope(|scope| {
            let course = &self;
            let device = scope.spawn(move || {
                pin(0);
                course.device(queue, memory)
            });
            let driver = scope.spawn(move || {
                pin(1);
                course.driver(driver)
            });
            (device.join().unwrap(), driver.join().unwrap())
        });
        let (device, driver) = match (device, driver) {
            (Ok(device), Ok(driver)) => (device, driver),
            (device, driver) => {
                panic!("{self}: the device: {:?}, the driver: {:?}\n{}", device.err(), driver.err(), ring());
            }
        };
        println!("{self}: {} rounds in {:.1} s", self.rounds, start.elapsed().as_secs_f64());
        for (what, sleeper, waker) in [("kicks", &device, &driver), ("interrupts", &driver, &device)] {
            let told = waker.told.iter().filter(|told| **told).count();
            let a_round = told as f64 / self.rounds as f64;
            let for_nothing = sleeper.for_nothing;
            println!("  {what:10} {told:8}, {a_round:.3} a round, {for_nothing} of them too late to find anything");
            if self.event_idx && *self.depth.end() == 1 {
                let (yes, no) = count_told_as_asked(&sleeper.asked, &waker.told);
                println!("  {what:10} {yes:8} times asked for in time and sent, {no} times not asked for and not sent");
            }
        }
    }
}

impl std::fmt::Display for Course {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.depth.start(), self.depth.end()) {
            (first, last) if first == last => write!(f, "{}, depth {first}", self.format)?,
            (first, last) => write!(f, "{}, depth {first} to {last}", self.format)?,
        }
        f.write_str(if self.event_idx { ", event index" } else { ", flags" })?;
        f.write_str(if self.in_order { ", in order" } else { "" })
    }
}

/// With the event index, at depth 1: each entry that was asked for is told of, and none that was not. How many are
/// there of each?
///
/// One that was asked for counts when all earlier wakeups had arrived. Else one of them may wake the sleeper, which finds the
/// entry, takes it, and asks for the next one, before the other side has looked whether it was asked for this one.
/// (The first does not count: memory that is zero asks for it.)
fn count_told_as_asked(questions: &[Question], told: &[bool]) -> (u64, u64) {
    let (mut yes, mut no, mut sent) = (0, 0, 0);
    assert_eq!(questions.len(), told.len());
    for (entry, (question, told)) in questions.iter().zip(told).enumerate() {
        match question.asked {
            _ if entry == 0 => {}
            Asked::Yes if question.received == sent => {
                assert!(told, "nobody was told of entry {entry}, which was asked for");
                yes += 1;
            }
            Asked::No => {
                assert!(!told, "entry {entry} was told of, and nobody had asked");
                no += 1;
            }
            Asked::Yes | Asked::AtTheSameTime => {}
        }
        sent += u64::from(*told);
    }
    (yes, no)
}

/// Gives the calling thread a core of its own, if there are two.
fn pin(side: usize) {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let cores: Vec<usize> = (0..CpuSet::count()).filter(|core| allowed.is_set(*core).unwrap_or(false)).collect();
    if let [first, second, ..] = cores[..] {
        let mut own = CpuSet::new();
        own.set([first, second][side]).unwrap();
        sched_setaffinity(Pid::from_raw(0), &own).unwrap();
    }
}

/// A number from the environment.
fn number<T: FromStr<Err: Debug>>(name: &str, default: T) -> T {
    env::var(name).map_or(default, |value| value.parse().expect(name))
}

fn run_all<Q: Format>(format: &'static str) {
    if number("STRESS_FORMAT", format.to_owned()) != format {
        return;
    }
    let rounds = number("STRESS_ROUNDS", 400_000u64) / 4;
    let seed = number("STRESS_SEED", 0);
    let patience = Duration::from_secs(number("STRESS_PATIENCE", 10));
    let looks = if thread::available_parallelism().unwrap().get() > 1 { 2000 } else { 0 };
    let courses = [1..=1, 2..=SIZE]
        .into_iter()
        .flat_map(|depth| [true, false].map(|event_idx| (depth.clone(), event_idx, false)));
    for (depth, event_idx, in_order) in courses.chain([(2..=SIZE, true, true)]) {
        let (kick, interrupt) = (Bell::new(), Bell::new());
        let patience = Patience::new(patience);
        Course { format, rounds, seed, depth, event_idx, in_order, looks, patience, kick, interrupt }.run::<Q>();
    }
}

#[test]
fn no_wakeup_is_lost() {
    run_all::<Split>("split");
    run_all::<Packed>("packed");
}
