//! Locks on files of blocks, against other servers and against QEMU and its tools.
//!
//! Two kinds, since neither sees the other: `flock`, and the byte ranges by which QEMU says what it does to a file and what
//! it lets others do (`block/file-posix.c` there: byte 100 + n is locked by who has permission n, byte 200 + n by who lets
//! nobody else have it). All of QEMU's locks are shared ones; who asks whether a byte is locked asks for an exclusive one.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};

/// How long a file may still be locked by a server that was killed: the kernel takes its io_uring apart, and lets go of the
/// files in it, some time after the process has ended.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long to wait between attempts.
const PAUSE: Duration = Duration::from_millis(10);

/// QEMU's permissions, by their number.
const CONSISTENT_READ: libc::off_t = 0;
const WRITE: libc::off_t = 1;
const RESIZE: libc::off_t = 3;

/// Where the byte of permission 0 is.
const HELD: libc::off_t = 100;
/// Where the byte of permission 0 is that others are not to have.
const DENIED: libc::off_t = 200;

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// To be read, together with others that read it.
    Shared,
    /// To be changed, by nobody else.
    Exclusive,
}

impl Access {
    fn held(self) -> &'static [libc::off_t] {
        match self {
            Self::Shared => &[CONSISTENT_READ],
            Self::Exclusive => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    /// Nobody else may change the file in either case.
    const DENIED: [libc::off_t; 2] = [WRITE, RESIZE];
}

/// A lock on an open file, held until this is dropped; if the process is killed, until the kernel is done with the file.
#[derive(Debug)]
pub(super) struct FileLock(Flock<File>);

/// Someone else uses it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Busy;

impl FileLock {
    /// Locks a regular file that is open for reading at least; `None` where its file system has no locks.
    ///
    /// # Errors
    /// If someone else uses it.
    pub(super) fn take(file: &File, access: Access) -> io::Result<Result<Option<Self>, Busy>> {
        let how = match access {
            Access::Shared => FlockArg::LockSharedNonblock,
            Access::Exclusive => FlockArg::LockExclusiveNonblock,
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Flock::lock(file.try_clone()?, how) {
                Ok(lock) => {
                    let lock = Self(lock);
                    match lock_bytes(&lock.0, access) {
                        Ok(true) => return Ok(Ok(Some(lock))),
                        Ok(false) => {}
                        Err(error) => {
                            log::debug!("its file system has no locks of byte ranges: {error}");
                            return Ok(Ok(Some(lock)));
                        }
                    }
                }
                Err((_, Errno::EWOULDBLOCK)) => {}
                Err((_, error)) => {
                    log::debug!("its file system has no locks: {error}");
                    return Ok(Ok(None));
                }
            }
            if Instant::now() >= deadline {
                return Ok(Err(Busy));
            }
            thread::sleep(PAUSE);
        }
    }
}

impl FileLock {
    /// Has a file that was locked to be read, to be changed; `false` if someone else reads it, and still does after a while, and then
    /// all is as before.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn upgrade(&self) -> io::Result<bool> {
        let deadline = Instant::now() + PATIENCE;
        while !self.try_upgrade()? {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            thread::sleep(PAUSE);
        }
        Ok(true)
    }

    fn try_upgrade(&self) -> io::Result<bool> {
        match self.0.relock(FlockArg::LockExclusiveNonblock) {
            Ok(()) if lock_bytes(&self.0, Access::Exclusive)? => return Ok(true),
            Ok(()) | Err(Errno::EWOULDBLOCK) => {}
            Err(error) => return Err(error.into()),
        }
        self.downgrade();
        Ok(false)
    }

    /// As it was before [`upgrade`](Self::upgrade).
    pub(super) fn downgrade(&self) {
        for byte in Access::Exclusive.held().iter().filter(|byte| !Access::Shared.held().contains(byte)) {
            let unlocked = fcntl(&*self.0, FcntlArg::F_OFD_SETLK(&byte_lock(HELD + byte, libc::F_UNLCK)));
            unlocked.map_or_else(|error| log::warn!("a lock stays: {error}"), drop);
        }
        if let Err(error) = self.0.relock(FlockArg::LockSharedNonblock) {
            log::warn!("a lock is lost: {error}");
        }
    }
}

impl Drop for FileLock {
    /// What is open of the file may stay open for longer. (`flock` goes with the field.)
    fn drop(&mut self) {
        // One that is no lock of ours is none that is held.
        let _ = fcntl(&*self.0, FcntlArg::F_OFD_SETLK(&bytes_lock(HELD, DENIED + RESIZE + 1 - HELD, libc::F_UNLCK)));
    }
}

/// Says what is done to the file and what others may not do, and whether nobody is in the way. In this order, as QEMU does:
/// of two who do it at the same time at least one sees the other.
fn lock_bytes(file: &File, access: Access) -> nix::Result<bool> {
    for byte in access.held().iter().map(|n| HELD + n).chain(Access::DENIED.map(|n| DENIED + n)) {
        fcntl(file, FcntlArg::F_OFD_SETLK(&byte_lock(byte, libc::F_RDLCK)))?;
    }
    for byte in access.held().iter().map(|n| DENIED + n).chain(Access::DENIED.map(|n| HELD + n)) {
        let mut lock = byte_lock(byte, libc::F_WRLCK);
        // SAFETY: the lock is a `struct flock`, which the call reads and writes. (nix has no safe form of this one.)
        Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) })?;
        if i32::from(lock.l_type) != libc::F_UNLCK {
            return Ok(false);
        }
    }
    Ok(true)
}

fn byte_lock(byte: libc::off_t, kind: i32) -> libc::flock {
    bytes_lock(byte, 1, kind)
}

fn bytes_lock(first: libc::off_t, len: libc::off_t, kind: i32) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: first, l_len: len, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        file
    }

    fn take(file: &tempfile::NamedTempFile, access: Access) -> Result<Option<FileLock>, Busy> {
        FileLock::take(&File::open(file.path()).unwrap(), access).unwrap()
    }

    #[test]
    fn readers_share_and_writers_do_not() {
        for (first, second, together) in [
            (Access::Shared, Access::Shared, true),
            (Access::Shared, Access::Exclusive, false),
            (Access::Exclusive, Access::Shared, false),
            (Access::Exclusive, Access::Exclusive, false),
        ] {
            let file = file();
            let held = take(&file, first).unwrap();
            assert_eq!(take(&file, second).is_ok(), together, "{first:?}, {second:?}");
            drop(held);
            assert!(take(&file, second).is_ok());
        }
    }

    #[test]
    fn a_readers_lock_becomes_a_writers_and_a_readers_again() {
        let file = file();
        let mine = take(&file, Access::Shared).unwrap().unwrap();
        let other = take(&file, Access::Shared).unwrap().unwrap();
        assert!(!mine.upgrade().unwrap(), "another reads it");
        assert!(take(&file, Access::Shared).is_ok() && take(&file, Access::Exclusive).is_err(), "as before");
        // As a server does that was killed.
        let upgraded = thread::scope(|scope| {
            scope.spawn(move || {
                thread::sleep(3 * PAUSE);
                drop(other);
            });
            mine.upgrade().unwrap()
        });
        assert!(upgraded);
        mine.downgrade();
        // By QEMU's rules alone.
        let qemu = File::open(file.path()).unwrap();
        assert_eq!(lock_bytes(&qemu, Access::Shared), Ok(true));
        assert!(!mine.upgrade().unwrap());
        drop(qemu);
        assert!(mine.upgrade().unwrap());
        assert!(take(&file, Access::Shared).is_err());
        mine.downgrade();
        assert!(take(&file, Access::Shared).is_ok() && take(&file, Access::Exclusive).is_err());
    }

    /// What QEMU's own locks mean to us, without `flock`, which QEMU does not use.
    #[test]
    fn bytes_that_are_locked_elsewhere_are_heeded() {
        let cases: [(libc::off_t, bool, bool); 5] = [
            (HELD + CONSISTENT_READ, true, true),
            (HELD + WRITE, false, false),
            (HELD + RESIZE, false, false),
            (DENIED + WRITE, true, false),
            (DENIED + CONSISTENT_READ, false, false),
        ];
        for (byte, may_read, may_write) in cases {
            let file = file();
            let other = File::open(file.path()).unwrap();
            fcntl(&other, FcntlArg::F_OFD_SETLK(&byte_lock(byte, libc::F_RDLCK))).unwrap();
            let mine = || File::open(file.path()).unwrap();
            assert_eq!(lock_bytes(&mine(), Access::Shared), Ok(may_read), "{byte}");
            assert_eq!(lock_bytes(&mine(), Access::Exclusive), Ok(may_write), "{byte}");
        }
    }

    /// That others are told: QEMU asks for a byte that we hold in the way it does.
    #[test]
    fn what_is_done_to_the_file_can_be_seen() {
        for (access, locked, free) in [
            (Access::Shared, vec![100, 201, 203], vec![101, 103, 200]),
            (Access::Exclusive, vec![100, 101, 103, 201, 203], vec![102, 200, 202]),
        ] {
            let file = file();
            let _held = take(&file, access).unwrap().unwrap();
            let other = File::open(file.path()).unwrap();
            for (bytes, is_locked) in [(locked, true), (free, false)] {
                for byte in bytes {
                    let mut lock = byte_lock(byte, libc::F_WRLCK);
                    // SAFETY: as in `lock_bytes`.
                    assert_eq!(unsafe { libc::fcntl(other.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) }, 0);
                    assert_eq!(i32::from(lock.l_type) != libc::F_UNLCK, is_locked, "{access:?}, {byte}");
                }
            }
        }
    }
}
