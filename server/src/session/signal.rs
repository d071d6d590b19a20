//! Signalling an eventfd that a client holds too, without ever waiting for the client.
//!
//! A write to an eventfd waits while its counter is full, unless O_NONBLOCK is set. That flag belongs to the open file, which
//! the client shares with us: it can fill the counter, and clear the flag between any look of ours and the write. A worker
//! would then serve nobody any more. `pwritev2` knows no RWF_NOWAIT there, io_uring looks at the same flag, and the file can't
//! be opened a second time. But the kernel never waits when it signals an eventfd itself, and it does that at the end
//! of an asynchronous I/O (io_submit(2), IOCB_FLAG_RESFD): so that is how it is signalled here, by a read of no bytes, which ends
//! at once with an error that nobody looks at. It costs about half a microsecond more than a write.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Once;

use libc::{SYS_io_destroy, SYS_io_getevents, SYS_io_setup, SYS_io_submit, c_long, c_ulong, iocb, syscall, timespec};
use nix::errno::Errno;

/// `IOCB_CMD_PREAD` of linux/aio_abi.h.
const IOCB_CMD_PREAD: u16 = 0;
/// `IOCB_FLAG_RESFD` of linux/aio_abi.h.
const IOCB_FLAG_RESFD: u32 = 1;
/// Ends of I/Os that are collected together. All contexts of a machine share `fs.aio-max-nr`, 65536 of them.
const EVENTS: u32 = 32;

/// `struct io_event` of linux/aio_abi.h.
type IoEvent = [u64; 4];

/// Signals an eventfd. One whose counter is full is signalled already.
///
/// # Errors
/// If the system refuses; `EINVAL` if it is no eventfd.
pub(super) fn signal(eventfd: BorrowedFd<'_>) -> io::Result<()> {
    thread_local! {
        /// This thread's, from its first signal to its end.
        static CONTEXT: Option<Context> = Context::new();
    }
    let signalled = CONTEXT.try_with(|context| context.as_ref().map(|context| context.signal(eventfd)));
    match signalled {
        Ok(Some(result)) => result,
        // Without a context, and in a thread that ends: as good as it can be done.
        _ => match nix::unistd::write(eventfd, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        },
    }
}

/// Takes what was signalled, if anything was: the client may have been faster, and have us wait for more.
pub(super) fn drain(eventfd: BorrowedFd<'_>) {
    let mut count = [0u8; 8];
    let into = libc::iovec { iov_base: count.as_mut_ptr().cast(), iov_len: count.len() };
    // SAFETY: reads at most eight bytes into `count`; with RWF_NOWAIT whatever O_NONBLOCK says, and without an offset.
    let _empty = unsafe { libc::preadv2(eventfd.as_raw_fd(), &into, 1, -1, libc::RWF_NOWAIT) };
}

/// A context of asynchronous I/O.
struct Context {
    id: c_ulong,
    /// I/Os whose ends have not been collected.
    ended: Cell<u32>,
}

impl Context {
    fn new() -> Option<Self> {
        let mut id: c_ulong = 0;
        // SAFETY: writes the new context's identity to `id`, which is 0 as it must be.
        let result = unsafe { syscall(SYS_io_setup, c_long::from(EVENTS), &mut id) };
        if result == 0 {
            return Some(Self { id, ended: Cell::new(0) });
        }
        static ONCE: Once = Once::new();
        let error = io::Error::last_os_error();
        ONCE.call_once(|| {
            log::warn!(
                "no asynchronous I/O is to be had (io_setup: {error}; see fs.aio-max-nr): a client that is out for it can hold up \
                 the workers that signal its interrupts"
            );
        });
        None
    }

    fn signal(&self, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        if self.ended.get() >= EVENTS {
            self.collect();
        }
        let fd = eventfd.as_raw_fd().unsigned_abs();
        // SAFETY: a structure of integers, for which zeroes are valid.
        let mut read: iocb = unsafe { std::mem::zeroed() };
        read.aio_lio_opcode = IOCB_CMD_PREAD;
        read.aio_fildes = fd;
        read.aio_flags = IOCB_FLAG_RESFD;
        read.aio_resfd = fd;
        let list = [&raw mut read];
        // SAFETY: one I/O, of no bytes, whose description the kernel copies.
        if unsafe { syscall(SYS_io_submit, self.id, 1 as c_long, list.as_ptr()) } == 1 {
            self.ended.set(self.ended.get() + 1);
            return Ok(());
        }
        Err(io::Error::last_os_error())
    }

    /// Makes room. All I/Os have ended when they are submitted.
    fn collect(&self) {
        let mut events: [IoEvent; EVENTS as usize] = [[0; 4]; EVENTS as usize];
        let no_wait = timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes at most as many events as there is room for.
        let count = unsafe {
            syscall(SYS_io_getevents, self.id, 0 as c_long, c_long::from(EVENTS), events.as_mut_ptr(), &no_wait)
        };
        self.ended.set(self.ended.get().saturating_sub(u32::try_from(count).unwrap_or(0)));
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: our own context, used no more. It can only fail for one that does not exist.
        let _destroyed = unsafe { syscall(SYS_io_destroy, self.id) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;

    #[test]
    fn each_signal_counts() {
        let eventfd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        for count in [1, 2, EVENTS, EVENTS + 1, 1000] {
            (0..count).for_each(|_| signal(eventfd.as_fd()).unwrap());
            assert_eq!(eventfd.read(), Ok(u64::from(count)));
        }
    }

    #[test]
    fn a_full_counter_is_not_waited_for() {
        let eventfd = EventFd::from_flags(EfdFlags::empty()).unwrap();
        assert!(!OFlag::from_bits_truncate(fcntl(&eventfd, FcntlArg::F_GETFL).unwrap()).contains(OFlag::O_NONBLOCK));
        eventfd.write(u64::MAX - 1).unwrap();
        (0..100).for_each(|_| signal(eventfd.as_fd()).unwrap());
        assert_eq!(eventfd.read(), Ok(u64::MAX));
        signal(eventfd.as_fd()).unwrap();
        assert_eq!(eventfd.read(), Ok(1));
    }

    #[test]
    fn an_empty_counter_is_not_waited_for() {
        let eventfd = EventFd::from_flags(EfdFlags::empty()).unwrap();
        drain(eventfd.as_fd());
        signal(eventfd.as_fd()).unwrap();
        drain(eventfd.as_fd());
        fcntl(&eventfd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        assert_eq!(eventfd.read(), Err(Errno::EAGAIN));
    }

    #[test]
    fn only_eventfds_are_signalled() {
        let (stream, _peer) = UnixStream::pair().unwrap();
        assert_eq!(signal(stream.as_fd()).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn a_context_goes_with_its_thread() {
        let context = Context::new().unwrap();
        let id = context.id;
        let exists = || {
            // SAFETY: asks for no events, and has none written.
            let found = unsafe { syscall(SYS_io_getevents, id, 0 as c_long, 0 as c_long, 0 as c_long, 0 as c_long) };
            found == 0
        };
        assert!(exists());
        drop(context);
        assert!(!exists());
    }
}
