//! What an operator has go wrong while a driver is at work, and that all is well again afterwards.

use std::time::{Duration, Instant};

use client::{BlockOptions, BlockQueue, BlockRequest, RequestType};
use serde_json::{Value, json};
use vfio_user_blk::control::ControlClient;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use crate::binary::Served;
use crate::control::{ctl, done, operator, refused, serve};
use crate::rig::{IOERR, LIMIT, Machine, OK, completion, count, exercise, given_back, signalled, until};

/// A server whose workers sleep when there is nothing to do.
fn sleepy() -> Served {
    serve(|_| ["--poll", "never"].map(str::to_owned).into())
}

/// A driver that is interrupted for each batch once it has asked.
fn interrupted(server: &Served) -> Machine {
    let features = BlockOptions::FEATURES & !(1 << VIRTIO_RING_F_EVENT_IDX);
    Machine::new(server.client(), &BlockOptions { features, ..BlockOptions::default() })
}

fn add(operator: &mut ControlClient, rule: Value) -> u64 {
    done(operator, "device.fault.add", json!({ "device": "blk", "rule": rule }))["id"].as_u64().unwrap()
}

fn remove(operator: &mut ControlClient, id: u64) {
    done(operator, "device.fault.remove", json!({ "device": "blk", "id": id }));
}

fn trigger(operator: &mut ControlClient, what: &str, queue: Option<u16>) {
    done(operator, "device.fault.trigger", json!({ "device": "blk", "what": what, "queue": queue }));
}

/// How many a fault has concerned, and struck.
fn counts(operator: &mut ControlClient, id: u64) -> (u64, u64) {
    let list = done(operator, "device.fault.list", json!({ "device": "blk" }));
    let fault = list["faults"].as_array().unwrap().iter().find(|fault| fault["id"] == id).unwrap();
    (fault["concerned"].as_u64().unwrap(), fault["struck"].as_u64().unwrap())
}

fn struck(operator: &mut ControlClient, id: u64, times: u64) {
    until("it strikes", || counts(operator, id).1 == times);
}

/// Asks for an interrupt, leaves a flush in a queue and kicks.
fn flush(queue: &mut BlockQueue) {
    let _others_are_there = queue.ring_mut().enable_interrupts();
    queue.submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
    queue.publish().unwrap();
}

/// Takes a completion that is there, or soon will be, without asking for an interrupt.
fn taken(queue: &mut BlockQueue) -> u8 {
    until("a completion is there", || queue.ring().has_used());
    queue.poll().unwrap().unwrap().status
}

/// That a driver hears of a completion by an interrupt.
fn is_sound(queue: &mut BlockQueue) {
    count(queue.interrupt().unwrap());
    flush(queue);
    assert_eq!(signalled(queue.interrupt().unwrap()), 1);
    assert_eq!(taken(queue), OK);
}

#[test]
fn faults_of_one_queue_come_and_go() {
    let server = serve(|_| vec![]);
    let mut operator = operator(&server);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    for round in 1..=10 {
        exercise(&mut machine.queues);
        let id = add(&mut operator, json!({ "fault": "eio", "on": ["flush"], "queue": 1, "every": 4, "burst": 2 }));
        assert_eq!(id, round);
        for _ in 0..2 {
            let statuses = machine.queues.iter_mut().map(|queue| {
                flush(queue);
                completion(queue).status
            });
            assert_eq!(statuses.collect::<Vec<_>>(), [OK, IOERR, OK, OK]);
        }
        // Of queue 1 two were asked for, both struck.
        assert_eq!(counts(&mut operator, id), (2, 2));
        for expected in [OK, OK, IOERR, IOERR, OK] {
            flush(&mut machine.queues[1]);
            assert_eq!(completion(&mut machine.queues[1]).status, expected);
        }
        assert_eq!(counts(&mut operator, id), (7, 4));
        remove(&mut operator, id);
        let list = done(&mut operator, "device.fault.list", json!({ "device": "blk" }));
        assert_eq!(list["faults"], json!([]));
    }
    exercise(&mut machine.queues);
    drop(machine);
    server.stop();
}

#[test]
fn what_is_stuck_is_released_or_ends_with_its_queue() {
    let server = serve(|_| vec![]);
    let mut operator = operator(&server);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    let id = add(&mut operator, json!({ "fault": "stuck", "on": ["flush"], "queue": 0 }));
    let stuck = |machine: &mut Machine, operator: &mut ControlClient, times| {
        let before = given_back(&machine.queues[0]);
        flush(&mut machine.queues[0]);
        struck(operator, id, times);
        exercise(&mut machine.queues[1..]);
        assert_eq!(given_back(&machine.queues[0]), before);
    };
    stuck(&mut machine, &mut operator, 1);
    done(&mut operator, "device.fault.release", json!({ "device": "blk" }));
    assert_eq!(completion(&mut machine.queues[0]).status, OK);
    // A reset waits for nobody; an operator who wants the device to rest is told, and nothing fails for that.
    let begun = Instant::now();
    stuck(&mut machine, &mut operator, 2);
    machine.reboot(&BlockOptions::default());
    stuck(&mut machine, &mut operator, 3);
    assert_eq!(refused(&mut operator, "device.pause", json!({ "device": "blk" })).0, 3);
    done(&mut operator, "device.fault.release", json!({ "device": "blk" }));
    assert_eq!(completion(&mut machine.queues[0]).status, OK);
    done(&mut operator, "device.resume", json!({ "device": "blk" }));
    // Neither does the client's end.
    stuck(&mut machine, &mut operator, 4);
    drop(machine);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    stuck(&mut machine, &mut operator, 5);
    remove(&mut operator, id);
    assert_eq!(completion(&mut machine.queues[0]).status, OK);
    exercise(&mut machine.queues);
    let id = add(&mut operator, json!({ "fault": "stuck" }));
    flush(&mut machine.queues[2]);
    struck(&mut operator, id, 1);
    assert!(begun.elapsed() < LIMIT);
    server.stop();
}

#[test]
fn interrupts_are_lost_late_or_for_nothing() {
    let server = sleepy();
    let mut operator = operator(&server);
    let mut machine = interrupted(&server);
    let queue = &mut machine.queues[1];
    is_sound(queue);

    let id = add(&mut operator, json!({ "fault": "lost-interrupt", "queue": 1 }));
    flush(queue);
    assert_eq!(taken(queue), OK);
    struck(&mut operator, id, 1);
    assert_eq!(count(queue.interrupt().unwrap()), 0);
    remove(&mut operator, id);
    assert_eq!(signalled(queue.interrupt().unwrap()), 1, "it is made up for");
    is_sound(queue);

    let late = Duration::from_millis(150);
    let begun = Instant::now();
    let id = add(&mut operator, json!({ "fault": "late-interrupt", "latency": "150ms", "every": 2 }));
    flush(queue);
    assert_eq!(taken(queue), OK);
    assert_eq!(signalled(queue.interrupt().unwrap()), 1);
    assert!(begun.elapsed() >= late);
    is_sound(queue);
    assert_eq!(counts(&mut operator, id), (2, 1));
    remove(&mut operator, id);

    let id = add(&mut operator, json!({ "fault": "spurious-interrupt", "latency": "1ms" }));
    flush(queue);
    assert_eq!(taken(queue), OK);
    let mut signals = 0;
    until("there are two interrupts", || {
        signals += count(queue.interrupt().unwrap());
        signals == 2
    });
    remove(&mut operator, id);
    is_sound(queue);

    trigger(&mut operator, "spurious-interrupt", Some(2));
    assert_eq!(signalled(machine.queues[2].interrupt().unwrap()), 1);
    let others = [0, 1, 3].map(|queue: usize| count(machine.queues[queue].interrupt().unwrap()));
    assert_eq!(others, [0; 3]);
    trigger(&mut operator, "spurious-interrupt", None);
    for queue in &mut machine.queues {
        assert_eq!(signalled(queue.interrupt().unwrap()), 1);
        is_sound(queue);
    }
    drop(machine);
    server.stop();
}

/// What an interrupt that is late for long may hold up: nothing.
#[test]
fn nobody_waits_for_a_late_interrupt() {
    let server = sleepy();
    let mut operator = operator(&server);
    let mut machine = interrupted(&server);
    let id = add(&mut operator, json!({ "fault": "late-interrupt", "latency": "60s" }));
    for round in 1..4 {
        flush(&mut machine.queues[0]);
        assert_eq!(taken(&mut machine.queues[0]), OK);
        struck(&mut operator, id, round);
        let begun = Instant::now();
        match round {
            1 => {
                done(&mut operator, "device.pause", json!({ "device": "blk" }));
                signalled(machine.queues[0].interrupt().unwrap());
                done(&mut operator, "device.resume", json!({ "device": "blk" }));
            }
            2 => machine.driver.transport().reset().unwrap(),
            _ => {}
        }
        drop(machine);
        machine = interrupted(&server);
        assert!(begun.elapsed() < LIMIT / 2);
    }
    remove(&mut operator, id);
    machine.queues.iter_mut().for_each(is_sound);
    drop(machine);
    let begun = Instant::now();
    server.stop();
    assert!(begun.elapsed() < LIMIT / 2);
}

#[test]
fn a_kick_is_lost_until_it_is_made_up_for() {
    let server = sleepy();
    let mut operator = operator(&server);
    let mut machine = interrupted(&server);
    exercise(&mut machine.queues);
    let id = add(&mut operator, json!({ "fault": "lost-kick", "queue": 0 }));
    // A worker that is awake still, or about to fall asleep, finds the request itself.
    let mut losses = 0;
    until("a kick is lost", || {
        let before = given_back(&machine.queues[0]);
        let was = counts(&mut operator, id).1;
        flush(&mut machine.queues[0]);
        crate::protocol::in_step(&machine.client);
        losses = counts(&mut operator, id).1 - was;
        exercise(&mut machine.queues[1..]);
        let lost = losses > 0 && given_back(&machine.queues[0]) == before;
        if !lost {
            assert_eq!(taken(&mut machine.queues[0]), OK);
        }
        lost
    });
    remove(&mut operator, id);
    assert_eq!(taken(&mut machine.queues[0]), OK);
    machine.queues.iter_mut().for_each(is_sound);
    drop(machine);
    server.stop();
}

#[test]
fn a_device_that_breaks_down_comes_back_after_a_reset() {
    let server = serve(|_| vec![]);
    let mut operator = operator(&server);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    let rule = json!({ "fault": "needs-reset", "on": ["flush"] });
    for by_rule in [false, true] {
        exercise(&mut machine.queues);
        let id = by_rule.then(|| add(&mut operator, rule.clone()));
        assert_eq!(machine.status() & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
        match id {
            Some(_) => flush(&mut machine.queues[3]),
            None => trigger(&mut operator, "needs-reset", None),
        }
        assert_eq!(signalled(machine.driver.config_interrupt().unwrap()), 1);
        assert_ne!(machine.status() & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
        // What is offered now is not looked at. The answer to a message comes after the queues have stopped.
        crate::protocol::in_step(&machine.client);
        let before = given_back(&machine.queues[0]);
        flush(&mut machine.queues[0]);
        crate::protocol::in_step(&machine.client);
        assert_eq!(given_back(&machine.queues[0]), before);
        id.into_iter().for_each(|id| remove(&mut operator, id));
        machine.reboot(&BlockOptions::default());
        exercise(&mut machine.queues);
    }
    drop(machine);
    server.stop();
}

#[test]
fn a_session_is_closed_and_the_next_is_served() {
    let server = serve(|_| vec![]);
    let mut operator = operator(&server);
    let nobody = json!({ "device": "blk", "what": "close-session" });
    assert_eq!(refused(&mut operator, "device.fault.trigger", nobody).0, 7);
    for by_rule in [false, true] {
        let mut machine = Machine::new(server.client(), &BlockOptions::default());
        exercise(&mut machine.queues);
        if by_rule {
            add(&mut operator, json!({ "fault": "close-session", "on": ["flush"] }));
            flush(&mut machine.queues[1]);
        } else {
            trigger(&mut operator, "close-session", None);
        }
        until("the client has gone", || {
            done(&mut operator, "device.list", json!({}))["devices"][0]["client"].is_null()
        });
        assert!(machine.driver.transport().status().is_err());
    }
    done(&mut operator, "device.fault.remove", json!({ "device": "blk", "all": true }));
    exercise(&mut Machine::new(server.client(), &BlockOptions::default()).queues);
    server.stop();
}

#[test]
fn ctl_has_things_go_wrong() {
    let server = serve(|_| vec!["--name".into(), "root".into()]);
    let machine = Machine::new(server.client(), &BlockOptions::default());
    let fault = |words: &[&str]| ctl(&server, &[&["fault"], words].concat());
    let (status, out, err) = fault(&["add", "root", "latency", "--latency", "1ms-2ms", "--on", "read", "--queue", "3"]);
    assert!(status == Some(0) && out.contains("fault 1;"), "{out}{err}");
    fault(&["add", "root", "eio", "--sectors", "8-15", "--probability", "0.5"]);
    let (_, out, _) = fault(&["list", "root"]);
    let lines: Vec<_> = out.lines().collect();
    assert!(lines.len() == 3 && lines[1].contains("queue 3") && lines[2].contains("probability 0.5"), "{out}");
    for (words, told) in [
        (&["add", "root", "eio", "--queue", "4"][..], "counted from 0"),
        (&["add", "root", "latency"], "needs latency"),
        (&["add", "toor", "eio"], "there are: root"),
        (&["remove", "root", "7"], "no fault 7"),
        (&["release", "root", "7"], "no fault 7"),
        (&["trigger", "root", "needs-reset", "--queue", "1"], "leave it out"),
        (&["trigger", "root", "spurious-interrupt", "--queue", "9"], "counted from 0"),
    ] {
        let (status, _, err) = fault(words);
        assert!(status == Some(1) && err.contains(told), "{words:?}: {err}");
    }
    assert!(fault(&["release", "root", "2"]).1.contains("released fault 2"));
    assert!(fault(&["remove", "root", "--all"]).1.contains("removed fault 1, 2"));
    assert!(fault(&["remove", "root", "--all"]).1.contains("removed nothing"));
    assert!(fault(&["trigger", "root", "spurious-interrupt"]).1.contains("spurious-interrupt"));
    drop(machine);
    server.stop();
}
