//! `server.statistics`, and `vfio-user-blk top` in a terminal and without.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use client::BlockOptions;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use vfio_user_blk::control::{ControlClient, Snapshot};

use crate::binary::{Served, command, disk};
use crate::rig::{Machine, exercise};

fn serve() -> Served {
    Served::start(|folder| {
        let mut arguments = disk(&folder.join("blk.sock"));
        arguments.extend(["--name", "vm1", "--control-socket"].map(str::to_owned));
        arguments.push(folder.join("control.sock").to_str().unwrap().to_owned());
        arguments
    })
}

fn top(server: &Served, words: &[&str]) -> Command {
    let mut top = command();
    top.args(["top", "--socket"]).arg(server.folder().join("control.sock")).args(words);
    top
}

fn look(server: &Served) -> Snapshot {
    let mut operator = ControlClient::connect(&server.folder().join("control.sock")).unwrap();
    serde_json::from_value(operator.call("server.statistics", &json!({})).unwrap()).unwrap()
}

#[test]
fn a_snapshot_has_every_queue_and_the_servers_time() {
    let server = serve();
    let before = look(&server);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    exercise(&mut machine.queues);
    exercise(&mut machine.queues[..1]);
    let now = look(&server);
    assert!(now.time_ns > before.time_ns);
    let [device] = now.devices.as_slice() else { panic!("{now:?}") };
    assert!(device.name == "vm1" && device.attached && !device.paused && !before.devices[0].attached);
    let counts: Vec<_> = device.queues.iter().map(|queue| (queue.statistics.reads, queue.statistics.writes)).collect();
    assert_eq!(counts, [(2, 2), (1, 1), (1, 1), (1, 1)]);
    for queue in &device.queues {
        assert_eq!(queue.stages.submit_to_reap.count(), queue.statistics.operations());
        assert_eq!(queue.stages.submit_to_reap.sum_ns, queue.statistics.submit_to_reap_ns);
    }
    // What an operator has counted anew goes on here.
    let mut operator = ControlClient::connect(&server.folder().join("control.sock")).unwrap();
    operator.call("device.reset_statistics", &json!({ "device": "vm1" })).unwrap();
    assert_eq!(look(&server).devices[0].queues[0].statistics.reads, 2);
    drop(machine);
    server.stop();
}

/// What the table says with a letter for a power of 1024.
fn bytes(word: &str) -> f64 {
    let (number, unit) = word.split_at(word.trim_end_matches(char::is_alphabetic).len());
    let power = ["", "k", "M", "G"].iter().position(|&letter| letter == unit).unwrap();
    number.parse::<f64>().unwrap() * 1024_f64.powi(power as i32)
}

#[test]
fn a_table_shows_what_a_driver_does() {
    let server = serve();
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    let over = AtomicBool::new(false);
    let text = thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                exercise(&mut machine.queues);
            }
        });
        let output = top(&server, &["--once", "--interval", "0.3", "--queues"]).output().unwrap();
        over.store(true, Ordering::Relaxed);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    });
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 6, "{text}");
    assert_eq!(lines[0][..3], ["DEVICE", "STATE", "IOPS"]);
    assert_eq!(lines[1][..3], ["vm1", "in", "use"]);
    // Something was done: as much was written as was read, but for what was under way when it was looked at.
    let (read, written) = (bytes(lines[1][4]), bytes(lines[1][5]));
    assert!(lines[1][3] != "0" && read > 0.0 && (0.8..1.25).contains(&(written / read)), "{text}");
    assert_eq!(lines[2][..2], ["queue", "0"]);
    drop(machine);
    server.stop();
}

#[test]
fn without_a_terminal_or_a_server_it_says_what_to_do() {
    let server = serve();
    let output = top(&server, &[]).output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && err.contains("--once"), "{err}");
    let folder = server.stop();
    let output =
        command().args(["top", "--once", "--socket"]).arg(folder.path().join("control.sock")).output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && err.contains("--control-socket"), "{err}");
}

/// What a terminal of 160 columns shows while `shell` runs in it, with what `then` does as soon as a table is there; it is given what
/// there is by then, and the keyboard.
fn terminal(shell: &str, then: impl FnOnce(&str, &mut dyn Write)) -> String {
    // Of bsdutils, without which there is no Debian.
    let mut script = Command::new("script");
    let shell = format!("stty cols 160 rows 20; stty -g; {shell}; echo ended with $?; stty -g");
    script.args(["--quiet", "--command", &shell, "/dev/null"]).env("TERM", "xterm").env("SHELL", "/bin/sh");
    let mut script = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut keyboard, mut screen) = (script.stdin.take().unwrap(), script.stdout.take().unwrap());
    let (mut seen, mut bytes) = (String::new(), [0; 4096]);
    let mut read = |seen: &mut String| {
        let count = screen.read(&mut bytes).unwrap();
        seen.push_str(&String::from_utf8_lossy(&bytes[..count]));
        count > 0
    };
    while !(seen.contains("STORE p50") && seen.contains("vm1")) {
        assert!(read(&mut seen), "{seen:?}");
    }
    then(&seen, &mut keyboard);
    while read(&mut seen) {}
    script.wait().unwrap();
    seen
}

/// Whatever ends it, the terminal is as it was: its modes, and what was on it.
#[test]
fn a_terminal_is_given_back() {
    const ENTER: &str = "\x1b[?1049h";
    const LEAVE: &str = "\x1b[?1049l";
    let server = serve();
    let words = top(&server, &["--interval", "0.2"]);
    let program = Path::new(words.get_program()).display().to_string();
    let arguments: Vec<_> = words.get_args().map(|word| word.to_str().unwrap()).collect();
    let top = format!("sh -c 'echo process $$ runs; exec {program} {}'", arguments.join(" "));
    for (why, status) in [("keys", 0), ("control", 0), ("signal", 0), ("server", 1)] {
        let seen = terminal(&top, |seen, keyboard| match why {
            "keys" => keyboard.write_all(b"sjuq").unwrap(),
            "control" => keyboard.write_all(b"\x03").unwrap(),
            "signal" => {
                let process = seen.split("process ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
                kill(Pid::from_raw(process), Signal::SIGTERM).unwrap();
            }
            _ => kill(Pid::from_raw(server.id().try_into().unwrap()), Signal::SIGTERM).unwrap(),
        });
        let (enter, leave) = (seen.find(ENTER), seen.rfind(LEAVE));
        assert!(enter.is_some() && enter < leave, "{why}: {seen:?}");
        let modes: Vec<_> = seen.lines().filter(|line| line.matches(':').count() > 20).map(str::trim).collect();
        assert!(modes.len() == 2 && modes[0] == modes[1], "{why}: {seen:?}");
        assert!(seen.contains(&format!("ended with {status}")), "{why}: {seen:?}");
    }
    server.stop();
}
