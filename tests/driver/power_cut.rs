//! A device whose power is cut while a driver works with it.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use client::{BlockOptions, BlockQueue, BlockRequest, Buffer, RequestType, Segment};
use serde_json::{Value, json};
use vfio_user_blk::control::ControlClient;

use crate::binary::{Served, command};
use crate::control::{done, refused};
use crate::rig::{DISK, Machine, OK, image_bytes};

/// Serves `disk.img`, whose power can be cut.
fn serve(more: &[&str]) -> (Served, ControlClient) {
    serve_in(tempfile::tempdir().unwrap(), more)
}

fn serve_in(folder: tempfile::TempDir, more: &[&str]) -> (Served, ControlClient) {
    let server = Served::start_in(folder, |folder| {
        let text = |name: &str| folder.join(name).display().to_string();
        let (socket, control, image) = (text("blk.sock"), text("control.sock"), text("disk.img"));
        let size = DISK.to_string();
        let words = ["--socket-path", &socket, "--control-socket", &control, "--blk-file", &image, "--size", &size];
        words.iter().chain(more).map(ToString::to_string).collect()
    });
    let operator = ControlClient::connect(&server.folder().join("control.sock")).unwrap();
    (server, operator)
}

fn image(folder: &Path) -> std::path::PathBuf {
    folder.join("disk.img")
}

fn filled(queue: &mut BlockQueue, sector: u64, byte: u8) {
    queue.write(sector, &[byte; 4096]).unwrap();
}

#[test]
fn what_was_flushed_survives_and_the_rest_does_not() {
    let (server, _operator) = serve(&["--power-cut"]);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    filled(&mut machine.queues[0], 0, 1);
    filled(&mut machine.queues[1], 8, 2);
    assert_eq!(image_bytes(&image(server.folder()), 0, 8192), [0; 8192], "they are in the cache");
    machine.queues[0].flush().unwrap();
    filled(&mut machine.queues[0], 8, 3);
    filled(&mut machine.queues[1], 16, 4);
    let mut bytes = [0; 4096];
    machine.queues[2].read(8, &mut bytes).unwrap();
    assert_eq!(bytes, [3; 4096]);

    let socket = server.folder().join("control.sock");
    let output =
        command().args(["ctl", "power-cut", "blk", "--mode", "drop", "--socket"]).arg(socket).output().unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(told.contains("of 2 writes that were not flushed 0 survive"), "{told}");
    server.wait_for("the client has gone");
    assert!(machine.client.reset().is_err(), "it is disconnected");
    drop(machine);

    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    for (sector, byte) in [(0, 1), (8, 2), (16, 0)] {
        machine.queues[0].read(sector, &mut bytes).unwrap();
        assert_eq!(bytes, [byte; 4096], "sector {sector}");
    }
    // The end of the service is no power cut.
    filled(&mut machine.queues[0], 24, 5);
    drop(machine);
    let folder = server.stop();
    assert_eq!(image_bytes(&image(folder.path()), 24 * 512, 4096), [5; 4096]);
}

/// Numbered records, each followed by a flush or not, until the power is cut; what was flushed is there.
#[test]
fn a_driver_at_work_loses_nothing_that_it_flushed() {
    for (seed, mode) in ["drop", "tear", "reorder", "reorder", "tear"].into_iter().enumerate() {
        let (server, mut operator) = serve(&["--power-cut", "--power-cut-cache", "64K"]);
        let mut machine = Machine::new(server.client(), &BlockOptions { queues: 2, ..BlockOptions::default() });
        let over = AtomicBool::new(false);
        let flushed = thread::scope(|scope| {
            let over = &over;
            let workers: Vec<_> = (0u64..)
                .zip(&mut machine.queues)
                .map(|(worker, queue)| {
                    let buffer = machine.memory.allocate(4096, 4096).unwrap();
                    scope.spawn(move || {
                        let (mut written, mut flushed) = (0, 0);
                        // At places of its own, each of which is written again and again.
                        while write(queue, &buffer, worker * 1024 + written % 100 * 8, written, over) {
                            written += 1;
                            if written % 7 == 0 {
                                if !execute(queue, RequestType::Flush, 0, &[], over) {
                                    break;
                                }
                                flushed = written;
                            }
                        }
                        (written, flushed)
                    })
                })
                .collect();
            // In the middle of it.
            loop {
                let statistics = done(&mut operator, "device.statistics", json!({ "device": "blk" }));
                let flushes = |queue: &Value| queue["flushes"].as_u64().unwrap();
                if statistics["queues"].as_array().unwrap()[..2].iter().all(|queue| flushes(queue) > 30) {
                    break;
                }
            }
            done(&mut operator, "device.power_cut", json!({ "device": "blk", "mode": mode, "seed": seed }));
            over.store(true, Ordering::SeqCst);
            workers.into_iter().map(|worker| worker.join().unwrap()).collect::<Vec<_>>()
        });
        drop(machine);
        let mut machine = Machine::new(server.client(), &BlockOptions::default());
        for (worker, (written, flushed)) in (0u64..).zip(flushed) {
            assert!(flushed > 100, "{flushed}");
            for place in 0..100 {
                let mut found = [0; 4096];
                machine.queues[0].read(worker * 1024 + place * 8, &mut found).unwrap();
                let last = |count: u64| (0..count).rev().find(|number| number % 100 == place).unwrap();
                // One more than was completed may have been on its way.
                let may: Vec<_> =
                    (last(flushed)..=written).filter(|number| number % 100 == place).map(record).collect();
                for (sector, found) in found.chunks(512).enumerate() {
                    let at = sector * 512..(sector + 1) * 512;
                    assert!(may.iter().any(|record| record[at.clone()] == *found), "{mode}: {worker} {place} {sector}");
                }
            }
        }
        drop(machine);
        server.stop();
    }
}

/// Whether the device does a request before its power is gone.
fn execute(queue: &mut BlockQueue, kind: RequestType, sector: u64, data: &[Segment], over: &AtomicBool) -> bool {
    if queue.submit(&BlockRequest { kind, sector, data }).is_err() || queue.publish().is_err() {
        return false;
    }
    // Nobody interrupts any more when it is gone.
    while !queue.wait(Duration::from_millis(20)).unwrap() {
        if over.load(Ordering::SeqCst) {
            return false;
        }
    }
    queue.poll().unwrap().unwrap().status == OK
}

fn write(queue: &mut BlockQueue, buffer: &Buffer, sector: u64, number: u64, over: &AtomicBool) -> bool {
    buffer.write(0, &record(number)).unwrap();
    execute(queue, RequestType::Write, sector, &[buffer.segment(0, 4096).unwrap()], over)
}

fn record(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(512)
}

#[test]
fn a_cut_without_a_client_and_of_what_cannot_be_cut() {
    let (server, mut operator) = serve(&["--power-cut"]);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    filled(&mut machine.queues[0], 0, 1);
    drop(machine);
    server.wait_for("the client has gone");
    let cut = done(&mut operator, "device.power_cut", json!({ "device": "blk" }));
    let nobody = server.folder().join("blk.sock").display().to_string();
    assert_eq!(cut, json!({ "device": nobody, "unflushed": 1, "whole": 0, "torn_sectors": null }));
    let (code, _) = refused(&mut operator, "device.power_cut", json!({ "device": "blk", "mode": "melt" }));
    assert_eq!(code, -32602);
    let folder = server.stop();
    assert_eq!(image_bytes(&image(folder.path()), 0, 4096), [0; 4096]);
    fs::remove_file(folder.path().join("disk.img")).unwrap();
    let (server, mut operator) = serve_in(folder, &[]);
    let (code, told) = refused(&mut operator, "device.power_cut", json!({ "device": "blk" }));
    assert!(code == 4 && told.contains("--power-cut"), "{told}");
    server.stop();
}

#[test]
fn it_can_be_resized_and_drained() {
    let (server, mut operator) = serve(&["--power-cut"]);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    filled(&mut machine.queues[0], 0, 1);
    done(&mut operator, "device.drain", json!({ "device": "blk" }));
    assert_eq!(image_bytes(&image(server.folder()), 0, 4096), [1; 4096]);
    done(&mut operator, "device.resume", json!({ "device": "blk" }));
    filled(&mut machine.queues[0], 8, 2);
    done(&mut operator, "device.resize", json!({ "device": "blk", "size": 2 * DISK }));
    filled(&mut machine.queues[0], DISK / 512, 3);
    machine.queues[1].flush().unwrap();
    assert_eq!(image_bytes(&image(server.folder()), DISK, 4096), [3; 4096]);
    assert_eq!(image_bytes(&image(server.folder()), 4096, 4096), [2; 4096]);
    drop(machine);
    server.stop();
}

/// A cache has more than the overlay behind it has room for.
#[test]
fn a_cache_goes_with_its_overlay() {
    let text = "overlay_of = \"golden.img\"\noverlay_limit = 8192\npower_cut = true\n";
    let (server, mut operator) = crate::on_error::serve(text);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    let fill = |machine: &mut Machine, byte: u8| {
        (0..5).for_each(|at| machine.queues[0].write(8 * at, &[byte; 4096]).unwrap());
    };
    let there = |machine: &mut Machine, byte: u8| {
        let mut bytes = vec![0; 5 * 4096];
        machine.queues[0].read(0, &mut bytes).unwrap();
        assert!(bytes == vec![byte; 5 * 4096], "{byte} is not there");
    };
    fill(&mut machine, 1);
    let (code, _) = refused(&mut operator, "device.discard", json!({ "device": "disk" }));
    assert_eq!(code, 2);
    there(&mut machine, 1);
    done(&mut operator, "device.discard", json!({ "device": "disk", "force": true }));
    there(&mut machine, 7);
    fill(&mut machine, 2);
    let committed = done(&mut operator, "device.commit", json!({ "device": "disk" }));
    assert_eq!(committed["written"], 5 * 4096);
    there(&mut machine, 2);
    drop(machine);
    let folder = server.stop();
    assert!(std::fs::read(folder.path().join("golden.img")).unwrap()[..5 * 4096] == [2; 5 * 4096]);
}
