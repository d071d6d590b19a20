//! Images that get another size while a driver uses them; files and memory are in `control`, block devices in `block_devices`.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use client::{BlockOptions, BlockQueue, RequestType};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vfio_user_blk::control::ControlClient;

use crate::binary::Served;
use crate::control::{done, operator, refused};
use crate::images::{answer, contents, qemu_img, random_bytes, random_operations};
use crate::rig::{DISK, IOERR, Machine, OK, Random, execute, exercise, signalled};

const SECTOR: u64 = 512;

/// Serves the image of a folder, in the sandbox.
fn arguments(more: &'static [&'static str]) -> impl FnOnce(&Path) -> Vec<String> {
    move |folder| {
        let path = |name: &str| folder.join(name).display().to_string();
        let image = path("image");
        let mut arguments =
            vec!["--socket-path".into(), path("blk.sock"), "--control-socket".into(), path("control.sock")];
        arguments.extend(["--store".into(), "qcow2".into(), "--blk-file".into(), image]);
        arguments.extend(more.iter().map(|word| (*word).to_owned()));
        arguments
    }
}

fn serve(more: &'static [&'static str], prepare: impl FnOnce(&Path)) -> Served {
    Served::start(|folder| {
        prepare(folder);
        arguments(more)(folder)
    })
}

fn resize(operator: &mut ControlClient, size: u64) -> Value {
    done(operator, "device.resize", json!({ "device": "blk", "size": size, "shrink": true }))
}

/// What QEMU says of an image's size.
fn virtual_size(folder: &Path, image: &str) -> u64 {
    let info = answer(folder, &["info", "--output=json", image]);
    serde_json::from_slice::<Value>(&info.stdout).unwrap()["virtual-size"].as_u64().unwrap()
}

fn read(queue: &mut BlockQueue, bytes: std::ops::Range<u64>) -> Vec<u8> {
    let mut read = vec![0x55; (bytes.end - bytes.start) as usize];
    for (place, piece) in read.chunks_mut(1 << 18).enumerate() {
        queue.read(bytes.start / SECTOR + (place as u64 * (1 << 18) / SECTOR), piece).unwrap();
    }
    read
}

/// How a request for the sector at `end` ends.
fn beyond(machine: &mut Machine, end: u64) -> u8 {
    let data = machine.memory.allocate(512, 512).unwrap();
    let segment = [data.segment(0, 512).unwrap()];
    execute(&mut machine.queues[1], RequestType::Read, end / SECTOR, &segment).status
}

fn capacity(machine: &Machine) -> u64 {
    machine.driver.config().unwrap().capacity * SECTOR
}

/// Of images of several kinds, whose last cluster is a whole one or not; also so large that their tables have to grow.
#[test]
fn an_image_grows_under_a_driver() {
    const GIB: u64 = 1 << 30;
    let kinds: [(&str, u64, u64, &'static [&'static str]); 4] = [
        ("cluster_size=64k", DISK, 600 * GIB, &[]),
        ("cluster_size=4k,refcount_bits=64", DISK / 2 + 7 * SECTOR, 20 * GIB, &["--cache", "writeback"]),
        ("cluster_size=512,refcount_bits=1", DISK / 2 + SECTOR, GIB / 4, &["--cache", "writethrough"]),
        ("cluster_size=2M,lazy_refcounts=on", DISK / 2 + 3 * SECTOR, 20 * GIB, &["--cache", "writeback"]),
    ];
    for (seed, (options, size, large, more)) in (9000..).zip(kinds) {
        let server = serve(more, |folder| {
            qemu_img(folder, &["create", "-q", "-f", "qcow2", "-o", options, "image", &size.to_string()]);
        });
        let mut operator = operator(&server);
        let mut machine = Machine::new(server.client(), &BlockOptions::default());
        let mut disk = vec![0; size as usize];
        random_operations(&mut machine.queues[0], &mut disk, seed, 300);
        for grown in [size + 2 * DISK, size + 2 * DISK + 8 * SECTOR] {
            assert_eq!(beyond(&mut machine, disk.len() as u64), IOERR);
            assert_eq!(resize(&mut operator, grown)["size"], grown);
            assert_eq!(signalled(machine.driver.config_interrupt().unwrap()), 1);
            assert_eq!((capacity(&machine), beyond(&mut machine, grown - SECTOR)), (grown, OK));
            disk.resize(grown as usize, 0);
            assert!(read(&mut machine.queues[1], 0..grown) == disk, "{options}");
            random_operations(&mut machine.queues[2], &mut disk, seed + 10, 300);
        }
        // Under requests of all queues.
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let busy = scope.spawn(|| {
                while !over.load(Ordering::Acquire) {
                    exercise(&mut machine.queues);
                }
            });
            let end = disk.len() as u64;
            (1..20).for_each(|n| assert_eq!(resize(&mut operator, end + n * 4096)["size"], end + n * 4096));
            assert_eq!(resize(&mut operator, large)["size"], large);
            over.store(true, Ordering::Release);
            busy.join().unwrap();
        });
        machine.queues[3].write(large / SECTOR - 2, &[0x3c; 1024]).unwrap();
        assert!(read(&mut machine.queues[0], large - 4096..large - 1024) == [0; 3072]);
        assert!(read(&mut machine.queues[0], disk.len() as u64..disk.len() as u64 + DISK) == [0; DISK as usize]);
        disk = read(&mut machine.queues[0], 0..disk.len() as u64);
        random_operations(&mut machine.queues[0], &mut disk, seed + 20, 300);
        drop((machine, operator));
        let folder = server.stop();
        assert_eq!(virtual_size(folder.path(), "image"), large);
        qemu_img(folder.path(), &["check", "image"]);
        // QEMU makes it as small again as can be compared.
        qemu_img(folder.path(), &["resize", "-q", "--shrink", "image", &disk.len().to_string()]);
        assert!(contents(folder.path(), "image") == disk, "{options}");
    }
}

/// Whoever made the image smaller has forgotten nothing of what he cut off.
#[test]
fn what_was_cut_off_does_not_come_back() {
    let bytes = random_bytes(23, DISK);
    let less = DISK / 4 + 3 * SECTOR;
    let server = serve(&[], |folder| {
        fs::write(folder.join("plain"), &bytes).unwrap();
        qemu_img(folder, &["convert", "-f", "raw", "-O", "qcow2", "plain", "image"]);
        let image = fs::File::options().write(true).open(folder.join("image")).unwrap();
        image.write_all_at(&less.to_be_bytes(), 24).unwrap();
        assert_eq!(virtual_size(folder, "image"), less);
    });
    let mut operator = operator(&server);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    let mut disk = bytes[..less as usize].to_vec();
    for grown in [less + SECTOR, DISK / 2, 2 * DISK] {
        resize(&mut operator, grown);
        disk.resize(grown as usize, 0);
        assert!(read(&mut machine.queues[0], 0..grown) == disk, "{grown}");
    }
    random_operations(&mut machine.queues[0], &mut disk, 9050, 300);
    drop((machine, operator));
    let folder = server.stop();
    assert!(contents(folder.path(), "image") == disk);
}

/// What lies below is no part of a disk that was smaller when it was made.
#[test]
fn an_image_that_grows_shows_nothing_more_of_those_below() {
    let base = random_bytes(21, DISK);
    for (seed, format, size) in
        [(9100, "raw", DISK / 2), (9110, "qcow2", DISK / 2 + 5 * SECTOR), (9120, "qcow2", DISK / 8)]
    {
        let server = serve(&[], |folder| {
            fs::write(folder.join("plain"), &base).unwrap();
            let convert = ["convert", "-c", "-f", "raw", "-O", format, "plain", "base"];
            qemu_img(folder, if format == "raw" { &["convert", "-O", "raw", "plain", "base"] } else { &convert });
            let create = ["create", "-q", "-f", "qcow2", "-F", format, "-b", "base", "image", &size.to_string()];
            qemu_img(folder, &create);
        });
        let below = fs::read(server.folder().join("base")).unwrap();
        let mut operator = operator(&server);
        let mut machine = Machine::new(server.client(), &BlockOptions::default());
        let mut disk = base[..size as usize].to_vec();
        for (n, grown) in [size + 4096, DISK - 4096, 2 * DISK].into_iter().enumerate() {
            resize(&mut operator, grown);
            disk.resize(grown as usize, 0);
            let found = read(&mut machine.queues[0], 0..grown);
            assert!(found == disk, "{format}: {size}, to {grown}");
            random_operations(&mut machine.queues[0], &mut disk, seed + n as u64, 200);
        }
        drop((machine, operator));
        let folder = server.stop();
        assert!(contents(folder.path(), "image") == disk, "{format}: {size}");
        assert!(fs::read(folder.path().join("base")).unwrap() == below, "what lies below has changed");
    }
}

#[test]
fn an_image_that_cannot_have_a_size_has_the_one_that_it_had() {
    let server = serve(&[], |folder| {
        qemu_img(folder, &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "image", "16M"]);
    });
    let mut operator = operator(&server);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    let mut disk = vec![0; DISK as usize];
    random_operations(&mut machine.queues[0], &mut disk, 9200, 300);
    let mut ask = |size: Value, shrink: bool| {
        refused(&mut operator, "device.resize", json!({ "device": "blk", "size": size, "shrink": shrink }))
    };
    for size in [json!(0), json!(1000), json!(DISK + 1), json!("1T"), json!(u64::MAX / 512 * 512)] {
        ask(size, true);
    }
    assert!(ask(json!("1T"), false).1.contains("137438953472 bytes at most"));
    let (code, message) = ask(json!(DISK / 2), false);
    assert!(code == 6 && message.contains("shrink"), "{message}");
    assert!(ask(json!(DISK / 2), true).1.contains("qemu-img resize --shrink"));
    // Nobody else changes it, so there is nothing to be looked for.
    assert_eq!(done(&mut operator, "device.resize", json!({ "device": "blk" }))["size"], DISK);
    assert_eq!(capacity(&machine), DISK);
    assert!(read(&mut machine.queues[0], 0..DISK) == disk);
    exercise(&mut machine.queues);
    disk = read(&mut machine.queues[0], 0..DISK);
    drop((machine, operator));
    let folder = server.stop();
    assert_eq!(virtual_size(folder.path(), "image"), DISK);
    assert!(contents(folder.path(), "image") == disk);
}

#[test]
fn what_is_only_read_and_what_lies_over_an_image_keeps_its_size() {
    for (more, words) in [
        (&["--store", "qcow2", "--blk-file", "image", "--read-only"][..], "read-only"),
        (&["--store", "vmdk", "--blk-file", "vmdk", "--read-only"], "read-only"),
        (&["--store", "qcow2", "--overlay-of", "image"], "the size that it was made with"),
    ] {
        let server = Served::start(|folder| {
            qemu_img(folder, &["create", "-q", "-f", "qcow2", "image", "16M"]);
            qemu_img(folder, &["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", "vmdk", "16M"]);
            let mut arguments = vec!["--socket-path", "blk.sock", "--control-socket", "control.sock"];
            arguments.extend(more);
            arguments.into_iter().map(String::from).collect()
        });
        let machine = Machine::new(server.client(), &BlockOptions::default());
        for size in [DISK / 2, 2 * DISK] {
            let params = json!({ "device": "blk", "size": size, "shrink": true });
            let (_, message) = refused(&mut operator(&server), "device.resize", params);
            assert!(message.contains(words), "{more:?}: {message}");
        }
        assert_eq!(capacity(&machine), DISK);
        drop(machine);
        let folder = server.stop();
        assert_eq!(virtual_size(folder.path(), "image"), DISK);
    }
}

#[test]
fn an_image_behind_layers_grows() {
    let more = ["--power-cut", "--on-error", "hold", "--limits", "iops=100000", "--fabric", "round_trip=20us"];
    let server = Served::start(|folder| {
        qemu_img(folder, &["create", "-q", "-f", "qcow2", "image", "16M"]);
        let mut arguments = arguments(&[])(folder);
        arguments.extend(more.map(String::from));
        arguments
    });
    let mut operator = operator(&server);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    let mut disk = vec![0; DISK as usize];
    random_operations(&mut machine.queues[0], &mut disk, 9300, 200);
    resize(&mut operator, 2 * DISK);
    disk.resize(2 * DISK as usize, 0);
    assert_eq!(signalled(machine.driver.config_interrupt().unwrap()), 1);
    assert!(read(&mut machine.queues[1], 0..2 * DISK) == disk);
    random_operations(&mut machine.queues[1], &mut disk, 9310, 200);
    drop((machine, operator));
    let folder = server.stop();
    assert!(contents(folder.path(), "image") == disk);
}

/// Wherever it is cut off, the image has one size or the other, all that it held, and nothing of those below that it did not show.
#[test]
fn a_server_killed_while_an_image_grows_leaves_one_size_or_the_other() {
    let base = random_bytes(22, DISK);
    let mut random = Random::new(31);
    let mut sizes = [0, 0];
    for _ in 0..12 {
        let server = serve(&[], |folder| {
            fs::write(folder.join("base"), &base).unwrap();
            let options = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-F", "raw", "-b", "base"];
            qemu_img(folder, &[&options[..], &["image", &(DISK / 2).to_string()]].concat());
        });
        let mut operator = operator(&server);
        let folder = thread::scope(|scope| {
            let grow = scope.spawn(move || {
                let _killed = operator.call("device.resize", &json!({ "device": "blk", "size": 2 * DISK }));
            });
            for _ in 0..random.below(8000) {
                thread::yield_now();
            }
            server.signal(Signal::SIGKILL);
            let (_, _, folder) = server.wait();
            grow.join().unwrap();
            folder
        });
        qemu_img(folder.path(), &["check", "-q", "-r", "all", "image"]);
        let size = virtual_size(folder.path(), "image");
        assert!([DISK / 2, 2 * DISK].contains(&size), "{size}");
        sizes[usize::from(size > DISK)] += 1;
        let mut disk = base[..DISK as usize / 2].to_vec();
        disk.resize(size as usize, 0);
        assert!(contents(folder.path(), "image") == disk, "{size}");
    }
    println!("{} had their old size, {} the new one", sizes[0], sizes[1]);
}
