//! What the server's threads have given up by the time that they serve, and who may connect to them.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use client::BlockOptions;
use nix::unistd::{Group, getgid, getuid};

use crate::binary::{Served, disk, run};
use crate::rig::{DISK, LIMIT, Machine, exercise, until};

/// What the kernel says of each thread, but for those of its own that work for a ring: its name, and the value of `key`.
fn threads(server: &Served, key: &str) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.id())).unwrap();
    let value = |status: &str, key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.unwrap_or_default().trim().to_owned()
    };
    let statuses = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok());
    statuses
        .map(|status| (value(&status, "Name"), value(&status, key)))
        .filter(|(name, _)| !name.starts_with("iou-"))
        .collect()
}

fn with(folder: &Path, more: &[&str]) -> Vec<String> {
    let mut arguments = disk(&folder.join("blk.sock"));
    arguments.extend(more.iter().map(|&word| word.to_owned()));
    arguments
}

#[test]
fn every_thread_has_given_up_what_it_can() {
    let own: [(&str, &[&str]); 2] = [("file", &[]), ("qcow2", &["store-0", "store-7"])];
    for (store, own) in own {
        every_thread_of_a_store_has_given_up_what_it_can(store, own);
    }
}

fn every_thread_of_a_store_has_given_up_what_it_can(store: &str, own: &[&str]) {
    let server = Served::start(|folder| {
        with(folder, &["--store", store, "--blk-file", folder.join("disk").to_str().unwrap(), "--cache", "none"])
    });
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    exercise(&mut machine.queues);
    let names: Vec<_> = threads(&server, "Seccomp").into_iter().map(|(name, _)| name).collect();
    for name in ["vfio-user-blk", "signals", "session-0", "worker-0", "worker-1"].iter().chain(own) {
        assert!(names.iter().any(|found| found == name), "{names:?}");
    }
    const NONE: &str = "0000000000000000";
    for (key, expected) in [("NoNewPrivs", "1"), ("CapEff", NONE), ("CapPrm", NONE), ("CapInh", NONE), ("Seccomp", "2")]
    {
        // The main thread enters as it begins to wait, after it has said that it listens.
        until(key, || threads(&server, key).iter().all(|(_, value)| value == expected));
    }
    server.wait_for("sandbox: on: seccomp, ");
    drop(machine);
    server.stop();
}

#[test]
fn what_is_off_is_off() {
    let server = Served::start(|folder| with(folder, &["--sandbox", "off"]));
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    exercise(&mut machine.queues);
    assert!(threads(&server, "Seccomp").iter().all(|(_, value)| value == "0"));
    server.wait_for("sandbox: off");
    drop(machine);
    server.stop();
}

#[test]
fn a_socket_has_the_mode_and_the_group_that_were_asked_for() {
    let group = getgid().to_string();
    for (words, mode) in [
        (&["--socket-mode", "0606"][..], 0o606),
        // More than the usual umask leaves.
        (&["--socket-mode", "777"], 0o777),
        (&["--socket-group", &group], 0o660),
        (&["--socket-group", &group, "--socket-mode", "0620"], 0o620),
    ] {
        let server = Served::start(|folder| with(folder, words));
        let metadata = fs::metadata(server.socket()).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o7777, mode, "{words:?}");
        assert_eq!(metadata.gid().to_string(), group);
        server.stop();
    }
}

#[test]
fn a_group_is_found_by_its_name_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut arguments = with(folder.path(), &["--socket-group", "no-such-group"]);
    arguments.insert(0, "serve".to_owned());
    let (status, said) = run(&arguments);
    assert!(!status.success() && said.contains("no group \"no-such-group\""), "{said}");
    assert!(!folder.path().join("blk.sock").exists());
    let ours = Group::from_gid(getgid()).unwrap().unwrap();
    let server = Served::start(|folder| with(folder, &["--socket-group", &ours.name]));
    assert_eq!(fs::metadata(server.socket()).unwrap().gid(), ours.gid.as_raw());
    server.stop();
}

#[test]
fn only_users_that_are_allowed_are_served() {
    let ours = getuid().as_raw();
    let server = Served::start(|folder| {
        let config = folder.join("server.toml");
        let device = |name: &str, uids: &[u32]| {
            format!("[[device]]\nsocket_path = \"{name}.sock\"\nsize = {DISK}\nallow_uids = {uids:?}\n")
        };
        fs::write(&config, device("blk", &[ours]) + &device("other", &[ours + 1, ours + 2])).unwrap();
        vec!["--config".into(), config.display().to_string()]
    });
    // Refused before a word is said, and again for the next one.
    for _ in 0..2 {
        let mut stream = UnixStream::connect(server.folder().join("other.sock")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0, "it is closed");
    }
    server.wait_for(&format!("other.sock: a client of uid {ours} (process {}) was refused", std::process::id()));
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    exercise(&mut machine.queues);
    drop(machine);
    server.stop();
}
