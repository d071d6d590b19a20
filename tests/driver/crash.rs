//! Either side is killed in the middle of requests (SIGKILL): nothing that was acknowledged is lost.
//!
//! A driver writes slots of a disk, a batch at a time, and flushes after each; what it was told is noted outside of the
//! process that is killed. Every sector tells its slot and the batch that wrote it, so that what the file holds afterwards can be held
//! against that note: it is no older than what was acknowledged, no newer than what was written, and no sector is torn.
//!
//! What a killed process has given to the kernel survives it, flushed or not; so this shows that the server keeps nothing
//! back that it has answered for. That a flush reaches the disk is for the contract of the stores to show.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use client::{BlockOptions, BlockQueue, BlockRequest, Buffer, Client, GuestMemory, RequestType};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::binary::{Served, disk};
use crate::rig::{DISK, IOVA, LIMIT, Machine, OK, Random, until};

const SECTOR: usize = 512;
const SLOT: usize = 8192;
const SLOTS: usize = 512;
/// Slots that a batch writes.
const BATCH: usize = 16;

/// What a sector holds that a batch has written; zeroes before the first.
fn sector(batch: u64, slot: usize, index: usize) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    if batch > 0 {
        Random::new(batch << 20 | (slot * SLOT / SECTOR + index) as u64).fill(&mut bytes);
        bytes[..8].copy_from_slice(&batch.to_le_bytes());
    }
    bytes
}

/// The slots that a batch writes, each once.
fn slots(batch: u64) -> BTreeSet<usize> {
    let mut random = Random::new(batch);
    (0..BATCH).map(|_| random.below(SLOTS as u64) as usize).collect()
}

/// What the disk may hold.
pub(crate) struct Journal {
    /// The batch that wrote each slot last, and was acknowledged.
    acknowledged: Vec<u64>,
    /// The last batch that may have been written in part.
    pub(crate) last: u64,
}

impl Journal {
    pub(crate) fn new() -> Journal {
        Journal { acknowledged: vec![0; SLOTS], last: 0 }
    }

    pub(crate) fn acknowledge(&mut self, batch: u64) {
        slots(batch).into_iter().for_each(|slot| self.acknowledged[slot] = batch);
        self.last = self.last.max(batch);
    }

    /// Holds the file against it.
    pub(crate) fn check(&self, image: &Path) {
        let file = File::open(image).unwrap();
        assert_eq!(file.metadata().unwrap().len(), DISK);
        self.check_slots(|slot, bytes| file.read_exact_at(bytes, (slot * SLOT) as u64).unwrap());
    }

    /// Holds a disk against it.
    fn check_slots(&self, mut read: impl FnMut(usize, &mut [u8])) {
        let mut bytes = vec![0; SLOT];
        for slot in 0..SLOTS {
            read(slot, &mut bytes);
            for (index, found) in bytes.chunks(SECTOR).enumerate() {
                let batch = u64::from_le_bytes(found[..8].try_into().unwrap());
                let place = format!("slot {slot}, sector {index}: batch {batch}");
                let oldest = self.acknowledged[slot];
                assert!(batch >= oldest, "{place} is older than {oldest}, which was acknowledged");
                assert!(batch <= self.last, "{place} was not written yet, {} was the last", self.last);
                assert!(batch == 0 || slots(batch).contains(&slot), "{place} went elsewhere");
                assert!(found == sector(batch, slot, index), "{place} is torn");
            }
        }
    }
}

/// A driver of one queue with a buffer for a batch.
pub(crate) struct Writer {
    machine: Machine,
    buffer: Buffer,
}

impl Writer {
    pub(crate) fn new(client: Arc<Client>) -> Writer {
        let options = BlockOptions { queues: 1, queue_size: 64, bounce_size: SLOT, ..BlockOptions::default() };
        let machine = Machine::with_memory(client, GuestMemory::new(4 << 20, IOVA).unwrap(), &options);
        let buffer = machine.memory.allocate(BATCH * SLOT, 4096).unwrap();
        Writer { machine, buffer }
    }

    /// Writes a batch, then flushes; calls `answered` with each answer. Says whether all were answered: not if the server is
    /// `dead` meanwhile.
    pub(crate) fn write(&mut self, batch: u64, dead: &AtomicBool, mut answered: impl FnMut()) -> bool {
        let queue = &mut self.machine.queues[0];
        let slots = slots(batch);
        for (place, slot) in slots.iter().enumerate() {
            let bytes: Vec<u8> = (0..SLOT / SECTOR).flat_map(|index| sector(batch, *slot, index)).collect();
            self.buffer.write(place * SLOT, &bytes).unwrap();
            let data = [self.buffer.segment(place * SLOT, SLOT).unwrap()];
            let write = BlockRequest { kind: RequestType::Write, sector: (slot * SLOT / SECTOR) as u64, data: &data };
            queue.submit(&write).unwrap();
        }
        let flush = BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] };
        queue.publish().is_ok()
            && (0..slots.len()).all(|_| answer(queue, dead, &mut answered))
            && queue.submit(&flush).is_ok()
            && queue.publish().is_ok()
            && answer(queue, dead, &mut answered)
    }
}

/// Waits for an answer, or for the server's death.
fn answer(queue: &mut BlockQueue, dead: &AtomicBool, answered: &mut impl FnMut()) -> bool {
    let mut done = None;
    until("there is an answer", || {
        // In this order: what came before its death counts.
        let over = dead.load(Ordering::Acquire);
        done = queue.poll().unwrap();
        done.is_some() || over
    });
    if let Some(done) = &done {
        assert_eq!(done.status, OK);
        answered();
    }
    done.is_some()
}

fn image(folder: &Path, cache: &str) -> Vec<String> {
    let mut arguments = disk(&folder.join("blk.sock"));
    arguments.extend(["--blk-file".into(), folder.join("disk.img").display().to_string()]);
    arguments.extend(["--cache".into(), cache.into()]);
    arguments
}

fn kill_servers(rounds: u64) {
    for cache in ["none", "writeback", "writethrough"] {
        let folder = tempfile::tempdir().unwrap();
        kill_servers_of(folder, rounds, &|folder| image(folder, cache), |journal, folder| {
            journal.check(&folder.path().join("disk.img"));
            folder
        });
    }
}

/// Kills one server after the other; `check` holds what each leaves behind in the folder against the journal.
fn kill_servers_of(
    mut folder: TempDir,
    rounds: u64,
    arguments: &dyn Fn(&Path) -> Vec<String>,
    check: impl Fn(&Journal, TempDir) -> TempDir,
) -> TempDir {
    let mut random = Random::new(rounds);
    let mut journal = Journal::new();
    for round in 0..rounds {
        let server = Served::start_in(folder, arguments);
        let mut writer = Writer::new(server.client());
        let (dead, answers) = (AtomicBool::new(false), AtomicU64::new(0));
        let fatal = random.below(400);
        folder = thread::scope(|scope| {
            let (dead, answers) = (&dead, &answers);
            let killer = scope.spawn(move || {
                until("enough is answered", || answers.load(Ordering::Relaxed) >= fatal);
                server.signal(Signal::SIGKILL);
                let (status, _, folder) = server.wait();
                dead.store(true, Ordering::Release);
                assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
                folder
            });
            loop {
                let batch = journal.last + 1;
                journal.last = batch;
                let whole = writer.write(batch, dead, || {
                    answers.fetch_add(1, Ordering::Relaxed);
                });
                if !whole {
                    break;
                }
                journal.acknowledge(batch);
            }
            killer.join().unwrap()
        });
        assert!(answers.into_inner() >= fatal, "round {round}");
        folder = check(&journal, folder);
    }
    folder
}

fn overlay(folder: &Path, cache: &str) -> Vec<String> {
    let path = |name: &str| folder.join(name).display().to_string();
    let mut arguments = vec!["--socket-path".to_owned(), path("blk.sock"), "--cache".to_owned(), cache.to_owned()];
    arguments.extend(["--overlay-of".into(), path("golden.img"), "--overlay-file".into(), path("disk.cow")]);
    arguments
}

/// Kills servers of a kept overlay: what the next one finds in it is held against the journal.
fn kill_overlays(rounds: u64) {
    for cache in ["none", "writeback", "writethrough"] {
        let folder = tempfile::tempdir().unwrap();
        let golden = folder.path().join("golden.img");
        File::create(&golden).unwrap().set_len(DISK).unwrap();
        let arguments = |folder: &Path| overlay(folder, cache);
        let folder = kill_servers_of(folder, rounds, &arguments, |journal, folder| {
            let server = Served::start_in(folder, arguments);
            let options = BlockOptions { queues: 1, bounce_size: SLOT, ..BlockOptions::default() };
            let mut machine = Machine::new(server.client(), &options);
            let queue = &mut machine.queues[0];
            journal.check_slots(|slot, bytes| queue.read((slot * SLOT / SECTOR) as u64, bytes).unwrap());
            drop(machine);
            server.stop()
        });
        let golden = std::fs::read(folder.path().join("golden.img")).unwrap();
        assert!(golden.len() as u64 == DISK && golden.iter().all(|byte| *byte == 0), "the base was changed");
    }
}

#[test]
fn a_killed_server_has_lost_nothing_of_an_overlay_that_was_flushed() {
    kill_overlays(4);
}

#[test]
#[ignore = "takes minutes"]
fn soak_a_server_killed_three_hundred_times_has_lost_nothing_of_an_overlay() {
    kill_overlays(100);
}

#[test]
fn a_killed_server_has_lost_nothing_that_it_acknowledged() {
    kill_servers(4);
}

#[test]
#[ignore = "takes minutes"]
fn soak_a_server_killed_three_hundred_times_has_lost_nothing() {
    kill_servers(100);
}

fn kill_clients(rounds: u64) {
    for cache in ["none", "writeback"] {
        let server = Served::start(|folder| image(folder, cache));
        let before = server.holds_for_a_client();
        let mut random = Random::new(rounds);
        let mut journal = Journal::new();
        for _ in 0..rounds {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "crash::writer_that_is_killed", "--ignored", "--nocapture"])
                .env("CRASH_SOCKET", server.socket())
                .env("CRASH_FIRST", (journal.last + 1).to_string())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let mut output = BufReader::new(child.stdout.take().unwrap());
            let mut line = String::new();
            for _ in 0..random.below(6) {
                output.read_line(&mut line).unwrap();
            }
            child.kill().unwrap();
            child.wait().unwrap();
            output.read_to_string(&mut line).unwrap();
            // A line may have been cut off.
            let whole = line.rsplit_once('\n').map_or("", |(whole, _)| whole);
            for batch in whole.lines().filter_map(|line| line.strip_prefix("flushed ")) {
                journal.acknowledge(batch.parse().unwrap());
            }
            // The one that it was at, and the one before if its line did not get through.
            journal.last += 2;
            // The next client is served when all that the last has in flight is done.
            assert_eq!(server.holds_for_a_client(), before);
            journal.check(&server.folder().join("disk.img"));
        }
        // Still a disk for a driver that comes now.
        let mut writer = Writer::new(server.client());
        let batch = journal.last + 1;
        assert!(writer.write(batch, &AtomicBool::new(false), || {}));
        journal.acknowledge(batch);
        drop(writer);
        let folder = server.stop();
        journal.check(&folder.path().join("disk.img"));
    }
}

#[test]
fn killed_clients_leave_a_whole_disk_and_nothing_else() {
    kill_clients(15);
}

#[test]
#[ignore = "takes minutes"]
fn soak_a_thousand_killed_clients_leave_a_whole_disk_and_nothing_else() {
    kill_clients(500);
}

/// Run by the tests above: writes until it is killed.
#[test]
#[ignore = "runs until it is killed, for another test"]
fn writer_that_is_killed() {
    let socket = std::env::var("CRASH_SOCKET").expect("run by another test");
    let first: u64 = std::env::var("CRASH_FIRST").unwrap().parse().unwrap();
    let client = Client::connect(Path::new(&socket)).unwrap();
    client.set_timeout(LIMIT);
    let mut writer = Writer::new(Arc::new(client));
    let alive = AtomicBool::new(false);
    for batch in first.. {
        assert!(writer.write(batch, &alive, || {}));
        println!("flushed {batch}");
    }
}
