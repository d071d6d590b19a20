//! Has the kernel hold threads to their system calls.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::syscalls::{self, Argument};
use super::{SandboxError, ThreadKind};

/// What the kernel is given of one kind of thread; it takes the stricter answer of the two.
#[derive(Debug)]
struct Filter {
    /// Says ENOSYS to calls that are refused.
    refusing: BpfProgram,
    /// Has the process killed for what is neither allowed nor refused.
    killing: BpfProgram,
}

/// The filters of all kinds.
///
/// Most calls are allowed whatever their arguments are. The kernel (Linux 5.11) finds that out when it takes a program, and
/// does not run it for these: docs/security.md says what is left of the cost.
#[derive(Debug)]
pub(super) struct Filters {
    main: Filter,
    session: Filter,
    worker: Filter,
    store: Filter,
    connector: Filter,
    control: Filter,
    metrics: Filter,
    sizes: Filter,
}

impl Filters {
    /// The filters; `None` if there are none for this processor.
    pub(super) fn new() -> Result<Option<Self>, SandboxError> {
        let Ok(arch) = TargetArch::try_from(std::env::consts::ARCH) else { return Ok(None) };
        let filter = |kind| Filter::new(kind, arch).map_err(SandboxError::of("seccomp"));
        Ok(Some(Self {
            main: filter(ThreadKind::Main)?,
            session: filter(ThreadKind::Session)?,
            worker: filter(ThreadKind::Worker)?,
            store: filter(ThreadKind::Store)?,
            connector: filter(ThreadKind::Connector)?,
            control: filter(ThreadKind::Control)?,
            metrics: filter(ThreadKind::Metrics)?,
            sizes: filter(ThreadKind::Sizes)?,
        }))
    }

    /// Has the calling thread keep to its calls; false if the kernel has no filters.
    pub(super) fn apply(&self, kind: ThreadKind) -> Result<bool, SandboxError> {
        let filter = match kind {
            ThreadKind::Main => &self.main,
            ThreadKind::Session => &self.session,
            ThreadKind::Worker => &self.worker,
            ThreadKind::Store => &self.store,
            ThreadKind::Connector => &self.connector,
            ThreadKind::Control => &self.control,
            ThreadKind::Metrics => &self.metrics,
            ThreadKind::Sizes => &self.sizes,
        };
        // In this order: the killing one leaves no way to add another.
        for program in [&filter.refusing, &filter.killing] {
            match seccompiler::apply_filter(program) {
                Ok(()) => {}
                Err(seccompiler::Error::Seccomp(error)) if is_missing(&error) => return Ok(false),
                Err(error) => return Err(SandboxError::of("seccomp")(error)),
            }
        }
        Ok(true)
    }
}

/// Whether the kernel was built without filters, or without seccomp.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS))
}

impl Filter {
    fn new(kind: ThreadKind, arch: TargetArch) -> Result<Self, BackendError> {
        let mut refused: BTreeMap<_, _> = syscalls::refused(kind).map(|call| (call, Vec::new())).collect();
        // A thread that starts others has these enter by themselves.
        if kind != ThreadKind::Control {
            refused.insert(libc::SYS_prctl, vec![but_no_new_privileges()?]);
        } else {
            refused.insert(libc::SYS_socket, vec![but_unix_sockets()?]);
            // What a ring does is seen by nobody. Workers have theirs.
            refused.insert(libc::SYS_io_uring_setup, Vec::new());
        }
        let mut spared: BTreeMap<_, _> = refused.keys().map(|call| (*call, Vec::new())).collect();
        for (call, argument) in syscalls::allowed(kind) {
            spared.insert(call, argument.map_or(Ok(Vec::new()), rules)?);
        }
        let errno = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
        Ok(Self {
            refusing: SeccompFilter::new(refused, SeccompAction::Allow, errno, arch)?.try_into()?,
            killing: SeccompFilter::new(spared, SeccompAction::KillProcess, SeccompAction::Allow, arch)?.try_into()?,
        })
    }
}

/// Any `socket` but those in the file system: a store over a network that is added finds an error, and the process lives.
fn but_unix_sockets() -> Result<SeccompRule, BackendError> {
    let allowed = u64::from(libc::AF_UNIX.unsigned_abs());
    SeccompRule::new(vec![SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, allowed)?])
}

/// Any `prctl` but the one that the second program of a filter is applied with.
fn but_no_new_privileges() -> Result<SeccompRule, BackendError> {
    let allowed = u64::from(libc::PR_SET_NO_NEW_PRIVS.unsigned_abs());
    SeccompRule::new(vec![SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, allowed)?])
}

/// A rule for each value that an argument may have.
fn rules(argument: Argument) -> Result<Vec<SeccompRule>, BackendError> {
    let Argument { index, mask, values } = argument;
    let rule = |value: &u64| {
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(mask), *value)?;
        SeccompRule::new(vec![condition])
    };
    values.iter().map(rule).collect()
}
