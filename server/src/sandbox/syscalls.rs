//! Which system calls each kind of thread makes.
//!
//! What stands here is what our code makes, what std makes for it, and what glibc makes for both, in whatever happens to a
//! thread until its end: memory that grows, contended locks, signals, panics, aborts. A call too many costs little; one
//! that is missing costs the process, at the worst of times.

use std::process;

use libc::*;

use super::ThreadKind;

/// In any thread: memory, locks, time, logging, eventfds, signals, the end.
const ANY: &[c_long] = &[
    SYS_futex,
    SYS_read,
    SYS_write,
    SYS_writev,
    SYS_close,
    // std asks whether what it closes is open, in debug builds.
    SYS_fcntl,
    SYS_brk,
    SYS_mmap,
    SYS_munmap,
    SYS_mremap,
    SYS_mprotect,
    SYS_madvise,
    SYS_getrandom,
    SYS_clock_gettime,
    SYS_clock_nanosleep,
    SYS_nanosleep,
    SYS_sched_yield,
    // How many arenas malloc makes.
    SYS_sched_getaffinity,
    SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    SYS_poll,
    // What was interrupted by SIGSTOP and had a time limit.
    SYS_restart_syscall,
    // A signal's handler tells the thread that waits for signals, from whichever thread it runs in.
    SYS_sendto,
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sigaltstack,
    SYS_getpid,
    SYS_gettid,
    SYS_tgkill,
    // Clients' interrupts are signalled so, see `session/signal.rs`.
    SYS_io_setup,
    SYS_io_submit,
    SYS_io_getevents,
    SYS_io_destroy,
    SYS_exit,
    SYS_exit_group,
];

const MAIN: &[c_long] = &[SYS_recvfrom];

const SESSION: &[c_long] = &[
    SYS_epoll_pwait,
    #[cfg(target_arch = "x86_64")]
    SYS_epoll_wait,
    // A client's eventfd, see `session/signal.rs`.
    SYS_preadv2,
    SYS_recvmsg,
    SYS_sendmsg,
    SYS_epoll_ctl,
    SYS_epoll_create1,
    SYS_eventfd2,
    SYS_accept4,
    SYS_getsockopt,
    SYS_shutdown,
    SYS_ioctl,
    // What a descriptor that a client sent leads to.
    SYS_fstat,
    SYS_fstatfs,
    SYS_newfstatat,
    SYS_statx,
    SYS_readlinkat,
    #[cfg(target_arch = "x86_64")]
    SYS_readlink,
    // At the end: the store is flushed and unlocked, the socket removed.
    SYS_fsync,
    SYS_fdatasync,
    // An overlay's map is stored.
    SYS_pwrite64,
    SYS_flock,
    SYS_unlinkat,
    #[cfg(target_arch = "x86_64")]
    SYS_unlink,
    // A store that gets another size.
    SYS_lseek,
    SYS_ftruncate,
];

/// What a session makes, since it starts those of devices that are added; and what opens a device, makes its socket, starts a
/// thread and has it enter.
const CONTROL: &[c_long] = &[
    SYS_clone3,
    SYS_clone,
    SYS_set_robust_list,
    SYS_rseq,
    SYS_prctl,
    SYS_capget,
    SYS_capset,
    SYS_seccomp,
    SYS_landlock_restrict_self,
    SYS_openat,
    SYS_pread64,
    SYS_fallocate,
    SYS_fadvise64,
    SYS_getcwd,
    SYS_socket,
    SYS_bind,
    SYS_listen,
    SYS_connect,
    SYS_fchmodat,
    SYS_fchownat,
    #[cfg(target_arch = "x86_64")]
    SYS_chmod,
    #[cfg(target_arch = "x86_64")]
    SYS_lchown,
    SYS_recvfrom,
];

/// At the end its socket is removed.
const METRICS: &[c_long] = &[
    SYS_accept4,
    SYS_recvfrom,
    SYS_getsockopt,
    SYS_ioctl,
    SYS_newfstatat,
    SYS_statx,
    SYS_unlinkat,
    #[cfg(target_arch = "x86_64")]
    SYS_unlink,
];

/// Neither `io_uring_setup` nor anything that stores need to be opened: a worker's ring is made before.
const WORKER: &[c_long] = &[
    SYS_io_uring_enter,
    SYS_io_uring_register,
    SYS_fsync,
    SYS_fdatasync,
    SYS_flock,
    // A connection that is given up, so that its ring gives back what it has of it.
    SYS_shutdown,
];

/// To connect. What it sends and receives goes by calls that all have.
const CONNECTOR: &[c_long] = &[SYS_socket, SYS_connect, SYS_getsockopt, SYS_setsockopt];

/// A store that blocks moves its bytes by itself.
const STORE: &[c_long] = &[
    SYS_preadv,
    SYS_pwritev,
    SYS_fallocate,
    SYS_ftruncate,
    SYS_fdatasync,
    // At the end: the store is unlocked.
    SYS_flock,
];

/// To ask, and, for a device with a cache to be cut off, to flush that before it gets another size.
const SIZES: &[c_long] = &[SYS_ioctl, SYS_fdatasync];

/// What a block device is asked for when it is opened (linux/fs.h): its size, its blocks, and what it prefers.
const BLKGETSIZE64: c_int = 0x8008_1272_u32.cast_signed();
const BLKSSZGET: c_int = 0x1268;
const BLKPBSZGET: c_int = 0x127b;
const BLKIOOPT: c_int = 0x1279;

/// What C libraries and std ask for and do without: they find out about the machine, and open files for it, when malloc makes
/// an arena or a panic tells where it comes from.
const DISPENSABLE: &[c_long] = &[
    SYS_openat,
    SYS_readlinkat,
    SYS_newfstatat,
    SYS_fstat,
    SYS_statx,
    SYS_faccessat,
    #[cfg(target_arch = "x86_64")]
    SYS_open,
    #[cfg(target_arch = "x86_64")]
    SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    SYS_access,
    SYS_getcwd,
    SYS_prlimit64,
    SYS_sysinfo,
];

/// The numbers of calls that are newer (Linux 6.11) than this: we use none of them, and a C library that does falls back to
/// others as on the kernels before.
const NEWER: std::ops::Range<c_long> = 463..512;

const FCNTLS: &[c_int] = &[
    F_GETFL,
    F_SETFL,
    F_GETFD,
    F_SETFD,
    F_DUPFD_CLOEXEC,
    F_GET_SEALS,
    F_ADD_SEALS,
    // A store that is let go of is unlocked, one that is added is locked.
    F_OFD_SETLK,
    F_OFD_GETLK,
];

/// What an argument must be.
#[derive(Debug)]
pub(super) struct Argument {
    /// Which one, from 0.
    pub(super) index: u8,
    /// The bits that matter.
    pub(super) mask: u64,
    /// What they may be.
    pub(super) values: Vec<u64>,
}

/// What a kind of thread may do, and what an argument must be if not anything.
pub(super) fn allowed(kind: ThreadKind) -> impl Iterator<Item = (c_long, Option<Argument>)> {
    let own = match kind {
        ThreadKind::Main => MAIN,
        ThreadKind::Session => SESSION,
        ThreadKind::Worker => WORKER,
        ThreadKind::Store => STORE,
        ThreadKind::Connector => CONNECTOR,
        ThreadKind::Control => CONTROL,
        ThreadKind::Metrics => METRICS,
        ThreadKind::Sizes => SIZES,
    };
    let inherited = if kind == ThreadKind::Control { SESSION } else { &[] };
    ANY.iter().chain(own).chain(inherited).map(move |call| (*call, argument(kind, *call)))
}

/// What a kind of thread is refused, and takes no harm.
pub(super) fn refused(kind: ThreadKind) -> impl Iterator<Item = c_long> {
    let is_allowed = move |call: &c_long| allowed(kind).any(|(allowed, _)| allowed == *call);
    DISPENSABLE.iter().copied().chain(NEWER).filter(move |call| !is_allowed(call))
}

/// None of the calls on the way of a request is here: the kernel has to look at the arguments of these each time.
#[allow(non_upper_case_globals, reason = "the C library's names")]
fn argument(kind: ThreadKind, call: c_long) -> Option<Argument> {
    const ALL: u64 = u64::MAX;
    const INT: u64 = u32::MAX as u64;
    let word = |word: &c_int| u64::from(word.unsigned_abs());
    let bits = |word: &c_int| u64::from(word.cast_unsigned());
    Some(match call {
        // Memory is never to be executed.
        SYS_mmap | SYS_mprotect => Argument { index: 2, mask: word(&PROT_EXEC), values: vec![0] },
        SYS_ioctl => {
            let values = match kind {
                ThreadKind::Sizes => &[BLKGETSIZE64][..],
                ThreadKind::Control => &[FIONBIO as c_int, BLKGETSIZE64, BLKSSZGET, BLKPBSZGET, BLKIOOPT],
                _ => &[FIONBIO as c_int],
            };
            Argument { index: 1, mask: INT, values: values.iter().map(bits).collect() }
        }
        SYS_socket => Argument { index: 0, mask: INT, values: [AF_UNIX, AF_INET, AF_INET6].iter().map(word).collect() },
        // Not, for one, signals to others.
        SYS_fcntl => Argument { index: 1, mask: INT, values: FCNTLS.iter().map(word).collect() },
        // To this process, which aborts.
        SYS_tgkill => Argument { index: 0, mask: INT, values: vec![process::id().into()] },
        // Without an address: to what the socket is connected to.
        SYS_sendto => Argument { index: 4, mask: ALL, values: vec![0] },
        _ => return None,
    })
}
