//! What a ring may be used for, for ever.
//!
//! Its operations are no system calls: seccomp does not see them, and those of a submission thread are done with the rights
//! that made the ring. So the kernel is told of each ring, before it does anything, what that ring is for; all else it
//! answers with EACCES. A store that needs another operation adds it here.

use std::io;

use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::{IoUring, Probe, opcode};

/// To move bytes of files and sockets that are open, to discard blocks of block devices, and to wait. None makes a
/// descriptor: messages are received without room for any.
const OPERATIONS: &[u8] = &[
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::ReadFixed::CODE,
    opcode::WriteFixed::CODE,
    opcode::ReadvFixed::CODE,
    opcode::WritevFixed::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::SendMsg::CODE,
    opcode::RecvMsg::CODE,
    opcode::UringCmd16::CODE,
    // For what is to come late.
    opcode::Timeout::CODE,
    #[cfg(test)]
    opcode::Nop::CODE,
];

/// To register open files and memory, and to ask what the kernel has: `enum io_uring_register_op` of linux/io_uring.h.
const REGISTRATIONS: [u8; 5] = [
    6,  // IORING_REGISTER_FILES_UPDATE
    8,  // IORING_REGISTER_PROBE
    13, // IORING_REGISTER_FILES2
    15, // IORING_REGISTER_BUFFERS2
    16, // IORING_REGISTER_BUFFERS_UPDATE
];

/// Restricts a ring that was made disabled (`IORING_SETUP_R_DISABLED`, Linux 5.10) and enables it, for the thread that calls.
///
/// # Errors
/// If the kernel refuses.
pub(super) fn enable(kernel: &IoUring) -> io::Result<()> {
    // An operation that the kernel does not know it does not let be named.
    let mut known = Probe::new();
    kernel.submitter().register_probe(&mut known)?;
    let operations = OPERATIONS.iter().filter(|operation| known.is_supported(**operation));
    let operations = operations.map(|operation| Restriction::sqe_op(*operation));
    let registrations = REGISTRATIONS.map(Restriction::register_op);
    let flags = Restriction::sqe_flags_allowed(Flags::FIXED_FILE.bits());
    let mut all: Vec<_> = operations.chain(registrations).chain([flags]).collect();
    kernel.submitter().register_restrictions(&mut all)?;
    kernel.submitter().register_enable_rings()
}

#[cfg(test)]
mod tests {
    use io_uring::types::Fd;
    use io_uring::{opcode, squeue};

    use crate::backend::uring::setup;

    /// The results of entries, each submitted alone.
    fn results(entries: impl IntoIterator<Item = squeue::Entry>) -> Vec<i32> {
        let mut ring = setup::best(None).unwrap();
        let submit = |entry| {
            // SAFETY: those that are let through touch no memory; the paths and addresses of the others are static.
            unsafe { ring.submission().push(&entry).unwrap() };
            ring.submit_and_wait(1).unwrap();
            ring.completion().next().unwrap().result()
        };
        entries.into_iter().map(submit).collect()
    }

    #[test]
    fn a_ring_opens_nothing_and_connects_to_nobody() {
        let root = Fd(libc::AT_FDCWD);
        let entries = [
            opcode::OpenAt::new(root, c"/proc/self/mem".as_ptr()).flags(libc::O_RDWR).build(),
            opcode::UnlinkAt::new(root, c"/nowhere/at/all".as_ptr()).build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::Nop::new().build().flags(squeue::Flags::ASYNC),
        ];
        assert_eq!(results(entries), [-libc::EACCES; 4]);
        // It is not that nothing works.
        assert_eq!(results([opcode::Nop::new().build()]), [0]);
    }

    #[test]
    fn a_ring_takes_no_other_registrations_and_keeps_its_restrictions() {
        let ring = setup::best(None).unwrap();
        let refused = ring.submitter().register_personality().unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
        assert!(ring.submitter().register_restrictions(&mut []).is_err());
    }
}
