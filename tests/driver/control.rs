//! The control socket of a running server: what operators can look at and change, with a driver at work.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use client::{BlockOptions, BlockRequest, Client, RequestType};
use serde_json::{Value, json};
use vfio_user_blk::control::{CallError, ControlClient};

use crate::binary::{Served, command, disk};
use crate::rig::{DISK, IOERR, LIMIT, Machine, OK, completion, execute, exercise, given_back, image_bytes, signalled};

/// A server with a disk in memory, or as `more` describes it, and a control socket.
pub(crate) fn serve(more: impl FnOnce(&Path) -> Vec<String>) -> Served {
    Served::start(|folder| {
        let mut arguments = disk(&folder.join("blk.sock"));
        arguments.extend(["--control-socket".into(), text(&folder.join("control.sock"))]);
        arguments.extend(more(folder));
        arguments
    })
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

pub(crate) fn operator(server: &Served) -> ControlClient {
    ControlClient::connect(&server.folder().join("control.sock")).unwrap()
}

pub(crate) fn done(operator: &mut ControlClient, method: &str, params: Value) -> Value {
    operator.call(method, &params).unwrap_or_else(|error| panic!("{method} {params}: {error}"))
}

/// What a call is refused for: the code, and the words.
pub(crate) fn refused(operator: &mut ControlClient, method: &str, params: Value) -> (i32, String) {
    match operator.call(method, &params) {
        Err(CallError::Refused { code, message }) => (code, message),
        other => panic!("{method} {params}: {other:?}"),
    }
}

/// Runs `ctl`: its status, what it prints, and what it says of errors.
pub(crate) fn ctl(server: &Served, words: &[&str]) -> (Option<i32>, String, String) {
    let socket = server.folder().join("control.sock");
    let output = command().arg("ctl").arg("--socket").arg(socket).args(words).output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    (output.status.code(), out, err)
}

#[test]
fn it_tells_what_is_served() {
    let server = serve(|_| vec!["--name".into(), "root".into(), "--read-only".into()]);
    let mut operator = operator(&server);
    let socket = server.folder().join("control.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o7777, 0o600);
    let version = done(&mut operator, "version", Value::Null);
    assert_eq!(version["control"], 1);
    let mut expected = json!({
        "name": "root", "socket_path": text(server.socket()), "description": "memory: 16 MiB, 4 queues",
        "num_queues": 4, "read_only": true, "size": DISK, "paused": false, "client": null,
    });
    expected["limits"] = Value::Null;
    expected["fabric"] = Value::Null;
    assert_eq!(done(&mut operator, "device.list", json!({})), json!({ "devices": [expected] }));
    let machine = Machine::new(server.client(), &BlockOptions::default());
    expected["client"] = json!({ "pid": std::process::id(), "uid": nix::unistd::getuid().as_raw() });
    assert_eq!(done(&mut operator, "device.list", json!({})), json!({ "devices": [expected] }));
    drop(machine);
    server.wait_for("the client has gone");
    // By any of its names.
    for name in ["root", "blk", "blk.sock", &text(server.socket())] {
        done(&mut operator, "device.resume", json!({ "device": name }));
    }
    let (code, message) = refused(&mut operator, "device.pause", json!({ "device": "toor" }));
    assert!(code == 1 && message.contains("root"), "{message}");
    let folder = server.stop();
    assert!(!folder.path().join("control.sock").exists());
}

#[test]
fn a_paused_device_takes_nothing_and_goes_on_where_it_stood() {
    for file in [false, true] {
        let server = serve(|folder| match file {
            false => vec![],
            true => vec!["--blk-file".into(), text(&folder.join("disk.img"))],
        });
        let mut operator = operator(&server);
        let device = json!({ "device": "blk" });
        let mut machine = Machine::new(server.client(), &BlockOptions::default());
        for round in 0..20u8 {
            exercise(&mut machine.queues);
            let paused = done(&mut operator, "device.pause", device.clone());
            assert_eq!(paused, json!({ "device": text(server.socket()), "size": DISK, "paused": true }));
            let before: Vec<_> = machine.queues.iter().map(given_back).collect();
            for queue in &mut machine.queues {
                for _ in 0..=round {
                    queue.submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
                }
                queue.publish().unwrap();
            }
            // The client is served as ever, and twice is once.
            crate::protocol::in_step(&machine.client);
            done(&mut operator, "device.pause", device.clone());
            assert_eq!(machine.queues.iter().map(given_back).collect::<Vec<_>>(), before, "round {round}");
            done(&mut operator, "device.resume", device.clone());
            for queue in &mut machine.queues {
                for _ in 0..=round {
                    assert_eq!(completion(queue).status, OK);
                }
            }
        }
        // It stays paused over a reset and over its client, and starts a driver that came meanwhile.
        done(&mut operator, "device.pause", device.clone());
        machine.reboot(&BlockOptions::default());
        machine.queues[0].submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
        machine.queues[0].publish().unwrap();
        crate::protocol::in_step(&machine.client);
        assert!(!machine.queues[0].ring().has_used());
        drop(machine);
        let mut machine = Machine::new(server.client(), &BlockOptions::default());
        machine.queues[0].submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
        machine.queues[0].publish().unwrap();
        assert_eq!(done(&mut operator, "device.list", json!({}))["devices"][0]["paused"], true);
        done(&mut operator, "device.resume", device.clone());
        assert_eq!(completion(&mut machine.queues[0]).status, OK);
        exercise(&mut machine.queues);
        drop(machine);
        server.stop();
    }
}

/// Under load, by two operators at once: a driver sees no more than pauses.
#[test]
fn pausing_loses_nothing() {
    let server = serve(|folder| vec!["--blk-file".into(), text(&folder.join("disk.img"))]);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let (over, server) = (&over, &server);
        let operators: Vec<_> = ["device.pause", "device.resize"]
            .map(|method| {
                scope.spawn(move || {
                    let mut operator = operator(server);
                    let mut rounds = 0u64;
                    while !over.load(Ordering::Relaxed) {
                        let size = match method {
                            "device.pause" => json!({ "device": "blk" }),
                            _ => json!({ "device": "blk", "size": DISK + 4096 * (rounds % 50) , "shrink": true}),
                        };
                        done(&mut operator, method, size);
                        done(&mut operator, "device.resume", json!({ "device": "blk" }));
                        rounds += 1;
                    }
                    rounds
                })
            })
            .into();
        for _ in 0..200 {
            exercise(&mut machine.queues);
        }
        over.store(true, Ordering::Relaxed);
        assert!(operators.into_iter().all(|operator| operator.join().unwrap() > 3));
    });
    exercise(&mut machine.queues);
    drop(machine);
    server.stop();
}

#[test]
fn a_driver_is_told_of_a_new_size() {
    for file in [false, true] {
        let server = serve(|folder| match file {
            false => vec![],
            true => vec!["--blk-file".into(), text(&folder.join("disk.img"))],
        });
        let image = server.folder().join("disk.img");
        let mut operator = operator(&server);
        let mut machine = Machine::new(server.client(), &BlockOptions::default());
        exercise(&mut machine.queues);
        let capacity = |machine: &Machine| machine.driver.config().unwrap().capacity * 512;
        let beyond = |machine: &mut Machine, end: u64| {
            let data = machine.memory.allocate(512, 512).unwrap();
            let segment = [data.segment(0, 512).unwrap()];
            execute(&mut machine.queues[1], RequestType::Read, end / 512, &segment).status
        };
        assert_eq!(beyond(&mut machine, DISK), IOERR);
        let grown = done(&mut operator, "device.resize", json!({ "device": "blk", "size": "24M" }));
        assert_eq!(grown["size"], 24 << 20);
        assert_eq!(signalled(machine.driver.config_interrupt().unwrap()), 1);
        assert_eq!(capacity(&machine), 24 << 20);
        assert_eq!(beyond(&mut machine, DISK), OK);
        machine.queues[2].write((24 << 11) - 1, &[0xab; 512]).unwrap();
        exercise(&mut machine.queues);
        // Less is a loss that has to be meant.
        let (code, message) = refused(&mut operator, "device.resize", json!({ "device": "blk", "size": "16M" }));
        assert!(code == 6 && message.contains("shrink") && message.contains(&(24 << 20).to_string()), "{message}");
        assert_eq!(capacity(&machine), 24 << 20);
        done(&mut operator, "device.resize", json!({ "device": "blk", "size": "16M", "shrink": true }));
        assert_eq!(signalled(machine.driver.config_interrupt().unwrap()), 1);
        assert_eq!((capacity(&machine), beyond(&mut machine, DISK)), (DISK, IOERR));
        // What was cut off does not come back.
        done(&mut operator, "device.resize", json!({ "device": "blk", "size": "24M" }));
        let mut last = [1; 512];
        machine.queues[0].read((24 << 11) - 1, &mut last).unwrap();
        assert_eq!(last, [0; 512]);
        for size in [json!(0), json!(1000), json!("big"), json!(-1)] {
            refused(&mut operator, "device.resize", json!({ "device": "blk", "size": size, "shrink": true }));
        }
        exercise(&mut machine.queues);
        if file {
            assert_eq!(fs::metadata(&image).unwrap().len(), 24 << 20);
            // Grown by somebody else.
            fs::File::options().write(true).open(&image).unwrap().set_len(32 << 20).unwrap();
            let grown = done(&mut operator, "device.resize", json!({ "device": "blk" }));
            assert_eq!((grown["size"].as_u64(), capacity(&machine)), (Some(32 << 20), 32 << 20));
            fs::File::options().write(true).open(&image).unwrap().set_len(30 << 20).unwrap();
            let (_, message) = refused(&mut operator, "device.resize", json!({ "device": "blk" }));
            assert!(message.contains("shorter"), "{message}");
        }
        exercise(&mut machine.queues);
        drop(machine);
        server.stop();
    }
}

#[test]
fn what_was_drained_is_in_the_image() {
    let server =
        serve(|folder| vec!["--blk-file".into(), text(&folder.join("disk.img")), "--cache".into(), "writeback".into()]);
    let mut operator = operator(&server);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    machine.queues[0].write(0, &[0x77; 4096]).unwrap();
    assert_eq!(done(&mut operator, "device.drain", json!({ "device": "blk" }))["paused"], true);
    assert_eq!(image_bytes(&server.folder().join("disk.img"), 0, 4096), [0x77; 4096]);
    done(&mut operator, "device.resume", json!({ "device": "blk" }));
    exercise(&mut machine.queues);
    drop(machine);
    server.stop();
}

#[test]
fn devices_come_and_go_while_others_are_at_work() {
    let elsewhere = tempfile::tempdir().unwrap();
    let server = serve(|folder| vec!["--control-allow".into(), text(folder)]);
    let folder = server.folder();
    let mut operator = operator(&server);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    for round in 0..3 {
        for (name, store) in [
            ("ram", json!({ "size": "8M", "name": "ram" })),
            ("disk", json!({ "size": "8M", "blk_file": folder.join("added.img"), "cache": "none" })),
            ("through", json!({ "size": "8M", "blk_file": folder.join("other.img"), "cache": "writeback" })),
        ] {
            let socket = folder.join(format!("{name}.sock"));
            let mut description = store.clone();
            description["socket_path"] = json!(socket);
            description["num_queues"] = json!(2);
            let added = done(&mut operator, "device.add", description.clone());
            assert_eq!((&added["device"]["size"], &added["device"]["num_queues"]), (&json!(8 << 20), &json!(2)));
            let (code, message) = refused(&mut operator, "device.add", description);
            assert!(code == 2 && message.contains("already"), "{message}");
            let client = Arc::new(Client::connect(&socket).unwrap());
            client.set_timeout(LIMIT);
            let mut added = Machine::new(client, &BlockOptions::default());
            exercise(&mut added.queues);
            exercise(&mut machine.queues);
            let (code, message) = refused(&mut operator, "device.remove", json!({ "device": name }));
            assert!(code == 2 && message.contains("force"), "{message}");
            exercise(&mut added.queues);
            // With its client, and without.
            let force = round == 0;
            if !force {
                drop(added);
                let listed =
                    |operator: &mut ControlClient| done(operator, "device.list", json!({}))["devices"][1].take();
                crate::rig::until("its client has gone", || listed(&mut operator)["client"].is_null());
            }
            let removed = done(&mut operator, "device.remove", json!({ "device": name, "force": force }));
            assert_eq!(removed["flushed"], true);
            assert!(!socket.exists() && UnixStream::connect(&socket).is_err());
            assert_eq!(done(&mut operator, "device.list", json!({}))["devices"].as_array().unwrap().len(), 1);
            exercise(&mut machine.queues);
        }
    }
    // What is not named is out of reach, and what makes no sense is refused; the server lives.
    for (description, code, words) in [
        (json!({ "socket_path": elsewhere.path().join("a.sock") }), 5, "a.sock"),
        (json!({ "socket_path": folder.join("a.sock"), "blk_file": "/etc/passwd" }), 5, "passwd"),
        (json!({ "socket_path": folder.join("a.sock"), "blk_file": folder.join("missing.img") }), 5, "missing.img"),
        (json!({ "socket_path": server.socket() }), 2, "already"),
        (json!({ "socket_path": folder.join("control.sock") }), 5, "another server"),
        (json!({ "socket_path": folder.join("a.sock"), "queue_size": 3 }), 4, "power of two"),
        (json!({ "socket_path": folder.join("a.sock"), "queue_workers": "7" }), 4, "worker 7"),
        (json!({ "socket_path": folder.join("a.sock"), "colour": "red" }), -32602, "colour"),
        (json!({ "socket_path": folder.join("a.sock"), "socket_group": "no-such-group" }), 5, "a.sock"),
        (json!({ "socket_path": folder.join("a.sock"), "overlay_of": "/tmp/none" }), 4, "sandbox"),
        (json!({ "socket_path": folder.join("a.sock"), "nbd_uri": "nbd+unix:///?socket=/tmp/none" }), 4, "sandbox"),
        (json!({ "socket_path": folder.join("a.sock"), "store": "qcow2", "blk_file": "/tmp/none" }), 4, "sandbox"),
        (json!({ "size": "1M" }), -32602, "socket_path"),
        (json!([1]), -32602, "object"),
    ] {
        let (was, message) = refused(&mut operator, "device.add", description.clone());
        assert!(was == code && message.contains(words), "{description} gave {was}: {message}");
    }
    assert!(!folder.join("a.sock").exists() && !elsewhere.path().join("a.sock").exists());
    exercise(&mut machine.queues);
    drop(machine);
    server.stop();
}

#[test]
fn a_server_may_begin_without_a_device() {
    let folder = tempfile::tempdir().unwrap();
    let server = Served::start_in(folder, |folder| {
        vec!["--control-socket".into(), text(&folder.join("control.sock")), "--control-allow".into(), text(folder)]
    });
    let socket = text(server.socket());
    let (status, out, err) = ctl(&server, &["add", "--socket-path", &socket, "--size", "1M", "--name", "late"]);
    assert!(status == Some(0) && out.contains("late: memory: 1 MiB, 4 queues"), "{out}{err}");
    exercise(&mut Machine::new(server.client(), &BlockOptions::default()).queues);
    server.stop();
}

#[test]
fn ctl_speaks_to_people_and_to_programs() {
    let server = serve(|_| vec!["--name".into(), "root".into()]);
    let (status, out, _) = ctl(&server, &["list"]);
    assert!(status == Some(0) && out.starts_with("DEVICE") && out.contains("root") && out.contains("16 MiB"), "{out}");
    let (_, out, _) = ctl(&server, &["--json", "list"]);
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["devices"][0]["name"], "root");
    assert!(ctl(&server, &["pause", "root"]).1.contains("resume root"));
    assert!(ctl(&server, &["list"]).1.contains("paused"));
    assert!(ctl(&server, &["resize", "root", "32M"]).1.contains("32 MiB"));
    assert!(ctl(&server, &["resume", "root"]).1.contains("takes requests"));
    assert!(ctl(&server, &["drain", "root"]).1.contains("stable storage"));
    assert!(ctl(&server, &["version"]).1.contains("control socket 1"));
    let machine = Machine::new(server.client(), &BlockOptions::default());
    let (status, _, err) = ctl(&server, &["remove", "root"]);
    assert!(status == Some(1) && err.contains("force"), "{err}");
    let (status, out, _) = ctl(&server, &["remove", "root", "--force"]);
    assert!(status == Some(0) && out.contains("root: removed"), "{out}");
    drop(machine);
    let (status, out, _) = ctl(&server, &["stop"]);
    assert!(status == Some(0) && out.contains("stops"), "{out}");
    let (status, log, folder) = server.wait();
    assert!(status.success() && !log.contains("panicked"), "{log}");
    assert!(!folder.path().join("control.sock").exists());
    let gone = command().args(["ctl", "--socket", "/no/such/control.sock", "list"]).output().unwrap();
    let said = String::from_utf8(gone.stderr).unwrap();
    assert!(gone.status.code() == Some(1) && said.contains("--control-socket"), "{said}");
}

#[test]
fn bad_words_harm_nobody() {
    let server = serve(|_| vec![]);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    let mut operator = operator(&server);
    let connect = || UnixStream::connect(server.folder().join("control.sock")).unwrap();
    for line in ["{", "[]", "null", "\u{1}", "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"exec\"}", &"[".repeat(60_000)]
    {
        let mut stream = connect();
        stream.write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut reply = String::new();
        BufReader::new(&stream).read_line(&mut reply).unwrap();
        assert!(serde_json::from_str::<Value>(&reply).unwrap()["error"]["code"].is_number(), "{reply}");
    }
    // A line without an end, and one that is not read.
    let mut stream = connect();
    let _cut_off = stream.write_all(&vec![b' '; 1 << 20]);
    let mut reply = String::new();
    let _closed = BufReader::new(&stream).read_line(&mut reply);
    drop(stream);
    let mut deaf = connect();
    deaf.write_all(&b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"device.list\"}\n".repeat(100)).unwrap();
    // More than there is room for: the rest finds the door closed, and those who are in are served.
    let crowd: Vec<_> = (0..40).map(|_| connect()).collect();
    assert_eq!(done(&mut operator, "version", json!({}))["control"], 1);
    drop(crowd);
    drop(deaf);
    exercise(&mut machine.queues);
    drop(machine);
    server.stop();
}
