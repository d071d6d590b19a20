//! Images: what a driver writes, QEMU's own tools must find, and the other way round.

use std::fs;
use std::path::Path;
use std::process::Output;

use client::{BlockOptions, BlockQueue, BlockRequest, RequestType};
use nix::sys::signal::Signal;
use testbed::{Progress, Tool};
use vfio_user_blk::config::{Cache, DeviceConfig, StoreKind};

use crate::binary::{Served, run};
use crate::io::run_all;
use crate::rig::{DISK, Machine, Random, Rig, ram};
use crate::workload::Workload;

const SECTOR: usize = 512;

/// What qemu-img answers in a folder.
pub(crate) fn answer(folder: &Path, arguments: &[&str]) -> Output {
    let mut qemu_img = Tool::QemuImg.command(&Progress::silent()).unwrap();
    qemu_img.current_dir(folder).args(arguments).output().unwrap()
}

/// Has qemu-img do something in a folder.
pub(crate) fn qemu_img(folder: &Path, arguments: &[&str]) {
    let output = answer(folder, arguments);
    assert!(output.status.success(), "qemu-img {arguments:?}: {output:?}");
}

/// A device on an image.
fn device(folder: &Path, store: StoreKind, image: &str, cache: Cache) -> DeviceConfig {
    let mut device = ram(&folder.join("blk.sock"));
    (device.store, device.size, device.cache) = (Some(store), None, Some(cache));
    device.blk_file = Some(folder.join(image));
    device
}

/// Serves the image of that name, which `prepare` makes.
fn serve(cache: Cache, image: &str, prepare: impl FnOnce(&Path)) -> Rig {
    Rig::devices(|folder| {
        prepare(folder);
        vec![device(folder, StoreKind::Qcow2, image, cache)]
    })
}

/// What is in an image, as QEMU reads it, after it has found no fault with it.
pub(crate) fn contents(folder: &Path, image: &str) -> Vec<u8> {
    qemu_img(folder, &["check", image]);
    qemu_img(folder, &["convert", "-O", "raw", image, "contents"]);
    fs::read(folder.join("contents")).unwrap()
}

/// Random bytes.
pub(crate) fn random_bytes(seed: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    Random::new(seed).fill(&mut bytes);
    bytes
}

/// Random operations of all kinds on a disk that holds `disk`, which is changed as the disk is to be.
pub(crate) fn random_operations(queue: &mut BlockQueue, disk: &mut [u8], seed: u64, count: usize) {
    let mut random = Random::new(seed);
    let sectors = (disk.len() / SECTOR) as u64;
    for n in 0..count {
        // Many small ones, some that cover clusters.
        let most = if random.below(4) == 0 { 512 } else { 24 };
        let len = 1 + random.below(most);
        let first = random.below(sectors - len + 1);
        let range = first as usize * SECTOR..(first + len) as usize * SECTOR;
        match random.below(16) {
            0..6 => {
                random.fill(&mut disk[range.clone()]);
                queue.write(first, &disk[range]).unwrap();
            }
            6..12 => {
                let mut read = vec![0; range.len()];
                queue.read(first, &mut read).unwrap();
                assert!(read == disk[range], "seed {seed}, operation {n}: sectors from {first} on, {len} of them");
            }
            kind @ (12 | 13) => {
                queue.write_zeroes(first, len as u32, kind == 12).unwrap();
                disk[range].fill(0);
            }
            14 => {
                queue.discard(first, len as u32).unwrap();
                // It holds anything now; what that is must last, as QEMU is asked too.
                queue.read(first, &mut disk[range]).unwrap();
            }
            _ => queue.flush().unwrap(),
        }
    }
    let mut all = vec![0; disk.len()];
    for (place, piece) in all.chunks_mut(1 << 18).enumerate() {
        queue.read((place * ((1 << 18) / SECTOR)) as u64, piece).unwrap();
    }
    assert!(all == disk, "seed {seed}");
}

#[test]
fn qemu_finds_in_an_image_what_was_written() {
    let size = DISK.to_string();
    let kinds = [
        ("", Cache::None),
        ("cluster_size=4k,refcount_bits=64", Cache::None),
        ("cluster_size=512,refcount_bits=1", Cache::Writeback),
        ("preallocation=metadata,lazy_refcounts=on", Cache::Writeback),
        ("cluster_size=2M", Cache::Writethrough),
    ];
    for (seed, (options, cache)) in (7000..).zip(kinds) {
        let rig = serve(cache, "image", |folder| {
            let mut create = vec!["create", "-q", "-f", "qcow2", "image", &size];
            if !options.is_empty() {
                create.extend(["-o", options]);
            }
            qemu_img(folder, &create);
        });
        let mut machine = rig.boot();
        let mut disk = vec![0; DISK as usize];
        random_operations(&mut machine.queues[0], &mut disk, seed, 1500);
        drop(machine);
        let folder = rig.stop();
        assert!(contents(folder.path(), "image") == disk, "{options:?}");
    }
}

#[test]
fn all_queues_of_an_image_at_once() {
    for (seed, cache) in [(7100, Cache::None), (7200, Cache::Writeback)] {
        let rig = serve(cache, "image", |folder| {
            qemu_img(folder, &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "image", "16M"]);
        });
        let mut machine = rig.boot();
        // Neighbouring queues meet within clusters.
        run_all(&mut machine, &Workload { seed, align: 1, sectors: 515, ..Workload::default() });
        let folder = rig.stop();
        qemu_img(folder.path(), &["check", "image"]);
    }
}

#[test]
fn an_image_takes_from_those_below_it_what_it_does_not_hold() {
    let mut disk = random_bytes(1, DISK);
    let base = disk.clone();
    // The one in the middle is smaller: what lies behind its end is zero, whatever the base holds.
    let (middle, size) = ((DISK / 2).to_string(), DISK.to_string());
    disk[(DISK / 2) as usize..].fill(0);
    let rig = serve(Cache::None, "below/middle", |folder| {
        fs::create_dir(folder.join("below")).unwrap();
        fs::write(folder.join("below/base"), &base).unwrap();
        // A name in an image is one beside the image.
        qemu_img(folder, &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base", "below/middle", &middle]);
    });
    let half = (DISK / 2) as usize;
    random_operations(&mut rig.boot().queues[0], &mut disk[..half], 7300, 1000);
    let folder = rig.stop();
    let below = |name: &str| fs::read(folder.path().join("below").join(name)).unwrap();
    assert!(below("base") == base);
    let middle = below("middle");

    qemu_img(folder.path(), &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "below/middle", "top", &size]);
    let (old, top) = (folder.path().to_owned(), folder.path().join("top"));
    let rig = Rig::devices(|folder| {
        let mut device = device(folder, StoreKind::Qcow2, "", Cache::None);
        device.blk_file = Some(top);
        vec![device]
    });
    random_operations(&mut rig.boot().queues[0], &mut disk, 7400, 2000);
    rig.stop();
    assert!(contents(&old, "top") == disk);
    assert!(below("base") == base && below("middle") == middle, "what lies below has changed");
}

#[test]
fn compressed_clusters_are_read_and_written_over() {
    let mut disk = vec![0; DISK as usize];
    for (n, sector) in disk.chunks_mut(SECTOR).enumerate() {
        sector.fill((n / 3) as u8);
    }
    let rig = serve(Cache::None, "image", |folder| {
        fs::write(folder.join("plain"), &disk).unwrap();
        qemu_img(folder, &["convert", "-c", "-f", "raw", "-O", "qcow2", "plain", "image"]);
        assert!(fs::metadata(folder.join("image")).unwrap().len() < DISK / 4);
    });
    random_operations(&mut rig.boot().queues[0], &mut disk, 7500, 1500);
    let folder = rig.stop();
    assert!(contents(folder.path(), "image") == disk);
}

#[test]
fn a_snapshot_in_an_image_stays_what_it_was() {
    let before = random_bytes(2, DISK);
    let mut disk = before.clone();
    let rig = serve(Cache::Writeback, "image", |folder| {
        fs::write(folder.join("plain"), &before).unwrap();
        qemu_img(folder, &["convert", "-f", "raw", "-O", "qcow2", "plain", "image"]);
        qemu_img(folder, &["snapshot", "-c", "before", "image"]);
    });
    random_operations(&mut rig.boot().queues[0], &mut disk, 7600, 1500);
    let folder = rig.stop();
    assert!(contents(folder.path(), "image") == disk);
    qemu_img(folder.path(), &["snapshot", "-a", "before", "image"]);
    assert!(contents(folder.path(), "image") == before);
}

#[test]
fn what_is_served_is_locked_against_qemu() {
    for (store, format) in [(StoreKind::Qcow2, "qcow2"), (StoreKind::File, "raw")] {
        let rig = Rig::devices(|folder| {
            qemu_img(folder, &["create", "-q", "-f", format, "image", "1M"]);
            vec![device(folder, store, "image", Cache::None)]
        });
        let folder = rig.image().parent().unwrap().to_owned();
        let resize = ["resize", "-q", "-f", format, "image", "2M"];
        let refused = answer(&folder, &resize);
        let told = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && told.contains("lock"), "{refused:?}");
        let folder = rig.stop();
        qemu_img(folder.path(), &resize);
    }
}

#[test]
fn a_killed_server_leaves_an_image_that_holds_what_was_flushed() {
    let served = Served::start(|folder| {
        qemu_img(folder, &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "image", "16M"]);
        ["--socket-path", "blk.sock", "--store", "qcow2", "--blk-file", "image"].map(String::from).to_vec()
    });
    let mut machine = Machine::new(served.client(), &BlockOptions::default());
    let mut disk = vec![0; DISK as usize];
    let queue = &mut machine.queues[0];
    random_operations(queue, &mut disk[..(DISK / 2) as usize], 7700, 500);
    queue.flush().unwrap();
    // The second half is written and not flushed, and requests are in flight when the server is killed.
    let buffer = machine.memory.allocate(4096, 4096).unwrap();
    let data = [buffer.segment(0, 4096).unwrap()];
    for n in 0..400 {
        let sector = DISK / 1024 + Random::new(n).below(DISK / 1024 / 8) * 8;
        let request = BlockRequest { kind: RequestType::Write, sector, data: &data };
        while queue.submit(&request).is_err() {
            queue.publish().unwrap();
            queue.wait(crate::rig::LIMIT).unwrap();
            while queue.poll().unwrap().is_some() {}
        }
    }
    queue.publish().unwrap();
    served.signal(Signal::SIGKILL);
    let (_, log, folder) = served.wait();
    assert!(!log.contains("panicked"), "{log}");
    // What it has not closed nobody takes for whole, before it is mended.
    let path = folder.path().join("image").display().to_string();
    let arguments = ["serve", "--socket-path", "/nowhere/blk.sock", "--store", "qcow2", "--blk-file", &path];
    let (status, told) = run(&arguments.map(String::from));
    assert!(!status.success() && told.contains("qemu-img check -r all"), "{told}");
    qemu_img(folder.path(), &["check", "-q", "-r", "all", "image"]);
    let half = (DISK / 2) as usize;
    assert!(contents(folder.path(), "image")[..half] == disk[..half]);
}

#[test]
fn a_vmdk_of_plain_extents_is_read() {
    let disk = random_bytes(3, DISK);
    let rig = Rig::devices(|folder| {
        fs::write(folder.join("plain"), &disk).unwrap();
        qemu_img(folder, &["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", "plain", "image"]);
        let mut device = device(folder, StoreKind::Vmdk, "image", Cache::None);
        device.read_only = true;
        vec![device]
    });
    let mut machine = rig.boot();
    let mut read = vec![0; 1 << 18];
    for (place, expected) in disk.chunks(1 << 18).enumerate() {
        machine.queues[0].read((place << 18 >> 9) as u64, &mut read).unwrap();
        assert!(read == expected);
    }
    assert!(machine.queues[0].write(0, &[0; SECTOR]).is_err());
}

/// What is not there is an image of zeroes, made as large as was asked for.
#[test]
fn an_image_is_created_if_it_has_a_size() {
    let rig = Rig::devices(|folder| {
        let mut device = device(folder, StoreKind::Qcow2, "new", Cache::None);
        device.size = Some(vfio_user_blk::config::Size(DISK));
        vec![device]
    });
    let mut disk = vec![0; DISK as usize];
    random_operations(&mut rig.boot().queues[0], &mut disk, 7800, 500);
    let folder = rig.stop();
    assert!(contents(folder.path(), "new") == disk);
}

/// Disks that start as copies of one image, which none of them changes.
#[test]
fn overlays_lie_over_an_image() {
    let mut bytes = random_bytes(11, DISK);
    let rig = Rig::devices(|folder| {
        fs::write(folder.join("raw"), &bytes).unwrap();
        qemu_img(folder, &["convert", "-c", "-O", "qcow2", "raw", "base.qcow2"]);
        qemu_img(folder, &["create", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "golden.qcow2"]);
        let overlay = |number: usize| DeviceConfig {
            overlay_of: Some(folder.join("golden.qcow2")),
            store: Some(StoreKind::Qcow2),
            ..DeviceConfig::new(folder.join(format!("blk{number}.sock")))
        };
        vec![overlay(0), overlay(1)]
    });
    let mut disk = bytes.clone();
    let mut machine = Machine::new(rig.client_of(0), &BlockOptions::default());
    random_operations(&mut machine.queues[0], &mut disk, 3, 2000);
    let mut found = vec![0; DISK as usize];
    machine.queues[1].read(0, &mut found).unwrap();
    assert!(found == disk);
    let mut other = Machine::new(rig.client_of(1), &BlockOptions::default());
    other.queues[0].read(0, &mut found).unwrap();
    assert!(found == bytes, "the other's changes are its own");
    random_operations(&mut other.queues[0], &mut bytes, 4, 500);
    drop((machine, other));
    let folder = rig.stop();
    assert!(contents(folder.path(), "golden.qcow2") == fs::read(folder.path().join("raw")).unwrap());
}
