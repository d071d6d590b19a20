//! Whether a file has polled queues, which is learnt by trying.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use io_uring::opcode;
use io_uring::types::Fd;

use super::lane::may_do_less;
use super::setup::{self, UringError};

/// Bytes of the read that is tried.
const LEN: usize = 4096;

#[repr(C, align(4096))]
struct Page([u8; LEN]);

/// Reads the first bytes of a file that was opened for direct I/O, and looks for the completion in its device's queue.
/// Waits for the device.
///
/// # Errors
/// If there is no such queue: `EOPNOTSUPP`; or what went wrong otherwise.
pub(in crate::backend) fn can_poll(file: &impl AsFd) -> io::Result<()> {
    let mut kernel = setup::polled().map_err(|error| match error {
        UringError::System(error) => error,
        other => io::Error::other(other),
    })?;
    let mut page = Box::new(Page([0; LEN]));
    let fd = Fd(file.as_fd().as_raw_fd());
    let read = opcode::Read::new(fd, page.0.as_mut_ptr(), LEN as u32).offset(0).build();
    // SAFETY: the page and the file outlive the read: it has completed when this returns, or the page is never freed, and
    // the kernel holds the file of an entry that it has taken.
    unsafe { kernel.submission().push(&read) }.map_err(|_| io::Error::other("no room in a new ring"))?;
    loop {
        if let Err(error) = may_do_less(kernel.submitter().submit_and_wait(1)) {
            std::mem::forget(page);
            return Err(error);
        }
        if let Some(completion) = kernel.completion().next() {
            return match completion.result() {
                bytes @ 0.. => {
                    log::debug!("a polled read of {bytes} bytes");
                    Ok(())
                }
                errno => Err(io::Error::from_raw_os_error(errno.saturating_neg())),
            };
        }
    }
}
