//! The client's interrupts: GET_IRQ_INFO and SET_IRQS.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use pci::{Interrupt, Interrupts, Irq};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE, VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
};
use vfio_user::{Errno, IrqAction, IrqData, IrqInfo, SetIrqs};

use super::allowance::{Allowance, Share};
use super::signal::{drain, signal};

/// What an interrupt index is. ERR and REQ are refused: a client that finds ERR arms it.
pub(super) fn info(interrupts: &Interrupts, index: u32) -> Result<IrqInfo, Errno> {
    let (flags, count) = match index {
        VFIO_PCI_INTX_IRQ_INDEX => {
            (VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED, interrupts.count(Irq::Intx))
        }
        VFIO_PCI_MSI_IRQ_INDEX => (0, 0),
        VFIO_PCI_MSIX_IRQ_INDEX => (VFIO_IRQ_INFO_EVENTFD, interrupts.count(Irq::Msix)),
        _ => return Err(Errno::EINVAL),
    };
    Ok(IrqInfo { flags, index, count })
}

/// What SET_IRQS leaves to the session: to watch an eventfd by which the client masks or unmasks INTx, or none.
pub(super) enum Watch {
    Nothing,
    Mask(Option<EventLine>),
    Unmask(Option<EventLine>),
}

/// Carries a SET_IRQS out.
///
/// # Errors
/// EINVAL for an interrupt that there is not, or descriptors that are no eventfds or too many or too few; ENOTSUP for
/// what the kind of interrupt does not do; EMFILE if the client may not have as many descriptors kept. Nothing is changed then.
pub(super) fn set(
    interrupts: &Interrupts,
    request: &SetIrqs<'_>,
    fds: Vec<OwnedFd>,
    allowance: &Arc<Allowance>,
) -> Result<Watch, Errno> {
    let irq = match request.index {
        VFIO_PCI_INTX_IRQ_INDEX => Irq::Intx,
        VFIO_PCI_MSIX_IRQ_INDEX => Irq::Msix,
        VFIO_PCI_MSI_IRQ_INDEX if request.count == 0 => return Ok(Watch::Nothing),
        _ => return Err(Errno::EINVAL),
    };
    let end = request.start.checked_add(request.count).filter(|end| *end <= interrupts.count(irq));
    let range = request.start..end.ok_or(Errno::EINVAL)?;
    if !fds.is_empty() && request.data != IrqData::EventFd {
        return Err(Errno::EINVAL);
    }
    match (request.data, request.action) {
        (IrqData::None, IrqAction::Trigger) if range.is_empty() => interrupts.disable(irq),
        (IrqData::EventFd, action) => {
            // One for each, or none at all: that takes them away.
            if !fds.is_empty() && fds.len() != range.len() {
                return Err(Errno::EINVAL);
            }
            let lines = fds.into_iter().map(|fd| EventLine::new(fd, allowance));
            let mut lines = lines.collect::<Result<Vec<_>, _>>()?.into_iter();
            match (action, irq) {
                (IrqAction::Trigger, _) => {
                    for vector in range {
                        let line = lines.next().map(|line| Arc::new(line) as Arc<dyn Interrupt>);
                        interrupts.set_line(irq, vector, line).map_err(|_| Errno::EINVAL)?;
                    }
                }
                (IrqAction::Mask, Irq::Intx) => return Ok(Watch::Mask(lines.next())),
                (IrqAction::Unmask, Irq::Intx) => return Ok(Watch::Unmask(lines.next())),
                (_, Irq::Msix) => return Err(Errno::ENOTSUP),
            }
        }
        (data, action) => {
            let act = match action {
                IrqAction::Mask => Interrupts::mask,
                IrqAction::Unmask => Interrupts::unmask,
                IrqAction::Trigger => Interrupts::trigger,
            };
            for (at, vector) in range.enumerate() {
                let meant = match data {
                    IrqData::Bool(bools) => bools.get(at).is_some_and(|meant| *meant != 0),
                    _ => true,
                };
                if meant {
                    act(interrupts, irq, vector).map_err(|_| Errno::EINVAL)?;
                }
            }
        }
    }
    Ok(Watch::Nothing)
}

/// An eventfd of the client's.
#[derive(Debug)]
pub(super) struct EventLine {
    fd: OwnedFd,
    _share: Share,
}

impl EventLine {
    /// Takes a descriptor if it is an eventfd, and makes it non-blocking; see [`signal`] for what a client can make of that.
    fn new(fd: OwnedFd, allowance: &Arc<Allowance>) -> Result<Self, Errno> {
        use std::os::fd::AsRawFd;
        let name = nix::fcntl::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()).as_str())?;
        if name.to_string_lossy() != "anon_inode:[eventfd]" {
            return Err(Errno::EINVAL);
        }
        let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let share = allowance.take(1).ok_or(Errno::EMFILE)?;
        Ok(Self { fd, _share: share })
    }

    /// Takes what was signalled.
    pub(super) fn drain(&self) {
        drain(self.fd.as_fd());
    }
}

impl Interrupt for EventLine {
    fn signal(&self) {
        if let Err(error) = signal(self.fd.as_fd()) {
            log::warn!("cannot signal an interrupt: {error}");
        }
    }
}

impl AsFd for EventLine {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
