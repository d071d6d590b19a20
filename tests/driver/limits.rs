//! Devices that may not be used as fast as they could be.

use std::thread;
use std::time::{Duration, Instant};

use client::{BlockOptions, BlockQueue, BlockRequest, RequestType, Segment};
use serde_json::{Value, json};
use vfio_user_blk::control::ControlClient;

use crate::binary::{Served, command, disk};
use crate::rig::{LIMIT, Machine, OK, Rig, completion, exercise};
use crate::workload::{Arena, Workload};

/// What a queue is asked for.
#[derive(Clone, Copy)]
pub(crate) struct Load<'a> {
    pub(crate) kind: RequestType,
    pub(crate) data: &'a [Segment],
    pub(crate) depth: u64,
}

impl Load<'_> {
    pub(crate) fn flushes(depth: u64) -> Load<'static> {
        Load { kind: RequestType::Flush, data: &[], depth }
    }

    /// Has that many requests in flight until `most` were given back, or until `end`; says how many were by then, and waits for
    /// the rest.
    pub(crate) fn run(self, queue: &mut BlockQueue, most: u64, end: Instant) -> u64 {
        let (mut submitted, mut done) = (0, 0);
        while done < most && Instant::now() < end {
            while submitted < most && submitted - done < self.depth {
                queue.submit(&BlockRequest { kind: self.kind, sector: 0, data: self.data }).unwrap();
                submitted += 1;
            }
            queue.publish().unwrap();
            queue.wait(end.saturating_duration_since(Instant::now())).unwrap();
            while let Some(completion) = queue.poll().unwrap() {
                assert_eq!(completion.status, OK);
                done += 1;
            }
        }
        (done..submitted).for_each(|_| assert_eq!(completion(queue).status, OK));
        done
    }
}

fn limited(limits: &str) -> Rig {
    Rig::with(|device| device.rates = Some(limits.parse().unwrap()))
}

fn far_off() -> Instant {
    Instant::now() + LIMIT
}

/// A disk in memory with a control socket.
pub(crate) fn serve(more: &[&str]) -> Served {
    Served::start(|folder| {
        let mut arguments = disk(&folder.join("blk.sock"));
        arguments.extend(["--control-socket".into(), folder.join("control.sock").to_str().unwrap().into()]);
        arguments.extend(more.iter().map(|word| (*word).to_owned()));
        arguments
    })
}

/// Runs `ctl`: whether that went well, and what it said.
pub(crate) fn ctl(server: &Served, words: &[&str]) -> (bool, String) {
    let socket = server.folder().join("control.sock");
    let output = command().arg("ctl").arg("--socket").arg(socket).args(words).output().unwrap();
    let text = if output.status.success() { output.stdout } else { output.stderr };
    (output.status.success(), String::from_utf8(text).unwrap())
}

/// What the server tells of its only device.
pub(crate) fn described(server: &Served) -> Value {
    let mut operator = ControlClient::connect(&server.folder().join("control.sock")).unwrap();
    operator.call("device.list", &json!({})).unwrap()["devices"][0].clone()
}

#[test]
fn a_burst_is_had_at_once_and_the_rest_at_the_rate() {
    let rig = limited("iops=100,iops_burst=200");
    let mut machine = rig.boot();
    let begun = Instant::now();
    assert_eq!(Load::flushes(16).run(&mut machine.queues[0], 200, far_off()), 200);
    let burst = begun.elapsed();
    assert!(burst < Duration::from_millis(1500), "at the rate they take two seconds: {burst:?}");
    Load::flushes(16).run(&mut machine.queues[1], 100, far_off());
    let all = begun.elapsed();
    assert!(all >= Duration::from_millis(960) && all < Duration::from_millis(2900), "{all:?}");
}

#[test]
fn bytes_are_limited_each_way_and_together() {
    for (limits, megabytes, bounds) in [
        ("bandwidth=2M,bandwidth_burst=64K", [1, 1], 930..2500),
        ("read_bandwidth=2M", [1, 4], 350..1500),
        ("write_bandwidth=2M", [4, 1], 350..1500),
    ] {
        let rig = limited(limits);
        let mut machine = rig.boot();
        let buffer = machine.memory.allocate(65536, 4096).unwrap();
        let data = [buffer.segment(0, 65536).unwrap()];
        let begun = Instant::now();
        for (kind, megabytes) in [RequestType::Read, RequestType::Write].into_iter().zip(megabytes) {
            Load { kind, data: &data, depth: 4 }.run(&mut machine.queues[0], megabytes * 16, far_off());
        }
        let took = u64::try_from(begun.elapsed().as_millis()).unwrap();
        assert!(bounds.contains(&took), "{limits}: {took} ms");
    }
}

#[test]
fn a_queue_with_one_request_has_its_turns_beside_one_with_many() {
    let rig = limited("iops=200,iops_burst=1");
    let mut machine = rig.boot();
    let end = Instant::now() + Duration::from_millis(1500);
    let (first, others) = machine.queues.split_at_mut(1);
    let (of_deep, of_shallow) = thread::scope(|scope| {
        let deep = scope.spawn(|| Load::flushes(120).run(&mut first[0], u64::MAX, end));
        let shallow = Load::flushes(1).run(&mut others[0], u64::MAX, end);
        (deep.join().unwrap(), shallow)
    });
    assert!(of_deep + of_shallow <= 310, "{of_deep} and {of_shallow}: more than it may");
    assert!(of_deep + of_shallow >= 150, "{of_deep} and {of_shallow}: fewer than it may by far");
    // Half of them, but for what the other thread and a slow machine take from it.
    assert!(of_shallow >= 50 && of_shallow * 5 >= of_deep, "{of_shallow} beside {of_deep}");
}

#[test]
fn a_device_that_waits_takes_no_processor() {
    for poll in ["always", "adaptive"] {
        let server = serve(&["--limits", "iops=20,iops_burst=1", "--poll", poll, "--num-queues", "1"]);
        let mut machine = Machine::new(server.client(), &BlockOptions::default());
        let queue = &mut machine.queues[0];
        Load::flushes(1).run(queue, 2, far_off());
        let before = server.processor_time();
        let done = Load::flushes(8).run(queue, 30, far_off());
        let took = server.processor_time() - before;
        // One and a half seconds: a hundred and fifty if it looked for something to do.
        assert!(done == 30 && took <= 20, "{poll}: {took} ticks");
        drop(machine);
        server.stop();
    }
}

#[test]
fn limits_change_at_once_also_for_what_waits() {
    let server = serve(&["--limits", "iops=2,iops_burst=1"]);
    assert_eq!(described(&server)["limits"], json!({ "iops": 2, "iops_burst": 1 }));
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    let begun = Instant::now();
    for queue in &mut machine.queues {
        for _ in 0..30 {
            queue.submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
        }
        queue.publish().unwrap();
    }
    let (ok, said) = ctl(&server, &["set-limits", "blk", "none"]);
    assert!(ok && said.contains("no limits"), "{said}");
    for queue in &mut machine.queues {
        (0..30).for_each(|_| assert_eq!(completion(queue).status, OK));
    }
    assert!(begun.elapsed() < Duration::from_secs(20), "a minute's worth: {:?}", begun.elapsed());
    assert_eq!(described(&server)["limits"], Value::Null);
    exercise(&mut machine.queues);

    let (ok, said) = ctl(&server, &["set-limits", "blk", "iops=100,iops_burst=1"]);
    assert!(ok && said.contains("limits iops=100,iops_burst=1"), "{said}");
    let begun = Instant::now();
    Load::flushes(8).run(&mut machine.queues[1], 50, far_off());
    assert!(begun.elapsed() > Duration::from_millis(450), "{:?}", begun.elapsed());
    assert!(ctl(&server, &["list"]).1.contains("4 queues; limits iops=100,iops_burst=1"));

    // What makes no sense changes nothing.
    for (words, told) in
        [("iops=0", "iops is 0"), ("iops_burst=5", "iops_burst is for iops"), ("iop=5", "not one of iops")]
    {
        let (ok, said) = ctl(&server, &["set-limits", "blk", words]);
        assert!(!ok && said.contains(told), "{words}: {said}");
    }
    assert_eq!(described(&server)["limits"]["iops"], 100);
    drop(machine);
    server.stop();
}

/// What waits for hours is no reason for a pause, a reset, or a client that goes to wait.
#[test]
fn whoever_stops_a_queue_does_not_wait_for_its_turns() {
    let server = serve(&["--limits", "iops=1,iops_burst=1"]);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    let begun = Instant::now();
    let fill = |machine: &mut Machine| {
        for queue in &mut machine.queues {
            for _ in 0..100 {
                queue.submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
            }
            queue.publish().unwrap();
        }
    };
    fill(&mut machine);
    for words in [["pause", "blk"], ["resume", "blk"], ["drain", "blk"], ["resume", "blk"]] {
        let (ok, said) = ctl(&server, &words);
        assert!(ok, "{said}");
    }
    machine.reboot(&BlockOptions::default());
    fill(&mut machine);
    drop(machine);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    fill(&mut machine);
    machine.reboot(&BlockOptions::default());
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert!(ctl(&server, &["set-limits", "blk", "none"]).0);
    exercise(&mut machine.queues);
    drop(machine);
    server.stop();
}

#[test]
fn what_passes_limits_and_a_fabric_is_what_was_written() {
    let rig = Rig::with(|device| {
        device.rates = Some("iops=5000,iops_burst=20,bandwidth=100M".parse().unwrap());
        device.fabric = Some("round_trip=200us,jitter=100us,bandwidth=200M,credits=8".parse().unwrap());
    });
    let mut machine = rig.boot();
    let workload = Workload::default();
    let arena = Arena::new(&machine.memory, &workload);
    workload.run(&mut machine.queues[0], &arena);
}
