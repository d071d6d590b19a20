//! Disks on block devices of the kernel's: loop devices, which need root.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use client::{BlockOptions, RequestType};
use nix::sys::signal::Signal;
use serde_json::json;
use vfio_user_blk::Server;
use vfio_user_blk::config::{Cache, ServerConfig};

use crate::binary::Served;
use crate::control::{ctl, done, operator, refused};
use crate::images::{qemu_img, random_bytes, random_operations};
use crate::rig::{DISK, IOERR, Machine, OK, Random, Rig, execute, exercise, ram, signalled, until};

/// A loop device, for as long as this lives.
struct Loop {
    device: PathBuf,
}

impl Loop {
    /// One on a file, with sectors of so many bytes; `None` where there is none to be had, which is said.
    fn new(file: &Path, sector: u32) -> Option<Loop> {
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show", "--sector-size", &sector.to_string()]).arg(file);
        let why = match losetup.output() {
            Ok(output) if output.status.success() => {
                let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
                return Some(Loop { device });
            }
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        println!("cannot run: no loop device (losetup, as root): {why}");
        None
    }
}

impl Loop {
    /// Has the device be as large as its file is by now.
    fn look(&self) {
        let looked = Command::new("losetup").arg("--set-capacity").arg(&self.device).status();
        assert!(looked.is_ok_and(|status| status.success()));
    }

    fn name(&self) -> String {
        self.device.display().to_string()
    }
}

/// Gives a file another length.
fn set_len(file: &Path, len: u64) {
    File::options().write(true).open(file).unwrap().set_len(len).unwrap();
}

fn capacity(machine: &Machine) -> u64 {
    machine.driver.config().unwrap().capacity * 512
}

/// How a read of the last sector before `end` ends.
fn last_sector(machine: &mut Machine, end: u64) -> u8 {
    let data = machine.memory.allocate(512, 512).unwrap();
    let segment = [data.segment(0, 512).unwrap()];
    execute(&mut machine.queues[0], RequestType::Read, end / 512 - 1, &segment).status
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("--detach").arg(&self.device).status();
        assert!(detached.is_ok_and(|status| status.success()), "{} is left", self.device.display());
    }
}

#[test]
fn a_disk_on_a_block_device_is_what_the_device_is() {
    for (seed, sector, cache) in [(8000, 512, Cache::None), (8100, 4096, Cache::None), (8200, 4096, Cache::Writeback)] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        File::create(&file).unwrap().set_len(DISK).unwrap();
        let Some(device) = Loop::new(&file, sector) else { return };
        let rig = Rig::devices(|folder| {
            let mut disk = ram(&folder.join("blk.sock"));
            (disk.size, disk.cache) = (None, Some(cache));
            disk.blk_file = Some(device.device.clone());
            vec![disk]
        });
        let mut machine = rig.boot();
        let config = machine.driver.config().unwrap();
        assert_eq!((config.capacity * 512, config.blk_size), (DISK, Some(sector)));

        let mut disk = vec![0; DISK as usize];
        random_operations(&mut machine.queues[0], &mut disk, seed, 1000);
        machine.queues[0].flush().unwrap();
        let mut stored = vec![0; DISK as usize];
        File::open(&file).unwrap().read_exact_at(&mut stored, 0).unwrap();
        assert!(stored == disk, "{sector}, {cache:?}");

        // What is given back is the device's, which gives it back to its file.
        for zeroes in [false, true] {
            let queue = &mut machine.queues[0];
            (0..DISK / 512).step_by(512).for_each(|at| queue.write(at, &[7; 1 << 18]).unwrap());
            queue.flush().unwrap();
            let full = fs::metadata(&file).unwrap().blocks();
            let sectors = (DISK / 512) as u32;
            if zeroes {
                queue.write_zeroes(0, sectors, true).unwrap()
            } else {
                queue.discard(0, sectors).unwrap()
            }
            queue.flush().unwrap();
            let left = fs::metadata(&file).unwrap().blocks();
            assert!(left < full / 4, "{zeroes}: {left} of {full} blocks are left");
        }

        // Nobody else may have it: neither another server nor what asks for it alone, as mount does.
        let alone = File::options().read(true).write(true).custom_flags(libc::O_EXCL).open(&device.device);
        assert_eq!(alone.unwrap_err().raw_os_error(), Some(libc::EBUSY));
        let mut second = ram(&folder.path().join("second.sock"));
        second.size = None;
        second.blk_file = Some(device.device.clone());
        let refused = Server::start(&ServerConfig::new(vec![second])).map(drop).unwrap_err().to_string();
        assert!(refused.contains("it is in use"), "{refused}");
        drop(machine);
        rig.stop();
    }
}

/// Nobody tells the server.
#[test]
fn a_block_device_that_grows_is_seen() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    File::create(&file).unwrap().set_len(DISK).unwrap();
    let Some(device) = Loop::new(&file, 512) else { return };
    let server = Served::start(|folder| {
        let path = |name: &str| folder.join(name).display().to_string();
        let mut arguments = vec!["--socket-path".into(), path("blk.sock"), "--blk-file".into(), device.name()];
        arguments.extend(["--control-socket".into(), path("control.sock"), "--num-queues".into(), "2".into()]);
        arguments
    });
    let mut operator = operator(&server);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    assert_eq!((capacity(&machine), last_sector(&mut machine, DISK + 512)), (DISK, IOERR));
    for grown in [DISK + 512, 2 * DISK] {
        set_len(&file, grown);
        device.look();
        assert_eq!(signalled(machine.driver.config_interrupt().unwrap()), 1);
        assert_eq!((capacity(&machine), last_sector(&mut machine, grown)), (grown, OK));
        server.wait_for(&format!("has grown to {grown} bytes, and so has the disk"));
    }
    machine.queues[1].write(2 * DISK / 512 - 1, &[0x2b; 512]).unwrap();
    exercise(&mut machine.queues);
    // Less than is served cannot be taken back from a guest: it is said, once, and requests fail.
    set_len(&file, DISK);
    device.look();
    server.wait_for("has become smaller");
    assert_eq!((capacity(&machine), last_sector(&mut machine, 2 * DISK)), (2 * DISK, IOERR));
    assert_eq!(last_sector(&mut machine, DISK), OK);
    // It is looked at all the time, also while the device is paused, and stays paused then.
    done(&mut operator, "device.pause", json!({ "device": "blk" }));
    set_len(&file, 3 * DISK);
    device.look();
    server.wait_for(&format!("has grown to {} bytes, and so has the disk", 3 * DISK));
    assert!(ctl(&server, &["list"]).1.contains("paused"));
    done(&mut operator, "device.resume", json!({ "device": "blk" }));
    assert_eq!((capacity(&machine), last_sector(&mut machine, 3 * DISK)), (3 * DISK, OK));
    exercise(&mut machine.queues);
    assert_eq!(server.log().matches("has become smaller").count(), 1);
    assert_eq!(server.threads("sizes").len(), 1);
    drop((machine, operator));
    server.stop();
}

/// Added to a server in its sandbox, whose thread that looks is there as long as there is a block device.
#[test]
fn a_block_device_that_is_added_is_seen_to_grow() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    File::create(&file).unwrap().set_len(DISK).unwrap();
    let Some(device) = Loop::new(&file, 512) else { return };
    let server = Served::start(|folder| {
        let path = |name: &str| folder.join(name).display().to_string();
        let mut arguments = vec!["--socket-path".into(), path("blk.sock"), "--size".into(), "1M".into()];
        arguments.extend(["--control-socket".into(), path("control.sock")]);
        for allowed in [path(""), device.name()] {
            arguments.extend(["--control-allow".into(), allowed]);
        }
        arguments
    });
    let socket = server.folder().join("added.sock");
    for round in 1..3 {
        assert!(server.threads("sizes").is_empty());
        let (_, out, err) = ctl(
            &server,
            &["add", "--socket-path", socket.to_str().unwrap(), "--blk-file", &device.name(), "--name", "added"],
        );
        assert!(err.is_empty() && out.contains("listens"), "{out}{err}");
        let mut machine = Machine::new(client::Client::connect(&socket).unwrap().into(), &BlockOptions::default());
        exercise(&mut machine.queues);
        set_len(&file, DISK + round * 4096);
        device.look();
        assert_eq!(signalled(machine.driver.config_interrupt().unwrap()), 1);
        assert_eq!(capacity(&machine), DISK + round * 4096);
        drop(machine);
        assert_eq!(ctl(&server, &["remove", "added", "--force"]).0, Some(0));
        until("nobody looks any more", || server.threads("sizes").is_empty());
    }
    server.stop();
}

/// A server of a kept overlay over a block device, whose operators may have that changed.
fn over(device: &Loop, size: u64) -> impl FnOnce(&Path) -> Vec<String> {
    let device = device.name();
    move |folder| {
        let path = |name: &str| folder.join(name).display().to_string();
        let words = [
            ("--socket-path", path("blk.sock")),
            ("--overlay-of", device.clone()),
            ("--overlay-file", path("a.cow")),
            ("--control-socket", path("control.sock")),
            ("--control-allow", device),
            ("--size", size.to_string()),
        ];
        words.into_iter().flat_map(|(option, value)| [option.to_owned(), value]).collect()
    }
}

/// Once as a whole, and cut off wherever it is.
#[test]
fn an_overlay_is_committed_onto_a_block_device() {
    let mut folder = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let file = elsewhere.path().join("file");
    let mut disk = random_bytes(61, DISK);
    fs::write(&file, &disk).unwrap();
    let Some(device) = Loop::new(&file, 512) else { return };
    let mut random = Random::new(62);
    let mut found = vec![0; DISK as usize];
    for round in 0..6 {
        let server = Served::start_in(folder, over(&device, DISK));
        let mut machine = Machine::new(server.client(), &BlockOptions::default());
        machine.queues[0].read(0, &mut found).unwrap();
        assert!(found == disk, "round {round}");
        random_operations(&mut machine.queues[0], &mut disk, 8300 + round, 300);
        machine.queues[0].flush().unwrap();
        let mut operator = operator(&server);
        if round == 0 {
            let committed = done(&mut operator, "device.commit", json!({ "device": "blk" }));
            assert!(committed["written"].as_u64() > Some(1 << 20), "{committed}");
            machine.queues[0].read(0, &mut found).unwrap();
            assert!(found == disk && fs::read(&file).unwrap() == disk);
        }
        drop(machine);
        folder = thread::scope(|scope| {
            let commit = scope.spawn(move || operator.call("device.commit", &json!({ "device": "blk" })).is_ok());
            for _ in 0..random.below(8000) {
                thread::yield_now();
            }
            server.signal(Signal::SIGKILL);
            let (_, _, folder) = server.wait();
            commit.join().unwrap();
            folder
        });
        for name in ["blk.sock", "control.sock"] {
            let _gone = fs::remove_file(folder.path().join(name));
        }
    }
    let server = Served::start_in(folder, over(&device, DISK));
    done(&mut operator(&server), "device.commit", json!({ "device": "blk" }));
    server.stop();
    assert!(fs::read(&file).unwrap() == disk);
}

#[test]
fn a_block_device_that_is_too_small_or_in_use_is_not_committed_onto() {
    let elsewhere = tempfile::tempdir().unwrap();
    let file = elsewhere.path().join("file");
    let bytes = random_bytes(63, DISK);
    fs::write(&file, &bytes).unwrap();
    let Some(device) = Loop::new(&file, 512) else { return };
    let server = Served::start(over(&device, DISK + 4096));
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    machine.queues[0].write(0, &[0x61; 4096]).unwrap();
    let mut operator = operator(&server);
    let (code, message) = refused(&mut operator, "device.commit", json!({ "device": "blk" }));
    assert!(code == 6 && message.contains("block device") && message.contains("copy the disk"), "{message}");
    // Nothing of it was begun: it can be discarded.
    done(&mut operator, "device.discard", json!({ "device": "blk", "force": true }));
    drop((machine, operator));
    server.stop();

    let server = Served::start(over(&device, DISK));
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    machine.queues[0].write(0, &[0x61; 4096]).unwrap();
    let alone = File::options().read(true).write(true).custom_flags(libc::O_EXCL).open(&device.device).unwrap();
    let mut operator = crate::control::operator(&server);
    let (_, message) = refused(&mut operator, "device.commit", json!({ "device": "blk" }));
    assert!(message.contains("busy"), "{message}");
    assert!(fs::read(&file).unwrap() == bytes);
    drop(alone);
    done(&mut operator, "device.commit", json!({ "device": "blk" }));
    assert!(fs::read(&file).unwrap()[..4096] == [0x61; 4096]);
    drop((machine, operator));
    server.stop();
}

/// An image on a block device has no room but what the device has.
#[test]
fn an_image_without_room_to_grow_stays_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    qemu_img(folder.path(), &["create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", "file", "16M"]);
    // Room for the data of the test, and none for another table.
    set_len(&file, fs::metadata(&file).unwrap().len().next_multiple_of(65536) + 2 * 65536);
    let Some(device) = Loop::new(&file, 512) else { return };
    let server = Served::start(|folder| {
        let path = |name: &str| folder.join(name).display().to_string();
        let mut arguments =
            vec!["--socket-path".into(), path("blk.sock"), "--control-socket".into(), path("control.sock")];
        arguments.extend(["--store".into(), "qcow2".into(), "--blk-file".into(), device.name()]);
        arguments
    });
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    let data: Vec<u8> = (0..65536).map(|n| n as u8).collect();
    machine.queues[0].write(0, &data).unwrap();
    machine.queues[0].flush().unwrap();
    let mut operator = operator(&server);
    for _ in 0..2 {
        let (code, message) = refused(&mut operator, "device.resize", json!({ "device": "blk", "size": "1T" }));
        assert!(code == 5 && message.contains("space"), "{message}");
        assert_eq!(capacity(&machine), DISK);
        let mut found = vec![0; 65536];
        machine.queues[1].read(0, &mut found).unwrap();
        assert!(found == data);
    }
    machine.queues[0].write(8, &[0x71; 512]).unwrap();
    drop((machine, operator));
    server.stop();
    drop(device);
    qemu_img(folder.path(), &["check", "file"]);
    qemu_img(folder.path(), &["convert", "-f", "qcow2", "-O", "raw", "file", "contents"]);
    let found = fs::read(folder.path().join("contents")).unwrap();
    assert!(found.len() as u64 == DISK && found[..4096] == data[..4096] && found[4096..4608] == [0x71; 512]);
}
