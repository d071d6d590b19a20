//! The server as an operator runs it: the process, its log, its end.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use client::Client;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::rig::{DISK, LIMIT, until};

/// `vfio-user-blk`, built once in the profile of this test.
pub(crate) fn command() -> Command {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    let path = PATH.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--package", "vfio-user-blk", "--bin", "vfio-user-blk"]);
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        assert!(cargo.current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap().success());
        // Beside the folder of the tests' own programs.
        let tests = std::env::current_exe().unwrap();
        tests.parent().and_then(Path::parent).unwrap().join("vfio-user-blk")
    });
    let mut command = Command::new(path);
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

/// The arguments for a disk of [`DISK`] bytes at a socket.
pub(crate) fn disk(socket: &Path) -> Vec<String> {
    vec!["--socket-path".into(), socket.display().to_string(), "--size".into(), DISK.to_string()]
}

/// Runs `vfio-user-blk` to its end: its exit status and what it printed on standard error.
pub(crate) fn run(arguments: &[String]) -> (ExitStatus, String) {
    let output = command().args(arguments).output().unwrap();
    (output.status, String::from_utf8(output.stderr).unwrap())
}

/// A process that serves; killed at the latest when this is dropped.
pub(crate) struct Served {
    folder: TempDir,
    socket: PathBuf,
    child: Child,
    log: Arc<Log>,
    readers: Vec<JoinHandle<()>>,
    clients: AtomicUsize,
}

/// What a process holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resources {
    /// What its descriptors lead to.
    descriptors: Vec<String>,
    /// How many pieces of guest memory are mapped.
    mappings: usize,
}

/// One of a process's threads.
#[derive(Debug, Clone)]
pub(crate) struct Thread {
    pub(crate) name: String,
    /// The processors that it may run on.
    pub(crate) cpus: String,
    /// Whether it sleeps.
    pub(crate) asleep: bool,
    /// How often it has given its processor away, to sleep or because it had to.
    pub(crate) switches: u64,
}

#[derive(Default)]
struct Log {
    text: Mutex<String>,
    grown: Condvar,
}

impl Served {
    /// Serves what `arguments` describe for the folder they are given, the first socket of which is `blk.sock`.
    pub(crate) fn start(arguments: impl FnOnce(&Path) -> Vec<String>) -> Served {
        let folder = tempfile::tempdir().unwrap();
        Served::start_in(folder, arguments)
    }

    pub(crate) fn start_in(folder: TempDir, arguments: impl FnOnce(&Path) -> Vec<String>) -> Served {
        Served::spawn(command(), folder, arguments)
    }

    /// As [`start`](Self::start), in a process that may have 100 descriptors.
    pub(crate) fn start_limited(arguments: impl FnOnce(&Path) -> Vec<String>) -> Served {
        let mut limited = Command::new("sh");
        let program = command().get_program().to_owned();
        limited
            .args(["-c", "ulimit -n 100; exec \"$0\" \"$@\""])
            .arg(program)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        Served::spawn(limited, tempfile::tempdir().unwrap(), arguments)
    }

    fn spawn(mut command: Command, folder: TempDir, arguments: impl FnOnce(&Path) -> Vec<String>) -> Served {
        let arguments = arguments(folder.path());
        let mut child = command
            .arg("serve")
            .args(["--workers", "2"])
            .args(arguments)
            .current_dir(folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Log::default());
        let streams: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        let follow = |stream| {
            let log = Arc::clone(&log);
            thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    log.text.lock().unwrap().push_str(&format!("{line}\n"));
                    log.grown.notify_all();
                }
            })
        };
        let readers = streams.into_iter().map(follow).collect();
        let socket = folder.path().join("blk.sock");
        let served = Served { folder, socket, child, log, readers, clients: AtomicUsize::new(0) };
        served.wait_for("memory-backend=mem");
        served
    }

    /// How long it has had processors, in ticks of ten milliseconds.
    pub(crate) fn processor_time(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        // User and system time are the 14th and 15th; the second is a name, which may hold anything.
        let (_, rest) = stat.rsplit_once(')').unwrap();
        rest.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Takes note of a client that connects by itself.
    pub(crate) fn expect_client(&self) {
        self.clients.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn client(&self) -> Arc<Client> {
        self.expect_client();
        let client = Client::connect(&self.socket).unwrap();
        client.set_timeout(LIMIT);
        Arc::new(client)
    }

    /// All that it has printed.
    pub(crate) fn log(&self) -> String {
        self.log.text.lock().unwrap().clone()
    }

    /// Waits until it has printed `words`.
    pub(crate) fn wait_for(&self, words: &str) {
        let text = self.log.text.lock().unwrap();
        let (text, late) = self.log.grown.wait_timeout_while(text, LIMIT, |text| !text.contains(words)).unwrap();
        assert!(!late.timed_out(), "it did not print {words:?}, but:\n{text}");
    }

    /// Waits until it has no more than `before` of [`Served::resources`].
    pub(crate) fn rests_with(&self, before: Resources) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let now = self.resources();
            if now == before {
                return;
            }
            assert!(Instant::now() < deadline, "{now:#?}, but before: {before:#?}");
            thread::yield_now();
        }
    }

    /// What descriptors it has open and how many mappings of guest memory, once it is done with all clients.
    pub(crate) fn resources(&self) -> Resources {
        let clients = self.clients.load(Ordering::Relaxed);
        until("the last client has gone", || self.log().matches("the client has gone").count() == clients);
        self.holds()
    }

    /// What it holds for a client that has only just come: it is served when nothing of those before it is left.
    pub(crate) fn holds_for_a_client(&self) -> Resources {
        let client = Client::connect(&self.socket).unwrap();
        client.set_timeout(LIMIT);
        crate::protocol::in_step(&client);
        self.holds()
    }

    /// What descriptors it has open and how many mappings of guest memory.
    fn holds(&self) -> Resources {
        let process = PathBuf::from(format!("/proc/{}", self.child.id()));
        let mut descriptors: Vec<_> = fs::read_dir(process.join("fd"))
            .unwrap()
            .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
            .map(|target| target.display().to_string())
            // A socket's number is another each time.
            .map(|target| if target.starts_with("socket:") { "socket".into() } else { target })
            .collect();
        descriptors.sort();
        let maps = fs::read_to_string(process.join("maps")).unwrap();
        Resources { descriptors, mappings: maps.lines().filter(|line| line.contains("memfd:")).count() }
    }

    /// Its threads whose names begin with `name`, by name and age; also those of the kernel's that work for it.
    pub(crate) fn threads(&self, name: &str) -> Vec<Thread> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let mut ids: Vec<u32> =
            tasks.map(|task| task.unwrap().file_name().into_string().unwrap().parse().unwrap()).collect();
        ids.sort_unstable();
        let thread = |id: u32| {
            // It may have ended by now.
            let status = fs::read_to_string(format!("/proc/{}/task/{id}/status", self.child.id())).ok()?;
            let value = |key: &str| {
                status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap().trim().to_owned()
            };
            let number = |key: &str| value(key).parse::<u64>().unwrap();
            Some(Thread {
                name: value("Name"),
                cpus: value("Cpus_allowed_list"),
                asleep: value("State").starts_with('S'),
                switches: number("voluntary_ctxt_switches") + number("nonvoluntary_ctxt_switches"),
            })
        };
        let mut threads: Vec<_> =
            ids.into_iter().filter_map(thread).filter(|thread| thread.name.starts_with(name)).collect();
        threads.sort_by(|one, other| one.name.cmp(&other.name));
        threads
    }

    /// Bytes of memory that are its own, in RAM.
    pub(crate) fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// Waits until it ends: its status, all that it printed, and its folder.
    pub(crate) fn wait(mut self) -> (ExitStatus, String, TempDir) {
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end; it printed:\n{}", self.log());
            thread::yield_now();
        };
        self.readers.drain(..).for_each(|reader| reader.join().unwrap());
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap());
        (status, self.log(), folder)
    }

    /// Ends it by SIGTERM and checks that it ends well; its folder is left.
    pub(crate) fn stop(self) -> TempDir {
        self.signal(Signal::SIGTERM);
        let (status, log, folder) = self.wait();
        assert!(status.success(), "{status}:\n{log}");
        assert!(!folder.path().join("blk.sock").exists());
        assert!(!log.contains("panicked"), "{log}");
        folder
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Fails for one that has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("the server printed:\n{}", self.log());
        }
    }
}
