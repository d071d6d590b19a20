//! The process: its arguments, its sockets, its signals, and what it leaves.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use client::{BlockOptions, BlockRequest, RequestType};
use nix::sys::signal::Signal;

use crate::binary::{Served, disk, run};
use crate::protocol::in_step;
use crate::rig::{DISK, Machine, OK, completion, exercise};

fn strings(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|&argument| argument.to_owned()).collect()
}

/// Runs `serve` with arguments that it must refuse; gives what it says.
fn refused(arguments: &[&str]) -> String {
    let (status, said) = run(&[strings(&["serve"]), strings(arguments)].concat());
    assert!(status.code().is_some_and(|code| code != 0), "{arguments:?}: {status}");
    assert!(!said.contains("panicked") && !said.is_empty(), "{arguments:?}: {said}");
    said
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_configuration_file_describes_several_devices() {
    let server = Served::start(|folder| {
        let config = folder.join("server.toml");
        let devices = "workers = 1\n\
            [[device]]\nsocket_path = \"blk.sock\"\nsize = \"16M\"\nserial = \"first\"\n\
            [[device]]\nsocket_path = \"second.sock\"\nblk_file = \"second.img\"\nsize = \"32M\"\nnum_queues = 1\n";
        fs::write(&config, devices).unwrap();
        // The tests' own argument stands before these.
        strings(&["--config", text(&config)])
    });
    let mut first = Machine::new(server.client(), &BlockOptions::default());
    let second = client::Client::connect(&server.folder().join("second.sock")).unwrap();
    let mut second = Machine::new(second.into(), &BlockOptions::default());
    assert_eq!((first.queues.len(), second.queues.len()), (4, 1));
    assert_eq!(first.queues[0].get_id().unwrap()[..5], *b"first");
    assert_eq!(second.driver.config().unwrap().capacity, (32 << 20) / 512);
    exercise(&mut first.queues);
    exercise(&mut second.queues);
    // They are two disks.
    first.queues[0].write(100, &[1; 512]).unwrap();
    second.queues[0].write(100, &[2; 512]).unwrap();
    let mut sector = [0; 512];
    first.queues[0].read(100, &mut sector).unwrap();
    assert_eq!(sector, [1; 512]);
    // One client goes in the middle of things, the other goes on.
    first.queues[0].submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
    first.queues[0].publish().unwrap();
    drop(first);
    exercise(&mut second.queues);
    drop(second);
    let folder = server.stop();
    assert!(!folder.path().join("second.sock").exists());
    assert_eq!(fs::read(folder.path().join("second.img")).unwrap()[51200..51712], [2; 512]);
}

#[test]
fn it_says_how_to_attach_the_device() {
    let server = Served::start(|folder| disk(&folder.join("blk.sock")));
    let log = server.log();
    assert!(log.contains(&format!("listening on {}", server.socket().display())), "{log}");
    assert!(log.contains("\"driver\":\"vfio-user-pci\"") && log.contains("share=on"), "{log}");
    server.stop();
}

#[test]
fn a_dead_servers_socket_is_replaced_and_a_live_ones_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("blk.sock");
    drop(UnixListener::bind(&socket).unwrap());
    assert!(UnixStream::connect(&socket).is_err(), "stale");
    let server = Served::start_in(folder, |folder| disk(&folder.join("blk.sock")));
    let client = server.client();
    in_step(&client);
    let said = refused(&["--socket-path", text(server.socket()), "--size", "1M"]);
    assert!(said.contains("another server is listening") && said.contains(text(server.socket())), "{said}");
    // The live one has not noticed, with or without a client.
    in_step(&client);
    drop(client);
    assert!(refused(&["--socket-path", text(server.socket())]).contains("another server"));
    in_step(&server.client());
    // Killed, it leaves its socket, and the next takes over.
    server.signal(Signal::SIGKILL);
    let (status, _, folder) = server.wait();
    assert!(!status.success() && folder.path().join("blk.sock").exists());
    let server = Served::start_in(folder, |folder| disk(&folder.join("blk.sock")));
    in_step(&server.client());
    server.stop();
}

#[test]
fn what_is_no_socket_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("precious");
    fs::write(&path, "data").unwrap();
    assert!(refused(&["--socket-path", text(&path)]).contains("not a socket"));
    assert_eq!(fs::read(&path).unwrap(), b"data");
    let nowhere = folder.path().join("no/such/folder/blk.sock");
    assert!(refused(&["--socket-path", text(&nowhere)]).contains(text(&nowhere)));
}

/// In the middle of requests: what completed is in the file, the sockets are gone, and the exit is a good one.
#[test]
fn a_signal_ends_it_well() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        for cache in ["none", "writeback", "writethrough"] {
            let server = Served::start(|folder| {
                let mut arguments = disk(&folder.join("blk.sock"));
                let image = folder.join("disk.img");
                arguments.extend(strings(&["--blk-file", text(&image), "--cache", cache]));
                arguments
            });
            let mut machine = Machine::new(server.client(), &BlockOptions::default());
            let data = machine.memory.allocate(64 << 10, 4096).unwrap();
            data.fill(0xd7);
            let segment = [data.segment(0, data.len()).unwrap()];
            let queue = &mut machine.queues[0];
            let mut done = Vec::new();
            for slot in 0..60 {
                let write = BlockRequest { kind: RequestType::Write, sector: 128 * slot, data: &segment };
                let tag = queue.submit(&write).unwrap();
                done.resize(done.len().max(tag.index() + 1), None);
                done[tag.index()] = Some(slot);
            }
            queue.publish().unwrap();
            let first = completion(queue);
            server.signal(signal);
            let (status, log, folder) = server.wait();
            assert!(status.success(), "{signal} {cache}: {status}\n{log}");
            assert!(log.contains("stopping"), "{log}");
            assert!(!folder.path().join("blk.sock").exists());
            let image = fs::read(folder.path().join("disk.img")).unwrap();
            assert_eq!(image.len() as u64, DISK);
            let mut check = |completion: client::Completion| {
                assert_eq!(completion.status, OK);
                let slot = done[completion.tag.index()].take().unwrap() as usize;
                let at = slot << 16;
                assert!(image[at..at + (64 << 10)].iter().all(|byte| *byte == 0xd7), "write {slot} is lost");
            };
            check(first);
            // What was in flight was drained: it may have completed after the signal, too.
            while let Some(completion) = machine.queues[0].poll().unwrap() {
                check(completion);
            }
        }
    }
}

#[test]
fn an_idle_server_ends_at_once() {
    let server = Served::start(|folder| disk(&folder.join("blk.sock")));
    let waiting = UnixStream::connect(server.socket()).unwrap();
    server.stop();
    drop(waiting);
}

#[test]
fn bad_arguments_are_explained() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("blk.sock");
    let socket = text(&socket);
    let missing = folder.path().join("missing.img");
    let odd = folder.path().join("odd.img");
    fs::write(&odd, [0; 1000]).unwrap();
    let image = folder.path().join("disk.img");
    fs::write(&image, [0; 4096]).unwrap();
    for (arguments, words) in [
        (&["--size", "1M"][..], &["--socket-path"][..]),
        (&[], &["--socket-path"]),
        (&["--socket-path", socket, "--size", "big"], &["--size", "big", "512M"]),
        (&["--socket-path", socket, "--size", "1000"], &["1000", "512"]),
        (&["--socket-path", socket, "--num-queues", "0"], &["num_queues", "1 to 64"]),
        (&["--socket-path", socket, "--num-queues", "65"], &["num_queues", "1 to 64"]),
        (&["--socket-path", socket, "--queue-size", "100"], &["queue_size", "power of two"]),
        (&["--socket-path", socket, "--cache", "none"], &["cache", "file"]),
        (&["--socket-path", socket, "--cache", "fast"], &["--cache", "fast", "writeback"]),
        (&["--socket-path", socket, "--store", "tape"], &["--store", "tape", "memory"]),
        (&["--socket-path", socket, "--store", "file"], &["blk_file"]),
        (&["--socket-path", socket, "--serial", "more than twenty bytes"], &["serial", "20"]),
        (&["--socket-path", socket, "--workers", "0"], &["workers", "1 to 1024"]),
        (&["--socket-path", socket, "--blk-file", text(&missing)], &["missing.img", "size"]),
        (&["--socket-path", socket, "--blk-file", text(&odd)], &["odd.img", "1000"]),
        (&["--socket-path", socket, "--blk-file", text(folder.path())], &[text(folder.path())]),
        (&["--socket-path", socket, "--blk-file", text(&image), "--size", "8192"], &["disk.img", "4096", "8192"]),
        (&["--socket-path", socket, "--config", "a.toml"], &["--config", "--socket-path"]),
        (&["--socket-path", socket, "--turbo"], &["--turbo"]),
    ] {
        let said = refused(arguments);
        for word in words {
            assert!(said.contains(word), "{arguments:?} does not say {word:?}:\n{said}");
        }
        assert!(!Path::new(socket).exists(), "{arguments:?} left a socket");
    }
    assert!(!missing.exists());
}

#[test]
fn bad_configurations_are_explained() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("server.toml");
    for (config, words) in [
        ("", &["no device"][..]),
        ("workers = 0\n[[device]]\nsocket_path = \"a\"", &["workers"]),
        ("[[device]]\nsize = \"1M\"", &["socket_path"]),
        ("[[device]]\nsocket_path = \"a\"\ncolour = \"red\"", &["line 3", "colour"]),
        ("[[device]]\nsocket_path = \"a\"\nqueue_size = 100", &["device 1", "queue_size"]),
        ("[[device]]\nsocket_path = \"a\"\n[[device]]\nsocket_path = \"a\"", &["device 2", "socket_path"]),
        ("[[device]\n", &["line 1"]),
    ] {
        fs::write(&path, config).unwrap();
        let said = refused(&["--config", text(&path)]);
        for word in words.iter().chain(&["server.toml"]) {
            assert!(said.contains(word), "{config:?} does not say {word:?}:\n{said}");
        }
    }
    fs::remove_file(&path).unwrap();
    assert!(refused(&["--config", text(&path)]).contains("server.toml"));
}

/// All or nothing: no socket of a server whose last disk cannot be had.
#[test]
fn a_server_that_cannot_start_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("server.toml");
    let good = folder.path().join("good.sock");
    let config = format!(
        "[[device]]\nsocket_path = {:?}\n[[device]]\nsocket_path = {:?}\nblk_file = {:?}\n",
        text(&good),
        text(&folder.path().join("bad.sock")),
        text(&folder.path().join("missing.img")),
    );
    fs::write(&path, config).unwrap();
    assert!(refused(&["--config", text(&path)]).contains("missing.img"));
    assert!(!good.exists());
}

/// An image is one server's.
#[test]
fn an_image_in_use_is_refused() {
    let server = Served::start(|folder| {
        let mut arguments = disk(&folder.join("blk.sock"));
        arguments.extend(strings(&["--blk-file", text(&folder.join("disk.img"))]));
        arguments
    });
    let image = server.folder().join("disk.img");
    let other = server.folder().join("other.sock");
    let said = refused(&["--socket-path", text(&other), "--blk-file", text(&image)]);
    assert!(said.contains("disk.img"), "{said}");
    server.stop();
}
