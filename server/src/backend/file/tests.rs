//! What concerns files alone; the contract is tested for all stores together.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use super::*;
use crate::backend::Op;
use crate::backend::contract::{Guest, Rig};
use crate::backend::uring::{UringOptions, Waker};
use virtio::memory::{Access, PinnedBuffers};

fn options(path: &Path) -> FileOptions {
    FileOptions {
        path: path.to_owned(),
        read_only: false,
        cache: Cache::None,
        size: None,
        fixed_buffers: false,
        iopoll: false,
    }
}

fn refusal(options: &FileOptions) -> OpenFailure {
    FileStore::open(options).unwrap_err().reason
}

/// A store of `len` bytes, and its path in a directory of its own.
fn store(cache: Cache, len: u64) -> (tempfile::TempDir, PathBuf, FileStore) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let store = FileStore::open(&FileOptions { cache, size: Some(len), ..options(&path) }).unwrap();
    (dir, path, store)
}

#[test]
fn what_cannot_be_opened_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    assert!(matches!(refusal(&options(&path)), OpenFailure::Missing));
    let sized = FileOptions { size: Some(4096), ..options(&path) };
    assert!(matches!(refusal(&FileOptions { read_only: true, ..sized.clone() }), OpenFailure::Missing));
    assert!(matches!(refusal(&FileOptions { size: Some(513), ..sized.clone() }), OpenFailure::Size(513)));
    assert!(matches!(refusal(&FileOptions { size: Some(0), ..sized.clone() }), OpenFailure::Size(0)));
    assert!(matches!(refusal(&options(dir.path())), OpenFailure::NotAStore));
    assert!(matches!(refusal(&options(Path::new("/dev/null"))), OpenFailure::NotAStore));
    fs::write(&path, []).unwrap();
    assert!(matches!(refusal(&options(&path)), OpenFailure::Empty));
    fs::write(&path, [0; 1000]).unwrap();
    assert!(matches!(refusal(&options(&path)), OpenFailure::Unaligned(1000)));
    fs::write(&path, [0; 1024]).unwrap();
    assert!(matches!(refusal(&sized), OpenFailure::SizeDiffers { found: 1024, wanted: 4096 }));
    let message = FileStore::open(&sized).unwrap_err().to_string();
    assert!(message.contains("image: it has 1024 bytes, not 4096"), "{message}");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    if !nix::unistd::geteuid().is_root() {
        assert!(matches!(refusal(&options(&path)), OpenFailure::Permission { read_only: false }));
    }
}

#[test]
fn a_pipe_is_refused_without_waiting_for_its_other_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pipe");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(refusal(&options(&path)), OpenFailure::NotAStore));
}

#[test]
fn a_size_creates_a_sparse_file_once() {
    use std::os::unix::fs::MetadataExt;
    let (_dir, path, store) = store(Cache::None, 1 << 30);
    assert_eq!(store.info().capacity, 1 << 30);
    assert!(fs::metadata(&path).unwrap().blocks() < 64);
    drop(store);
    FileStore::open(&FileOptions { size: Some(1 << 30), ..options(&path) }).unwrap();
}

#[test]
fn writers_exclude_all_others() {
    let (_dir, path, store) = store(Cache::Writeback, 4096);
    let reading = FileOptions { read_only: true, ..options(&path) };
    assert!(matches!(refusal(&options(&path)), OpenFailure::Busy));
    assert!(matches!(refusal(&reading), OpenFailure::Busy));
    drop(store);
    let first = FileStore::open(&reading).unwrap();
    assert!(first.info().read_only && !first.info().discard);
    FileStore::open(&reading).unwrap();
    assert!(matches!(refusal(&options(&path)), OpenFailure::Busy));
}

#[test]
fn a_file_that_was_truncated_gives_errors() {
    for cache in [Cache::None, Cache::Writeback] {
        let (_dir, path, store) = store(cache, 1 << 20);
        OpenOptions::new().write(true).open(path).unwrap().set_len(4096 + 1024).unwrap();
        let mut rig = Rig::new(&store);
        for (offset, len) in [(8192, 512), (8192, 65536), (0, 65536), (4096, 4096), (4096 + 512, 1024)] {
            let buffers = rig.guest.buffers(&[(0, len)]);
            let error = rig.one(Op::Read { offset }, buffers).result.unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EIO));
        }
        let buffers = rig.guest.buffers(&[(0, 5120)]);
        rig.one(Op::Read { offset: 0 }, buffers).result.unwrap();
    }
}

#[test]
fn a_batch_takes_few_system_calls_and_a_device_that_waits_begins_at_once() {
    let (_dir, _path, store) = store(Cache::None, 1 << 20);
    let mut rig = Rig::new(&store);
    for round in 1..=3 {
        let before = rig.ring.system_calls();
        let mut calls = Vec::new();
        for n in 0..40 {
            let buffers = rig.guest.buffers(&[(n * 4096, 4096)]);
            rig.submit(Op::Read { offset: n * 4096 }, buffers).unwrap();
            calls.push(rig.ring.system_calls() - before);
        }
        // After 4, 8, 16 and 32: with as many as are at work.
        assert_eq!([2, 3, 7, 15, 30, 31, 39].map(|n| calls[n]), [0, 1, 2, 3, 3, 4, 4], "round {round}");
        rig.ring.submit().unwrap();
        assert_eq!(rig.ring.system_calls() - before, 5, "round {round}");
        rig.ring.submit().unwrap();
        assert!(rig.ring.system_calls() - before <= 6, "at most for completions that are ready");
        assert_eq!(rig.finish().len(), 40);
    }
}

/// Where there are polled queues, they are used; where there are none, the message names what to do.
#[test]
fn iopoll_works_or_is_refused_with_what_to_do() {
    let (dir, path, closed) = store(Cache::None, 1 << 20);
    drop(closed);
    let polled = FileOptions { iopoll: true, ..options(&path) };
    match FileStore::open(&polled) {
        Ok(store) => {
            let both = |waker: &Waker| Uring::with(waker, UringOptions { sqpoll: None, iopoll: true }).unwrap();
            let mut rig = Rig::on(&store, both);
            let buffers = rig.guest.buffers(&[(0, 4096)]);
            rig.one(Op::Read { offset: 0 }, buffers).result.unwrap();
        }
        Err(error) => {
            assert!(matches!(error.reason, OpenFailure::NoPolledQueues), "{error}");
            for word in ["iopoll", "poll_queues", path.to_str().unwrap()] {
                assert!(error.to_string().contains(word), "{error}");
            }
        }
    }
    // Direct I/O is the least that it takes.
    let cached = FileOptions { cache: Cache::Writeback, ..polled };
    assert!(matches!(refusal(&cached), OpenFailure::NoPolledQueues));
    drop(dir);
}

#[test]
fn iopoll_takes_a_ring_that_has_it() {
    let (_dir, _path, mut store) = store(Cache::None, 1 << 20);
    Arc::get_mut(&mut store.0).unwrap().iopoll = true;
    let ring = Rc::new(Uring::new(&Waker::new().unwrap()).unwrap());
    assert_eq!(store.attach(&ring, 0).map(drop).unwrap_err().kind(), io::ErrorKind::Unsupported);
    let ring = Uring::with(&Waker::new().unwrap(), UringOptions { sqpoll: None, iopoll: true }).unwrap();
    assert!(store.attach(&Rc::new(ring), 0).is_ok());
}

/// A store with fixed buffers, of 1 MiB, that numbers its sectors.
fn fixed_store() -> (tempfile::TempDir, FileStore) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let bytes: Vec<u8> = (0..1 << 20).map(|at| (at / 512) as u8).collect();
    fs::write(&path, bytes).unwrap();
    (dir, FileStore::open(&FileOptions { fixed_buffers: true, ..options(&path) }).unwrap())
}

fn check_read(rig: &mut Rig, pieces: &[(u64, u64)]) {
    let buffers = rig.guest.buffers(pieces);
    buffers.fill(0xff);
    let len = buffers.len() as usize;
    rig.one(Op::Read { offset: 512 * 7 }, buffers).result.unwrap();
    let mut read = vec![0; len];
    rig.guest.buffers(pieces).copy_to_slice(0, &mut read);
    assert!(read.iter().enumerate().all(|(at, byte)| usize::from(*byte) == 7 + at / 512));
}

#[test]
fn fixed_buffers_follow_the_file_of_guest_memory_and_go_with_it() {
    let (_dir, store) = fixed_store();
    let mut rig = Rig::new(&store);
    for _ in 0..3 {
        // Pieces of 16 MiB are registered when they are used first; a request across two goes without.
        rig.guest = Guest::of_bytes(40 << 20);
        assert_eq!(rig.ring.registered().1, 0);
        check_read(&mut rig, &[(4096, 8192)]);
        check_read(&mut rig, &[(0, 512), (65536, 512), (8192, 4096)]);
        assert_eq!(rig.ring.registered().1, 1);
        check_read(&mut rig, &[((16 << 20) - 4096, 8192)]);
        check_read(&mut rig, &[(0, 4096), (16 << 20, 4096)]);
        check_read(&mut rig, &[(0, 4096), (8192, 512), ((16 << 20) - 512, 1024)]);
        assert_eq!(rig.ring.registered().1, 1);
        check_read(&mut rig, &[((40 << 20) - 4096, 4096)]);
        assert_eq!(rig.ring.registered().1, 2);
        let old = std::mem::replace(&mut rig.guest, Guest::new());
        // In flight while the memory is taken away.
        let mut io = Guest::buffers(&mut { old }, &[(0, 4096)]);
        io.fill(0);
        rig.submit(Op::Read { offset: 0 }, io).unwrap();
        rig.ring.submit().unwrap();
        assert_eq!(rig.ring.registered().1, 2, "still in use");
        io = rig.finish().pop().unwrap().io.buffers;
        assert_eq!(rig.ring.registered().1, 2, "still in use");
        drop(io);
        // Even a thread that has nothing else to do wakes for it.
        while rig.ring.registered().1 > 0 {
            rig.ring.wait().unwrap();
        }
    }
}

#[test]
fn ranges_come_and_go_and_the_fixed_buffers_stay() {
    let (_dir, store) = fixed_store();
    let mut rig = Rig::new(&store);
    check_read(&mut rig, &[(0, 4096)]);
    rig.guest.remap(1 << 20);
    check_read(&mut rig, &[(1 << 20, 4096)]);
    assert_eq!(rig.ring.registered().1, 1);
    let other = std::mem::replace(&mut rig.guest, Guest::new());
    check_read(&mut rig, &[(0, 4096)]);
    assert_eq!(rig.ring.registered().1, 2, "two files");
    drop(other);
    while rig.ring.registered().1 > 1 {
        rig.ring.wait().unwrap();
    }
    check_read(&mut rig, &[(0, 4096)]);
    assert_eq!(rig.ring.registered().1, 1);
}

#[test]
fn memory_that_cannot_be_a_fixed_buffer_is_used_without() {
    let (dir, store) = fixed_store();
    let mut rig = Rig::new(&store);
    let path = dir.path().join("memory");
    fs::write(&path, [9; 8192]).unwrap();
    rig.guest = Guest::of_file(fs::File::open(path).unwrap(), Access::READ);
    let buffers = rig.guest.buffers(&[(0, 4096)]);
    rig.one(Op::Write { offset: 4096, durable: false }, buffers).result.unwrap();
    assert_eq!(rig.ring.registered().1, 0, "it cannot be written");
    rig.guest = Guest::new();
    let buffers = rig.guest.buffers(&[(0, 4096)]);
    rig.one(Op::Read { offset: 4096 }, buffers).result.unwrap();
    let mut read = [0; 4096];
    rig.guest.buffers(&[(0, 4096)]).copy_to_slice(0, &mut read);
    assert_eq!(read, [9; 4096]);
    assert_eq!(rig.ring.registered().1, 1);
}

#[test]
fn a_file_is_registered_as_long_as_a_backend_uses_it() {
    let (_dir, path, store) = store(Cache::None, 1 << 20);
    let mut rig = Rig::new(&store);
    assert_eq!(rig.ring.registered().0, 1);
    // More backends than the table has room for, of which the last go without.
    let backends: Vec<_> = (0..5000).map(|_| store.attach(&rig.ring, 0).unwrap()).collect();
    let registered = rig.ring.registered().0;
    assert!((256..5000).contains(&registered), "{registered}");
    let first = std::mem::replace(&mut rig.backend, backends.into_iter().last().unwrap());
    assert_eq!(rig.ring.registered().0, 1);
    let buffers = rig.guest.buffers(&[(0, 4096)]);
    rig.one(Op::Read { offset: 0 }, buffers).result.unwrap();
    rig.backend = first;
    let buffers = rig.guest.buffers(&[(0, 4096)]);
    rig.submit(Op::Read { offset: 0 }, buffers).unwrap();
    rig.backend = store.attach(&rig.ring, 0).unwrap();
    assert_eq!(rig.ring.registered().0, 2, "the one that is gone has a read in flight");
    drop((path, store));
    rig.forget();
    while rig.ring.registered().0 > 1 {
        rig.ring.wait().unwrap();
    }
}

/// All ways through the page cache and past it, one beside the other: each request sees what the ones before wrote.
#[test]
fn unaligned_requests_see_aligned_ones_and_the_reverse() {
    let (_dir, path, mut store) = store(Cache::None, 1 << 20);
    let opened = Arc::get_mut(&mut store.0).unwrap();
    let Some(direct) = &mut opened.direct else {
        panic!("no direct I/O in {}", path.display());
    };
    // As on a device with blocks of 4096 bytes.
    direct.alignment = Alignment { memory: 512, offset: 4096 };
    for (offset, len, fits) in [(0, 4096, true), (4096, 8192, true), (512, 4096, false), (0, 512, false)] {
        assert_eq!(opened.direct_for(offset, len).is_some(), fits, "{offset}+{len}");
    }
    let mut rig = Rig::new(&store);
    let second = fs::File::open(&path).unwrap();
    // (offset, length, first address): direct; cached, within a block; bounced; cached, across blocks.
    let ways = [(0, 8192, 0), (512, 512, 0), (0, 8192, 4), (4096 - 512, 1024, 8), (0, 1 << 18, 4), (0, 1 << 18, 0)];
    for (n, (offset, len, memory)) in ways.into_iter().enumerate() {
        for (from, (read_offset, read_len, read_memory)) in ways.into_iter().enumerate() {
            let fill = (n * ways.len() + from) as u8;
            let buffers = rig.guest.buffers(&[(memory, len)]);
            buffers.fill(fill);
            rig.one(Op::Write { offset, durable: false }, buffers).result.unwrap();
            let buffers = rig.guest.buffers(&[(read_memory, read_len)]);
            buffers.fill(!fill);
            rig.one(Op::Read { offset: read_offset }, buffers).result.unwrap();
            let mut read = vec![0; read_len as usize];
            rig.guest.buffers(&[(read_memory, read_len)]).copy_to_slice(0, &mut read);
            let mut expected = vec![0; read_len as usize];
            second.read_exact_at(&mut expected, read_offset).unwrap();
            assert_eq!(read, expected);
            let both = offset.max(read_offset)..(offset + len).min(read_offset + read_len);
            for at in both {
                assert_eq!(read[(at - read_offset) as usize], fill);
            }
        }
    }
}

#[test]
fn zeroes_are_written_where_none_can_be_made() {
    for cache in [Cache::None, Cache::Writeback] {
        let (_dir, path, store) = store(cache, 4 << 20);
        store.0.no_punch_hole.store(true, std::sync::atomic::Ordering::Relaxed);
        store.0.no_zero_range.store(true, std::sync::atomic::Ordering::Relaxed);
        let file = OpenOptions::new().write(true).read(true).open(path).unwrap();
        let mut rig = Rig::new(&store);
        for (offset, len) in [(512, 512), (0, 4 << 20), (4096, (2 << 20) + 512), (512, 0)] {
            file.write_all_at(&vec![0xff; 4 << 20], 0).unwrap();
            let op = Op::WriteZeroes { offset, len, unmap: true, durable: true };
            rig.one(op, PinnedBuffers::default()).result.unwrap();
            let mut bytes = vec![0; 4 << 20];
            file.read_exact_at(&mut bytes, 0).unwrap();
            for (at, byte) in (0..).zip(bytes) {
                assert_eq!(byte == 0, (offset..offset + len).contains(&at), "byte {at}");
            }
        }
    }
}

/// Bounds of the kernel: pieces (1024) and bytes (just below 2 GiB) that it takes at once.
#[test]
fn what_the_kernel_does_not_move_at_once_is_moved_in_turns() {
    const PIECE: u64 = 4 << 20;
    const PIECES: u64 = 520;
    let (_dir, path, store) = store(Cache::None, PIECE * PIECES);
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let end = [7; 4096];
    file.write_all_at(&end, PIECE * PIECES - 4096).unwrap();
    let mut rig = Rig::new(&store);
    // The same memory again and again, so that the last piece is what remains.
    let buffers = rig.guest.buffers(&vec![(0, PIECE); PIECES as usize]);
    assert!(buffers.len() > 1 << 31);
    rig.one(Op::Read { offset: 0 }, buffers).result.unwrap();
    let mut last = [0; 8192];
    rig.guest.buffers(&[(PIECE - 8192, 8192)]).copy_to_slice(0, &mut last);
    assert_eq!((last[4095], last[4096], last[8191]), (0, 7, 7));
}

#[test]
fn buffers_outlive_their_backend_until_the_kernel_is_done() {
    let (_dir, _path, store) = store(Cache::None, 1 << 20);
    let mut rig = Rig::new(&store);
    for n in 0..64 {
        let buffers = rig.guest.buffers(&[(n * 4096, 4096)]);
        rig.submit(Op::Read { offset: n * 4096 }, buffers).unwrap();
    }
    let Rig { ring, backend, guest, .. } = rig;
    let release = Guest::release(guest);
    // Not even submitted: the ring does that, and holds all of it until it has looked at the completions.
    drop(backend);
    assert!(!release.wait(std::time::Instant::now()));
    drop(store);
    drop(ring);
    assert!(release.wait(std::time::Instant::now()));
}

#[test]
fn a_slot_of_a_backend_that_is_gone_is_not_taken_for_anothers() {
    let (_dir, _path, store) = store(Cache::None, 1 << 20);
    let mut rig = Rig::new(&store);
    for round in 0..50 {
        for n in 0..8 {
            let buffers = rig.guest.buffers(&[(n * 4096, 4096)]);
            rig.submit(Op::Read { offset: 0 }, buffers).unwrap();
        }
        if round % 2 == 0 {
            rig.ring.submit().unwrap();
        }
        rig.backend = store.attach(&rig.ring, 0).unwrap();
        rig.forget();
        let buffers = rig.guest.buffers(&[(0, 512)]);
        rig.submit(Op::Read { offset: 512 }, buffers).unwrap();
        rig.ring.submit().unwrap();
        assert_eq!(rig.finish().len(), 1);
    }
}

#[test]
fn without_a_ring_there_is_no_backend() {
    let (_dir, _path, store) = store(Cache::None, 4096);
    let ring = Rc::new(Uring::without_kernel(&Waker::new().unwrap()));
    assert_eq!(store.attach(&ring, 0).map(drop).unwrap_err().kind(), io::ErrorKind::Unsupported);
}

/// `VFIO_USER_BLK_TEST_DEVICE=/dev/loop0 cargo test -p vfio-user-blk block_device -- --ignored`
#[test]
#[ignore = "needs a block device to overwrite, named by VFIO_USER_BLK_TEST_DEVICE"]
fn a_block_device_is_a_store() {
    let path = PathBuf::from(std::env::var_os("VFIO_USER_BLK_TEST_DEVICE").unwrap());
    for cache in [Cache::None, Cache::Writeback] {
        let store = FileStore::open(&FileOptions { cache, ..options(&path) }).unwrap();
        let info = store.info();
        println!("{info:?}, {:?}", store.0.direct);
        assert!(info.capacity >= 1 << 20);
        assert_eq!(store.0.direct.is_some(), cache == Cache::None);
        assert!(matches!(refusal(&options(&path)), OpenFailure::Busy));
        let mut rig = Rig::new(&store);
        for (offset, len, memory) in [(0, 1 << 20, 0), (4096, 8192, 4), (512, 512, 0), (3584, 1024, 8)] {
            for unmap in [false, true] {
                let buffers = rig.guest.buffers(&[(memory, len)]);
                buffers.fill(7);
                rig.one(Op::Write { offset, durable: unmap }, buffers).result.unwrap();
                rig.one(Op::Flush, PinnedBuffers::default()).result.unwrap();
                let zeroes = Op::WriteZeroes { offset: offset + len - 512, len: 512, unmap, durable: true };
                rig.one(zeroes, PinnedBuffers::default()).result.unwrap();
                let buffers = rig.guest.buffers(&[(memory, len)]);
                buffers.fill(9);
                rig.one(Op::Read { offset }, buffers).result.unwrap();
                let mut read = vec![0; len as usize];
                rig.guest.buffers(&[(memory, len)]).copy_to_slice(0, &mut read);
                let (sevens, zeroes) = read.split_at(len as usize - 512);
                assert!(sevens.iter().all(|byte| *byte == 7) && zeroes.iter().all(|byte| *byte == 0));
                rig.one(Op::Discard { offset, len }, PinnedBuffers::default()).result.unwrap();
            }
        }
    }
}
