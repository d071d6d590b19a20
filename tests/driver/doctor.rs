//! `device.diagnose` and `vfio-user-blk doctor`: what is said of a device whose state the test knows.

use std::path::Path;

use client::{BlockOptions, BlockRequest, RequestType};
use serde_json::{Value, json};
use vfio_user_blk::control::ControlClient;

use crate::binary::{Served, command, disk};
use crate::rig::{DISK, IOVA, MEMORY, Machine, exercise, until};

fn serve(more: &[&str]) -> Served {
    Served::start(|folder| {
        let mut arguments = disk(&folder.join("blk.sock"));
        arguments.extend(["--name", "vm1", "--control-socket"].map(str::to_owned));
        arguments.push(control(folder));
        arguments.extend(more.iter().map(|word| (*word).to_owned()));
        arguments
    })
}

fn control(folder: &Path) -> String {
    folder.join("control.sock").to_str().unwrap().to_owned()
}

fn diagnose(server: &Served) -> Value {
    let mut operator = ControlClient::connect(Path::new(&control(server.folder()))).unwrap();
    operator.call("device.diagnose", &json!({ "device": "vm1" })).unwrap()
}

fn codes(diagnosis: &Value) -> Vec<&str> {
    diagnosis["findings"].as_array().unwrap().iter().map(|finding| finding["code"].as_str().unwrap()).collect()
}

/// Runs `doctor`: its status, what it prints, and what it says of errors.
fn doctor(server: &Served, words: &[&str]) -> (Option<i32>, String, String) {
    let output = command().args(["doctor", "--socket", &control(server.folder())]).args(words).output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    (output.status.code(), out, err)
}

#[test]
fn a_device_that_is_well_is_told_from_one_that_is_not() {
    let server = serve(&[]);
    let alone = diagnose(&server);
    assert_eq!(codes(&alone), ["detached"]);
    assert_eq!((&alone["client"], &alone["session"], &alone["silent"]), (&Value::Null, &Value::Null, &Value::Null));
    assert_eq!(doctor(&server, &[]).0, Some(0));

    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    exercise(&mut machine.queues);
    let well = diagnose(&server);
    assert_eq!(codes(&well), Vec::<&str>::new(), "{well:#}");
    assert_eq!(well["client"]["pid"], std::process::id());
    assert_eq!(well["size"], DISK);
    let session = &well["session"];
    assert_eq!(session["protocol"]["version"], "0.0");
    assert_eq!(session["interrupts"], "msix");
    for word in ["DRIVER_OK", "FEATURES_OK"] {
        assert!(session["device_status"].as_array().unwrap().contains(&word.into()), "{session:#}");
    }
    for feature in ["VERSION_1", "EVENT_IDX", "INDIRECT_DESC", "BLK_MQ"] {
        assert!(session["features"].as_array().unwrap().contains(&feature.into()), "{session:#}");
    }
    let queues = session["queues"].as_array().unwrap();
    assert_eq!(queues.len(), 4);
    for queue in queues {
        assert!(queue["enabled"] == true && queue["running"] == true && queue["vector_connected"] == true, "{queue}");
    }
    let memory = json!({
        "ranges": 1, "bytes": MEMORY, "unreachable_ranges": 0, "unreachable_bytes": 0, "found_blank": false,
        "files": [{ "bytes": MEMORY, "kind": "memfd", "page_size": 4096, "writable": true }],
    });
    assert_eq!(session["memory"], memory);
    // A write and a read by each queue, all kicked for by messages.
    let (kicks, statistics) = (&session["kicks"], &well["statistics"]);
    assert!(kicks["by_message"].as_u64().unwrap() > 0 && kicks["eventfds"] == 0, "{kicks}");
    assert_eq!((&statistics["reads"], &statistics["writes"]), (&json!(4), &json!(4)));
    assert_eq!(well["stages"][1]["stage"], "submit_to_reap");
    assert_eq!(well["stages"][1]["count"], 8);

    let (status, text, err) = doctor(&server, &["vm1"]);
    assert_eq!((status, err.as_str()), (Some(0), ""), "{text}");
    for words in ["vm1: memory", "vfio-user 0.0", "4 of 4 enabled, 4 served", "memfd", "all is well"] {
        assert!(text.contains(words), "{words:?} is not in:\n{text}");
    }

    // Paused, and with a range that has no file.
    let mut operator = ControlClient::connect(Path::new(&control(server.folder()))).unwrap();
    operator.call("device.pause", &json!({ "device": "vm1" })).unwrap();
    machine
        .client
        .dma_map(&vfio_user::DmaMap { address: IOVA * 2, size: MEMORY, ..machine.memory.dma_map() }, None)
        .unwrap();
    assert_eq!(codes(&diagnose(&server)), ["unreachable_memory", "paused"]);
    let (status, text, err) = doctor(&server, &[]);
    assert_eq!(status, Some(3));
    assert!(text.contains("WARNING: an operator has paused it") && text.contains("ctl resume vm1"), "{text}");
    assert!(err.contains("0 errors, 2 warnings"), "{err}");
    let (status, json, _) = doctor(&server, &["--json"]);
    assert_eq!(status, Some(3));
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json[0]["findings"][1]["code"], "paused");

    assert_eq!(doctor(&server, &["vm2"]).0, Some(1));
    drop(machine);
    server.wait_for("the client has gone");
    assert!(diagnose(&server)["session"].is_null(), "nothing is left of a client");
    server.stop();
}

#[test]
fn a_driver_that_broke_the_rules_is_named() {
    let server = serve(&[]);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    // A chain whose first buffer lies outside of memory.
    let segment = client::Segment { iova: 0x10, len: 512 };
    machine.queues[2].submit(&BlockRequest { kind: RequestType::Read, sector: 0, data: &[segment] }).unwrap();
    machine.queues[2].publish().unwrap();
    until("the device needs a reset", || codes(&diagnose(&server)).contains(&"needs_reset"));
    let found = diagnose(&server);
    assert_eq!(found["findings"][0]["level"], "error");
    assert!(found["session"]["fault"].as_str().unwrap().starts_with("queue 2: "), "{found:#}");
    let (status, text, _) = doctor(&server, &[]);
    assert!(status == Some(3) && text.contains("ERROR: the device has stopped"), "{text}");
    machine.reboot(&BlockOptions::default());
    exercise(&mut machine.queues);
    assert_eq!(codes(&diagnose(&server)), Vec::<&str>::new());
    drop(machine);
    server.stop();
}

/// A client of another kind: an old driver, kicks by eventfds, a doorbell page that nobody maps.
#[test]
fn what_is_slow_is_told_with_its_reason() {
    let server = serve(&["--queue-size", "16", "--num-queues", "2", "--poll", "always"]);
    let options = BlockOptions { features: 0, ..BlockOptions::default() };
    let machine = Machine::new(server.client(), &options);
    until("the worker has looked in vain", || codes(&diagnose(&server)).contains(&"idle_polling"));
    let found = diagnose(&server);
    let mut codes = codes(&found);
    codes.sort_unstable();
    assert_eq!(codes, ["few_queues", "idle_polling", "no_event_idx", "no_indirect_desc", "small_queue"], "{found:#}");
    assert_eq!(found["session"]["queues"][0]["size"], 16);
    drop(machine);
    server.stop();
}
