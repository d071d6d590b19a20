//! Storage that fails, and requests that wait in the server until it is in order again.

use std::fs;
use std::time::{Duration, Instant};

use client::{BlockOptions, BlockQueue, BlockRequest, Buffer, RequestType};
use serde_json::{Value, json};
use vfio_user_blk::control::ControlClient;

use crate::binary::{Served, command};
use crate::control::done;
use crate::rig::{DISK, IOERR, Machine, OK, RINGS, completion, execute, exercise, until};

/// A server of a disk in memory that a file describes: `device` are lines of its table, and what follows that.
pub(crate) fn serve(device: &str) -> (Served, ControlClient) {
    let server = Served::start(|folder| {
        fs::write(folder.join("golden.img"), vec![7; DISK as usize]).unwrap();
        let path = folder.join("serve.toml");
        let text = format!(
            "control_socket = \"control.sock\"\ncontrol_allow = [\"golden.img\"]\n[[device]]\nsocket_path = \"blk.sock\"\nname = \"disk\"\nsize = {DISK}\n{device}"
        );
        fs::write(&path, text).unwrap();
        vec!["--config".into(), path.display().to_string()]
    });
    let operator = ControlClient::connect(&server.folder().join("control.sock")).unwrap();
    (server, operator)
}

/// Every first of so many writes fails.
fn failing(on_error: &str, every: u64) -> String {
    format!("{on_error}\n[[device.fault]]\nfault = \"eio\"\non = [\"write\"]\nevery = {every}\n")
}

/// Has the device do a write of 4 KiB, without waiting for it.
fn submit(queue: &mut BlockQueue, buffer: &Buffer, sector: u64) {
    let data = [buffer.segment(0, 4096).unwrap()];
    queue.submit(&BlockRequest { kind: RequestType::Write, sector, data: &data }).unwrap();
    queue.publish().unwrap();
}

fn held(operator: &mut ControlClient) -> Value {
    done(operator, "device.list", json!({}))["devices"][0]["held"].clone()
}

fn is_held(operator: &mut ControlClient, requests: u64, error: &str) {
    until("it is held", || held(operator)["error"].as_str().is_some_and(|told| told.contains(error)));
    assert_eq!(held(operator)["requests"], requests);
}

#[test]
fn a_full_disk_is_a_slow_one_until_there_is_room() {
    let (server, mut operator) = serve("overlay_of = \"golden.img\"\noverlay_limit = 8192\non_error = \"hold\"\n");
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    let buffer = machine.memory.allocate(4096, 4096).unwrap();
    buffer.write(0, &[5; 4096]).unwrap();
    let data = [buffer.segment(0, 4096).unwrap()];
    assert_eq!(held(&mut operator), json!({ "requests": 0, "error": null }));
    for sector in [0, 8] {
        assert_eq!(execute(&mut machine.queues[0], RequestType::Write, sector, &data).status, OK);
    }
    submit(&mut machine.queues[0], &buffer, 16);
    is_held(&mut operator, 1, "No space left");
    server.wait_for("vfio-user-blk ctl resume disk");
    // Reads and flushes pass it, and it is not there yet.
    let mut bytes = [0; 4096];
    machine.queues[1].read(16, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 4096]);
    machine.queues[1].flush().unwrap();
    assert_eq!(done(&mut operator, "device.resume", json!({ "device": "disk" }))["sent_again"], 1);
    is_held(&mut operator, 1, "No space left");
    assert!(machine.queues[0].poll().unwrap().is_none(), "there is still no room");
    machine.queues[1].discard(0, 8).unwrap();
    let socket = server.folder().join("control.sock");
    let ctl = |words: &[&str]| {
        let output = command().arg("ctl").arg("--socket").arg(&socket).args(words).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(ctl(&["list"]).contains("holds 1: No space left on device"));
    let told = ctl(&["resume", "disk"]);
    assert!(told.contains("1 that had failed"), "{told}");
    assert_eq!(completion(&mut machine.queues[0]).status, OK);
    machine.queues[1].read(16, &mut bytes).unwrap();
    assert_eq!(bytes, [5; 4096]);
    until("nothing is held", || held(&mut operator)["requests"] == 0);
    drop(machine);
    server.stop();
}

#[test]
fn a_full_overlay_is_emptied_while_a_write_is_held() {
    let (server, mut operator) = serve("overlay_of = \"golden.img\"\noverlay_limit = 8192\non_error = \"hold\"\n");
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    let disk = json!({ "device": "disk", "force": true });
    let mut expected = vec![7; DISK as usize];
    for (round, method) in (1..).zip(["device.commit", "device.discard", "device.commit"]) {
        // What was held before is there by now, and has room for itself only.
        done(&mut operator, "device.commit", json!({ "device": "disk" }));
        let before = expected.clone();
        let buffer = machine.memory.allocate(4096, 4096).unwrap();
        for (sector, byte) in [(0, round), (8, round + 10)] {
            machine.queues[0].write(sector, &[byte; 4096]).unwrap();
            expected[sector as usize * 512..][..4096].fill(byte);
        }
        buffer.write(0, &[round + 20; 4096]).unwrap();
        submit(&mut machine.queues[0], &buffer, 16);
        is_held(&mut operator, 1, "No space left");
        let params = if method == "device.commit" { json!({ "device": "disk" }) } else { disk.clone() };
        done(&mut operator, method, params);
        if method == "device.discard" {
            expected = before;
        }
        // Nobody has to say that it may go on.
        assert_eq!(completion(&mut machine.queues[0]).status, OK);
        expected[16 * 512..][..4096].fill(round + 20);
        until("nothing is held", || held(&mut operator) == json!({ "requests": 0, "error": null }));
        let mut bytes = vec![0; 64 * 512];
        machine.queues[1].read(0, &mut bytes).unwrap();
        assert!(bytes == expected[..bytes.len()], "{method}, round {round}");
    }
    drop(machine);
    let folder = server.stop();
    // What was held was written after the last commit: it is in the overlay, which has gone.
    expected[16 * 512..][..4096].fill(22);
    assert!(fs::read(folder.path().join("golden.img")).unwrap() == expected, "the base has what was committed");
}

#[test]
fn a_pause_puts_off_what_is_held_and_loses_nothing() {
    for features in RINGS {
        let (server, mut operator) =
            serve(&format!("packed = true\nin_order = true\nnum_queues = 1\n{}", failing("on_error = \"hold\"", 5)));
        let options = BlockOptions { features: BlockOptions::FEATURES | features, ..BlockOptions::default() };
        let mut machine = Machine::new(server.client(), &options);
        let disk = json!({ "device": "disk" });
        let buffer = machine.memory.allocate(4 * 4096, 4096).unwrap();
        for at in 0..3 {
            buffer.write(at * 4096, &[at as u8 + 1; 4096]).unwrap();
            let data = [buffer.segment(at * 4096, 4096).unwrap()];
            let request = BlockRequest { kind: RequestType::Write, sector: 8 * at as u64, data: &data };
            machine.queues[0].submit(&request).unwrap();
        }
        machine.queues[0].publish().unwrap();
        is_held(&mut operator, 1, "Input/output error");
        // The others pass, unless they may not.
        let in_order = features & BlockOptions::IN_ORDER != 0;
        let mut given_back = usize::from(!in_order) * 2;
        (0..given_back).for_each(|_| assert_eq!(completion(&mut machine.queues[0]).status, OK));
        for method in ["device.pause", "device.drain", "device.pause"] {
            assert_eq!(done(&mut operator, method, disk.clone())["paused"], true);
            assert_eq!(held(&mut operator), json!({ "requests": 1, "error": "Input/output error (os error 5)" }));
        }
        // What is behind it now waits in the ring.
        let data = [buffer.segment(3 * 4096, 4096).unwrap()];
        let request = BlockRequest { kind: RequestType::Read, sector: 0, data: &data };
        machine.queues[0].submit(&request).unwrap();
        machine.queues[0].publish().unwrap();
        assert!(machine.queues[0].poll().unwrap().is_none(), "the guest is told of nothing");
        let resumed = done(&mut operator, "device.resume", disk.clone());
        assert_eq!((&resumed["sent_again"], &resumed["paused"]), (&json!(1), &json!(false)));
        while given_back < 4 {
            assert_eq!(completion(&mut machine.queues[0]).status, OK);
            given_back += 1;
        }
        until("nothing is held", || held(&mut operator)["requests"] == 0);
        let mut bytes = [0; 3 * 4096];
        machine.queues[0].read(0, &mut bytes).unwrap();
        assert!(bytes.chunks(4096).zip(1..).all(|(piece, byte)| piece == [byte; 4096]));
        // A reset forgets what was put off.
        machine.queues[0].flush().unwrap();
        for sector in [0, 8] {
            submit(&mut machine.queues[0], &buffer, sector);
        }
        is_held(&mut operator, 1, "Input/output error");
        done(&mut operator, "device.pause", disk.clone());
        machine.client.reset().unwrap();
        assert_eq!(held(&mut operator), json!({ "requests": 0, "error": null }));
        done(&mut operator, "device.resume", disk);
        machine.reboot(&options);
        exercise(&mut machine.queues);
        drop(machine);
        server.stop();
    }
}

/// What waits behind them for room is put off in its turn; nothing wakes the worker in between.
#[test]
fn a_pause_puts_off_more_than_a_fabric_has_credits_for() {
    let device = format!(
        "num_queues = 1\npoll = \"never\"\nfabric = \"round_trip=1us,credits=2\"\n{}",
        failing("on_error = \"hold\"", 1)
    );
    let (server, mut operator) = serve(&device);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    let buffer = machine.memory.allocate(4096, 4096).unwrap();
    let data = [buffer.segment(0, 4096).unwrap()];
    for sector in 0..8 {
        let request = BlockRequest { kind: RequestType::Write, sector: 8 * sector, data: &data };
        machine.queues[0].submit(&request).unwrap();
    }
    machine.queues[0].publish().unwrap();
    is_held(&mut operator, 2, "Input/output error");
    let disk = json!({ "device": "disk" });
    assert_eq!(done(&mut operator, "device.pause", disk.clone())["paused"], true);
    assert_eq!(held(&mut operator)["requests"], 8);
    done(&mut operator, "device.fault.remove", json!({ "device": "disk", "all": true }));
    done(&mut operator, "device.resume", disk);
    (0..8).for_each(|_| assert_eq!(completion(&mut machine.queues[0]).status, OK));
    drop(machine);
    server.stop();
}

#[test]
fn what_was_put_off_may_have_no_place_any_more() {
    let (server, mut operator) = serve(&failing("on_error = \"hold\"", 9));
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    let buffer = machine.memory.allocate(4096, 4096).unwrap();
    submit(&mut machine.queues[0], &buffer, DISK / 512 - 8);
    is_held(&mut operator, 1, "Input/output error");
    done(&mut operator, "device.resize", json!({ "device": "disk", "size": DISK / 2, "shrink": true }));
    assert_eq!(completion(&mut machine.queues[0]).status, IOERR);
    drop(machine);
    server.stop();
}

#[test]
fn whoever_goes_does_not_wait_for_what_is_held() {
    for on_error in ["on_error = \"hold\"", "on_error = \"retry\"\nretry_deadline = 3600"] {
        let (server, mut operator) = serve(&failing(on_error, 1));
        let mut machine = Machine::new(server.client(), &BlockOptions::default());
        let begun = Instant::now();
        let fill = |machine: &mut Machine, operator: &mut ControlClient| {
            let buffer = machine.memory.allocate(4096, 4096).unwrap();
            (0..20).for_each(|sector| submit(&mut machine.queues[sector as usize % 2], &buffer, sector));
            until("they are held", || held(operator)["requests"] == 20);
        };
        // A reset of the driver's, and of the client's; the client goes; it is removed with one, and stops with one.
        fill(&mut machine, &mut operator);
        machine.reboot(&BlockOptions::default());
        assert_eq!(held(&mut operator)["requests"], 0);
        fill(&mut machine, &mut operator);
        machine.client.reset().unwrap();
        machine.reboot(&BlockOptions::default());
        fill(&mut machine, &mut operator);
        drop(machine);
        let mut machine = Machine::new(server.client(), &BlockOptions::default());
        machine.queues[0].flush().unwrap();
        assert_eq!(held(&mut operator)["requests"], 0);
        fill(&mut machine, &mut operator);
        done(&mut operator, "device.remove", json!({ "device": "disk", "force": true }));
        drop(machine);
        drop(operator);
        assert!(begun.elapsed() < Duration::from_secs(40), "it waited for its limits");
        server.stop();

        let (server, mut operator) = serve(&failing(on_error, 1));
        let mut machine = Machine::new(server.client(), &BlockOptions::default());
        fill(&mut machine, &mut operator);
        let begun = Instant::now();
        server.stop();
        assert!(begun.elapsed() < Duration::from_secs(20), "it waited for its limits");
        drop(machine);
    }
}

#[test]
fn a_disk_that_fails_now_and_then_is_tried_again() {
    let (server, mut operator) = serve(&failing("on_error = \"retry\"", 2));
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    exercise(&mut machine.queues);
    exercise(&mut machine.queues);
    assert_eq!(held(&mut operator)["requests"], 0);
    assert!(server.log().contains("while it is tried again"), "{}", server.log());
    drop(machine);
    server.stop();
    let (server, _operator) = serve(&failing("on_error = \"retry\"\nretry_deadline = 1", 1));
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    let buffer = machine.memory.allocate(4096, 4096).unwrap();
    let begun = Instant::now();
    let data = [buffer.segment(0, 4096).unwrap()];
    assert_eq!(execute(&mut machine.queues[0], RequestType::Write, 0, &data).status, IOERR);
    assert!(begun.elapsed() >= Duration::from_secs(1));
    server.wait_for("still fails");
    drop(machine);
    server.stop();
}
