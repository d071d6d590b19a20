//! What a client's messages do to a device.

use std::fmt::Display;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use nix::sys::eventfd::{EfdFlags, EventFd};
use pci::{Effect, Irq, PciFunction, Region};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_PCI_NUM_IRQS, VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use vfio_user::{
    ConnectionError, DeviceInfo, DmaUnmap, Errno, IoEventFd, RegionData, RegionInfo, RegionIoFds, Reply, ReplyTo,
    Request, Sender, SparseMmapArea,
};

use super::allowance::Allowance;
use super::client_log::ClientLog;
use super::data_path::DataPath;
use super::dma::ClientMemory;
use super::irqs::{self, EventLine, Watch};
use super::observation::Notes;
use super::watcher::{Source, Watcher};
use super::{DRAIN_LIMIT, Events, OrderError, negotiation};
use crate::device::{Device, StillBusy};
use crate::worker::Pool;

/// A client's time with a device.
pub(super) struct Attendance<'a> {
    log: &'a ClientLog,
    pub(super) device: &'a mut Device,
    pub(super) memory: ClientMemory,
    /// Descriptors of the client's that may be kept.
    fds: Arc<Allowance>,
    pub(super) data_path: DataPath,
    events: Arc<Events>,
    pub(super) watcher: Watcher,
    /// The client's own bounds, once VERSION has told them.
    max_msg_fds: Option<usize>,
    /// What the driver asked for and what still waits for requests in flight.
    unsettled: Vec<Unsettled>,
    pub(super) doorbells: Vec<EventFd>,
    mask_intx: Option<EventLine>,
    unmask_intx: Option<EventLine>,
    /// The bytes of a region read.
    scratch: Vec<u8>,
    /// What operators may want to know.
    pub(super) notes: Notes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unsettled {
    Reset,
    Queue(u16),
}

impl<'a> Attendance<'a> {
    pub(super) fn new(
        log: &'a ClientLog,
        device: &'a mut Device,
        pool: Arc<Pool>,
        events: Arc<Events>,
        watcher: Watcher,
    ) -> Self {
        let fds = Allowance::new(device.limits.fds.into());
        let memory = ClientMemory::new(device.limits, Arc::clone(&fds), Arc::clone(events.loss()));
        let num_queues = device.function.num_queues();
        let data_path = DataPath::new(pool, Arc::clone(memory.table()), Arc::clone(&events), num_queues);
        Self {
            log,
            device,
            memory,
            fds,
            data_path,
            events,
            watcher,
            max_msg_fds: None,
            unsettled: Vec::new(),
            doorbells: Vec::new(),
            mask_intx: None,
            unmask_intx: None,
            scratch: Vec::new(),
            notes: Notes::default(),
        }
    }

    /// Carries a request out and answers it; `room` is how many bytes of payload it had.
    pub(super) fn answer(
        &mut self,
        sender: &mut Sender,
        to: ReplyTo,
        request: Request<'_>,
        room: usize,
        fds: Vec<OwnedFd>,
    ) -> Result<(), ConnectionError> {
        self.settle();
        if self.max_msg_fds.is_none() && !matches!(request, Request::Version(_)) {
            self.log.debug(format_args!("{:?} before VERSION", request.command()));
            return sender.refuse(to, Errno::EINVAL);
        }
        match request {
            Request::RegionWrite(write) => match self.region_write(&write) {
                // A kick is work for others, which the client need not wait for.
                Ok(effect @ Effect::Kick(_)) => {
                    self.notes.kicked_by_message(!to.expected());
                    sender.reply(to, &Reply::RegionWrite(write.span()))?;
                    self.act(effect);
                    Ok(())
                }
                // Whatever else it asked for has happened when it is answered: queues that are to stop have stopped.
                Ok(effect) => {
                    self.act(effect);
                    sender.reply(to, &Reply::RegionWrite(write.span()))
                }
                Err(errno) => sender.refuse(to, errno),
            },
            Request::RegionWriteMulti(writes) => {
                let mut wr_cnt = 0;
                for write in writes.iter() {
                    match self.region_write(&write) {
                        Ok(effect) => {
                            if matches!(effect, Effect::Kick(_)) {
                                self.notes.kicked_by_message(!to.expected());
                            }
                            self.act(effect);
                        }
                        Err(errno) => return sender.refuse(to, errno),
                    }
                    wr_cnt += 1;
                }
                sender.reply(to, &Reply::RegionWriteMulti { wr_cnt })
            }
            Request::RegionRead(span) => match self.region_read(span.region, span.offset, span.count) {
                Ok(()) => {
                    let data = RegionData { offset: span.offset, region: span.region, data: &self.scratch };
                    sender.reply(to, &Reply::RegionRead(data))
                }
                Err(errno) => sender.refuse(to, errno),
            },
            Request::DeviceGetRegionIoFds { argsz, index } => self.region_io_fds(sender, to, argsz, index),
            Request::DeviceGetRegionInfo { argsz, index } => match self.region_info(index) {
                Ok(info) => {
                    // What can be mapped comes with the whole answer only, which says where it lies.
                    let whole = !info.sparse_mmap.is_empty() && info.argsz() <= argsz;
                    let page = self.device.doorbell_page.as_ref().filter(|_| whole).map(AsFd::as_fd);
                    sender.reply_with_fds(to, &Reply::RegionInfo { info: &info, argsz }, page.as_slice())
                }
                Err(errno) => sender.refuse(to, errno),
            },
            Request::Version(proposed) => match negotiation::answer(&proposed, &self.device.limits, room) {
                Ok(version) => {
                    let theirs = proposed.capabilities.max_msg_fds();
                    self.max_msg_fds = Some(usize::try_from(theirs).unwrap_or(usize::MAX));
                    self.log.info(format_args!("protocol {}.{}", version.major, version.minor));
                    self.notes.agreed(&proposed, &version);
                    sender.reply(to, &Reply::Version(&version))
                }
                Err(errno) => {
                    self.log.error(format_args!(
                        "the client speaks vfio-user {}.{}, this server 0.1",
                        proposed.major, proposed.minor
                    ));
                    sender.refuse(to, errno)
                }
            },
            request => match self.carry_out(request, fds) {
                Ok(reply) => sender.reply(to, &reply),
                Err(errno) => sender.refuse(to, errno),
            },
        }
    }

    /// The requests that have small answers.
    fn carry_out(&mut self, request: Request<'_>, fds: Vec<OwnedFd>) -> Result<Reply<'static>, Errno> {
        Ok(match request {
            Request::DmaMap(map) => {
                self.memory.map(&map, fds).map_err(|error| {
                    self.log.warn(format_args!("DMA_MAP of {:#x}+{:#x}: {error}", map.address, map.size));
                    error.errno()
                })?;
                if self.events.take_ring_lost() {
                    self.data_path.refresh();
                }
                Reply::Done
            }
            Request::DmaUnmap(unmap) => self.dma_unmap(unmap)?,
            Request::DeviceGetInfo => Reply::DeviceInfo(DeviceInfo {
                flags: VFIO_DEVICE_FLAGS_RESET | VFIO_DEVICE_FLAGS_PCI,
                num_regions: Region::COUNT as u32,
                num_irqs: VFIO_PCI_NUM_IRQS,
            }),
            Request::DeviceGetIrqInfo { index } => {
                Reply::IrqInfo(irqs::info(&self.device.function.interrupts(), index)?)
            }
            Request::DeviceSetIrqs(set) => {
                match irqs::set(&self.device.function.interrupts(), &set, fds, &self.fds)? {
                    Watch::Nothing => {}
                    Watch::Mask(line) => {
                        watch(&self.watcher, &mut self.mask_intx, line, Source::MaskIntx)?;
                    }
                    Watch::Unmask(line) => {
                        watch(&self.watcher, &mut self.unmask_intx, line, Source::UnmaskIntx)?;
                    }
                }
                Reply::Done
            }
            Request::DeviceReset => {
                self.data_path.stop_all(Instant::now() + DRAIN_LIMIT).map_err(|error| {
                    self.log.error(format_args!("DEVICE_RESET: {error}; the storage does not answer"));
                    Errno::EBUSY
                })?;
                self.data_path.forget_all();
                self.events.forget();
                self.unsettled.clear();
                self.device.function.reset();
                Reply::Done
            }
            // Answered by the caller.
            _ => return Err(Errno::ENOTSUP),
        })
    }

    fn dma_unmap(&mut self, unmap: DmaUnmap) -> Result<Reply<'static>, Errno> {
        let released = self.memory.unmap(&unmap).map_err(|error| {
            self.log.warn(format_args!("DMA_UNMAP: {error}"));
            Errno::EINVAL
        })?;
        // The queues let go of what they only remember; what requests in flight hold is gone when they end.
        self.data_path.refresh();
        let deadline = Instant::now() + DRAIN_LIMIT;
        if !released.iter().all(|release| release.wait(deadline)) {
            self.log.error(format_args!("DMA_UNMAP: requests still use that memory; the storage does not answer"));
            return Err(Errno::EBUSY);
        }
        Ok(Reply::DmaUnmap(unmap))
    }

    fn region(&self, index: u32) -> Result<(Region, u64), Errno> {
        let region = Region::from_index(index).ok_or(Errno::EINVAL)?;
        let size = self.device.function.regions().get(region.index()).copied();
        Ok((region, size.ok_or(Errno::EINVAL)?))
    }

    fn region_info(&self, index: u32) -> Result<RegionInfo, Errno> {
        let (region, size) = self.region(index)?;
        let mut flags = if size == 0 { 0 } else { VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE };
        // Only where it was asked for: a client that may map something waits for the answer to each write to anything.
        let page = self.device.doorbell_page.as_ref().and_then(|page| page.span(region));
        let sparse_mmap: Vec<_> = page.into_iter().map(|(offset, size)| SparseMmapArea { offset, size }).collect();
        if !sparse_mmap.is_empty() {
            flags |= VFIO_REGION_INFO_FLAG_MMAP;
        }
        Ok(RegionInfo { flags, index, size, offset: 0, sparse_mmap })
    }

    /// Reads into `self.scratch`.
    fn region_read(&mut self, index: u32, offset: u64, count: u32) -> Result<(), Errno> {
        let (region, size) = self.region(index)?;
        if u64::from(count) > size || count > self.device.limits.data_xfer_size {
            return Err(Errno::EINVAL);
        }
        self.scratch.clear();
        self.scratch.resize(count as usize, 0);
        self.device.function.read(region, offset, &mut self.scratch).map_err(|_| Errno::EINVAL)
    }

    fn region_write(&mut self, write: &RegionData<'_>) -> Result<Effect, Errno> {
        let (region, _) = self.region(write.region)?;
        self.device.function.write(region, write.offset, write.data).map_err(|_| Errno::EINVAL)
    }

    /// Hands out an eventfd for each queue's doorbell, as many as one message carries.
    fn region_io_fds(
        &mut self,
        sender: &mut Sender,
        to: ReplyTo,
        argsz: u32,
        index: u32,
    ) -> Result<(), ConnectionError> {
        let region = match self.region(index) {
            Ok((region, _)) => region,
            Err(errno) => return sender.refuse(to, errno),
        };
        let function = &self.device.function;
        let addresses = (0..function.num_queues()).filter_map(|queue| function.notify_address(queue));
        let here = addresses.filter(|(place, _)| *place == region).map(|(_, offset)| offset);
        let most = self.max_msg_fds.unwrap_or(1).min(negotiation::MAX_MSG_FDS as usize);
        let sub_regions = (0u32..)
            .zip(here.take(most))
            .map(|(fd_index, offset)| IoEventFd { offset, size: 2, fd_index, flags: 0, datamatch: 0 })
            .collect();
        let io_fds = RegionIoFds { index, sub_regions };
        if io_fds.argsz() > argsz {
            return sender.reply(to, &Reply::RegionIoFds { io_fds: &io_fds, argsz });
        }
        while self.doorbells.len() < io_fds.sub_regions.len() {
            let queue = self.doorbells.len() as u16;
            let made = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(std::io::Error::from)
                .and_then(|doorbell| {
                    self.watcher.add(doorbell.as_fd(), Source::Doorbell(queue))?;
                    Ok(doorbell)
                });
            match made {
                Ok(doorbell) => self.doorbells.push(doorbell),
                Err(error) => {
                    self.log.error(format_args!("no eventfd for the doorbell of queue {queue}: {error}"));
                    return sender.refuse(to, error.raw_os_error().map_or(Errno::EIO, Errno::from_raw));
                }
            }
        }
        let fds: Vec<BorrowedFd<'_>> = self.doorbells.iter().take(io_fds.sub_regions.len()).map(AsFd::as_fd).collect();
        sender.reply_with_fds(to, &Reply::RegionIoFds { io_fds: &io_fds, argsz }, &fds)
    }

    /// Does what a write asked for.
    fn act(&mut self, effect: Effect) {
        let deadline = Instant::now() + DRAIN_LIMIT;
        match effect {
            Effect::None => {}
            Effect::Kick(queue) => self.data_path.kick(queue),
            Effect::Start => {
                if let Err((queue, error)) = self.data_path.start_all(self.device) {
                    self.log.error(format_args!("queue {queue} cannot be started: {error}; the device needs a reset"));
                    self.needs_reset(queue, &error);
                }
            }
            Effect::StartQueue(queue) => {
                if let Err(error) = self.data_path.start(self.device, queue) {
                    self.log.error(format_args!("queue {queue} cannot be started: {error}; the device needs a reset"));
                    self.needs_reset(queue, &error);
                }
            }
            Effect::Stop => {
                if let Err(error) = self.data_path.pause_all(deadline) {
                    self.log.warn(format_args!("bus mastering was turned off, but {error}"));
                }
            }
            Effect::StopQueue(queue) => {
                self.unsettled.push(Unsettled::Queue(queue));
                self.settle_until(deadline);
            }
            Effect::Reset => {
                self.unsettled.push(Unsettled::Reset);
                self.settle_until(deadline);
            }
        }
    }

    /// Ends the resets whose requests in flight have ended by now.
    fn settle(&mut self) {
        if !self.unsettled.is_empty() {
            self.settle_until(Instant::now());
        }
    }

    fn settle_until(&mut self, deadline: Instant) {
        let (data_path, function, events) = (&mut self.data_path, &mut self.device.function, &self.events);
        self.unsettled.retain(|unsettled| match *unsettled {
            Unsettled::Reset => {
                let rests = data_path.stop_all(deadline).is_ok();
                if rests {
                    data_path.forget_all();
                    events.forget();
                    function.reset_done();
                }
                !rests
            }
            Unsettled::Queue(queue) => {
                let rests = data_path.stop(queue, deadline).is_ok();
                if rests {
                    data_path.forget(queue);
                    function.queue_stopped(queue);
                }
                !rests
            }
        });
        if !self.unsettled.is_empty() {
            self.log.debug(format_args!("a reset waits for requests in flight"));
        }
    }

    pub(super) fn device(&mut self) -> &mut Device {
        self.device
    }

    /// Stops all queues and waits for what they have in flight.
    pub(super) fn rest(&mut self, deadline: Instant) -> Result<(), OrderError> {
        self.settle_until(deadline);
        self.data_path.pause_all(deadline).map_err(|StillBusy| OrderError::Busy)
    }

    /// Starts the queues that an order had stopped.
    pub(super) fn start_again(&mut self) {
        if self.unsettled.is_empty() && self.device.function.is_running() {
            self.act(Effect::Start);
        }
    }

    /// Has the queues that run look for what they may go on with.
    pub(super) fn look(&mut self) {
        self.data_path.look();
    }

    /// Says that the device needs a reset, on purpose: its queues stop, as those of a device that can't go on.
    pub(super) fn break_down(&mut self) {
        self.log.warn(format_args!("the device needs a reset on purpose"));
        self.notes.fault = Some("on purpose".to_owned());
        self.device.function.set_needs_reset();
        if let Err(error) = self.data_path.stop_all(Instant::now() + DRAIN_LIMIT) {
            self.log.warn(format_args!("its queues stop, but {error}"));
        }
    }

    /// Interrupts the driver for nothing, on purpose.
    pub(super) fn interrupt(&self, queue: Option<u16>) {
        let function = &self.device.function;
        for queue in (0..function.num_queues()).filter(|index| queue.is_none_or(|queue| queue == *index)) {
            function.queue_interrupt(queue).iter().for_each(|interrupt| interrupt.signal());
        }
    }

    /// The driver broke the rules, or we cannot serve it.
    pub(super) fn needs_reset(&mut self, queue: u16, why: &dyn Display) {
        self.notes.fault = Some(format!("queue {queue}: {why}"));
        self.device.function.set_needs_reset();
    }

    /// The client signalled the eventfd of a queue's doorbell.
    pub(super) fn doorbell(&mut self, queue: u16) {
        if let Some(doorbell) = self.doorbells.get(usize::from(queue)) {
            // EAGAIN: it was signalled once for two reports.
            let _empty = doorbell.read();
            self.notes.by_eventfd = self.notes.by_eventfd.wrapping_add(1);
            self.data_path.kick(queue);
        }
    }

    /// The client masks INTx by its eventfd.
    pub(super) fn mask_intx(&mut self) {
        if let Some(line) = &self.mask_intx {
            line.drain();
            // There always is an INTx.
            let _exists = self.device.function.interrupts().mask(Irq::Intx, 0);
        }
    }

    /// The client unmasks INTx by its eventfd.
    pub(super) fn unmask_intx(&mut self) {
        if let Some(line) = &self.unmask_intx {
            line.drain();
            let _exists = self.device.function.interrupts().unmask(Irq::Intx, 0);
        }
    }

    /// Ends the client's time: its interrupts, its queues, then the device's registers as at power-on. Says whether nothing
    /// was in flight any more at `deadline`; call it again if not.
    pub(super) fn leave(&mut self, deadline: Instant) -> bool {
        self.device.function.interrupts().disconnect();
        if self.data_path.stop_all(deadline).is_err() {
            return false;
        }
        self.device.function.reset();
        true
    }
}

/// Watches `line` in place of what `slot` held.
fn watch(
    watcher: &Watcher,
    slot: &mut Option<EventLine>,
    line: Option<EventLine>,
    source: Source,
) -> Result<(), Errno> {
    if let Some(old) = slot.take() {
        watcher.remove(old.as_fd());
    }
    if let Some(line) = line {
        watcher.add(line.as_fd(), source).map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
        *slot = Some(line);
    }
    Ok(())
}
