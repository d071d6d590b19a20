//! What a thread in the sandbox cannot do, and what it still can.
//!
//! Most of it is done in a process of its own, which is killed for it if all is well: this program again, told by its
//! environment which of [`ACTS`] to do.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{self, Command, Output};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};
use std::{env, panic};

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect};
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::{Pid, execv};

use super::*;

/// What is to be done, given a folder that names may be removed from.
type Act = fn(&Path);

/// What nobody may.
const FORBIDDEN: &[(&str, Act)] = &[
    ("run a program", |_| assert!(execv(c"/bin/true", &[c"true"]).is_err())),
    ("signal another process", |_| kill(Pid::from_raw(1), None).unwrap()),
    ("have a descriptor signal another process", |_| {
        // SAFETY: it touches no memory.
        unsafe { libc::fcntl(1, libc::F_SETOWN, 1) };
    }),
    ("make a socket of another kind", |_| {
        drop(socket(AddressFamily::Netlink, SockType::Raw, SockFlag::empty(), None));
    }),
    ("make a folder", |folder| fs::create_dir(folder.join("new")).unwrap()),
    ("move a file", |folder| fs::rename(folder.join("file"), folder.join("moved")).unwrap()),
    ("discard what a block device has", |_| ask(0x1277)),
    ("map memory to execute", |_| assert!(map(ProtFlags::PROT_READ | ProtFlags::PROT_EXEC).is_ok())),
    ("make memory executable", |_| {
        let memory = map(ProtFlags::PROT_READ | ProtFlags::PROT_WRITE).unwrap();
        // SAFETY: nobody uses that memory.
        unsafe { mprotect(memory, 4096, ProtFlags::PROT_READ | ProtFlags::PROT_EXEC) }.unwrap();
    }),
];

/// What whoever opens devices for operators may, or is refused without harm, and nobody else.
const FOR_CONTROL: &[(&str, Act)] = &[
    ("start a thread", |_| thread::spawn(|| {}).join().unwrap()),
    ("make a ring", |_| {
        assert_eq!(io_uring::IoUring::new(8).map(drop).unwrap_err().raw_os_error(), Some(libc::ENOSYS));
    }),
];

/// What those may that connect, and nobody else: control is refused what is no UNIX socket, without harm.
const FOR_CONNECTORS: &[(&str, Act)] = &[
    ("make a socket", |_| drop(socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None))),
    ("connect", |folder| {
        let error = UnixStream::connect(folder.join("socket")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }),
];

/// What those may whose sockets go with them.
const FOR_LISTENERS: &[(&str, Act)] = &[("remove a socket", |folder| fs::remove_file(folder.join("file")).unwrap())];

/// What sessions may, and those who start them.
const FOR_SESSIONS: &[(&str, Act)] = &[("make an eventfd", |_| drop(nix::sys::eventfd::EventFd::new().unwrap()))];

/// What those may who look how large block devices are, and who open them.
const FOR_SIZES: &[(&str, Act)] = &[("ask for a device's size", |_| ask(0x8008_1272))];

/// What those may who open them.
const FOR_DEVICES: &[(&str, Act)] = &[("ask for a device's blocks", |_| ask(0x1268))];

/// Asks what is no block device.
fn ask(request: libc::Ioctl) {
    let mut answer = 0u64;
    // SAFETY: the answer has room for each that is asked for.
    assert_eq!(unsafe { libc::ioctl(0, request, &raw mut answer) }, -1);
}

/// What a store over a network meets that is added.
const NETWORK: (&str, Act) = ("make a socket of a network", |_| {
    let made = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None);
    assert_eq!(made.unwrap_err(), nix::errno::Errno::ENOSYS);
    socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
});

/// What sessions may as far as seccomp goes.
const ELSEWHERE: (&str, Act) = ("remove a file elsewhere", |folder| {
    let error = fs::remove_file(folder.parent().unwrap().join("outside")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EACCES));
});

/// What everybody may, or is refused without harm.
const HARMLESS: &[(&str, Act)] = &[
    ("be refused a file", |folder| {
        for path in [folder.join("file"), "/etc/passwd".into(), "/proc/self/maps".into()] {
            let refused = File::open(path).unwrap_err().raw_os_error();
            assert!([Some(libc::ENOSYS), Some(libc::EACCES)].contains(&refused), "{refused:?}");
        }
    }),
    ("allocate", |_| {
        let mut sizes = HashMap::new();
        for shift in 4..26 {
            let mut memory = vec![1u8; 1 << shift];
            memory.resize(3 << shift, 2);
            sizes.insert(shift, memory);
        }
        assert_eq!(sizes.values().map(Vec::len).sum::<usize>(), 3 * ((1 << 26) - (1 << 4)));
    }),
    ("wait", |_| {
        let (lock, never) = (Mutex::new(()), Condvar::new());
        assert!(never.wait_timeout(lock.lock().unwrap(), Duration::from_millis(1)).unwrap().1.timed_out());
        thread::sleep(Duration::from_millis(1));
        thread::yield_now();
    }),
    ("log", |_| log::error!("a line")),
    ("panic", |_| assert!(panic::catch_unwind(|| panic!("as it should")).is_err())),
    ("be interrupted", |_| {
        // SAFETY: a handler that does nothing may run at any time.
        unsafe { nix::sys::signal::signal(Signal::SIGUSR1, nix::sys::signal::SigHandler::Handler(nothing)).unwrap() };
        raise(Signal::SIGUSR1).unwrap();
    }),
    // As a C library would that is newer than all of this.
    ("try a newer system call", |_| {
        // SAFETY: it does not exist.
        assert_eq!(unsafe { libc::syscall(500) }, -1);
        assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::ENOSYS));
    }),
];

extern "C" fn nothing(_signal: libc::c_int) {}

fn map(prot: ProtFlags) -> nix::Result<std::ptr::NonNull<libc::c_void>> {
    let len = std::num::NonZeroUsize::new(4096).unwrap();
    // SAFETY: new memory, where the kernel likes it.
    unsafe { mmap_anonymous(None, len, prot, MapFlags::MAP_PRIVATE) }
}

/// The process in which an act is done; nothing if the tests are run as usual.
#[test]
fn stage() {
    let Some(name) = env::var_os("SANDBOX_ACT") else { return };
    let some = [FOR_CONTROL, FOR_CONNECTORS, FOR_SESSIONS, FOR_LISTENERS, FOR_SIZES, FOR_DEVICES].concat();
    let act = [FORBIDDEN, &some, &[ELSEWHERE, NETWORK], HARMLESS].concat().into_iter().find(|(act, _)| name == **act);
    let (_, act) = act.unwrap_or(("abort", |_| process::abort()));
    let kind = env::var("SANDBOX_KIND").unwrap();
    let kind = ThreadKind::ALL.into_iter().find(|known| format!("{known:?}") == kind).unwrap();
    let folder = PathBuf::from(env::var_os("SANDBOX_FOLDER").unwrap());
    env_logger::init();
    let sandbox = Sandbox::new(SandboxMode::On, &[&folder], &[]).unwrap();
    let actor = thread::spawn(move || {
        sandbox.enter_as(kind);
        act(&folder);
    });
    process::exit(actor.join().map_or(1, |()| 0));
}

/// Has a thread of some kind do something.
fn done(name: &str, kind: ThreadKind) -> Output {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("sockets");
    fs::create_dir(&folder).unwrap();
    File::create(folder.join("file")).unwrap();
    File::create(parent.path().join("outside")).unwrap();
    Command::new(env::current_exe().unwrap())
        .args(["--exact", "sandbox::tests::stage", "--nocapture", "--test-threads=1"])
        .env("SANDBOX_ACT", name)
        .env("SANDBOX_KIND", format!("{kind:?}"))
        .env("SANDBOX_FOLDER", folder)
        .env("RUST_BACKTRACE", "full")
        .output()
        .unwrap()
}

fn killed(output: &Output) -> bool {
    output.status.signal() == Some(libc::SIGSYS)
}

#[test]
fn what_nobody_may_ends_the_process() {
    for (name, _) in FORBIDDEN {
        for kind in ThreadKind::ALL {
            let output = done(name, kind);
            assert!(killed(&output), "{kind:?}, {name}: {output:?}");
        }
    }
}

#[test]
fn some_may_more_than_others() {
    use ThreadKind::{Connector, Control, Metrics, Session, Sizes};
    for (acts, kinds) in [
        (FOR_LISTENERS, &[Session, Control, Metrics][..]),
        (FOR_SESSIONS, &[Session, Control]),
        (FOR_CONNECTORS, &[Connector, Control]),
        (FOR_CONTROL, &[Control]),
        (FOR_SIZES, &[Control, Sizes]),
        (FOR_DEVICES, &[Control]),
    ] {
        for (name, _) in acts {
            for kind in ThreadKind::ALL {
                let output = done(name, kind);
                let fine = if kinds.contains(&kind) { output.status.success() } else { killed(&output) };
                assert!(fine, "{kind:?}, {name}: {output:?}");
            }
        }
    }
}

/// What was named can be used, by those who open devices; and a session that they start has no more than any other.
#[test]
fn what_an_operator_has_named_is_open_to_control() {
    let (ours, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let files = [&ours, &other].map(|folder| folder.path().join("file"));
    files.iter().for_each(|file| fs::write(file, "text").unwrap());
    let parts = |allowed: &[PathBuf]| {
        let folders: Vec<_> = allowed.iter().map(PathBuf::as_path).collect();
        (Files::new(&folders, &[]).unwrap(), Files::for_control(&folders, allowed).unwrap())
    };
    let (session, control) = parts(&[ours.path().to_owned(), files[1].clone()]);
    let enforced = aside(|| {
        let Some(_abi) = control.restrict().unwrap() else { return false };
        let denied = |result: io::Result<()>| assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EACCES));
        let write = |path: &Path| File::options().write(true).create(true).truncate(true).open(path).map(drop);
        files.iter().for_each(|file| write(file).unwrap());
        write(&ours.path().join("new")).unwrap();
        std::os::unix::net::UnixListener::bind(ours.path().join("socket")).unwrap();
        denied(write(&other.path().join("new")));
        denied(fs::remove_file(&files[1]));
        denied(fs::create_dir(ours.path().join("folder")));
        denied(File::open("/etc/passwd").map(drop));
        fs::remove_file(&files[0]).unwrap();
        aside(|| {
            session.restrict().unwrap();
            denied(File::open(ours.path().join("new")).map(drop));
        });
        true
    });
    assert!(!enforced || files[1].exists());
}

#[test]
fn control_makes_no_socket_of_a_network() {
    let output = done(NETWORK.0, ThreadKind::Control);
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn sessions_remove_nothing_elsewhere() {
    if aside(|| Files::new(&[], &[]).unwrap().restrict().unwrap()).is_some() {
        let output = done(ELSEWHERE.0, ThreadKind::Session);
        assert!(output.status.success(), "{output:?}");
    }
}

#[test]
fn what_happens_to_any_thread_harms_none() {
    for (name, _) in HARMLESS {
        for kind in ThreadKind::ALL {
            let output = done(name, kind);
            assert!(output.status.success(), "{kind:?}, {name}: {output:?}");
        }
    }
}

#[test]
fn an_abort_is_an_abort() {
    for kind in ThreadKind::ALL {
        let output = done("abort", kind);
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{kind:?}: {output:?}");
    }
}

/// Does it on a thread of its own, in this process.
fn aside<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(act).join().unwrap())
}

#[test]
fn files_are_out_of_reach_without_seccomp_too() {
    let (ours, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let files = [&ours, &other].map(|folder| folder.path().join("file"));
    files.iter().for_each(|file| fs::write(file, "").unwrap());
    let enforced = aside(|| {
        let Some(_abi) = Files::new(&[ours.path()], &[]).unwrap().restrict().unwrap() else { return false };
        let denied = |result: io::Result<()>| assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EACCES));
        denied(File::open(&files[0]).map(drop));
        denied(File::open("/etc/passwd").map(drop));
        denied(File::create(ours.path().join("new")).map(drop));
        denied(fs::remove_file(&files[1]));
        fs::remove_file(&files[0]).unwrap();
        true
    });
    assert!(!enforced || files[1].exists() && !files[0].exists());
    // Other threads are as free as before.
    fs::remove_file(&files[1]).unwrap();
}

#[test]
fn only_the_ports_of_stores_can_be_connected_to() {
    use std::net::{TcpListener, TcpStream};
    let [ours, other] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let [ours, other] = [&ours, &other].map(|listener| listener.local_addr().unwrap());
    aside(|| {
        // TCP is guarded from the fourth version on.
        if Files::new(&[], &[ours.port()]).unwrap().restrict().unwrap().is_some_and(|abi| abi >= 4) {
            assert!(TcpStream::connect(ours).is_ok());
            assert_eq!(TcpStream::connect(other).unwrap_err().raw_os_error(), Some(libc::EACCES));
        }
    });
}

#[test]
fn no_capability_is_left_and_none_comes_back() {
    use caps::CapSet;
    aside(|| {
        privileges::drop_all().unwrap();
        for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable, CapSet::Ambient] {
            assert_eq!(caps::read(None, set).unwrap(), caps::CapsHashSet::new(), "{set:?}");
        }
        assert!(nix::sys::prctl::get_no_new_privs().unwrap());
        assert!(caps::raise(None, CapSet::Permitted, caps::Capability::CAP_SYS_ADMIN).is_err());
    });
}

#[test]
fn a_sandbox_that_is_off_takes_nothing() {
    let sandbox = Sandbox::new(SandboxMode::Off, &[], &[]).unwrap();
    aside(|| {
        sandbox.enter_as(ThreadKind::Worker);
        File::open("/dev/null").unwrap();
        assert!(!nix::sys::prctl::get_no_new_privs().unwrap());
    });
}

/// What the filter adds to a worker's system call: `cargo test --release -p vfio-user-blk --lib cost -- --ignored --nocapture`.
#[test]
#[ignore = "measures"]
fn cost_of_the_filter() {
    const CALLS: u32 = 10_000;
    // The least of many: what else the machine does only adds. To no ring: the kernel finds out at once, and what is measured is
    // the way there.
    let enter = || {
        let round = |_| {
            let begun = Instant::now();
            for _ in 0..CALLS {
                // SAFETY: without a ring the kernel touches no memory.
                unsafe { libc::syscall(libc::SYS_io_uring_enter, -1, 0, 0, 0, 0, 0) };
            }
            begun.elapsed()
        };
        (0..200).map(round).min().unwrap().as_secs_f64() * 1e9 / f64::from(CALLS)
    };
    let filters = Filters::new().unwrap().unwrap();
    for _ in 0..3 {
        let without = aside(enter);
        let with = aside(|| {
            assert!(filters.apply(ThreadKind::Worker).unwrap());
            enter()
        });
        println!("io_uring_enter: {without:.1} ns without the filter, {with:.1} ns with it");
    }
}
