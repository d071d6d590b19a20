//! Making an io_uring, with what the kernel has of its features.

use std::io;

use io_uring::IoUring;

use super::restrictions;

/// Entries of the submission queue; a larger batch takes more than one system call.
const SUBMISSIONS: u32 = 1024;

/// Entries of the completion queue, which bounds the operations in flight on all clients together.
const COMPLETIONS: u32 = 8192;

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UringError {
    /// The kernel was built without it, or a sandbox hides it.
    #[error(
        "this kernel offers no io_uring: files need Linux 5.15 or newer, with CONFIG_IO_URING, \
         and outside of sandboxes that do not implement it (gVisor)"
    )]
    Missing,
    /// The kernel has it, and does not let us.
    #[error(
        "io_uring is forbidden here: set the sysctl kernel.io_uring_disabled to 0, and in a container \
         allow io_uring_setup, io_uring_enter and io_uring_register in its seccomp profile"
    )]
    Forbidden,
    /// The kernel has an early form of it.
    #[error("the io_uring of this kernel is too old: files need Linux 5.15 or newer")]
    TooOld,
    /// No memory for the queues.
    #[error("there is no memory for an io_uring: raise the memory limit, or the locked memory limit (ulimit -l)")]
    NoMemory,
    /// No such processor, or not for this process.
    #[error(
        "sqpoll_cpus names processor {0}, which is not there, or offline, or not among those that this process may use \
         (/proc/self/status, Cpus_allowed_list)"
    )]
    SqPollCpu(u32),
    /// The system refused.
    #[error("cannot set up an io_uring: {0}")]
    System(#[source] io::Error),
}

impl From<io::Error> for UringError {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOSYS) => Self::Missing,
            Some(libc::EPERM | libc::EACCES) => Self::Forbidden,
            Some(libc::ENOMEM) => Self::NoMemory,
            _ => Self::System(error),
        }
    }
}

/// A thread of the kernel's that takes entries from the submission queue, so that no system call has to
/// (`IORING_SETUP_SQPOLL`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SqPoll {
    /// Milliseconds, at least 1, that it looks at an empty queue before it sleeps.
    pub idle: u32,
    /// The processor that it is bound to.
    pub cpu: Option<u32>,
}

/// When completions are made that need a thread of ours to make them; older kernels do not have all.
#[derive(Clone, Copy, Debug)]
enum TaskRun {
    /// Linux 6.1: when the ring's thread asks for them, and only then.
    Deferred,
    /// Linux 5.19: when the ring's thread makes a system call; it is not interrupted for them.
    Cooperative,
    /// Any: at any time. The only one where a thread of the kernel's submits, which then makes them too.
    Plain,
}

impl TaskRun {
    /// The best first.
    const ALL: [Self; 3] = [Self::Deferred, Self::Cooperative, Self::Plain];
}

/// The features to ask for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    task_run: TaskRun,
    sqpoll: Option<SqPoll>,
    /// Completions are looked for in the devices' queues (`IORING_SETUP_IOPOLL`).
    iopoll: bool,
}

/// The best io_uring that this kernel has, for the thread that calls.
pub(super) fn best(sqpoll: Option<SqPoll>) -> Result<IoUring, UringError> {
    match sqpoll {
        None => Setup::first_of(Setup::plain()),
        Some(sqpoll) => Setup::threaded(sqpoll).build(SUBMISSIONS).map_err(|error| match (error, sqpoll.cpu) {
            // The kernel says no more than that; all else that is asked for it has had since Linux 5.11.
            (UringError::System(error), Some(cpu)) if error.raw_os_error() == Some(libc::EINVAL) => {
                UringError::SqPollCpu(cpu)
            }
            (error, _) => error,
        }),
    }
}

/// The best io_uring for files whose completions are looked for.
pub(super) fn polled() -> Result<IoUring, UringError> {
    Setup::first_of(Setup::plain().map(|setup| Setup { iopoll: true, ..setup }))
}

impl Setup {
    /// All forms in which the ring's own thread submits, the best first.
    pub(super) fn plain() -> [Self; 3] {
        TaskRun::ALL.map(|task_run| Self { task_run, sqpoll: None, iopoll: false })
    }

    /// The form in which a thread of the kernel's submits.
    pub(super) fn threaded(sqpoll: SqPoll) -> Self {
        Self { task_run: TaskRun::Plain, sqpoll: Some(sqpoll), iopoll: false }
    }

    fn first_of(setups: [Self; 3]) -> Result<IoUring, UringError> {
        for setup in setups {
            match setup.build(SUBMISSIONS) {
                // What a kernel does not know it calls invalid.
                Err(UringError::System(error)) if error.raw_os_error() == Some(libc::EINVAL) => {}
                result => return result,
            }
        }
        Err(UringError::TooOld)
    }

    /// An io_uring with so many entries in its submission queue.
    pub(super) fn build(self, submissions: u32) -> Result<IoUring, UringError> {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(COMPLETIONS).dontfork().setup_r_disabled();
        match self.task_run {
            TaskRun::Deferred => {
                builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all();
            }
            TaskRun::Cooperative => {
                builder.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
            }
            TaskRun::Plain => {}
        }
        if let Some(SqPoll { idle, cpu }) = self.sqpoll {
            builder.setup_sqpoll(idle);
            cpu.map(|cpu| builder.setup_sqpoll_cpu(cpu));
        }
        if self.iopoll {
            builder.setup_iopoll();
        }
        let kernel = builder.build(submissions)?;
        // Waiting with a time limit is the newest feature we rely on (5.11). Before 5.5 entries may not be reused once
        // they are submitted, and completions can be lost.
        let params = kernel.params();
        if !(params.is_feature_ext_arg() && params.is_feature_submit_stable() && params.is_feature_nodrop()) {
            return Err(UringError::TooOld);
        }
        restrictions::enable(&kernel)?;
        log::debug!("io_uring: {self:?}, {} submissions, {} completions", params.sq_entries(), params.cq_entries());
        Ok(kernel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_cure() {
        for (errno, cure) in [
            (libc::EPERM, "io_uring_disabled"),
            (libc::EPERM, "seccomp"),
            (libc::ENOSYS, "CONFIG_IO_URING"),
            (libc::ENOMEM, "ulimit -l"),
        ] {
            let message = UringError::from(io::Error::from_raw_os_error(errno)).to_string();
            assert!(message.contains(cure), "{message}");
        }
    }
}
