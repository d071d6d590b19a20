//! Disks that start as copies of one image.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use client::RequestType;
use nix::sys::signal::Signal;
use serde_json::json;
use vfio_user_blk::config::{Cache, DeviceConfig, OverlayKind, Size};
use vfio_user_blk::control::ControlClient;

use crate::binary::{Served, command, run};
use crate::rig::{DISK, IOERR, Machine, OK, Random, Rig, execute, exercise, until};

/// Makes an image that is no other.
fn golden(folder: &Path) -> Vec<u8> {
    let mut bytes = vec![0; DISK as usize];
    Random::new(77).fill(&mut bytes);
    fs::write(folder.join("golden.img"), &bytes).unwrap();
    bytes
}

fn overlay(folder: &Path, number: usize) -> DeviceConfig {
    let mut device = DeviceConfig::new(folder.join(format!("blk{number}.sock")));
    device.num_queues = Some(1);
    device.overlay_of = Some(folder.join("golden.img"));
    device
}

#[test]
fn a_hundred_disks_share_one_image() {
    let mut image = Vec::new();
    let mut path = std::path::PathBuf::new();
    let rig = Rig::devices(|folder| {
        image = golden(folder);
        path = folder.join("golden.img");
        // By another name too.
        fs::hard_link(&path, folder.join("same.img")).unwrap();
        let mut devices: Vec<_> = (0..100).map(|number| overlay(folder, number)).collect();
        devices[99].overlay_of = Some(folder.join("same.img"));
        (devices[50].overlay, devices[50].overlay_file) = (Some(OverlayKind::Temporary), Some(folder.to_owned()));
        devices
    });
    let links = fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    let names = [path.clone(), path.with_file_name("same.img")];
    // The file, and the lock on it.
    assert_eq!(links.filter(|link| names.contains(link)).count(), 2);

    let mut machines: Vec<_> =
        [0, 1, 50, 99].map(|number| Machine::new(rig.client_of(number), &Default::default())).into();
    for (number, machine) in machines.iter_mut().enumerate() {
        let mut bytes = vec![0; 65536];
        machine.queues[0].read(64, &mut bytes).unwrap();
        assert!(bytes == image[64 * 512..][..65536], "the image shows");
        exercise(&mut machine.queues);
        machine.queues[0].write(64 + number as u64, &[number as u8; 512]).unwrap();
    }
    for (number, machine) in machines.iter_mut().enumerate() {
        let mut bytes = vec![0; 4 * 512];
        machine.queues[0].read(64, &mut bytes).unwrap();
        let mut expected = image[64 * 512..][..4 * 512].to_vec();
        expected[number * 512..][..512].fill(number as u8);
        assert!(bytes == expected, "each its own changes and no other's");
    }
    drop(machines);
    let folder = rig.stop();
    assert!(fs::read(folder.path().join("golden.img")).unwrap() == image, "the base was changed");
}

#[test]
fn a_full_overlay_refuses_writes_and_takes_them_after_a_discard() {
    let rig = Rig::devices(|folder| {
        golden(folder);
        let mut device = overlay(folder, 0);
        device.overlay_limit = Some(Size(8192));
        vec![device]
    });
    let mut machine = rig.boot();
    let buffer = machine.memory.allocate(4096, 4096).unwrap();
    let data = [buffer.segment(0, 4096).unwrap()];
    let queue = &mut machine.queues[0];
    for (sector, status) in [(0, OK), (8, OK), (16, IOERR), (0, OK)] {
        assert_eq!(execute(queue, RequestType::Write, sector, &data).status, status, "sector {sector}");
    }
    queue.discard(0, 8).unwrap();
    assert_eq!(execute(queue, RequestType::Write, 16, &data).status, OK);
    assert_eq!(execute(queue, RequestType::Write, 0, &data).status, IOERR);
}

#[test]
fn a_kept_overlay_is_found_again_and_grows_a_disk() {
    let mut image = Vec::new();
    let arguments = |folder: &Path| {
        let path = |name: &str| folder.join(name).display().to_string();
        ["--socket-path", &path("blk.sock"), "--overlay-of", &path("golden.img"), "--overlay-file", &path("a.cow")]
            .map(str::to_owned)
            .to_vec()
    };
    let server = Served::start(|folder| {
        image = golden(folder);
        let mut arguments = arguments(folder);
        arguments.extend(["--size".into(), (2 * DISK).to_string()]);
        arguments
    });
    let mut machine = Machine::new(server.client(), &Default::default());
    let end = DISK / 512;
    // Not flushed: that is the server's own business, at its end.
    machine.queues[0].write(end - 1, &[7; 1024]).unwrap();
    drop(machine);
    let folder = server.stop();
    let allocated = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(folder.path().join("a.cow")).unwrap()) * 512;
    assert!(allocated < 1 << 20, "sparse: {allocated}");

    let server = Served::start_in(folder, arguments);
    let mut machine = Machine::new(server.client(), &Default::default());
    let mut bytes = vec![1; 4096];
    machine.queues[0].read(end - 4, &mut bytes).unwrap();
    let mut expected = image[image.len() - 2048..].to_vec();
    expected.resize(4096, 0);
    expected[3 * 512..5 * 512].fill(7);
    assert!(bytes == expected);
    drop(machine);
    let folder = server.stop();
    assert!(fs::read(folder.path().join("golden.img")).unwrap() == image, "the base was changed");

    // Over another image it is refused.
    fs::write(folder.path().join("golden.img"), vec![0; DISK as usize]).unwrap();
    let mut serve = vec!["serve".to_owned()];
    serve.extend(arguments(folder.path()));
    let (status, told) = run(&serve);
    assert!(!status.success() && told.contains("a.cow") && told.contains("another base"), "{told}");
}

#[test]
fn a_writethrough_overlay_has_each_write_in_its_file() {
    let rig = Rig::devices(|folder| {
        golden(folder);
        let mut device = overlay(folder, 0);
        (device.overlay_file, device.cache) = (Some(folder.join("a.cow")), Some(Cache::Writethrough));
        vec![device]
    });
    let mut machine = rig.boot();
    machine.queues[0].write(3, &[9; 512]).unwrap();
    let file = fs::read(rig.socket(0).with_file_name("a.cow")).unwrap();
    assert_eq!(file[4096..4104], [0b1000_0000, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(file[(1 << 20) + 3 * 512..][..512], [9; 512]);
}

/// A server of a kept overlay with a control socket, whose operators may have its folder changed.
fn with_operator(folder: &Path, more: &[String]) -> Vec<String> {
    let path = |name: &str| folder.join(name).display().to_string();
    let mut arguments: Vec<_> = [
        ("--socket-path", "blk.sock"),
        ("--overlay-of", "golden.img"),
        ("--overlay-file", "a.cow"),
        ("--control-socket", "control.sock"),
    ]
    .iter()
    .flat_map(|(option, name)| [(*option).to_owned(), path(name)])
    .collect();
    arguments.extend_from_slice(more);
    arguments
}

fn ctl(server: &Served, words: &[&str]) -> (bool, String) {
    let socket = server.folder().join("control.sock");
    let output = command().arg("ctl").arg("--socket").arg(socket).args(words).output().unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (output.status.success(), said)
}

/// In its sandbox, while a driver is at work.
#[test]
fn an_operator_commits_an_overlay_under_a_driver() {
    let mut image = Vec::new();
    let server = Served::start(|folder| {
        image = golden(folder);
        with_operator(folder, &["--control-allow".into(), folder.display().to_string()])
    });
    let golden = server.folder().join("golden.img");
    let mut machine = Machine::new(server.client(), &Default::default());
    for round in 1..4_u8 {
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let busy = scope.spawn(|| {
                loop {
                    exercise(&mut machine.queues);
                    if over.load(Ordering::Acquire) {
                        break;
                    }
                }
                machine.queues[0].write(3 * u64::from(round), &[round; 1024]).unwrap();
            });
            let (done, said) = ctl(&server, &["commit", "blk"]);
            assert!(done && said.contains("written into its base"), "{said}");
            over.store(true, Ordering::Release);
            busy.join().unwrap();
        });
        let (done, said) = ctl(&server, &["--json", "commit", "blk"]);
        assert!(done, "{said}");
        image[..4096].fill(0x5a);
        image[3 * 512 * usize::from(round)..][..1024].fill(round);
        let found = fs::read(&golden).unwrap();
        assert!(found[..64 * 512] == image[..64 * 512], "round {round}");
        let mut whole = vec![0; DISK as usize];
        machine.queues[0].read(0, &mut whole).unwrap();
        assert!(whole == found, "the driver sees what the base has");
    }
    // The driver's disk under its feet is changed by force only.
    let before = fs::read(&golden).unwrap();
    machine.queues[0].write(0, &[0x77; 4096]).unwrap();
    let (done, said) = ctl(&server, &["discard", "blk"]);
    assert!(!done && said.contains("force"), "{said}");
    let (done, said) = ctl(&server, &["discard", "blk", "--force"]);
    assert!(done && said.contains("is its base again"), "{said}");
    let mut bytes = [0; 4096];
    machine.queues[0].read(0, &mut bytes).unwrap();
    assert!(bytes[..] == before[..4096]);
    // Without a client, and it stays paused if it was.
    machine.queues[0].write(8, &[0x78; 4096]).unwrap();
    assert!(ctl(&server, &["pause", "blk"]).0);
    drop(machine);
    until("its client has gone", || ctl(&server, &["list"]).1.contains("paused  -"));
    assert!(ctl(&server, &["discard", "blk"]).0);
    assert!(ctl(&server, &["list"]).1.contains("paused"));
    assert!(ctl(&server, &["resume", "blk"]).0);
    let folder = server.stop();
    assert!(fs::read(&golden).unwrap() == before, "{}", folder.path().display());
    // The overlay knows its base, which it has changed.
    let server = Served::start_in(folder, |folder| with_operator(folder, &[]));
    let mut machine = Machine::new(server.client(), &Default::default());
    machine.queues[0].read(0, &mut bytes).unwrap();
    assert!(bytes[..] == before[..4096]);
    machine.queues[0].write(0, &[0x79; 4096]).unwrap();
    // What the operator has not been given stays closed.
    let (done, said) = ctl(&server, &["commit", "blk"]);
    assert!(!done && said.contains("--control-allow"), "{said}");
    exercise(&mut machine.queues);
    drop(machine);
    let _folder = server.stop();
    assert!(fs::read(&golden).unwrap() == before);
}

#[test]
fn what_has_no_overlay_or_shares_its_base_is_not_committed() {
    let server = Served::start(|folder| {
        golden(folder);
        let path = |name: &str| folder.join(name).display().to_string();
        let overlay =
            |name: &str| format!("[[device]]\nsocket_path = {:?}\noverlay_of = {:?}\n", path(name), path("golden.img"));
        let config = [
            format!("control_socket = {:?}\ncontrol_allow = [{:?}]\n", path("control.sock"), path("")),
            overlay("one.sock"),
            overlay("two.sock"),
            format!("[[device]]\nsocket_path = {:?}\nsize = \"1M\"\n", path("blk.sock")),
        ]
        .concat();
        fs::write(folder.join("config.toml"), config).unwrap();
        vec!["--config".into(), path("config.toml")]
    });
    let (done, said) = ctl(&server, &["commit", "two"]);
    assert!(!done && said.contains("1 more of this server's devices"), "{said}");
    for word in ["commit", "discard"] {
        let (done, said) = ctl(&server, &[word, "blk"]);
        assert!(!done && said.contains("no overlay"), "{said}");
    }
    assert!(ctl(&server, &["remove", "one"]).0);
    let (done, said) = ctl(&server, &["commit", "two"]);
    assert!(done, "{said}");
    server.stop();
}

/// Wherever a commit is cut off, overlay and base are the disk together, and the next server ends what was begun.
#[test]
fn a_server_killed_in_the_middle_of_a_commit_has_the_same_disk() {
    let mut folder = tempfile::tempdir().unwrap();
    let mut disk = golden(folder.path());
    let arguments = |folder: &Path| with_operator(folder, &["--control-allow".into(), folder.display().to_string()]);
    let mut random = Random::new(9);
    let mut found = vec![0; DISK as usize];
    for round in 0..8 {
        let server = Served::start_in(folder, arguments);
        let mut machine = Machine::new(server.client(), &Default::default());
        machine.queues[0].read(0, &mut found).unwrap();
        assert!(found == disk, "round {round}");
        for _ in 0..300 {
            let len = 1 + random.below(100);
            let first = random.below(DISK / 512 - len);
            let data = &mut disk[first as usize * 512..][..len as usize * 512];
            random.fill(data);
            machine.queues[0].write(first, data).unwrap();
        }
        machine.queues[0].flush().unwrap();
        drop(machine);
        let control = server.folder().join("control.sock");
        folder = thread::scope(|scope| {
            let mut operator = ControlClient::connect(&control).unwrap();
            let commit = scope.spawn(move || operator.call("device.commit", &json!({ "device": "blk" })).is_ok());
            // Anywhere from before its beginning to after its end.
            for _ in 0..random.below(4000) {
                thread::yield_now();
            }
            server.signal(Signal::SIGKILL);
            let (_, _, folder) = server.wait();
            commit.join().unwrap();
            folder
        });
        // Nobody is there to take them away.
        for name in ["blk.sock", "control.sock"] {
            let _gone = fs::remove_file(folder.path().join(name));
        }
    }
    let server = Served::start_in(folder, arguments);
    let (done, said) = ctl(&server, &["commit", "blk"]);
    assert!(done, "{said}");
    let folder = server.stop();
    assert!(fs::read(folder.path().join("golden.img")).unwrap() == disk);
}

/// The base is smaller than the disk, and grows with the first commit, wherever that is cut off.
#[test]
fn a_server_killed_while_it_makes_a_base_larger_has_the_same_disk() {
    const LARGER: u64 = DISK + (5 << 20) + 512;
    let mut random = Random::new(10);
    let mut grown = 0;
    for round in 0..10 {
        let folder = tempfile::tempdir().unwrap();
        let mut disk = golden(folder.path());
        disk.resize(LARGER as usize, 0);
        let arguments = |folder: &Path| {
            let more = ["--control-allow".into(), folder.display().to_string(), "--size".into(), LARGER.to_string()];
            with_operator(folder, &more)
        };
        let server = Served::start_in(folder, arguments);
        let mut machine = Machine::new(server.client(), &Default::default());
        for _ in 0..200 {
            let len = 1 + random.below(100);
            let first = random.below(LARGER / 512 - len);
            let data = &mut disk[first as usize * 512..][..len as usize * 512];
            random.fill(data);
            machine.queues[0].write(first, data).unwrap();
        }
        machine.queues[0].flush().unwrap();
        drop(machine);
        let control = server.folder().join("control.sock");
        let folder = thread::scope(|scope| {
            let mut operator = ControlClient::connect(&control).unwrap();
            let commit = scope.spawn(move || operator.call("device.commit", &json!({ "device": "blk" })).is_ok());
            for _ in 0..random.below(3000) {
                thread::yield_now();
            }
            server.signal(Signal::SIGKILL);
            let (_, _, folder) = server.wait();
            commit.join().unwrap();
            folder
        });
        for name in ["blk.sock", "control.sock"] {
            let _gone = fs::remove_file(folder.path().join(name));
        }
        let golden = folder.path().join("golden.img");
        grown += usize::from(fs::metadata(&golden).unwrap().len() == LARGER);
        let server = Served::start_in(folder, arguments);
        let mut machine = Machine::new(server.client(), &Default::default());
        let mut found = vec![0; LARGER as usize];
        machine.queues[0].read(0, &mut found[..DISK as usize]).unwrap();
        machine.queues[0].read(DISK / 512, &mut found[DISK as usize..]).unwrap();
        assert!(found == disk, "round {round}");
        let (done, said) = ctl(&server, &["commit", "blk"]);
        assert!(done, "{said}");
        machine.queues[0].read(DISK / 512, &mut found[DISK as usize..]).unwrap();
        assert!(found == disk && fs::read(&golden).unwrap() == disk);
        drop(machine);
        server.stop();
    }
    println!("{grown} of 10 bases had grown");
}

/// What a terminal shows: a server that is slow is played by the test, so that nothing depends on how fast a disk is.
#[test]
fn a_terminal_shows_how_far_a_commit_is() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let playing = thread::spawn(move || {
        let [mut waiting, mut asking] = [(); 2].map(|()| BufReader::new(listener.accept().unwrap().0));
        let mut line = String::new();
        waiting.read_line(&mut line).unwrap();
        assert!(line.contains("device.commit") && line.contains("vm1"), "{line}");
        for looked_at in [1_u64 << 20, 3 << 20] {
            line.clear();
            asking.read_line(&mut line).unwrap();
            assert!(line.contains("device.progress") && line.contains("vm1"), "{line}");
            let id = serde_json::from_str::<serde_json::Value>(&line).unwrap()["id"].clone();
            let commit = json!({ "looked_at": looked_at, "size": 4 << 20, "written": 1 << 20 });
            let reply = json!({ "jsonrpc": "2.0", "id": id, "result": { "device": "vm1", "commit": commit } });
            writeln!(asking.get_mut(), "{reply}").unwrap();
        }
        // It has shown what it was told when it asks again.
        asking.read_line(&mut line).unwrap();
        let result = json!({ "device": "vm1", "written": 4096, "zeroed": 0, "freed": 4096, "seconds": 1.5 });
        writeln!(waiting.get_mut(), "{}", json!({ "jsonrpc": "2.0", "id": 1, "result": result })).unwrap();
    });
    let program = command().get_program().to_str().unwrap().to_owned();
    let words = format!("{program} ctl --socket {} commit vm1", socket.display());
    // Its standard streams are a terminal's there.
    let output = std::process::Command::new("script").args(["-q", "-e", "-c", &words, "/dev/null"]).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}");
    playing.join().unwrap();
    let places = [" 25 % of 4 MiB, 1 MiB written", " 75 % of 4 MiB", "vm1: 4 KiB written into its base"];
    let places = places.map(|words| said.find(words).unwrap_or_else(|| panic!("{words} is not in {said:?}")));
    assert!(places.is_sorted() && said[places[1]..places[2]].contains("\r\x1b[K"), "{said:?}");
}

/// Who does not look at a terminal gets the result, and nothing else; who asks while nothing is done is told that.
#[test]
fn a_commit_is_silent_where_there_is_no_terminal() {
    let server = Served::start(|folder| {
        golden(folder);
        with_operator(folder, &["--control-allow".into(), folder.display().to_string()])
    });
    let mut operator = ControlClient::connect(&server.folder().join("control.sock")).unwrap();
    let progress = operator.call("device.progress", &json!({ "device": "blk" })).unwrap();
    assert!(progress["commit"].is_null() && progress["device"].as_str().unwrap().ends_with("blk.sock"), "{progress}");
    assert!(operator.call("device.list", &json!({})).unwrap()["devices"][0]["commit"].is_null());
    let socket = server.folder().join("control.sock");
    let output = command().arg("ctl").arg("--socket").arg(socket).args(["commit", "blk"]).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    drop(operator);
    server.stop();
}
