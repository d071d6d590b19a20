//! Devices whose stores seem to be elsewhere.

use std::fs;
use std::time::{Duration, Instant};

use client::{BlockOptions, BlockRequest, RequestType};
use serde_json::{Value, json};

use crate::binary::Served;
use crate::limits::{Load, ctl, described, serve};
use crate::rig::{LIMIT, Machine, OK, Rig, completion, exercise};

/// How long so many reads take, of so many bytes each and so many at a time.
fn time(machine: &mut Machine, reads: u64, bytes: usize, depth: u64) -> Duration {
    let buffer = machine.memory.allocate(bytes, 4096).unwrap();
    let data = [buffer.segment(0, bytes).unwrap()];
    let load = Load { kind: RequestType::Read, data: &data, depth };
    let begun = Instant::now();
    load.run(&mut machine.queues[0], reads, begun + LIMIT);
    begun.elapsed()
}

#[test]
fn latency_and_bandwidth_are_those_of_the_fabric() {
    let ms = Duration::from_millis;
    // Fabric, reads, bytes, depth, and milliseconds that they take.
    for (fabric, reads, bytes, depth, expected) in [
        // As many a second as round trips go into one.
        ("round_trip=10ms", 40, 512, 1, 400),
        // As much as goes over the wire, however many are on their way.
        ("round_trip=1ms,bandwidth=4M", 32, 65536, 8, 500),
        // Two at a time.
        ("round_trip=20ms,credits=2", 40, 512, 32, 400),
        // Half of it each way, in the mean.
        ("round_trip=0s,jitter=10ms", 60, 512, 1, 600),
    ] {
        let rig = Rig::with(|device| device.fabric = Some(fabric.parse().unwrap()));
        let took = time(&mut rig.boot(), reads, bytes, depth);
        let least = ms(if fabric.contains("jitter") { expected * 2 / 3 } else { expected });
        assert!(took >= least && took < ms(2 * expected + 300), "{fabric}: {took:?}");
    }
}

#[test]
fn all_queues_share_the_wire() {
    let rig = Rig::with(|device| device.fabric = Some("round_trip=1ms,bandwidth=4M".parse().unwrap()));
    let mut machine = rig.boot();
    let buffer = machine.memory.allocate(65536, 4096).unwrap();
    let data = [buffer.segment(0, 65536).unwrap()];
    let begun = Instant::now();
    let write = BlockRequest { kind: RequestType::Write, sector: 0, data: &data };
    let read = BlockRequest { kind: RequestType::Read, ..write };
    for queue in &mut machine.queues {
        for request in [&write, &read].into_iter().cycle().take(8) {
            queue.submit(request).unwrap();
        }
        queue.publish().unwrap();
    }
    for queue in &mut machine.queues {
        (0..8).for_each(|_| assert_eq!(completion(queue).status, OK));
    }
    // Sixteen of each kind, a megabyte each way.
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(250) && took < Duration::from_millis(1500), "{took:?}");
}

#[test]
fn a_fabric_is_exchanged_under_a_running_driver() {
    let server = serve(&["--fabric", "25g-tor"]);
    assert_eq!(described(&server)["fabric"], "25g-tor");
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    exercise(&mut machine.queues);
    let (ok, said) = ctl(&server, &["set-fabric", "blk", "round_trip=300ms"]);
    assert!(ok && said.contains("fabric round_trip=300ms"), "{said}");
    assert!(time(&mut machine, 4, 512, 1) >= Duration::from_millis(1200));
    let (ok, said) = ctl(&server, &["set-fabric", "blk", "none"]);
    assert!(ok && said.contains("no limits, no fabric"), "{said}");
    assert_eq!(described(&server)["fabric"], Value::Null);
    assert!(time(&mut machine, 4, 512, 1) < Duration::from_millis(1100));
    let (ok, said) = ctl(&server, &["set-fabric", "blk", "40g"]);
    assert!(!ok && said.contains("25g-tor, 100g-spine, cxl-pool"), "{said}");
    // Whoever stops does not wait for what is far away; limits stay what they are.
    assert!(ctl(&server, &["set-limits", "blk", "iops=100000"]).0);
    assert!(ctl(&server, &["set-fabric", "blk", "round_trip=10s,bandwidth=1"]).0);
    assert_eq!(described(&server)["limits"], json!({ "iops": 100_000 }));
    let begun = Instant::now();
    machine.queues[0].submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
    machine.queues[0].publish().unwrap();
    machine.reboot(&BlockOptions::default());
    assert!(ctl(&server, &["set-fabric", "blk", "none"]).0);
    exercise(&mut machine.queues);
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    drop(machine);
    server.stop();
}

#[test]
fn a_file_may_name_fabrics_of_its_own() {
    let server = Served::start(|folder| {
        let file = folder.join("a.toml");
        let text = "control_socket = \"control.sock\"\n[[fabric]]\nname = \"wan\"\nround_trip = \"40ms\"\n\
                    [[device]]\nsocket_path = \"blk.sock\"\nsize = \"16M\"\nfabric = \"wan\"\nlimits.iops = 1000000\n";
        fs::write(&file, text).unwrap();
        vec!["--config".into(), file.to_str().unwrap().into()]
    });
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    assert!(time(&mut machine, 5, 512, 1) >= Duration::from_millis(200));
    assert!(ctl(&server, &["set-fabric", "blk", "cxl-pool"]).0);
    exercise(&mut machine.queues);
    assert!(ctl(&server, &["set-fabric", "blk", "wan"]).0);
    assert_eq!(described(&server)["fabric"], "wan");
    assert!(time(&mut machine, 5, 512, 1) >= Duration::from_millis(200));
    drop(machine);
    server.stop();
}
