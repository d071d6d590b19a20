//! The server under a service manager.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::binary::command;
use crate::rig::LIMIT;

#[test]
fn a_service_manager_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let manager = UnixDatagram::bind(folder.path().join("notify")).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let socket = folder.path().join("blk.sock");
    let mut server = command()
        .args(["serve", "--workers", "1", "--socket-path"])
        .arg(&socket)
        .env("NOTIFY_SOCKET", folder.path().join("notify"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let heard = || {
        let mut bytes = [0; 4096];
        let count = manager.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..count].to_vec()).unwrap()
    };
    let ready = heard();
    assert!(ready.starts_with("READY=1\n") && ready.contains("1 device\n") && socket.exists(), "{ready}");
    // One that has gone keeps the server from nothing; this one stays.
    kill(Pid::from_raw(server.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    assert!(heard().starts_with("STOPPING=1\n"));
    assert!(server.wait().unwrap().success());
}

fn units() -> Vec<PathBuf> {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../dist/systemd"));
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// What the units say is what the server understands.
#[test]
fn units_use_options_that_there_are() {
    let units = units();
    assert_eq!(units.len(), 2);
    let help = String::from_utf8(command().args(["serve", "--help"]).output().unwrap().stdout).unwrap();
    for unit in units {
        let text = fs::read_to_string(&unit).unwrap();
        let start = text.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
        let options: Vec<_> = start.split(' ').filter(|word| word.starts_with("--")).collect();
        assert!(start.contains("vfio-user-blk serve") && options.contains(&"--config"), "{start}");
        assert!(options.iter().all(|option| help.contains(&format!("{option} <"))), "{start}");
        assert!(text.contains("Type=notify") && text.contains("RestartPreventExitStatus=2 78"), "{}", unit.display());
    }
}
