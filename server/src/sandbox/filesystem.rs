//! Files, and what else landlock guards.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, NetPort, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};

use nix::sys::stat::{SFlag, fstat};

use super::SandboxError;

/// The newest form of landlock that this was written for. Kernels enforce what they have of it.
const NEWEST: ABI = ABI::V7;

/// What there can be of rights to something: to a file there are fewer than to a folder.
fn rights(to: &PathFd) -> BitFlags<AccessFs> {
    let is_file =
        fstat(to.as_fd()).is_ok_and(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFDIR);
    if is_file { AccessFs::from_file(NEWEST) } else { AccessFs::from_all(NEWEST) }
}

/// What is left of the file system, and of the rest that landlock guards: TCP, and processes that do not share the sandbox.
///
/// It guards what is opened from then on. Descriptors that are open, or come from a client, stay what they are.
#[derive(Debug)]
pub(super) struct Files(RulesetCreated);

impl Files {
    /// Nothing, but that names can be removed from `folders`, and TCP ports connected to.
    pub(super) fn new(folders: &[&Path], ports: &[u16]) -> Result<Self, SandboxError> {
        let refused = SandboxError::of("landlock");
        let all = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))
            .and_then(|rules| rules.handle_access(AccessNet::from_all(NEWEST)))
            .and_then(|rules| rules.scope(Scope::from_all(NEWEST)))
            .and_then(Ruleset::create)
            .map_err(&refused)?;
        let open = |folder: &&Path| PathFd::new(folder).map_err(SandboxError::of("landlock"));
        let folders = folders.iter().map(open).collect::<Result<Vec<_>, _>>()?.into_iter();
        // A single file may be among them, of which nothing can be removed, and a rule of nothing is refused.
        let rules = folders
            .filter(|folder| rights(folder).contains(AccessFs::RemoveFile))
            .map(|folder| Ok(PathBeneath::new(folder, AccessFs::RemoveFile)));
        let ports = ports.iter().map(|port| Ok(NetPort::new(*port, AccessNet::ConnectTcp)));
        Ok(Self(all.add_rules(rules).and_then(|all| all.add_rules(ports)).map_err(&refused)?))
    }

    /// As [`new`](Self::new); what is below `allowed` may also be opened, made and cut off.
    pub(super) fn for_control(folders: &[&Path], allowed: &[PathBuf]) -> Result<Self, SandboxError> {
        let refused = SandboxError::of("landlock");
        let Self(mut rules) = Self::new(folders, &[])?;
        let wanted = AccessFs::ReadFile
            | AccessFs::ReadDir
            | AccessFs::WriteFile
            | AccessFs::Truncate
            | AccessFs::MakeReg
            | AccessFs::MakeSock
            | AccessFs::RemoveFile
            | AccessFs::IoctlDev;
        for path in allowed {
            let opened = PathFd::new(path).map_err(SandboxError::of("landlock"))?;
            let access = wanted & rights(&opened);
            rules = rules.add_rule(PathBeneath::new(opened, access)).map_err(&refused)?;
        }
        // What block devices say of themselves.
        if let (false, Ok(devices)) = (allowed.is_empty(), PathFd::new("/sys/devices")) {
            rules = rules.add_rule(PathBeneath::new(devices, AccessFs::ReadFile)).map_err(&refused)?;
        }
        Ok(Self(rules))
    }

    /// Has the calling thread keep to it; the version of landlock that it is kept by, or `None` if the kernel has none.
    pub(super) fn restrict(&self) -> Result<Option<i32>, SandboxError> {
        let rules = self.0.try_clone().map_err(SandboxError::of("landlock"))?;
        let status = rules.restrict_self().map_err(SandboxError::of("landlock"))?;
        Ok(match (status.ruleset, status.landlock) {
            (RulesetStatus::NotEnforced, _) => None,
            (_, LandlockStatus::Available { effective_abi, .. }) => Some(effective_abi as i32),
            _ => None,
        })
    }
}
