//! Servers that go, servers that are slow, servers that lie.

use std::thread;
use std::time::{Duration, Instant};

use virtio::memory::PinnedBuffers;

use super::testing::{ALL, Answer, Asked, Conduct, Server, chunk, simple};
use crate::backend::contract::Rig;
use crate::backend::{Op, Store};

const MIB: u64 = 1 << 20;
/// Guards against hanging only.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn without_several_connections_there_is_one_queue() {
    let server = Server::new(Conduct { flags: ALL & !(1 << 8), ..Conduct::honest(MIB) });
    assert_eq!(server.store().max_queues(), 1);
    server.conduct(|conduct| conduct.flags = ALL);
    assert_eq!(server.store().max_queues(), 8);
    assert_eq!(server.store_with(|options| options.connections = 3).max_queues(), 3);
}

#[test]
fn what_the_export_is_is_what_the_device_is() {
    let server = Server::new(Conduct { flags: 3, block_sizes: Some([4096, 65536, 65536]), ..Conduct::honest(MIB) });
    let info = server.store().info();
    assert_eq!((info.capacity, info.block_size, info.physical_block_size), (MIB, 4096, 65536));
    assert!(info.read_only && !info.discard && !info.write_zeroes_unmap);
    server.conduct(|conduct| (conduct.flags, conduct.block_sizes) = (ALL, None));
    let info = server.store().info();
    assert!(info.block_size == 512 && !info.read_only && info.discard && info.write_zeroes_unmap);
    assert!(server.store_with(|options| options.read_only = true).info().read_only);
}

#[test]
fn a_queue_hands_its_connection_on() {
    let server = Server::new(Conduct::honest(MIB));
    let store = server.store();
    for round in 0..3 {
        let mut rig = Rig::new(&store);
        rig.write(round * 4096, &[round as u8 + 1; 4096], false);
        assert_eq!(rig.read(round * 4096, 4096), [round as u8 + 1; 4096]);
    }
    assert_eq!(server.connections(), 1);
    store.flush().unwrap();
    assert_eq!(server.connections(), 1);
}

#[test]
fn connections_that_break_are_made_again_and_nobody_sees_it() {
    for (structured, requests) in [(true, 7), (false, 7), (true, 40), (false, 2)] {
        let server = Server::new(Conduct { requests, structured, ..Conduct::honest(MIB) });
        let store = server.store();
        let mut rig = Rig::new(&store);
        for round in 0..4 {
            for n in 0..32 {
                let buffers = rig.guest.buffers(&[(n * 4096, 4096)]);
                buffers.fill((round * 32 + n) as u8);
                rig.submit(Op::Write { offset: n * 4096, durable: n % 5 == 0 }, buffers).unwrap();
            }
            assert!(rig.finish().iter().all(|done| done.result.is_ok()));
            for n in 0..32 {
                assert_eq!(rig.read(n * 4096, 4096), [(round * 32 + n) as u8; 4096]);
            }
        }
        assert!(server.connections() > 256 / requests, "{} connections", server.connections());
    }
}

/// More than a socket holds: what is being sent fails besides what is being received.
#[test]
fn connections_that_break_in_the_middle_of_a_request_are_made_again() {
    for structured in [true, false] {
        let server = Server::new(Conduct { requests: 3, structured, ..Conduct::honest(MIB) });
        let mut rig = Rig::new(&server.store());
        for n in 0..16 {
            let buffers = rig.guest.buffers(&[(n * 65536, 65536)]);
            buffers.fill(n as u8 + 1);
            rig.submit(Op::Write { offset: n * 65536, durable: false }, buffers).unwrap();
        }
        assert!(rig.finish().iter().all(|done| done.result.is_ok()));
        assert!(server.stored().chunks(65536).enumerate().all(|(n, bytes)| bytes == [n as u8 + 1; 65536]));
    }
}

#[test]
fn a_server_that_is_started_anew_is_a_slow_disk() {
    let mut server = Server::new(Conduct::honest(MIB));
    let store = server.store();
    let mut rig = Rig::new(&store);
    rig.write(0, &[1; 4096], false);
    server.stop();
    let buffers = rig.guest.buffers(&[(0, 4096)]);
    buffers.fill(2);
    rig.submit(Op::Write { offset: 0, durable: false }, buffers).unwrap();
    rig.ring.submit().unwrap();
    assert!(rig.reap().is_empty());
    server.start();
    assert!(rig.finish().pop().unwrap().result.is_ok());
    assert_eq!(server.stored()[..4096], [2; 4096]);
}

#[test]
fn requests_fail_when_their_time_is_over() {
    let mut server = Server::new(Conduct::honest(MIB));
    let store = server.store_with(|options| options.deadline = Duration::from_secs(1));
    let mut rig = Rig::new(&store);
    // A server that is silent, and one that is gone.
    server.conduct(|conduct| conduct.answer = |_, _| Some(Vec::new()));
    server.hang_up();
    for _ in 0..2 {
        let since = Instant::now();
        let buffers = rig.guest.buffers(&[(0, 4096)]);
        let error = rig.one(Op::Read { offset: 0 }, buffers).result.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        assert!(since.elapsed() >= Duration::from_secs(1));
        server.stop();
    }
    server.conduct(|conduct| *conduct = Conduct::honest(MIB));
    server.start();
    // It comes back before the next requests fail, or with those after them.
    let limit = Instant::now() + LIMIT;
    loop {
        let buffers = rig.guest.buffers(&[(0, 4096)]);
        if rig.one(Op::Read { offset: 0 }, buffers).result.is_ok() {
            break;
        }
        assert!(Instant::now() < limit);
    }
}

/// A queue that is stopped ends soon, however long requests may wait otherwise.
#[test]
fn a_stop_does_not_wait_for_a_server() {
    for gone in [true, false] {
        let mut server = Server::new(Conduct { answer: |_, _| Some(Vec::new()), ..Conduct::honest(MIB) });
        let store = server.store_with(|options| options.deadline = Duration::from_secs(3600));
        let mut rig = Rig::new(&store);
        let buffers = rig.guest.buffers(&[(0, 4096)]);
        rig.submit(Op::Read { offset: 0 }, buffers).unwrap();
        rig.ring.submit().unwrap();
        assert!(rig.reap().is_empty());
        if gone {
            server.stop();
        }
        rig.backend.stop();
        assert!(rig.finish().pop().unwrap().result.is_err());
    }
}

#[test]
fn another_export_is_not_taken_for_the_same() {
    let server = Server::new(Conduct::honest(MIB));
    let store = server.store_with(|options| options.deadline = Duration::from_secs(1));
    let mut rig = Rig::new(&store);
    rig.write(0, &[1; 512], false);
    server.conduct(|conduct| conduct.size = MIB / 2);
    server.hang_up();
    let buffers = rig.guest.buffers(&[(0, 512)]);
    assert!(rig.one(Op::Read { offset: 0 }, buffers).result.is_err());
    server.conduct(|conduct| conduct.size = MIB);
}

#[test]
fn a_server_s_errors_are_the_guest_s() {
    let server = Server::new(Conduct { answer: |asked, _| Some(simple(asked, 28, &[])), ..Conduct::honest(MIB) });
    let mut rig = Rig::new(&server.store());
    let buffers = rig.guest.buffers(&[(0, 512)]);
    let error = rig.one(Op::Write { offset: 0, durable: false }, buffers).result.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    server.conduct(|conduct| {
        conduct.answer = |asked, _| {
            let error = [&5_u32.to_be_bytes()[..], &[0, 3], b"bad"].concat();
            Some([chunk(asked.cookie, 0, 1 << 15 | 1, &error), chunk(asked.cookie, 1, 0, &[])].concat())
        };
    });
    server.hang_up();
    let buffers = rig.guest.buffers(&[(0, 512)]);
    assert_eq!(rig.one(Op::Read { offset: 0 }, buffers).result.unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(server.connections(), 2, "an error is no reason to give a connection up");
}

#[test]
fn blocks_that_a_server_does_not_take_are_refused() {
    let server = Server::new(Conduct { block_sizes: Some([4096, 4096, 8192]), ..Conduct::honest(MIB) });
    let mut rig = Rig::new(&server.store());
    let buffers = rig.guest.buffers(&[(0, 512)]);
    assert_eq!(rig.one(Op::Read { offset: 0 }, buffers).result.unwrap_err().raw_os_error(), Some(libc::EINVAL));
    rig.write(4096, &[3; 65536], true);
    assert_eq!(rig.read(4096, 65536), [3; 65536]);
}

/// Each lie costs a connection, again and again, until the request has failed; never more than that.
#[test]
fn lies_end_connections_and_requests_but_nothing_else() {
    fn offset(asked: &Asked, by: u64) -> Vec<u8> {
        [&(asked.offset + by).to_be_bytes()[..], &asked.data].concat()
    }
    let lies: [Answer; 11] = [
        |_, _| Some(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
        |asked, _| Some(simple(&Asked { cookie: asked.cookie ^ 1 << 20, ..asked.clone() }, 0, &[])),
        |asked, _| Some(simple(asked, 0, &asked.data)),
        |asked, _| Some(chunk(asked.cookie, 1, 1, &offset(asked, 512))),
        |asked, _| Some(chunk(asked.cookie, 1, 1, &offset(asked, 0)[..8 + 100])),
        |asked, _| Some(chunk(asked.cookie, 0, 1, &offset(asked, 0)).repeat(2)),
        |asked, _| Some(chunk(asked.cookie, 1, 5, &[0; 64])),
        |asked, _| Some(chunk(asked.cookie, 1, 2, &[&asked.offset.to_be_bytes()[..], &[255; 4]].concat())),
        |asked, _| Some(chunk(asked.cookie, 1, 0, &[])),
        |asked, _| Some(chunk(asked.cookie, 1, 1, &offset(asked, 0)).repeat(2)),
        |_, _| None,
    ];
    for (number, answer) in lies.into_iter().enumerate() {
        let server = Server::new(Conduct { answer, ..Conduct::honest(MIB) });
        let store = server.store_with(|options| options.deadline = Duration::from_secs(1));
        let mut rig = Rig::new(&store);
        let around = rig.guest.buffers(&[(0, 16384)]);
        around.fill(0xee);
        let buffers = rig.guest.buffers(&[(4096, 4096)]);
        let result = rig.one(Op::Read { offset: 8192 }, buffers).result;
        // What comes after a good answer is the next request's trouble.
        assert_eq!(result.is_ok(), number == 9, "lie {number}");
        let mut bytes = vec![0; 16384];
        around.copy_to_slice(0, &mut bytes);
        assert!(bytes[..4096].iter().chain(&bytes[8192..]).all(|byte| *byte == 0xee), "lie {number}");
        server.conduct(|conduct| *conduct = Conduct::honest(MIB));
        server.hang_up();
        let limit = Instant::now() + LIMIT;
        loop {
            let buffers = rig.guest.buffers(&[(0, 512)]);
            if rig.one(Op::Read { offset: 0 }, buffers).result.is_ok() {
                break;
            }
            assert!(Instant::now() < limit, "lie {number}");
        }
    }
}

#[test]
fn the_last_flush_finds_a_server_that_was_started_anew() {
    let mut server = Server::new(Conduct::honest(MIB));
    let store = server.store();
    Rig::new(&store).write(0, &[1; 4096], false);
    server.stop();
    server.start();
    store.flush().unwrap();
    assert_eq!(server.connections(), 2);
    store.flush().unwrap();
    assert_eq!(server.connections(), 2, "nothing was written since");
    Rig::new(&store).write(0, &[2; 4096], false);
    server.stop();
    assert!(store.flush().is_err());
}

/// The thread ends with its store.
#[test]
fn nothing_is_left_behind() {
    let server = Server::new(Conduct::honest(MIB));
    let store = super::NbdStore::open(server.options()).unwrap();
    let thread = thread::spawn(store.service().unwrap().run);
    assert!(store.service().is_none());
    let mut rig = Rig::new(&store);
    rig.one(Op::Flush, PinnedBuffers::default()).result.unwrap();
    drop(rig);
    drop(store);
    thread.join().unwrap();
}
