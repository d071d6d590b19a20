//! Capabilities, and programs that would give some back.

use caps::CapSet;
use caps::errors::CapsError;
use nix::errno::Errno;

/// Has the calling thread, and what it may become, run with nothing but its user's and groups' rights, for ever.
///
/// The bounding set is left as it is: it limits what executing a program may give, and that is nothing from now on.
pub(super) fn drop_all() -> Result<(), super::SandboxError> {
    let failed = super::SandboxError::of::<Errno>;
    nix::sys::prctl::set_no_new_privs().map_err(failed("no new privileges"))?;
    // The effective ones must be among the permitted ones all the time, and the ambient ones among the inheritable ones.
    [CapSet::Ambient, CapSet::Effective, CapSet::Permitted, CapSet::Inheritable]
        .into_iter()
        .try_for_each(|set| caps::clear(None, set))
        .map_err(super::SandboxError::of::<CapsError>("capabilities"))
}
