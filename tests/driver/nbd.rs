//! Devices whose blocks an NBD server has: nbdkit, qemu-nbd and nbd-server, each as Debian builds it.

use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use client::{BlockOptions, BlockQueue, BlockRequest, Buffer, RequestType};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::json;
use tempfile::TempDir;
use testbed::{Process, Progress, Tool};
use vfio_user_blk::Server;
use vfio_user_blk::config::{DeviceConfig, OverlayKind, ServerConfig};
use vfio_user_blk::control::ControlClient;

use crate::binary::{self, Served};
use crate::control::done;
use crate::crash::{Journal, Writer};
use crate::images::random_operations;
use crate::rig::{DISK, LIMIT, Machine, OK, Random, Rig, UNSUPP, exercise, image_bytes, until};
use crate::workload::{Arena, Workload};

/// A program that exports the file `disk.img`, or memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    NbdkitMemory,
    NbdkitFile,
    /// Over TCP, with answers that come late and out of order, and no more than 64 KiB at once.
    NbdkitDelayed,
    QemuRaw,
    QemuQcow2,
    NbdServer,
}

impl Kind {
    const ALL: [Self; 6] =
        [Self::NbdkitMemory, Self::NbdkitFile, Self::NbdkitDelayed, Self::QemuRaw, Self::QemuQcow2, Self::NbdServer];
}

/// A running server, in a folder that goes with it.
pub(crate) struct Export {
    kind: Kind,
    folder: TempDir,
    port: u16,
    /// More arguments for nbdkit and qemu-nbd: options, and parameters of nbdkit's filters.
    more: Vec<String>,
    process: Option<Process>,
}

fn nbdkit(arguments: &[&str]) -> Command {
    let mut command = Tool::Nbdkit.command(&Progress::silent()).unwrap();
    command.args(["--foreground", "--newstyle"]).args(arguments);
    command
}

/// A plugin or a filter of nbdkit's.
fn part(kind: &str, name: &str) -> String {
    let path = format!("usr/lib/x86_64-linux-gnu/nbdkit/{kind}s/nbdkit-{name}-{kind}.so");
    Tool::Nbdkit.file(&path, &Progress::silent()).unwrap().display().to_string()
}

impl Export {
    fn new(kind: Kind) -> Self {
        Self::with(kind, &[])
    }

    pub(crate) fn with(kind: Kind, more: &[String]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut export = Self { kind, folder, port, more: more.to_vec(), process: None };
        File::create(export.image()).unwrap().set_len(DISK).unwrap();
        if kind == Kind::QemuQcow2 {
            fs::remove_file(export.image()).unwrap();
            let image = Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2"])
                .arg(export.image())
                .arg(DISK.to_string())
                .status();
            assert!(image.unwrap().success());
        }
        export.start();
        export
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("disk.img")
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    fn start(&mut self) {
        let (socket, image) = (self.socket(), self.image());
        let _left = fs::remove_file(&socket);
        let (socket, image) = (socket.display().to_string(), image.display().to_string());
        let mut command = match self.kind {
            Kind::NbdkitMemory => {
                let (options, parameters): (Vec<_>, Vec<_>) = self.more.iter().partition(|word| word.starts_with("--"));
                let mut command = nbdkit(&["--unix", &socket]);
                command.args(options).args([&part("plugin", "memory"), &format!("size={DISK}")]).args(parameters);
                command
            }
            Kind::NbdkitFile => {
                let mut command = nbdkit(&["--unix", &socket]);
                command.args(&self.more).args([&part("plugin", "file"), &format!("file={image}")]);
                command
            }
            Kind::NbdkitDelayed => nbdkit(&[
                "--ipaddr=127.0.0.1",
                &format!("--port={}", self.port),
                &format!("--filter={}", part("filter", "blocksize-policy")),
                &format!("--filter={}", part("filter", "delay")),
                &part("plugin", "file"),
                &format!("file={image}"),
                "blocksize-maximum=64K",
                "blocksize-error-policy=error",
                "rdelay=1ms",
                "delay-trim=2ms",
            ]),
            Kind::QemuRaw | Kind::QemuQcow2 => {
                let format = if self.kind == Kind::QemuRaw { "raw" } else { "qcow2" };
                let mut command = Tool::QemuNbd.command(&Progress::silent()).unwrap();
                command.args([
                    "--socket",
                    &socket,
                    "--persistent",
                    "--shared=8",
                    "--discard=unmap",
                    "--format",
                    format,
                ]);
                command.args(&self.more).arg(&image);
                command
            }
            Kind::NbdServer => {
                let config = self.folder.path().join("config");
                let text = format!(
                    "[generic]\nunixsock = {socket}\nlistenaddr = 127.0.0.1\nport = {}\n\n\
                     [disk]\nexportname = {image}\nflush = true\nfua = true\ntrim = true\n",
                    self.port
                );
                fs::write(&config, text).unwrap();
                let mut command = Tool::NbdServer.command(&Progress::silent()).unwrap();
                command.arg("-n").arg("-C").arg(config);
                command
            }
        };
        command.current_dir(self.folder.path());
        let process = Process::start("NBD server", &command).unwrap();
        let limit = std::time::Instant::now() + LIMIT;
        while !self.answers() {
            assert!(std::time::Instant::now() < limit, "{:?}: {}", self.kind, process.log());
            thread::sleep(std::time::Duration::from_millis(5));
        }
        self.process = Some(process);
    }

    fn answers(&self) -> bool {
        match self.kind {
            Kind::NbdkitDelayed => TcpStream::connect(("127.0.0.1", self.port)).is_ok(),
            _ => UnixStream::connect(self.socket()).is_ok(),
        }
    }

    fn kill(&mut self) {
        self.process.take().unwrap().kill().unwrap();
    }

    pub(crate) fn uri(&self) -> String {
        match self.kind {
            Kind::NbdkitDelayed => format!("nbd://127.0.0.1:{}/", self.port),
            Kind::NbdServer => format!("nbd+unix:///disk?socket={}", self.socket().display()),
            _ => format!("nbd+unix:///?socket={}", self.socket().display()),
        }
    }

    pub(crate) fn device(&self, folder: &Path) -> DeviceConfig {
        let mut device = DeviceConfig::new(folder.join("blk.sock"));
        device.nbd_uri = Some(self.uri().parse().unwrap());
        device
    }

    fn rig(&self) -> Rig {
        Rig::devices(|folder| vec![self.device(folder)])
    }
}

#[test]
fn random_requests_on_all_queues_against_a_plain_copy() {
    for kind in Kind::ALL {
        let export = Export::new(kind);
        let mut rig = export.rig();
        let mut machine = rig.boot();
        let (queues, memory) = (&mut machine.queues, &machine.memory);
        assert!(!queues.is_empty());
        let sectors = DISK as usize / 512 / queues.len();
        for (index, queue) in queues.iter_mut().enumerate() {
            let workload = Workload {
                seed: kind as u64 * 100 + index as u64,
                first_sector: (index * sectors) as u64,
                sectors: 2048,
                requests: if kind == Kind::NbdkitDelayed { 300 } else { 1500 },
                depth: 32,
                largest: 200,
                ..Workload::default()
            };
            workload.run(queue, &Arena::new(memory, &workload));
        }
        drop(machine);
        rig = {
            drop(rig);
            export.rig()
        };
        exercise(&mut rig.boot().queues);
    }
}

/// One request, of data that lies at the start of the buffer.
fn execute(queue: &mut BlockQueue, kind: RequestType, sector: u64, buffer: &Buffer, len: usize) -> u8 {
    let data = if len > 0 { vec![buffer.segment(0, len).unwrap()] } else { Vec::new() };
    queue.execute(&BlockRequest { kind, sector, data: &data }).unwrap().status
}

/// Thousands of operations of all kinds, one after the other.
#[test]
fn all_kinds_of_requests_against_a_plain_copy() {
    const SECTORS: u64 = 1024;
    for kind in [Kind::NbdkitMemory, Kind::NbdkitFile, Kind::QemuRaw, Kind::QemuQcow2, Kind::NbdServer] {
        let export = Export::new(kind);
        let rig = export.rig();
        let mut machine = rig.boot_with(&BlockOptions { queues: 1, ..BlockOptions::default() });
        let buffer = machine.memory.allocate(64 << 10, 4096).unwrap();
        let queue = &mut machine.queues[0];
        let mut random = Random::new(kind as u64 + 7);
        let mut disk = vec![0_u8; (SECTORS * 512) as usize];
        let mut known = vec![true; SECTORS as usize];
        for _ in 0..3000 {
            let count = 1 + random.below(64);
            let first = random.below(SECTORS - count);
            let bytes = (first * 512) as usize..((first + count) * 512) as usize;
            let sectors = first as usize..(first + count) as usize;
            let range =
                [&first.to_le_bytes()[..], &(count as u32).to_le_bytes(), &[random.below(2) as u8, 0, 0, 0]].concat();
            match random.below(8) {
                0..3 => {
                    random.fill(&mut disk[bytes.clone()]);
                    buffer.write(0, &disk[bytes.clone()]).unwrap();
                    assert_eq!(execute(queue, RequestType::Write, first, &buffer, bytes.len()), OK);
                    known[sectors].fill(true);
                }
                3..5 => {
                    assert_eq!(execute(queue, RequestType::Read, first, &buffer, bytes.len()), OK);
                    let mut read = vec![0; bytes.len()];
                    buffer.read(0, &mut read).unwrap();
                    for (sector, data) in sectors.zip(read.chunks(512)) {
                        assert!(!known[sector] || data == &disk[sector * 512..][..512], "{kind:?}, sector {sector}");
                    }
                }
                5 => {
                    buffer.write(0, &range).unwrap();
                    assert_eq!(execute(queue, RequestType::WriteZeroes, 0, &buffer, 16), OK);
                    disk[bytes].fill(0);
                    known[sectors].fill(true);
                }
                6 => {
                    buffer.write(0, &[&range[..12], &[0; 4]].concat()).unwrap();
                    let status = execute(queue, RequestType::Discard, 0, &buffer, 16);
                    // Not all servers can.
                    assert!(status == OK || status == UNSUPP, "{kind:?}: {status}");
                    known[sectors].fill(status != OK);
                }
                _ => assert_eq!(execute(queue, RequestType::Flush, 0, &buffer, 0), OK),
            }
        }
    }
}

/// A server that is killed, again and again, while a driver writes: the driver sees a slow disk, and nothing that was flushed is
/// lost. The server that the driver sees is in its sandbox all the time.
#[test]
fn a_killed_nbd_server_costs_nothing_but_time() {
    for kind in [Kind::NbdkitFile, Kind::QemuRaw, Kind::NbdkitDelayed] {
        let mut export = Export::new(kind);
        let rig = export.rig();
        kill_under(rig, &mut export);
    }
}

/// The same with TLS: each connection makes its keys anew, and what was encrypted for the last is encrypted again.
#[test]
fn a_killed_nbd_server_costs_nothing_but_time_with_tls() {
    let authority = Authority::new("nbd.example");
    let certificates = format!("--tls-certificates={}", authority.path().display());
    let mut export =
        Export::with(Kind::NbdkitFile, &["--tls=require".into(), "--tls-verify-peer".into(), certificates]);
    let rig = Rig::devices(|folder| {
        let mut device = export.device(folder);
        device.nbd_uri = Some(export.uri().replace("nbd+unix", "nbds+unix").parse().unwrap());
        device.nbd_tls_dir = Some(authority.path());
        device.nbd_tls_hostname = Some("nbd.example".into());
        vec![device]
    });
    kill_under(rig, &mut export);
}

/// Kills the server under a writer, some times.
pub(crate) fn kill_under(rig: Rig, export: &mut Export) {
    let (kind, image) = (export.kind, export.image());
    let (mut journal, mut writer) = (Journal::new(), Writer::new(rig.client()));
    let (over, answers) = (AtomicBool::new(false), AtomicU64::new(0));
    let journal = thread::scope(|scope| {
        let (over, answers) = (&over, &answers);
        let writing = scope.spawn(move || {
            while !over.load(Ordering::Acquire) {
                let batch = journal.last + 1;
                journal.last = batch;
                let whole = writer.write(batch, &AtomicBool::new(false), || {
                    answers.fetch_add(1, Ordering::Relaxed);
                });
                assert!(whole, "{kind:?}: batch {batch}");
                journal.acknowledge(batch);
            }
            journal
        });
        // The servers end with the thread that has started them: this one.
        let mut random = Random::new(kind as u64);
        for _ in 0..6 {
            let fatal = answers.load(Ordering::Relaxed) + random.below(100);
            until("enough is answered", || answers.load(Ordering::Relaxed) >= fatal || writing.is_finished());
            export.kill();
            export.start();
        }
        over.store(true, Ordering::Release);
        writing.join().unwrap()
    });
    rig.stop();
    export.kill();
    journal.check(&image);
}

/// Disks that start as copies of one export, which none of them changes.
#[test]
fn overlays_lie_over_an_export() {
    for kind in [Kind::NbdkitFile, Kind::QemuQcow2, Kind::NbdServer] {
        let export = Export::new(kind);
        let mut disk = vec![0; DISK as usize];
        if kind != Kind::QemuQcow2 {
            Random::new(5).fill(&mut disk);
            fs::write(export.image(), &disk).unwrap();
        }
        let device = |folder: &Path, number: usize, overlay| DeviceConfig {
            socket_path: folder.join(format!("blk{number}.sock")),
            // Of qemu-nbd no more than 8 connections can be had.
            num_queues: Some(2),
            overlay: Some(overlay),
            overlay_file: (overlay == OverlayKind::Kept).then(|| export.folder.path().join("kept.cow")),
            ..export.device(folder)
        };
        let devices = |folder: &Path| {
            vec![
                device(folder, 0, OverlayKind::Memory),
                device(folder, 1, OverlayKind::Kept),
                device(folder, 2, OverlayKind::Memory),
            ]
        };
        let rig = Rig::devices(devices);
        let mut found = vec![0; DISK as usize];
        let mut kept = Vec::new();
        for number in 0..3 {
            let mut machine = Machine::new(rig.client_of(number), &BlockOptions::default());
            machine.queues[0].read(0, &mut found).unwrap();
            assert!(found == disk, "{kind:?}: the export shows, and nothing of other disks");
            let mut own = disk.clone();
            random_operations(&mut machine.queues[0], &mut own, number as u64, 800);
            machine.queues[1].read(0, &mut found).unwrap();
            assert!(found == own, "{kind:?}");
            if number == 1 {
                kept = own;
            }
        }
        rig.stop();
        let again = Rig::devices(devices);
        let mut machine = Machine::new(again.client_of(1), &BlockOptions::default());
        machine.queues[0].read(0, &mut found).unwrap();
        assert!(found == kept, "{kind:?}: it is kept");
        drop((machine, again));
        assert!(
            kind == Kind::QemuQcow2 || fs::read(export.image()).unwrap() == disk,
            "{kind:?}: the export was changed"
        );
    }
}

/// A driver that gives up does not wait for a server that is gone.
#[test]
fn a_reset_does_not_wait_for_a_dead_server() {
    let mut export = Export::new(Kind::NbdkitMemory);
    let rig = export.rig();
    let options = BlockOptions { queues: 1, ..BlockOptions::default() };
    let mut machine = rig.boot_with(&options);
    exercise(&mut machine.queues);
    export.kill();
    let buffer = machine.memory.allocate(4096, 4096).unwrap();
    let data = [buffer.segment(0, 4096).unwrap()];
    machine.queues[0].submit(&BlockRequest { kind: RequestType::Read, sector: 0, data: &data }).unwrap();
    machine.queues[0].publish().unwrap();
    let begun = std::time::Instant::now();
    machine.reboot(&options);
    assert!(begun.elapsed() < std::time::Duration::from_secs(20), "the deadline is 60 seconds");
    export.start();
    exercise(&mut machine.queues);
}

/// The store has given up by its deadline, and the guest has not.
#[test]
fn what_outlasts_the_deadline_is_held_until_the_server_is_back() {
    let mut export = Export::new(Kind::NbdkitFile);
    let uri = export.uri();
    let server = Served::start(|folder| {
        let [socket, control] = ["blk.sock", "control.sock"].map(|name| folder.join(name).display().to_string());
        let words = ["--socket-path", &socket, "--control-socket", &control, "--nbd-uri", &uri, "--nbd-deadline", "1"];
        words.into_iter().chain(["--on-error", "hold"]).map(str::to_owned).collect()
    });
    let mut operator = ControlClient::connect(&server.folder().join("control.sock")).unwrap();
    let mut held = || done(&mut operator, "device.list", json!({}))["devices"][0]["held"]["requests"].clone();
    let mut machine = Machine::new(server.client(), &BlockOptions { queues: 1, ..BlockOptions::default() });
    exercise(&mut machine.queues);
    export.kill();
    let buffer = machine.memory.allocate(4096, 4096).unwrap();
    buffer.write(0, &[9; 4096]).unwrap();
    let data = [buffer.segment(0, 4096).unwrap()];
    let queue = &mut machine.queues[0];
    queue.submit(&BlockRequest { kind: RequestType::Write, sector: 800, data: &data }).unwrap();
    queue.publish().unwrap();
    until("it is held", || held() == 1);
    export.start();
    // It may take longer than a deadline until the store has found it.
    let status = loop {
        done(&mut operator, "device.resume", json!({ "device": "blk" }));
        if queue.wait(std::time::Duration::from_secs(2)).unwrap() {
            break queue.poll().unwrap().unwrap().status;
        }
    };
    assert_eq!(status, OK);
    queue.flush().unwrap();
    assert_eq!(image_bytes(&export.image(), 800 * 512, 4096), [9; 4096]);
    drop(machine);
    server.stop();
}

/// Errors that a server makes up are the guest's, and no reason for more.
#[test]
fn errors_of_the_server_are_told_and_end() {
    let fatal = tempfile::tempdir().unwrap();
    let trigger = fatal.path().join("inject");
    let more = [
        format!("--filter={}", part("filter", "error")),
        "error=EIO".into(),
        "error-rate=100%".into(),
        format!("error-file={}", trigger.display()),
    ];
    let export = Export::with(Kind::NbdkitMemory, &more);
    let rig = export.rig();
    let mut machine = rig.boot_with(&BlockOptions { queues: 1, ..BlockOptions::default() });
    let buffer = machine.memory.allocate(4096, 4096).unwrap();
    let queue = &mut machine.queues[0];
    assert_eq!(execute(queue, RequestType::Read, 0, &buffer, 4096), OK);
    File::create(&trigger).unwrap();
    assert_eq!(execute(queue, RequestType::Read, 0, &buffer, 4096), crate::rig::IOERR);
    assert_eq!(execute(queue, RequestType::Write, 0, &buffer, 4096), crate::rig::IOERR);
    fs::remove_file(&trigger).unwrap();
    assert_eq!(execute(queue, RequestType::Read, 0, &buffer, 4096), OK);
}

/// Certificates of one authority: `ca-cert.pem`, and a certificate and a key for each role.
pub(crate) struct Authority {
    folder: TempDir,
}

impl Authority {
    pub(crate) fn new(server_name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        let write = |name: &str, text: String| fs::write(folder.path().join(name), text).unwrap();
        write("ca-cert.pem", certificate.pem());
        let issuer = Issuer::new(params, key);
        for (role, name) in [("server", server_name), ("client", "client")] {
            let key = KeyPair::generate().unwrap();
            let certificate = CertificateParams::new(vec![name.into()]).unwrap().signed_by(&key, &issuer).unwrap();
            write(&format!("{role}-cert.pem"), certificate.pem());
            write(&format!("{role}-key.pem"), key.serialize_pem());
        }
        Self { folder }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    /// Without a client's certificate.
    fn without_client(self) -> Self {
        fs::remove_file(self.path().join("client-cert.pem")).unwrap();
        fs::remove_file(self.path().join("client-key.pem")).unwrap();
        self
    }
}

/// Whether a server starts on the export, and why not.
pub(crate) fn start(device: &DeviceConfig) -> Result<Server, String> {
    Server::start(&ServerConfig::new(vec![device.clone()])).map_err(|error| error.to_string())
}

#[test]
fn tls_refuses_a_wrong_certificate() {
    let right = Authority::new("nbd.example");
    let certificates = format!("--tls-certificates={}", right.path().display());
    let export = Export::with(Kind::NbdkitMemory, &["--tls=require".into(), "--tls-verify-peer".into(), certificates]);
    let folder = tempfile::tempdir().unwrap();
    let mut device = export.device(folder.path());
    let plain = start(&device).map(drop).unwrap_err();
    assert!(plain.contains("wants TLS"), "{plain}");
    let uri = export.uri().replace("nbd+unix", "nbds+unix");
    device.nbd_uri = Some(uri.parse().unwrap());
    device.nbd_tls_dir = Some(right.path());
    device.nbd_tls_hostname = Some("nbd.example".into());
    let rig = Rig::devices(|folder| vec![DeviceConfig { socket_path: folder.join("blk.sock"), ..device.clone() }]);
    let mut machine = rig.boot();
    exercise(&mut machine.queues);
    let workload =
        Workload { first_sector: 8192, requests: 1000, largest: 300, sectors: 4096, depth: 32, ..Workload::default() };
    workload.run(&mut machine.queues[0], &Arena::new(&machine.memory, &workload));
    drop((machine, rig));
    for (dir, name, why) in
        [(right.path(), "other.example", "certificate"), (folder.path().join("nowhere"), "nbd.example", "ca-cert.pem")]
    {
        let wrong = DeviceConfig { nbd_tls_dir: Some(dir), nbd_tls_hostname: Some(name.into()), ..device.clone() };
        let error = start(&wrong).map(drop).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
    let other = Authority::new("nbd.example");
    let wrong = DeviceConfig { nbd_tls_dir: Some(other.path()), ..device.clone() };
    let error = start(&wrong).map(drop).unwrap_err();
    assert!(error.contains("TLS") && error.contains("certificate"), "{error}");
    // The server wants to know us.
    let nobody = right.without_client();
    let wrong = DeviceConfig { nbd_tls_dir: Some(nobody.path()), ..device };
    assert!(start(&wrong).is_err());
}

/// As it is built by default.
#[test]
fn a_program_without_pre_shared_keys_says_so_when_it_reads_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("server.toml");
    for device in ["nbd_uri = 'nbds://alice@h/?tls-psk-file=/k'", "nbd_uri = 'nbds://h'\nnbd_tls_psk_file = '/k'"] {
        fs::write(&config, format!("[[device]]\nsocket_path = 'blk.sock'\n{device}\n")).unwrap();
        let (status, error) = binary::run(&["check".into(), config.display().to_string()]);
        assert!(!status.success() && error.contains("--features psk"), "{error}");
    }
}

#[test]
fn a_device_says_why_it_cannot_be_served() {
    let folder = tempfile::tempdir().unwrap();
    let mut device = DeviceConfig::new(folder.path().join("blk.sock"));
    let socket = folder.path().join("nobody.sock");
    device.nbd_uri = Some(format!("nbd+unix:///?socket={}", socket.display()).parse().unwrap());
    let error = start(&device).map(drop).unwrap_err();
    assert!(error.contains("nobody.sock") && error.contains("cannot connect"), "{error}");
    let export = Export::new(Kind::NbdServer);
    device.nbd_uri = Some(export.uri().replace("disk?", "other?").parse().unwrap());
    let error = start(&device).map(drop).unwrap_err();
    assert!(error.contains("no export of this name"), "{error}");
}
