//! The server under a service manager.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use client::{BlockOptions, Client};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use testbed::{Progress, Tool};
use vfio_user_blk::control::ControlClient;

use crate::binary::{Served, command};
use crate::control::done;
use crate::rig::{LIMIT, Machine, exercise};

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

/// As the unit that is shipped has it: operators add all devices.
#[test]
fn an_empty_configuration_is_served_for_operators() {
    let server = Served::start(|folder| {
        fs::write(folder.join("server.toml"), "control_mode = \"0600\"\n").unwrap();
        vec!["--config".into(), "server.toml".into(), "--control-socket".into(), "control.sock".into()]
    });
    let mut operator = ControlClient::connect(&server.folder().join("control.sock")).unwrap();
    assert_eq!(done(&mut operator, "device.list", json!({})), json!({ "devices": [] }));
    let folder = server.stop();
    let serve = command().args(["serve", "--config", "server.toml"]).current_dir(folder.path()).output().unwrap();
    let said = String::from_utf8(serve.stderr).unwrap();
    assert!(serve.status.code() == Some(78), "{said}");
    fs::write(folder.path().join("server.toml"), "").unwrap();
    let output = |words: &[&str]| command().args(words).current_dir(folder.path()).output().unwrap();
    assert!(output(&["check", "server.toml"]).status.success());
    let serve = output(&["serve", "--config", "server.toml"]);
    let said = String::from_utf8(serve.stderr).unwrap();
    assert!(serve.status.code() == Some(78) && said.contains("no device in it"), "{said}");
}

/// The server as a service manager starts it, with sockets of its own for standard input and output, which become the descriptors
/// 3 and 4.
struct Activated {
    child: Child,
    manager: UnixDatagram,
}

impl Activated {
    fn start(folder: &Path, sockets: [UnixListener; 2], names: &str, words: &[&str]) -> Activated {
        let manager = UnixDatagram::bind(folder.join(format!("notify-{names}"))).unwrap();
        manager.set_read_timeout(Some(LIMIT)).unwrap();
        let [first, second] = sockets.map(|socket| Stdio::from(OwnedFd::from(socket)));
        // systemd's sockets do not block, and the process is known only once there is one.
        let shell = "exec 3<&0 4<&1 0</dev/null 1>&2; LISTEN_PID=$$ exec \"$0\" \"$@\"";
        let child = Command::new("sh")
            .args(["-c", shell])
            .arg(command().get_program())
            .args(["serve", "--workers", "1"])
            .args(words)
            .current_dir(folder)
            .env_remove("RUST_LOG")
            .env("LISTEN_FDS", "2")
            .env("LISTEN_FDNAMES", names)
            .env("NOTIFY_SOCKET", folder.join(format!("notify-{names}")))
            .stdin(first)
            .stdout(second)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Activated { child, manager }
    }

    fn ready(&self) {
        let mut bytes = [0; 4096];
        let count = self.manager.recv(&mut bytes).unwrap();
        assert!(bytes[..count].starts_with(b"READY=1\n"));
    }

    /// Its status, and what it said.
    fn wait(self) -> (Option<i32>, String) {
        let output = self.child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }
}

#[test]
fn sockets_that_are_handed_over_are_served_and_stay() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (disk, control) = (UnixListener::bind(path("a.sock")).unwrap(), UnixListener::bind(path("ctl.sock")).unwrap());
    // Who comes before the server waits for it. The device is known by its name, operators by the path.
    let early = UnixStream::connect(path("ctl.sock")).unwrap();
    let words = ["--socket-path", "elsewhere.sock", "--name", "vm1", "--control-socket", "ctl.sock", "--allow-uid"];
    let uid = nix::unistd::getuid().to_string();
    let words: Vec<_> = words.into_iter().chain([uid.as_str()]).collect();
    for round in 0..2 {
        let sockets = [disk.try_clone().unwrap(), control.try_clone().unwrap()];
        let server = Activated::start(folder.path(), sockets, &format!("vm1:some{round}"), &words);
        server.ready();
        let mut operator = ControlClient::connect(&path("ctl.sock")).unwrap();
        let list = operator.call("device.list", &Value::Null).unwrap();
        let socket_path = path("a.sock");
        assert_eq!(list["devices"][0]["socket_path"], socket_path.to_str().unwrap());
        assert!(!path("elsewhere.sock").exists());
        let client = Client::connect(&socket_path).unwrap();
        client.set_timeout(LIMIT);
        let mut machine = Machine::new(Arc::new(client), &BlockOptions::default());
        exercise(&mut machine.queues);
        if round == 0 {
            let mut lines = BufReader::new(&early);
            (&early).write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"version\"}\n").unwrap();
            let mut reply = String::new();
            lines.read_line(&mut reply).unwrap();
            assert!(reply.contains("\"result\""), "{reply}");
        }
        drop(machine);
        operator.call("server.stop", &Value::Null).unwrap();
        let (status, log) = server.wait();
        assert!(status == Some(0) && log.contains("the socket is the service manager's"), "{log}");
        // They are its own, and the next server's.
        assert!(path("a.sock").exists() && path("ctl.sock").exists());
    }
}

#[test]
fn sockets_that_make_no_sense_are_refused_with_what_would() {
    let folder = tempfile::tempdir().unwrap();
    let listen = |name: &str| {
        let path = folder.path().join(name);
        // What the round before has left.
        let _none = fs::remove_file(&path);
        UnixListener::bind(path).unwrap()
    };
    let words = ["--socket-path", "a.sock", "--name", "vm1"];
    for (names, status, message) in [
        ("vm1:vm2", 78, &["\"vm2\"", "FileDescriptorName=", "\"vm1\" or "][..]),
        ("vm1", 78, &["1 names for 2 descriptors"]),
        ("vm1:vm1", 78, &["\"vm1\"", "is no device's"]),
    ] {
        let server = Activated::start(folder.path(), [listen("a.sock"), listen("b.sock")], names, &words);
        let (found, log) = server.wait();
        assert_eq!(found, Some(status), "{log}");
        message.iter().for_each(|words| assert!(log.contains(words), "{names}: {words:?} is not in {log}"));
        assert!(folder.path().join("a.sock").exists(), "it is not ours to remove");
    }
    // One that does not listen.
    let (deaf, _) = UnixStream::pair().unwrap();
    let deaf = UnixListener::from(OwnedFd::from(deaf));
    let server = Activated::start(folder.path(), [listen("a.sock"), deaf], "vm1:control", &words);
    let (status, log) = server.wait();
    assert!(status == Some(78) && log.contains("\"control\"") && log.contains("does not listen"), "{log}");
}

#[test]
fn the_journal_gets_priorities() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stderr");
    let log = fs::File::create(&path).unwrap();
    let about = log.metadata().unwrap();
    let serve = |stream: String| {
        let log = log.try_clone().unwrap();
        // Somebody else's socket is in the way.
        let taken = folder.path().join("taken");
        fs::write(&taken, "").unwrap();
        let mut serve = command();
        serve.args(["serve", "--size", "1M", "--socket-path"]).arg(taken).env("JOURNAL_STREAM", stream);
        assert_eq!(serve.stdout(Stdio::null()).stderr(log).status().unwrap().code(), Some(1));
        let text = fs::read_to_string(&path).unwrap();
        text.lines().last().unwrap().to_owned()
    };
    let here = serve(format!("{}:{}", about.dev(), about.ino()));
    assert!(here.starts_with("<3>/") && here.contains("is not a socket"), "{here}");
    let elsewhere = serve(format!("{}:{}", about.dev(), about.ino() + 1));
    assert!(elsewhere.starts_with("vfio-user-blk: /"), "{elsewhere}");
}

/// The units of a kind.
fn units(extension: &str) -> Vec<PathBuf> {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../dist/systemd"));
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|found| found == extension)).collect()
}

/// What the units say is what the server understands.
#[test]
fn units_use_options_that_there_are() {
    let units = units("service");
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

/// systemd understands each line of them.
#[test]
fn units_are_what_systemd_takes() {
    let folder = tempfile::tempdir().unwrap();
    let units: Vec<_> = ["service", "socket"].into_iter().flat_map(units).collect();
    assert_eq!(units.len(), 4);
    let mut copies = Vec::new();
    for unit in units {
        // The program has to be there, and nothing else is to be looked for.
        let text = fs::read_to_string(&unit).unwrap();
        let text = text.replace("/usr/local/bin/vfio-user-blk", command().get_program().to_str().unwrap());
        // Of a template, an instance.
        let name = unit.file_name().unwrap().to_str().unwrap().replace('@', "@vm1");
        let copy = folder.path().join(name);
        fs::write(&copy, text).unwrap();
        copies.push(copy);
    }
    let verify = |units: &[PathBuf]| {
        let mut analyze = Tool::SystemdAnalyze.command(&Progress::stderr()).unwrap();
        let output = analyze.args(["verify", "--man=no", "--generators=no"]).args(units).output().unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    let ours =
        |said: &str| said.lines().filter(|line| line.contains("vfio-user-blk")).map(str::to_owned).collect::<Vec<_>>();
    let (well, said) = verify(&copies);
    assert!(well && ours(&said).is_empty(), "{said}");
    // And it does see what is wrong.
    let text = fs::read_to_string(&copies[0]).unwrap();
    fs::write(&copies[0], text.replace("RuntimeDirectory=", "RunTimeDirectory=")).unwrap();
    let (_, said) = verify(&copies[..1]);
    assert!(ours(&said).iter().any(|line| line.contains("RunTimeDirectory")), "{said}");
}
