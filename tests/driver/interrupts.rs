//! How the device interrupts: INTx with its masks, MSI-X with its pending bits, and eventfds that change meanwhile.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use client::{BlockOptions, BlockQueue, BlockRequest, Client, RequestType, VirtioPci};
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE, VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_REQ_IRQ_INDEX,
};
use vfio_user::{IrqAction, IrqData, SetIrqs};

use crate::protocol::in_step;
use crate::rig::{LIMIT, Machine, OK, Rig, count, eventfd, exercise, readable, signalled, until};

const INTX: u32 = VFIO_PCI_INTX_IRQ_INDEX;
const MSIX: u32 = VFIO_PCI_MSIX_IRQ_INDEX;
const CONFIG: u32 = VFIO_PCI_CONFIG_REGION_INDEX;

fn set(client: &Client, action: IrqAction, data: IrqData<'_>, index: u32, start: u32, count: u32) {
    client.set_irqs(SetIrqs { action, data, index, start, count }, &[]).unwrap();
}

fn attach(client: &Client, action: IrqAction, index: u32, start: u32, eventfd: &EventFd) {
    let set = SetIrqs { action, data: IrqData::EventFd, index, start, count: 1 };
    client.set_irqs(set, &[eventfd.as_fd()]).unwrap();
}

fn mask(client: &Client, index: u32, vector: u32) {
    set(client, IrqAction::Mask, IrqData::None, index, vector, 1);
}

fn unmask(client: &Client, index: u32, vector: u32) {
    set(client, IrqAction::Unmask, IrqData::None, index, vector, 1);
}

/// A request whose completion asks for an interrupt; returns when it has completed.
fn complete_one(queue: &mut BlockQueue) {
    assert!(!queue.ring_mut().enable_interrupts());
    queue.submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
    queue.publish().unwrap();
    until("a completion", || queue.ring().has_used());
    assert_eq!(queue.poll().unwrap().unwrap().status, OK);
}

/// That all which the device has done so far has also been signalled: it answers a question about its registers after
/// that, but its workers signal after they complete. A request on the same queue that wants no interrupt comes later.
fn settle(queue: &mut BlockQueue) {
    queue.ring_mut().disable_interrupts();
    queue.submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
    queue.publish().unwrap();
    until("a completion", || queue.ring().has_used());
    queue.poll().unwrap().unwrap();
}

fn interrupt_status(client: &Client) -> bool {
    let mut status = [0; 2];
    client.region_read(CONFIG, 6, &mut status).unwrap();
    status[0] & 1 << 3 != 0
}

fn polled() -> BlockOptions {
    BlockOptions { interrupts: false, ..BlockOptions::default() }
}

#[test]
fn the_kinds_of_interrupt_are_told() {
    let rig = Rig::ram();
    let client = rig.client();
    let info = |index| client.irq_info(index).map(|info| (info.flags, info.count)).map_err(|error| error.errno());
    let intx = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED;
    assert_eq!(info(INTX), Ok((intx, 1)));
    assert_eq!(info(VFIO_PCI_MSI_IRQ_INDEX), Ok((0, 0)));
    let (flags, count) = info(MSIX).unwrap();
    assert_eq!((flags & VFIO_IRQ_INFO_EVENTFD, count), (VFIO_IRQ_INFO_EVENTFD, 5));
    // QEMU arms ERR when it is there, and stops the machine when it fires.
    for index in [VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX, 5, u32::MAX] {
        assert_eq!(info(index), Err(Some(Errno::EINVAL)));
    }
}

#[test]
fn interrupts_that_there_are_not_are_refused() {
    let rig = Rig::ram();
    let client = rig.client();
    let refused = |set: SetIrqs<'_>, fds: &[&EventFd]| {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        let errno = client.set_irqs(set, &fds).unwrap_err().errno();
        in_step(&client);
        errno.unwrap()
    };
    let (trigger, eventfds) = (IrqAction::Trigger, IrqData::EventFd);
    let one = eventfd();
    let of = |index, start, count| SetIrqs { action: trigger, data: eventfds, index, start, count };
    assert_eq!(refused(of(MSIX, 5, 1), &[&one]), Errno::EINVAL);
    assert_eq!(refused(of(MSIX, 4, 2), &[&one, &one]), Errno::EINVAL);
    assert_eq!(refused(of(MSIX, 0, 2), &[&one]), Errno::EINVAL, "fewer descriptors than interrupts");
    assert_eq!(refused(of(MSIX, 0, 1), &[&one, &one]), Errno::EINVAL, "more descriptors than interrupts");
    assert_eq!(refused(of(INTX, 1, 1), &[&one]), Errno::EINVAL);
    assert_eq!(refused(of(VFIO_PCI_MSI_IRQ_INDEX, 0, 1), &[&one]), Errno::EINVAL);
    assert_eq!(refused(of(VFIO_PCI_ERR_IRQ_INDEX, 0, 1), &[&one]), Errno::EINVAL);
    assert_eq!(refused(of(99, 0, 1), &[&one]), Errno::EINVAL);
    let with_fd = SetIrqs { action: trigger, data: IrqData::None, index: MSIX, start: 0, count: 1 };
    assert_eq!(refused(with_fd, &[&one]), Errno::EINVAL, "a descriptor that belongs to nothing");
    // Descriptors that are no eventfds would make a worker wait, or worse.
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    for fd in [reader.as_fd(), writer.as_fd(), file.as_fd()] {
        let error = client.set_irqs(of(MSIX, 0, 1), &[fd]).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::EINVAL));
    }
    let mut payload = Vec::new();
    for field in [20u32, 0x21 | 0x4, MSIX, u32::MAX, 2] {
        payload.extend(field.to_ne_bytes());
    }
    client.send_raw(&crate::protocol::message(1, 8, 0, &payload), &[]).unwrap();
    assert_eq!(client.recv_raw(LIMIT).unwrap().unwrap().header.error(), Some(Errno::EINVAL));
}

/// Virtio 1.3 sections 4.1.4.5 and 4.1.5.4.
#[test]
fn intx_is_asserted_until_the_isr_is_read() {
    let rig = Rig::ram();
    let mut machine = rig.boot_with(&polled());
    let Machine { client, driver, queues, .. } = &mut machine;
    let transport = driver.transport();
    let line = eventfd();
    attach(client, IrqAction::Trigger, INTX, 0, &line);
    assert_eq!(transport.read_isr().unwrap(), 0);
    assert!(!interrupt_status(client));
    for queue in queues.iter_mut() {
        complete_one(queue);
        assert_eq!(signalled(&line), 1);
        assert!(interrupt_status(client), "the status bit of configuration space");
        assert_eq!(transport.read_isr().unwrap(), 1, "a queue's");
        assert_eq!(transport.read_isr().unwrap(), 0, "reading took it");
        assert!(!interrupt_status(client));
        unmask(client, INTX, 0);
    }
    settle(&mut queues[0]);
    assert_eq!(count(&line), 0, "deasserted before it was unmasked");
}

#[test]
fn intx_is_signalled_again_when_it_is_unmasked_while_asserted() {
    let rig = Rig::ram();
    let mut machine = rig.boot_with(&polled());
    let Machine { client, driver, queues, .. } = &mut machine;
    let (line, by_eventfd) = (eventfd(), eventfd());
    attach(client, IrqAction::Trigger, INTX, 0, &line);
    attach(client, IrqAction::Unmask, INTX, 0, &by_eventfd);
    complete_one(&mut queues[0]);
    assert_eq!(signalled(&line), 1);
    complete_one(&mut queues[0]);
    settle(&mut queues[0]);
    assert_eq!(count(&line), 0, "masked by its own delivery");
    for _ in 0..5 {
        unmask(client, INTX, 0);
        assert_eq!(signalled(&line), 1, "by message");
        by_eventfd.write(1).unwrap();
        assert_eq!(signalled(&line), 1, "by eventfd");
    }
    assert_eq!(driver.transport().read_isr().unwrap(), 1);
    unmask(client, INTX, 0);
    assert_eq!(count(&line), 0);
    // By the eventfd it is enough for the next one, too.
    complete_one(&mut queues[1]);
    assert_eq!(signalled(&line), 1);
    driver.transport().read_isr().unwrap();
    by_eventfd.write(1).unwrap();
    until("the unmask is taken", || !readable(by_eventfd.as_fd(), Duration::ZERO));
    in_step(client);
    complete_one(&mut queues[1]);
    assert_eq!(signalled(&line), 1);
}

#[test]
fn intx_has_masks() {
    let rig = Rig::ram();
    let mut machine = rig.boot_with(&polled());
    let Machine { client, driver, queues, .. } = &mut machine;
    let transport = driver.transport();
    let (line, mask_line) = (eventfd(), eventfd());
    attach(client, IrqAction::Trigger, INTX, 0, &line);
    mask(client, INTX, 0);
    complete_one(&mut queues[0]);
    settle(&mut queues[0]);
    assert_eq!(count(&line), 0);
    assert!(interrupt_status(client), "asserted, if not delivered");
    unmask(client, INTX, 0);
    assert_eq!(signalled(&line), 1);
    transport.read_isr().unwrap();
    unmask(client, INTX, 0);
    // The bit in the command register.
    let command = |value: u16| client.region_write(CONFIG, 4, &value.to_le_bytes()).unwrap();
    command(0x406);
    complete_one(&mut queues[0]);
    settle(&mut queues[0]);
    assert_eq!(count(&line), 0);
    assert!(interrupt_status(client));
    command(0x006);
    assert_eq!(signalled(&line), 1);
    transport.read_isr().unwrap();
    unmask(client, INTX, 0);
    // And by an eventfd that masks.
    attach(client, IrqAction::Mask, INTX, 0, &mask_line);
    mask_line.write(1).unwrap();
    until("the mask is taken", || !readable(mask_line.as_fd(), Duration::ZERO));
    in_step(client);
    complete_one(&mut queues[0]);
    settle(&mut queues[0]);
    assert_eq!(count(&line), 0);
    unmask(client, INTX, 0);
    assert_eq!(signalled(&line), 1);
}

/// A driver that came up without a line finds its interrupt when the client brings one.
#[test]
fn intx_waits_for_its_line() {
    let rig = Rig::ram();
    let mut machine = rig.boot_with(&polled());
    let Machine { client, driver, queues, .. } = &mut machine;
    complete_one(&mut queues[0]);
    settle(&mut queues[0]);
    let line = eventfd();
    attach(client, IrqAction::Trigger, INTX, 0, &line);
    assert_eq!(signalled(&line), 1);
    set(client, IrqAction::Trigger, IrqData::None, INTX, 0, 1);
    assert_eq!(signalled(&line), 1, "triggered by the client");
    set(client, IrqAction::Trigger, IrqData::Bool(&[0]), INTX, 0, 1);
    assert_eq!(count(&line), 0);
    set(client, IrqAction::Trigger, IrqData::Bool(&[1]), INTX, 0, 1);
    assert_eq!(signalled(&line), 1);
    client.disable_irqs(INTX).unwrap();
    driver.transport().read_isr().unwrap();
    complete_one(&mut queues[0]);
    settle(&mut queues[0]);
    assert_eq!(count(&line), 0, "its line is gone");
}

#[test]
fn each_queue_has_its_vector() {
    let rig = Rig::ram();
    let mut machine = rig.boot();
    for index in 0..machine.queues.len() {
        complete_one(&mut machine.queues[index]);
        assert_eq!(signalled(machine.queues[index].interrupt().unwrap()), 1);
        for queue in &mut machine.queues {
            settle(queue);
            assert_eq!(count(queue.interrupt().unwrap()), 0);
        }
    }
    assert_eq!(count(machine.driver.config_interrupt().unwrap()), 0);
    assert_eq!(machine.driver.transport().read_isr().unwrap(), 0, "MSI-X leaves the ISR status alone");
    // All share one, as drivers do that get fewer vectors than queues.
    let transport = machine.driver.transport();
    let shared = eventfd();
    attach(&machine.client, IrqAction::Trigger, MSIX, 3, &shared);
    for queue in 0..4 {
        transport.write_common(client::CommonRegister::QueueSelect, queue).unwrap();
        transport.write_common(client::CommonRegister::QueueMsixVector, 3).unwrap();
    }
    for queue in &mut machine.queues {
        complete_one(queue);
        assert_eq!(signalled(&shared), 1);
    }
    // And none at all.
    transport.write_common(client::CommonRegister::QueueMsixVector, client::NO_VECTOR.into()).unwrap();
    complete_one(&mut machine.queues[3]);
    settle(&mut machine.queues[3]);
    assert_eq!(count(&shared), 0);
}

/// Whether a vector's bit is set in the Pending Bit Array.
fn is_pending(transport: &VirtioPci, vector: u16) -> bool {
    let msix = transport.capabilities().msix.unwrap();
    let mut word = [0; 8];
    let offset = u64::from(msix.pba_offset) + 8 * u64::from(vector / 64);
    transport.client().region_read(msix.pba_bar.into(), offset, &mut word).unwrap();
    u64::from_le_bytes(word) >> (vector % 64) & 1 != 0
}

#[test]
fn a_vector_without_line_is_pending_until_it_has_one() {
    let rig = Rig::ram();
    let mut machine = rig.boot();
    let Machine { client, driver, queues, .. } = &mut machine;
    let transport = driver.transport();
    set(client, IrqAction::Trigger, IrqData::EventFd, MSIX, 2, 1);
    assert!(!is_pending(transport, 2));
    complete_one(&mut queues[1]);
    until("it is pending", || is_pending(transport, 2));
    complete_one(&mut queues[1]);
    settle(&mut queues[1]);
    assert_eq!(count(queues[1].interrupt().unwrap()), 0);
    let line = eventfd();
    attach(client, IrqAction::Trigger, MSIX, 2, &line);
    assert_eq!(count(&line), 1, "delivered once, before the answer");
    assert!(!is_pending(transport, 2));
    complete_one(&mut queues[1]);
    assert_eq!(signalled(&line), 1);
}

#[test]
fn a_masked_vector_is_pending_until_it_is_unmasked() {
    let rig = Rig::ram();
    let mut machine = rig.boot();
    let Machine { client, driver, queues, .. } = &mut machine;
    let transport = driver.transport();
    let msix = *transport.capabilities().msix.as_ref().unwrap();
    let control = u64::from(msix.capability) + 2;
    let entry = u64::from(msix.table_offset) + 16;
    let table = |bytes: &[u8], at: u64| client.region_write(msix.table_bar.into(), entry + at, bytes).unwrap();
    type Switch<'a> = (&'a str, Box<dyn Fn() + 'a>, Box<dyn Fn() + 'a>);
    let switches: [Switch<'_>; 3] = [
        ("SET_IRQS", Box::new(|| mask(client, MSIX, 1)), Box::new(|| unmask(client, MSIX, 1))),
        (
            "the function mask",
            Box::new(|| client.region_write(CONFIG, control, &0xc000u16.to_le_bytes()).unwrap()),
            Box::new(|| client.region_write(CONFIG, control, &0x8000u16.to_le_bytes()).unwrap()),
        ),
        ("the table entry", Box::new(|| table(&[1, 0, 0, 0], 12)), Box::new(|| table(&[0; 4], 12))),
    ];
    for (by, masks, unmasks) in switches {
        masks();
        complete_one(&mut queues[0]);
        until("it is pending", || is_pending(transport, 1));
        assert_eq!(count(queues[0].interrupt().unwrap()), 0, "{by}");
        unmasks();
        assert_eq!(count(queues[0].interrupt().unwrap()), 1, "{by}");
        assert!(!is_pending(transport, 1));
        unmasks();
        assert_eq!(count(queues[0].interrupt().unwrap()), 0, "{by}: once");
    }
    // What waits for delivery is forgotten by a reset.
    mask(client, MSIX, 1);
    complete_one(&mut queues[0]);
    until("it is pending", || is_pending(transport, 1));
    transport.reset().unwrap();
    assert!(!is_pending(transport, 1));
    unmask(client, MSIX, 1);
    assert_eq!(count(queues[0].interrupt().unwrap()), 0);
}

#[test]
fn a_disabled_msix_gives_way_to_intx() {
    let rig = Rig::ram();
    let mut machine = rig.boot();
    let line = eventfd();
    exercise(&mut machine.queues);
    machine.driver.transport().disable_msix().unwrap();
    attach(&machine.client, IrqAction::Trigger, INTX, 0, &line);
    complete_one(&mut machine.queues[0]);
    assert_eq!(signalled(&line), 1);
    assert_eq!(machine.driver.transport().read_isr().unwrap(), 1);
    assert_eq!(count(machine.queues[0].interrupt().unwrap()), 0);
}

/// QEMU masks and unmasks a vector by swapping its eventfd: whatever it swaps and when, each completion is heard of.
#[test]
fn eventfds_swapped_under_load_lose_nothing() {
    const ROUNDS: u64 = 4000;
    let rig = Rig::ram();
    let mut machine = rig.boot();
    let client = Arc::clone(&machine.client);
    let lines: Vec<_> = (0..3).map(|_| eventfd()).collect();
    attach(&client, IrqAction::Trigger, MSIX, 1, &lines[0]);
    let over = AtomicBool::new(false);
    let swaps = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            for at in (0..lines.len()).cycle() {
                // Away for a moment, as when a vector is masked, every other time.
                if swaps.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
                    set(&client, IrqAction::Trigger, IrqData::EventFd, MSIX, 1, 1);
                }
                attach(&client, IrqAction::Trigger, MSIX, 1, &lines[at]);
                if over.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        let queue = &mut machine.queues[0];
        for round in 0..ROUNDS {
            assert!(!queue.ring_mut().enable_interrupts());
            queue.submit(&BlockRequest { kind: RequestType::Flush, sector: 0, data: &[] }).unwrap();
            queue.publish().unwrap();
            // Hears of it by nothing but a signal, on whichever eventfd.
            let mut fds: Vec<_> =
                lines.iter().map(|line| nix::poll::PollFd::new(line.as_fd(), nix::poll::PollFlags::POLLIN)).collect();
            let limit = nix::poll::PollTimeout::try_from(LIMIT).unwrap();
            let ready = nix::poll::poll(&mut fds, limit).unwrap();
            if ready == 0 {
                over.store(true, Ordering::Relaxed);
                panic!("the interrupt of round {round} was lost");
            }
            lines.iter().for_each(|line| {
                count(line);
            });
            // A signal of the round before may still have been on its way.
            until("a completion", || queue.ring().has_used());
            assert_eq!(queue.poll().unwrap().unwrap().status, OK);
        }
        over.store(true, Ordering::Relaxed);
    });
    assert!(swaps.load(Ordering::Relaxed) > 10, "nothing was swapped meanwhile");
}
