use std::thread;
use std::time::{Duration, Instant};

use virtio::memory::PinnedBuffers;

use super::*;
use crate::backend::Op;
use crate::backend::contract::{Rig, pattern};
use crate::backend::moody::{Mood, Moody};

const MIB: u64 = 1 << 20;

fn store(on_error: OnError) -> (HoldStore, Arc<Mood>) {
    let moody = Moody::new(MIB);
    let mood = Arc::clone(&moody.mood);
    (HoldStore::new(Arc::new(moody), on_error, "disk"), mood)
}

/// Submits a write of a pattern, of 8 KiB.
fn submit(rig: &mut Rig, at: u64) {
    let buffers = rig.guest.buffers(&[(at, 4096), (at + MIB, 4096)]);
    buffers.copy_from_slice(0, &pattern(at, 8192));
    rig.submit(Op::Write { offset: at, durable: false }, buffers).unwrap();
}

/// Whether nothing comes, however often it is looked for.
fn is_silent(rig: &mut Rig) -> bool {
    rig.ring.submit().unwrap();
    (0..100).all(|_| rig.reap().is_empty())
}

#[test]
fn what_fails_waits_until_it_is_told_to_go_on() {
    let (store, mood) = store(OnError::Hold);
    let held = store.held();
    let (mut first, mut second) = (Rig::new(&store), Rig::new(&store));
    mood.fail(libc::ENOSPC);
    submit(&mut first, 0);
    submit(&mut second, 8192);
    submit(&mut first, 16384);
    assert!(is_silent(&mut first) && is_silent(&mut second));
    let HeldRequests { requests, error } = held.requests();
    assert!(requests == 3 && error.unwrap().contains("No space left"));
    assert_eq!(mood.failed(), 3, "they wait and do not try");
    // Others pass.
    mood.fail(0);
    let buffers = first.guest.buffers(&[(2 * MIB, 512)]);
    first.submit(Op::Read { offset: MIB - 512 }, buffers).unwrap();
    first.submit(Op::Flush, PinnedBuffers::default()).unwrap();
    first.ring.submit().unwrap();
    assert_eq!(first.reap().len(), 2);
    // Too early, and once more.
    mood.fail(libc::EIO);
    assert_eq!(held.resume(), 3);
    assert!(is_silent(&mut first) && is_silent(&mut second));
    assert_eq!(mood.failed(), 6);
    assert!(held.requests().error.unwrap().contains("Input/output"));
    mood.fail(0);
    assert_eq!(held.resume(), 3);
    for done in first.finish().into_iter().chain(second.finish()) {
        done.result.unwrap();
    }
    assert_eq!(held.requests(), HeldRequests::default());
    for at in [0, 8192, 16384] {
        assert_eq!(second.read(at, 8192), pattern(at, 8192), "whole, whatever of it was used up before");
    }
    assert_eq!(held.resume(), 0);
}

#[test]
fn going_on_wakes_who_sleeps() {
    let (store, mood) = store(OnError::Hold);
    let mut rig = Rig::new(&store);
    mood.fail(libc::EIO);
    submit(&mut rig, 0);
    assert!(is_silent(&mut rig));
    let held = store.held();
    thread::scope(|scope| {
        scope.spawn(|| {
            // When it sleeps, most likely; it must be woken whether or not.
            thread::sleep(Duration::from_millis(20));
            mood.fail(0);
            held.resume();
        });
        rig.finish().pop().unwrap().result.unwrap();
    });
}

#[test]
fn what_was_on_its_way_goes_on_too() {
    let (store, mood) = store(OnError::Hold);
    let mut rig = Rig::new(&store);
    mood.fail(libc::EIO);
    submit(&mut rig, 0);
    // It has failed, and nobody has looked yet.
    mood.fail(0);
    store.held().resume();
    rig.finish().pop().unwrap().result.unwrap();
    assert_eq!(rig.read(0, 8192), pattern(0, 8192));
    assert_eq!(store.held().requests(), HeldRequests::default());
}

#[test]
fn a_stop_ends_what_waits_with_its_error() {
    let (store, mood) = store(OnError::Hold);
    let mut rig = Rig::new(&store);
    mood.fail(libc::ENOSPC);
    submit(&mut rig, 0);
    assert!(is_silent(&mut rig));
    rig.backend.stop();
    mood.fail(libc::EIO);
    submit(&mut rig, 8192);
    rig.ring.submit().unwrap();
    let mut errors: Vec<_> =
        rig.finish().into_iter().map(|done| done.result.unwrap_err().raw_os_error().unwrap()).collect();
    errors.sort_unstable();
    assert_eq!(errors, [libc::EIO, libc::ENOSPC]);
    assert_eq!(store.held().requests(), HeldRequests::default());
}

#[test]
fn a_queue_that_is_dropped_leaves_nothing() {
    let (store, mood) = store(OnError::Retry(Duration::from_secs(3600)));
    let mut rig = Rig::new(&store);
    mood.fail(libc::EIO);
    submit(&mut rig, 0);
    assert!(is_silent(&mut rig));
    assert_eq!(store.held().requests().requests, 1);
    let Rig { ring, backend, guest, .. } = rig;
    let release = guest.release();
    drop(backend);
    assert!(release.wait(Instant::now()), "its memory is free at once");
    assert_eq!(store.held().requests(), HeldRequests::default());
    assert!(store.held().waiting().wakers.is_empty());
    let begun = Instant::now();
    drop(ring);
    assert!(begun.elapsed() < Duration::from_secs(4), "a timer kept it");
}

#[test]
fn what_the_guest_did_wrong_is_reported() {
    for on_error in [OnError::Hold, OnError::Retry(Duration::from_secs(3600))] {
        let (store, mood) = store(on_error);
        let mut rig = Rig::new(&store);
        for errno in [libc::EINVAL, libc::EFAULT, libc::EOPNOTSUPP] {
            mood.fail(errno);
            submit(&mut rig, 0);
            let error = rig.finish().pop().unwrap().result.unwrap_err();
            assert_eq!(error.raw_os_error(), Some(errno));
        }
    }
}

#[test]
fn it_is_tried_again_until_it_works() {
    let (store, mood) = store(OnError::Retry(Duration::from_secs(3600)));
    let mut rig = Rig::new(&store);
    mood.fail_times(libc::EIO, 5);
    let (begun, calls) = (Instant::now(), rig.ring.system_calls());
    submit(&mut rig, 0);
    rig.finish().pop().unwrap().result.unwrap();
    // 10 + 20 + 40 + 80 + 160 ms.
    assert!(begun.elapsed() >= Duration::from_millis(310), "{:?}", begun.elapsed());
    assert!(rig.ring.system_calls() - calls < 100, "it looked all the time");
    assert_eq!(rig.read(0, 8192), pattern(0, 8192));
    assert_eq!(store.held().requests(), HeldRequests::default());
    // At once, for who cannot wait.
    mood.fail_times(libc::EIO, 1);
    submit(&mut rig, 0);
    rig.ring.submit().unwrap();
    assert!(rig.reap().is_empty());
    store.held().resume();
    rig.ring.submit().unwrap();
    assert_eq!(rig.reap().len(), 1);
}

#[test]
fn it_is_not_tried_for_ever() {
    let deadline = Duration::from_millis(100);
    let (store, mood) = store(OnError::Retry(deadline));
    let mut rig = Rig::new(&store);
    mood.fail(libc::EIO);
    let begun = Instant::now();
    submit(&mut rig, 0);
    let error = rig.finish().pop().unwrap().result.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(begun.elapsed() >= deadline);
    // At 0, 10, 30, 70 and 100 ms.
    assert!((3..=5).contains(&mood.failed()), "{}", mood.failed());
    assert_eq!(store.held().requests(), HeldRequests::default());
}
