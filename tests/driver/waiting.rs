//! Devices whose requests wait for nothing but time, or somebody's word: nobody looks at them meanwhile.

use std::sync::Arc;
use std::time::Instant;

use client::{BlockOptions, BlockRequest, Client, RequestType};
use serde_json::{Value, json};
use vfio_user_blk::control::ControlClient;

use crate::binary::Served;
use crate::control::done;
use crate::limits::Load;
use crate::on_error::serve;
use crate::rig::{LIMIT, Machine, until};

/// What the device's only queue has done.
fn statistics(operator: &mut ControlClient) -> Value {
    done(operator, "device.statistics", json!({ "device": "disk" }))["queues"][0].take()
}

fn client(server: &Served, socket: &str) -> Arc<Client> {
    server.expect_client();
    let client = Client::connect(&server.folder().join(socket)).unwrap();
    client.set_timeout(LIMIT);
    Arc::new(client)
}

/// Counted, and not timed: a worker that looks all the time does so thousands of times, however little of a processor it gets.
#[test]
fn who_only_waits_is_not_looked_at() {
    let fault = |fault: &str| format!("[[device.fault]]\nfault = {fault}\n");
    for waits in [
        "limits = { iops = 1, iops_burst = 1 }".to_owned(),
        "fabric = { round_trip = \"10s\" }".to_owned(),
        format!("on_error = \"hold\"\n{}", fault("\"eio\"")),
        fault("\"stuck\""),
        fault("\"latency\"\nlatency = \"60s\""),
        fault("\"late-interrupt\"\nlatency = \"60s\""),
        // Two that wait, one behind the other.
        format!("fabric = {{ round_trip = \"2ms\" }}\n{}", fault("\"latency\"\nlatency = \"60s\"")),
    ] {
        // The other one is a clock.
        let clock =
            "[[device]]\nsocket_path = \"clock.sock\"\nnum_queues = 1\nlimits = { iops = 20, iops_burst = 1 }\n";
        let (server, mut operator) = serve(&format!("num_queues = 1\npoll = \"always\"\n{waits}\n{clock}"));
        let mut machine = Machine::new(server.client(), &BlockOptions::default());
        let mut clock = Machine::new(client(&server, "clock.sock"), &BlockOptions::default());
        for _ in 0..5 {
            machine.queues[0].submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
        }
        // It wants an interrupt for the first, which may be what waits.
        machine.queues[0].ring().split().unwrap().set_used_event(0);
        machine.queues[0].publish().unwrap();
        until("they were taken", || statistics(&mut operator)["flushes"] == 5);
        Load::flushes(1).run(&mut clock.queues[0], 2, Instant::now() + LIMIT);
        let looks = |operator: &mut _| {
            let now = statistics(operator);
            ["polls_in_vain", "polls_with_work"].map(|polls| now[polls].as_u64().unwrap()).iter().sum::<u64>()
        };
        let before = looks(&mut operator);
        Load::flushes(1).run(&mut clock.queues[0], 10, Instant::now() + LIMIT);
        let looks = looks(&mut operator) - before;
        // Half a second. What waits long is looked at each 100 ms: each of five, and when it is told to wait again.
        assert!(looks < 200, "{waits}: {looks} looks");
        drop((machine, clock));
        server.stop();
    }
}
