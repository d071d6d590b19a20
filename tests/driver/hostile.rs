//! Clients that mean harm: whatever one does to its own memory, its messages or its descriptors, the server stays, the next
//! client is served, and other devices' clients notice nothing.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use client::{BlockOptions, BlockRequest, Client, Error, GuestMemory, RequestType, Segment};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use vfio_user::{Command, DmaMap, IrqAction, IrqData, RegionSpan, Request, SetIrqs};

use crate::binary::Served;
use crate::protocol::{encoded, in_step, message};
use crate::rig::{IOVA, LIMIT, Machine, eventfd, exercise, until};

const GONE: &str = "memory of the client's is gone";
/// Where memory lies that goes away.
const FLEETING: u64 = 0x50_0000_0000;

/// A server of devices described by the lines of a table each: sockets `blk.sock`, `1.sock`, `2.sock` and so on.
fn serve(tables: &[&str]) -> Served {
    Served::start(|folder| {
        let table = |(number, lines): (usize, &&str)| {
            let socket = if number == 0 { "blk.sock".into() } else { format!("{number}.sock") };
            format!("[[device]]\nsocket_path = \"{socket}\"\nsize = \"16M\"\n{lines}\n")
        };
        let config = folder.join("server.toml");
        fs::write(&config, tables.iter().enumerate().map(table).collect::<String>()).unwrap();
        vec!["--config".into(), config.display().to_string()]
    })
}

fn client_of(server: &Served, number: usize) -> Arc<Client> {
    if number == 0 {
        return server.client();
    }
    let client = Client::connect(&server.folder().join(format!("{number}.sock"))).unwrap();
    client.set_timeout(LIMIT);
    Arc::new(client)
}

fn small() -> BlockOptions {
    BlockOptions { queue_size: 16, bounce_size: 16 << 10, ..BlockOptions::default() }
}

fn memfd(len: u64) -> File {
    let file = File::from(memfd_create(c"fleeting", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

fn range(address: u64, size: u64) -> DmaMap {
    DmaMap { readable: true, writeable: true, offset: 0, address, size }
}

fn refusal(result: Result<impl Sized, Error>) -> Option<Errno> {
    result.err().map(|error| error.errno().expect("an errno, and a connection that goes on"))
}

/// The server has hung up: every later call fails by that.
fn hung_up(client: &Client) -> bool {
    matches!(client.device_info(), Err(error) if error.errno().is_none())
}

/// A driver whose data lies in memory that has just become shorter asks for it to be read or written.
fn use_memory_that_is_gone(server: &Served, kind: RequestType, iova: u64, len: u32) {
    let mut machine = Machine::with_memory(server.client(), GuestMemory::new(1 << 20, IOVA).unwrap(), &small());
    let file = memfd(1 << 20);
    machine.client.dma_map(&range(FLEETING, 1 << 20), Some(file.as_fd())).unwrap();
    let queue = &mut machine.queues[0];
    queue.submit(&BlockRequest { kind, sector: 0, data: &[Segment { iova, len }] }).unwrap();
    file.set_len(0).unwrap();
    // A worker that is awake finds it before the kick, and the session may be over by then.
    let _gone = queue.publish();
    until("the session ends", || hung_up(&machine.client));
}

/// By our own hands (a disk in memory, a bounce buffer) and by the kernel's, through the page cache and past it.
#[test]
fn a_client_may_take_its_data_away_under_requests() {
    for lines in ["", "blk_file = \"a.img\"", "blk_file = \"a.img\"\ncache = \"writeback\""] {
        let server = serve(&[lines, ""]);
        let mut bystander = Machine::new(client_of(&server, 1), &small());
        in_step(&server.client());
        let before = server.resources();
        let mut ended = 0;
        for kind in [RequestType::Read, RequestType::Write] {
            for (iova, len) in [(FLEETING, 4096), (FLEETING + 1, 512), (FLEETING + 2048, 64 << 10)] {
                use_memory_that_is_gone(&server, kind, iova, len);
                ended += 1;
                exercise(&mut bystander.queues);
                let mut next =
                    Machine::with_memory(server.client(), GuestMemory::new(1 << 20, IOVA).unwrap(), &small());
                exercise(&mut next.queues);
            }
        }
        server.rests_with(before);
        let log = server.log();
        assert_eq!(log.matches(GONE).count(), ended, "once for each session:\n{log}");
        assert!(!log.contains("needs a reset"), "it is not the guest's fault:\n{log}");
        exercise(&mut bystander.queues);
        server.stop();
    }
}

/// The rings themselves, under a worker that sleeps and under one that looks at them all the time.
#[test]
fn a_client_may_take_its_rings_away() {
    for lines in ["poll = \"never\"", "poll = \"always\"", "poll = \"always\"\nblk_file = \"a.img\""] {
        let server = serve(&[lines, ""]);
        let mut bystander = Machine::new(client_of(&server, 1), &small());
        for round in 1..=10 {
            let machine = Machine::with_memory(server.client(), GuestMemory::new(1 << 20, IOVA).unwrap(), &small());
            // From here on the memory is not to be touched by us either.
            ftruncate(machine.memory.fd(), 0).unwrap();
            for queue in &machine.queues {
                // The server may have gone by then.
                let _gone = queue.doorbell().ring();
            }
            until("the session ends", || hung_up(&machine.client));
            exercise(&mut bystander.queues);
            until("it is said", || server.log().matches(GONE).count() == round);
            std::mem::forget(machine);
        }
        server.stop();
    }
}

/// Several devices' clients at once, while another does its work.
#[test]
fn many_clients_may_take_their_memory_away_at_once() {
    let server = serve(&["", "", "blk_file = \"a.img\"", ""]);
    let mut bystander = Machine::new(client_of(&server, 3), &small());
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let takers: Vec<_> = (0..3)
            .map(|number| {
                let server = &server;
                scope.spawn(move || {
                    for _ in 0..15 {
                        let memory = GuestMemory::new(1 << 20, IOVA).unwrap();
                        let machine = Machine::with_memory(client_of(server, number), memory, &small());
                        ftruncate(machine.memory.fd(), 0).unwrap();
                        until("the session ends", || {
                            let _gone = machine.queues[0].doorbell().ring();
                            hung_up(&machine.client)
                        });
                        std::mem::forget(machine);
                    }
                })
            })
            .collect();
        let over = &over;
        let bystander = &mut bystander;
        scope.spawn(move || {
            while !over.load(Ordering::Relaxed) {
                exercise(&mut bystander.queues);
            }
        });
        let results: Vec<_> = takers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        over.store(true, Ordering::Relaxed);
        results.into_iter().for_each(|result| result.unwrap());
    });
    server.stop();
}

#[test]
fn the_bytes_that_a_client_has_mapped_are_bounded() {
    let server = serve(&["max_guest_memory = \"1M\""]);
    let client = server.client();
    let (whole, part, other) = (memfd(1 << 20), memfd(768 << 10), memfd(512 << 10));
    assert_eq!(
        refusal(client.dma_map(&range(FLEETING, 4096), Some(memfd((1 << 20) + 1).as_fd()))),
        Some(Errno::ENOMEM)
    );
    client.dma_map(&range(FLEETING, 4096), Some(whole.as_fd())).unwrap();
    // A second range of the same file is no more of it.
    client.dma_map(&range(FLEETING + 4096, 4096), Some(whole.as_fd())).unwrap();
    assert_eq!(refusal(client.dma_map(&range(IOVA, 4096), Some(memfd(4096).as_fd()))), Some(Errno::ENOMEM));
    client.dma_unmap_all().unwrap();
    client.dma_map(&range(FLEETING, 4096), Some(part.as_fd())).unwrap();
    assert_eq!(refusal(client.dma_map(&range(IOVA, 4096), Some(other.as_fd()))), Some(Errno::ENOMEM));
    // No bytes of such a range are mapped.
    client.dma_map(&range(0x1000_0000_0000, 1 << 40), None).unwrap();
    in_step(&client);
    server.wait_for("--max-guest-memory");
    server.stop();
}

#[test]
fn the_descriptors_of_a_client_are_bounded() {
    let server = serve(&["max_fds = 4", ""]);
    let client = server.client();
    let files: Vec<_> = (0..5).map(|_| memfd(4096)).collect();
    let map = |index: usize| client.dma_map(&range(IOVA + 4096 * index as u64, 4096), Some(files[index].as_fd()));
    (0..4).for_each(|index| map(index).unwrap());
    assert_eq!(refusal(map(4)), Some(Errno::EMFILE));
    let event = eventfd();
    let lines = |count: u32| {
        let set = SetIrqs { action: IrqAction::Trigger, data: IrqData::EventFd, index: 2, start: 0, count };
        client.set_irqs(set, &vec![event.as_fd(); count as usize])
    };
    assert_eq!(refusal(lines(1)), Some(Errno::EMFILE));
    client.dma_unmap(IOVA, 2 * 4096).unwrap();
    assert_eq!(refusal(lines(3)), Some(Errno::EMFILE), "two are free");
    lines(2).unwrap();
    assert_eq!(refusal(map(4)), Some(Errno::EMFILE));
    in_step(&client);
    // The next client has all of them.
    drop(client);
    let client = server.client();
    for (index, file) in files.iter().take(4).enumerate() {
        client.dma_map(&range(IOVA + 4096 * index as u64, 4096), Some(file.as_fd())).unwrap();
    }
    server.stop();
}

/// A hundred thousand maps, of one file and of many.
#[test]
fn the_ranges_of_a_client_are_bounded() {
    let server = serve(&["max_dma_maps = 1000"]);
    let client = server.client();
    assert_eq!(client.server_capabilities().max_dma_maps(), 1000);
    let file = memfd(4096);
    let (mut taken, mut refused) = (0, 0);
    const AT_ONCE: u64 = 50;
    for first in (0..100_000).step_by(AT_ONCE as usize) {
        for id in first..first + AT_ONCE {
            let map = Request::DmaMap(range(IOVA + 0x2000 * id, 0x1000));
            client.send_raw(&encoded(id as u16, &map), &[file.as_fd()]).unwrap();
        }
        for _ in 0..AT_ONCE {
            match client.recv_raw(LIMIT).unwrap().unwrap().header.error() {
                None => taken += 1,
                Some(errno) => {
                    assert_eq!(errno, Errno::ENOSPC);
                    refused += 1;
                }
            }
        }
    }
    assert_eq!((taken, refused), (1000, 99_000));
    in_step(&client);
    // Nor does the log grow by a line for each.
    server.wait_for("--max-dma-maps");
    server.signal(nix::sys::signal::Signal::SIGTERM);
    let (status, log, _folder) = server.wait();
    assert!(status.success() && log.lines().count() < 5000, "{} lines", log.lines().count());
}

#[test]
fn the_messages_of_a_client_are_bounded() {
    let server = serve(&["max_data_xfer_size = \"4K\""]);
    let client = server.client();
    assert_eq!(client.server_capabilities().max_data_xfer_size(), 4096);
    let write = |len| message(3, Command::RegionWrite.number(), 0, &vec![0; len]);
    for (len, errno) in [(8192 - 16, Errno::EINVAL), (8192 - 15, Errno::EMSGSIZE)] {
        client.send_raw(&write(len), &[]).unwrap();
        assert_eq!(client.recv_raw(LIMIT).unwrap().unwrap().header.error(), Some(errno), "{len}");
        in_step(&client);
    }
    // Larger than an answer may be.
    for (count, expected) in [(4096, None), (4097, Some(Errno::EINVAL)), (0x4000, Some(Errno::EINVAL))] {
        assert_eq!(refusal(client.region_read(2, 0, &mut vec![0; count])), expected, "{count}");
        in_step(&client);
    }
    server.stop();
}

/// What a client makes the server keep: every range, the largest message in part, and answers that it does not read.
#[test]
fn the_memory_that_a_client_costs_is_bounded() {
    let server = serve(&["", ""]);
    in_step(&client_of(&server, 0));
    let before = server.resident();
    let client = client_of(&server, 0);
    let file = memfd(4096);
    const AT_ONCE: u64 = 64;
    for first in (0..65535).step_by(AT_ONCE as usize) {
        let ids = first..65535.min(first + AT_ONCE);
        for id in ids.clone() {
            let map = Request::DmaMap(range(IOVA + 0x2000 * id, 0x1000));
            client.send_raw(&encoded(id as u16, &map), &[file.as_fd()]).unwrap();
        }
        for _ in ids {
            assert_eq!(client.recv_raw(LIMIT).unwrap().unwrap().header.error(), None);
        }
    }
    client.set_timeout(Duration::from_millis(200));
    let span = RegionSpan { offset: 0, region: 2, count: 0x4000 };
    while client.send_raw(&encoded(1, &Request::RegionRead(span)), &[]).is_ok() {}
    let half = UnixStream::connect(server.folder().join("1.sock")).unwrap();
    let half = Client::from_stream(half).unwrap();
    let largest = message(1, Command::RegionWrite.number(), 0, &vec![0; 1 << 20]);
    half.send_raw(&largest[..largest.len() - 1], &[]).unwrap();
    let grown = server.resident().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes");
    drop(half);
    in_step(&client_of(&server, 1));
    server.stop();
}

/// A page of such a file may never come: FUSE, for one, asks a process of the client's for it.
#[test]
fn memory_on_other_file_systems_takes_the_operators_word() {
    // A file system on a disk, and one that is a process's own view of the kernel.
    let beside = std::env::current_exe().unwrap().with_file_name("guest-memory");
    let on_disk = File::options().read(true).write(true).create(true).truncate(true).open(&beside).unwrap();
    on_disk.set_len(1 << 20).unwrap();
    fs::remove_file(&beside).unwrap();
    let shm = File::options().read(true).write(true).create_new(true).open(shm_path()).unwrap();
    fs::remove_file(shm_path()).unwrap();
    shm.set_len(1 << 20).unwrap();
    let server = serve(&["", "any_memory_file = true"]);
    let (strict, lenient) = (client_of(&server, 0), client_of(&server, 1));
    let map = range(IOVA, 1 << 20);
    for kernel in ["/proc/self/maps", "/proc/version"] {
        let file = File::open(kernel).unwrap();
        assert_eq!(refusal(strict.dma_map(&map, Some(file.as_fd()))), Some(Errno::EACCES), "{kernel}");
    }
    assert!(refusal(lenient.dma_map(&map, Some(File::open("/proc/version").unwrap().as_fd()))).is_some());
    assert_eq!(refusal(strict.dma_map(&map, Some(on_disk.as_fd()))), Some(Errno::EACCES));
    lenient.dma_map(&map, Some(on_disk.as_fd())).unwrap();
    strict.dma_map(&map, Some(shm.as_fd())).unwrap();
    in_step(&strict);
    server.wait_for("--any-memory-file");
    server.stop();
}

fn shm_path() -> PathBuf {
    format!("/dev/shm/vfio-user-blk-test-{}", std::process::id()).into()
}

/// Descriptors of every kind in the place of an interrupt: none is taken that could hold up whoever writes to it.
#[test]
fn an_interrupt_is_an_eventfd() {
    let server = serve(&["", ""]);
    let client = server.client();
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let (socket, _peer) = UnixStream::pair().unwrap();
    let signals = nix::sys::signalfd::SignalFd::new(&nix::sys::signal::SigSet::empty()).unwrap();
    let terminal = File::options().read(true).write(true).open("/dev/ptmx").unwrap();
    let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty()).unwrap();
    // A file that has the name of what an eventfd is.
    let named = File::from(memfd_create(c"anon_inode:[eventfd]", MFdFlags::MFD_CLOEXEC).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let fake = File::create(folder.path().join("anon_inode:[eventfd]")).unwrap();
    let (null, open_folder) = (File::open("/dev/null").unwrap(), File::open(folder.path()).unwrap());
    let kinds: [(&str, BorrowedFd<'_>); 10] = [
        ("a pipe's end", reader.as_fd()),
        ("a pipe's other end", writer.as_fd()),
        ("a socket", socket.as_fd()),
        ("signals", signals.as_fd()),
        ("a terminal", terminal.as_fd()),
        ("an epoll", epoll.0.as_fd()),
        ("a memory file", named.as_fd()),
        ("a file", fake.as_fd()),
        ("a device", null.as_fd()),
        ("a folder", open_folder.as_fd()),
    ];
    for (what, fd) in kinds {
        for (action, index) in
            [(IrqAction::Trigger, 0), (IrqAction::Trigger, 2), (IrqAction::Mask, 0), (IrqAction::Unmask, 0)]
        {
            let set = SetIrqs { action, data: IrqData::EventFd, index, start: 0, count: 1 };
            assert_eq!(refusal(client.set_irqs(set, &[fd])), Some(Errno::EINVAL), "{what}: {action:?} {index}");
        }
        in_step(&client);
    }
    server.stop();
}

/// A client that fills the counter of its own eventfd and has writes to it wait: nobody else waits with it.
#[test]
fn an_interrupt_that_is_full_holds_nobody_up() {
    let server = Served::start(|folder| {
        let config = folder.join("server.toml");
        let device = |socket: &str| {
            format!("[[device]]\nsocket_path = \"{socket}\"\nsize = \"16M\"\nnum_queues = 2\nqueue_workers = [0]\n")
        };
        fs::write(&config, device("blk.sock") + &device("1.sock")).unwrap();
        vec!["--config".into(), config.display().to_string()]
    });
    let mut bystander = Machine::new(client_of(&server, 1), &small());
    let mut machine = Machine::new(server.client(), &small());
    let stuck = eventfd();
    let set = SetIrqs { action: IrqAction::Trigger, data: IrqData::EventFd, index: 2, start: 0, count: 1 };
    for vector in 0..3 {
        machine.client.set_irqs(SetIrqs { start: vector, ..set }, &[stuck.as_fd()]).unwrap();
    }
    // The server has made it non-blocking; the client, whose open file it is too, makes it what it was.
    stuck.write(u64::MAX - 1).unwrap();
    let flags = OFlag::from_bits_truncate(fcntl(&stuck, FcntlArg::F_GETFL).unwrap());
    assert!(flags.contains(OFlag::O_NONBLOCK));
    fcntl(&stuck, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK)).unwrap();
    for round in 0..20 {
        for queue in &mut machine.queues {
            queue.submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
            queue.publish().unwrap();
            queue.doorbell().ring().unwrap();
            until("it is done", || queue.ring().has_used());
            queue.poll().unwrap().unwrap();
        }
        // The session signals too.
        machine.client.set_irqs(SetIrqs { data: IrqData::None, ..set }, &[]).unwrap();
        exercise(&mut bystander.queues);
        assert!(round < 20);
    }
    drop(machine);
    in_step(&server.client());
    server.stop();
}

/// Messages without end, most of them broken, on one device: others go on, and the server still hears that it is to stop.
#[test]
fn a_flood_of_messages_is_its_senders_own_affair() {
    let server = serve(&["", ""]);
    let mut bystander = Machine::new(client_of(&server, 1), &small());
    let flood = {
        let kick = Request::RegionWrite(vfio_user::RegionData { offset: 0x3000, region: 2, data: &[0, 0] });
        let quiet = |bytes: Vec<u8>| {
            let mut bytes = bytes;
            bytes[8] |= 0x10;
            bytes
        };
        let mut bytes = quiet(encoded(1, &kick));
        bytes.extend(quiet(message(2, 77, 0, &[1; 40])));
        bytes.extend(quiet(encoded(3, &Request::DmaMap(range(IOVA + 1, 77)))));
        bytes.extend(quiet(message(4, 9, 0, &[0xff; 3])));
        bytes.extend(message(5, 9, 1, &[]));
        bytes.extend(quiet(encoded(6, &Request::DeviceReset)));
        bytes.repeat(20)
    };
    let client = server.client();
    thread::scope(|scope| {
        let (client, flood) = (&client, &flood);
        // Ends when the server hangs up.
        let sender = scope.spawn(move || (0..).take_while(|_| client.send_raw(flood, &[]).is_ok()).count());
        for _ in 0..100 {
            exercise(&mut bystander.queues);
        }
        server.signal(nix::sys::signal::Signal::SIGTERM);
        assert!(sender.join().unwrap() > 10);
    });
    let (status, log, _folder) = server.wait();
    assert!(status.success(), "{status}");
    assert!(log.lines().count() < 20_000, "{} lines", log.lines().count());
}

/// A message that never ends, and one that brings its descriptors bit by bit, keep only their own device busy.
#[test]
fn half_messages_are_waited_for_by_nobody_else() {
    let server = serve(&["", "", ""]);
    let map = encoded(1, &Request::DmaMap(range(IOVA, 4096)));
    let mut half = Vec::new();
    for (number, len) in [(1, 15), (2, map.len() - 1)] {
        let client = client_of(&server, number);
        let file = memfd(4096);
        client.send_raw(&map[..1], &[file.as_fd()]).unwrap();
        client.send_raw(&map[1..len], &[file.as_fd()]).unwrap();
        half.push(client);
    }
    let mut machine = Machine::new(server.client(), &small());
    exercise(&mut machine.queues);
    // With all of it, the second of them is judged: two descriptors for one range.
    half[1].send_raw(&map[map.len() - 1..], &[]).unwrap();
    assert_eq!(half[1].recv_raw(LIMIT).unwrap().unwrap().header.error(), Some(Errno::EINVAL));
    in_step(&half[1]);
    drop(machine);
    // The first is cut off by the end of the server.
    server.stop();
}

/// A server that may open few descriptors, and clients that have it keep as many as they can: what is refused is refused
/// to that client and at that time, and everything works again when they have gone.
#[test]
fn a_lack_of_descriptors_passes() {
    let server = Served::start_limited(|folder| {
        let config = folder.join("server.toml");
        let devices: String = (0..4)
            .map(|number| {
                let socket = if number == 0 { "blk.sock".into() } else { format!("{number}.sock") };
                format!("[[device]]\nsocket_path = \"{socket}\"\nsize = \"16M\"\nmax_fds = 1000\n")
            })
            .collect();
        fs::write(&config, devices).unwrap();
        vec!["--config".into(), config.display().to_string()]
    });
    in_step(&server.client());
    let mut bystander = Machine::new(client_of(&server, 3), &small());
    let hog = client_of(&server, 1);
    let files: Vec<_> = (0..200).map(|_| memfd(4096)).collect();
    let map = |client: &Client, index: usize| {
        client.dma_map(&range(IOVA + 4096 * index as u64, 4096), Some(files[index].as_fd()))
    };
    let refused = (0..200).find_map(|index| refusal(map(&hog, index)));
    assert_eq!(refused, Some(Errno::EMFILE));
    exercise(&mut bystander.queues);
    // Nobody else can be served just now, and is told so by the end of the connection, or waits.
    let late: Vec<_> = (0..5).map(|_| UnixStream::connect(server.folder().join("2.sock")).unwrap()).collect();
    server.wait_for("cannot accept a client");
    // Enough for a connection, and for nothing else.
    hog.dma_unmap(IOVA, 4096).unwrap();
    server.wait_for("cannot be served");
    exercise(&mut bystander.queues);
    drop(late);
    drop(hog);
    drop(bystander);
    // Each is served when nothing is left of the one before it.
    for number in [1, 2, 3] {
        in_step(&client_of(&server, number));
    }
    for number in 0..4 {
        let mut machine = Machine::new(client_of(&server, number), &small());
        exercise(&mut machine.queues);
    }
    let log = server.log();
    assert!(log.lines().count() < 500, "{} lines", log.lines().count());
    server.stop();
}

/// One visit of a client that leaves in whatever state it is in.
fn visit(server: &Served, kind: usize) {
    let socket = server.socket();
    match kind % 8 {
        // Gone at once.
        0 => drop(UnixStream::connect(socket).unwrap()),
        // In the middle of a message, with a descriptor on the way.
        1 => {
            let client = Client::connect(socket).unwrap();
            let map = encoded(1, &Request::DmaMap(range(IOVA, 4096)));
            client.send_raw(&map[..20], &[memfd(4096).as_fd()]).unwrap();
        }
        // Some files, ranges and interrupts.
        2 => {
            let client = Client::connect(socket).unwrap();
            for index in 0..3 {
                client.dma_map(&range(IOVA + 4096 * index, 4096), Some(memfd(4096).as_fd())).unwrap();
            }
            let event = eventfd();
            for (action, index) in [(IrqAction::Trigger, 2), (IrqAction::Mask, 0), (IrqAction::Unmask, 0)] {
                let set = SetIrqs { action, data: IrqData::EventFd, index, start: 0, count: 1 };
                client.set_irqs(set, &[event.as_fd()]).unwrap();
            }
            client.region_io_fds(2).unwrap();
        }
        // Refusals, with descriptors each.
        3 => {
            let client = Client::connect(socket).unwrap();
            let file = memfd(4096);
            assert!(client.dma_map(&range(IOVA, 8192), Some(file.as_fd())).is_err());
            let events: Vec<_> = (0..20).map(|_| eventfd()).collect();
            let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
            client.send_raw(&message(1, 99, 0, &[]), &fds).unwrap();
        }
        // Answers that nobody reads.
        4 => {
            let client = Client::connect(socket).unwrap();
            let span = RegionSpan { offset: 0, region: 2, count: 0x4000 };
            (0..20).for_each(|id| client.send_raw(&encoded(id, &Request::RegionRead(span)), &[]).unwrap());
        }
        // Memory taken away.
        5 => {
            let machine = Machine::with_memory(
                Arc::new(Client::connect(socket).unwrap()),
                GuestMemory::new(1 << 20, IOVA).unwrap(),
                &small(),
            );
            ftruncate(machine.memory.fd(), 0).unwrap();
            let _gone = machine.queues[0].doorbell().ring();
            machine.client.set_timeout(LIMIT);
            drop(machine.client);
        }
        // A driver in the middle of its work.
        _ => {
            let client = Arc::new(Client::connect(socket).unwrap());
            let mut machine = Machine::with_memory(client, GuestMemory::new(1 << 20, IOVA).unwrap(), &small());
            exercise(&mut machine.queues[..1]);
            let queue = &mut machine.queues[0];
            queue.submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
            queue.publish().unwrap();
        }
    }
}

fn visits_leave_nothing(count: usize) {
    let server = serve(&["blk_file = \"a.img\""]);
    (0..16).for_each(|kind| visit(&server, kind));
    let (before, resident) = (server.holds_for_a_client(), server.resident());
    (0..count).for_each(|kind| visit(&server, kind));
    assert_eq!(server.holds_for_a_client(), before);
    let grown = server.resident().saturating_sub(resident);
    assert!(grown < 16 << 20, "{grown} bytes more");
    server.stop();
}

#[test]
fn hundreds_of_hostile_visits_leave_nothing_behind() {
    visits_leave_nothing(400);
}

#[test]
#[ignore = "takes minutes"]
fn soak_ten_thousand_hostile_visits_leave_nothing_behind() {
    visits_leave_nothing(10_000);
}
