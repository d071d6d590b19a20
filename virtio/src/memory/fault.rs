//! Guest memory that a client takes away under us.
//!
//! Whoever shares a file may make it shorter at any time. The next access to a page beyond its new end raises SIGBUS, which
//! by default ends the process, and all other clients' devices with it. [`outlive_lost_memory`] installs a handler that puts
//! zeroes in the place of such memory, tells the client's [`Loss`], and lets the access go on. What is read or written there
//! means nothing any more: whoever serves the client ends its session. The same happens when the system has no page for a
//! hole in the file, or finds one broken.
//!
//! The handler runs in whichever thread faults, in several at once, in the middle of anything. So it takes no lock and no
//! memory: it walks a list of [`Slot`]s that only ever grows. The memory that a thread faults in is held by that thread, so
//! that the slot it looks for stands still; one that changes meanwhile is another's.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use libc::{c_int, c_void, siginfo_t};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::mapping::PAGE;

/// Says that a client's memory is gone: the end of its session, and of nothing else.
#[derive(Debug)]
pub struct Loss {
    happened: AtomicBool,
    event: EventFd,
}

impl Loss {
    /// Nothing is lost yet.
    ///
    /// # Errors
    /// If there is no descriptor for it.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { happened: AtomicBool::new(false), event })
    }

    /// Whether memory was lost.
    pub fn happened(&self) -> bool {
        self.happened.load(Ordering::Acquire)
    }

    /// Tells it, from whoever finds out: also the kernel does, by EFAULT. Calls nothing that a signal handler may not.
    pub fn tell(&self) {
        if !self.happened.swap(true, Ordering::AcqRel) {
            let one = 1u64.to_ne_bytes();
            // SAFETY: writes eight bytes to our own eventfd, which does not block. It is written once: there is room.
            let _told = unsafe { libc::write(self.event.as_fd().as_raw_fd(), one.as_ptr().cast(), one.len()) };
        }
    }
}

/// Readable, and so for ever, once memory was lost.
impl AsFd for Loss {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// Where one mapping of guest memory lies, as the handler finds it. Never freed, but used again.
#[derive(Debug)]
struct Slot {
    /// Odd while the rest is changed.
    version: AtomicUsize,
    start: AtomicUsize,
    /// In bytes; 0 if it is free.
    len: AtomicUsize,
    loss: AtomicPtr<Loss>,
    /// The slot that was made before this one.
    next: Option<&'static Slot>,
}

/// The slot that was made last.
static NEWEST: AtomicPtr<Slot> = AtomicPtr::new(ptr::null_mut());
/// Slots to be used again. Who holds it may also add one; the handler never looks here.
static FREE: Mutex<Vec<&'static Slot>> = Mutex::new(Vec::new());

impl Slot {
    /// One that nobody uses.
    fn take() -> &'static Self {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        free.pop().unwrap_or_else(|| {
            let slot = Box::leak(Box::new(Self {
                version: AtomicUsize::new(0),
                start: AtomicUsize::new(0),
                len: AtomicUsize::new(0),
                loss: AtomicPtr::new(ptr::null_mut()),
                next: Self::newest(),
            }));
            NEWEST.store(slot, Ordering::Release);
            slot
        })
    }

    fn newest() -> Option<&'static Self> {
        // SAFETY: null, or a slot that was leaked when it was put there.
        unsafe { NEWEST.load(Ordering::Acquire).as_ref() }
    }

    /// Changes what it says; its owner's alone to call.
    fn set(&self, start: usize, len: usize, loss: *const Loss) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        // ORDERING: our store of an odd version comes before the stores of what it guards. `get` loads these first, has its
        // fence, and loads the version again. Without ours it might read half of the new entry under the old version, and
        // take it for whole.
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.loss.store(loss.cast_mut(), Ordering::Relaxed);
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// What it says, or `None` while that changes.
    fn get(&self) -> Option<(usize, usize, *const Loss)> {
        let version = self.version.load(Ordering::Acquire);
        let read = (self.start.load(Ordering::Relaxed), self.len.load(Ordering::Relaxed));
        let loss = self.loss.load(Ordering::Relaxed);
        // ORDERING: our loads of the entry come before the second load of the version: the pair of the fence in `set`. Without
        // ours the version might be loaded first, and an entry that changes meanwhile be taken for whole.
        fence(Ordering::Acquire);
        let same = version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version;
        same.then_some((read.0, read.1, loss.cast_const()))
    }
}

/// A mapping of guest memory that the handler knows. Must be dropped before the mapping is: the addresses may be another's
/// at once.
#[derive(Debug)]
pub(super) struct Watched {
    slot: &'static Slot,
    /// The slot points to it.
    loss: Arc<Loss>,
}

impl Watched {
    /// Has the handler answer for the `len` bytes at `start`, which are mapped and the caller's own.
    pub(super) fn new(start: NonNull<u8>, len: usize, loss: &Arc<Loss>) -> Self {
        let watched = Self { slot: Slot::take(), loss: Arc::clone(loss) };
        watched.slot.set(start.addr().get(), len, Arc::as_ptr(&watched.loss));
        watched
    }

    /// What is told.
    pub(super) fn loss(&self) -> &Arc<Loss> {
        &self.loss
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.slot.set(0, 0, ptr::null());
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(self.slot);
    }
}

/// What SIGBUS did before.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// Makes the process outlive accesses to guest memory that is gone, from now on: installs a handler for SIGBUS. One that
/// was there before gets what is none of our business. Does nothing if it was called before.
///
/// # Errors
/// If the system refuses.
pub fn outlive_lost_memory() -> io::Result<()> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if *installed {
        return Ok(());
    }
    // SAFETY: zeroes are a valid `sigaction`; it is all that the call writes to.
    let previous = unsafe {
        let mut previous: libc::sigaction = std::mem::zeroed();
        Errno::result(libc::sigaction(libc::SIGBUS, ptr::null(), &mut previous))?;
        previous
    };
    // Before the handler can run.
    let _new = PREVIOUS.set(previous);
    // SAFETY: zeroes are a valid `sigaction`, with an empty mask. The handler has the signature that SA_SIGINFO asks for, and
    // calls only what is safe in a signal handler. On the stack that the thread has for signals, if it has one.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        Errno::result(libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()))?;
    }
    *installed = true;
    Ok(())
}

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let errno = Errno::last_raw();
    // SAFETY: with SA_SIGINFO the kernel gives a valid `siginfo_t`. Above 0, the code is the kernel's, and there is an address.
    let fault = unsafe { ((*info).si_code > 0).then(|| (*info).si_addr().addr()) };
    if !fault.is_some_and(replace) {
        pass_on(signal, info, context, fault.is_some());
    }
    Errno::set_raw(errno);
}

/// Puts zeroes in the place of the guest memory that `address` lies in, and tells its loss; says whether there was such.
fn replace(address: usize) -> bool {
    let holds = |(start, len, _): &(usize, usize, _)| address.checked_sub(*start).is_some_and(|offset| offset < *len);
    let mut slots = std::iter::successors(Slot::newest(), |slot| slot.next);
    let Some((start, len, loss)) = slots.find_map(|slot| slot.get().filter(holds)) else { return false };
    // All of it, since the next page is as likely gone; and huge pages can't be replaced one small page at a time. If there is
    // no room to promise so much, then the one page.
    let page = address & !(PAGE - 1) as usize;
    if !put_zeroes(start, len) && !put_zeroes(page, PAGE as usize) {
        return false;
    }
    // SAFETY: the slot points to what its `Watched` owns, which lives as long as the memory that this thread is using.
    unsafe { (*loss).tell() };
    true
}

/// Maps private zeroes over guest memory.
fn put_zeroes(start: usize, len: usize) -> bool {
    let place = ptr::without_provenance_mut(start);
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: replaces pages of a mapping that lies in a slot, so that nothing but guest memory is there, to which no reference
    // exists; who uses it holds it, this thread among others, and unmaps it by address and length as before.
    unsafe { libc::mmap(place, len, prot, flags, -1, 0) != libc::MAP_FAILED }
}

/// Lets a handler that was there before us judge a fault. Without one, and for a signal that somebody sent, the process ends.
fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void, fault: bool) {
    let is_handler = |action: &&libc::sigaction| ![libc::SIG_DFL, libc::SIG_IGN].contains(&action.sa_sigaction);
    let Some(previous) = PREVIOUS.get().filter(is_handler).filter(|_| fault) else {
        // SAFETY: zeroes are the default action. The signal comes when our handler returns: by the access that faulted, which
        // is made again, or since it is raised here.
        unsafe {
            let default: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, &default, ptr::null_mut());
            libc::raise(signal);
        }
        return;
    };
    let handler = previous.sa_sigaction as *const ();
    // SAFETY: it was installed as a handler of this kind, and is called as the kernel would.
    unsafe {
        if previous.sa_flags & libc::SA_SIGINFO != 0 {
            let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = std::mem::transmute(handler);
            handler(signal, info, context);
        } else {
            let handler: extern "C" fn(c_int) = std::mem::transmute(handler);
            handler(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::memory::{Access, GuestMemory, MappedRing, Mapping, MemoryFile, RingAddresses, SharedTable};
    use crate::queue::{Field, RingMemory};

    const IOVA: u64 = 0x1_0000;

    /// Guest memory of `pages` pages in two mappings, and what a client needs to take it away.
    fn guest(pages: u64) -> (File, Arc<Loss>, Arc<SharedTable>) {
        outlive_lost_memory().unwrap();
        let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(pages * PAGE).unwrap();
        let loss = Arc::new(Loss::new().unwrap());
        let mapped = Arc::new(MemoryFile::map(file.try_clone().unwrap()).unwrap().watched(&loss));
        let shared = Arc::new(SharedTable::default());
        // The halves change places, so that a ring across them is mapped a second time.
        let half = pages / 2 * PAGE;
        for (iova, offset) in [(IOVA, half), (IOVA + half, 0)] {
            shared.map(Mapping::of_file(iova, half, Access::READ_WRITE, Arc::clone(&mapped), offset).unwrap()).unwrap();
        }
        (file, loss, shared)
    }

    fn readable(loss: &Loss) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        poll(&mut [PollFd::new(loss.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn memory_that_is_gone_reads_as_zeroes_and_is_told() {
        let (file, loss, memory) = guest(8);
        let (_other_file, other_loss, other) = guest(8);
        let (mut memory, mut other) = (GuestMemory::new(memory), GuestMemory::new(other));
        let mut bytes = [0; 16];
        for memory in [&mut memory, &mut other] {
            memory.write(IOVA, &[7; 16]).unwrap();
        }
        file.set_len(PAGE).unwrap();
        assert!(!loss.happened() && !readable(&loss), "nobody has looked yet");
        memory.read(IOVA, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 16]);
        assert!(loss.happened() && readable(&loss));
        memory.write(IOVA + 3 * PAGE, &[1; 16]).unwrap();
        other.read(IOVA, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 16]);
        assert!(!other_loss.happened() && !readable(&other_loss));
    }

    #[test]
    fn a_ring_that_is_mapped_twice_is_gone_with_its_file() {
        let (file, loss, memory) = guest(2);
        let mut memory = GuestMemory::new(memory);
        // Across the two pages, which are no neighbours.
        let at = RingAddresses { desc: IOVA + PAGE - 32, driver: IOVA, device: IOVA + PAGE + 256 };
        let ring = MappedRing::new(&mut memory, at, 4).unwrap();
        ring.read_descriptor(3);
        file.set_len(0).unwrap();
        assert_eq!(ring.read_descriptor(0), ring.read_descriptor(3));
        assert!(loss.happened());
        ring.store(Field::UsedIdx, 1, Ordering::Relaxed);
        assert_eq!(ring.load(Field::UsedIdx, Ordering::Relaxed), 1);
    }

    /// Many threads at the same memory and at others', while more comes and goes.
    #[test]
    fn several_threads_may_fault_at_once() {
        for _ in 0..50 {
            let guests = [guest(64), guest(64)];
            let start = std::sync::Barrier::new(5);
            std::thread::scope(|scope| {
                for (file, _, memory) in &guests {
                    for at in 0..2 {
                        let mut memory = GuestMemory::new(Arc::clone(memory));
                        let start = &start;
                        scope.spawn(move || {
                            start.wait();
                            file.set_len(0).unwrap();
                            for page in 0..32 {
                                memory.read(IOVA + (2 * page + at) * PAGE, &mut [0; 8]).unwrap();
                            }
                        });
                    }
                }
                start.wait();
                (0..20).for_each(|_| drop(guest(4)));
            });
            assert!(guests.iter().all(|(_, loss, _)| loss.happened()));
        }
    }

    #[test]
    fn slots_are_used_again() {
        let count = || std::iter::successors(Slot::newest(), |slot| slot.next).count();
        let before = count();
        (0..1000).for_each(|_| drop(guest(2)));
        // Other tests take some at the same time.
        assert!(count() < before + 500, "{} slots, {before} before", count());
    }

    /// Any other SIGBUS ends the process as it always did: run in processes of their own.
    #[test]
    fn what_is_not_guest_memory_is_none_of_our_business() {
        for kind in ["fault", "sent"] {
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "memory::fault::tests::victim", "--ignored"])
                .env("VICTIM", kind)
                .output()
                .unwrap()
                .status;
            assert_eq!(status.signal(), Some(libc::SIGBUS), "{kind}");
        }
    }

    #[test]
    #[ignore = "ends its process, for another test"]
    fn victim() {
        let (file, loss, memory) = guest(2);
        file.set_len(0).unwrap();
        GuestMemory::new(memory).read(IOVA, &mut [0; 8]).unwrap();
        assert!(loss.happened());
        if std::env::var("VICTIM").as_deref() == Ok("sent") {
            nix::sys::signal::raise(nix::sys::signal::Signal::SIGBUS).unwrap();
        } else {
            file.set_len(PAGE).unwrap();
            let region =
                vm_memory::MmapRegion::<()>::from_file(vm_memory::FileOffset::new(file.try_clone().unwrap(), 0), 4096)
                    .unwrap();
            file.set_len(0).unwrap();
            // SAFETY: mapped; that the page is gone is the point.
            unsafe { region.as_ptr().read_volatile() };
        }
    }
}
