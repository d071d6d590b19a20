//! What a device's state means, and what to do about it: a list of questions, each of which looks at a [`Diagnosis`].

use super::{Diagnosis, Finding, Level};
use crate::config::{Cache, Doorbell, PollPolicy, Size};
use crate::session::{Observation, ObservedQueue};

/// Requests below which rates mean nothing.
const ENOUGH: u64 = 1000;
/// A queue with fewer entries cannot keep a fast store busy.
const SMALL_QUEUE: u16 = 64;
/// What a worker may leave a kick waiting, in nanoseconds, in one of a hundred cases.
const SLOW_WORKER_NS: u64 = 1_000_000;
/// What a store may take for one of a hundred requests, in nanoseconds.
const SLOW_STORE_NS: u64 = 100_000_000;
/// Guest memory from which on huge pages matter, in bytes.
const MUCH_MEMORY: u64 = 4 << 30;

type Question = fn(&Diagnosis) -> Option<Finding>;

/// Asked in this order; the answers are told the worst first.
const QUESTIONS: &[Question] = &[
    silent,
    needs_reset,
    private_memory,
    no_memory,
    unreachable_memory,
    io_errors,
    held,
    faults,
    paused,
    no_version,
    many_ranges,
    no_interrupts,
    intx,
    one_vector,
    small_queues,
    no_event_idx,
    no_indirect,
    few_queues,
    idle_polling,
    unused_page,
    slow_worker,
    slow_store,
    where_the_time_goes,
    buffered,
    small_pages,
    unsupported,
    detached,
];

/// What is found, the worst first.
pub(super) fn of(diagnosis: &Diagnosis) -> Vec<Finding> {
    let mut findings: Vec<_> = QUESTIONS.iter().filter_map(|question| question(diagnosis)).collect();
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.level));
    findings
}

fn finding(level: Level, code: &str, what: impl Into<String>, next: impl Into<String>) -> Option<Finding> {
    Some(Finding { level, code: code.into(), what: what.into(), next: next.into() })
}

fn error(code: &str, what: impl Into<String>, next: impl Into<String>) -> Option<Finding> {
    finding(Level::Error, code, what, next)
}

fn warning(code: &str, what: impl Into<String>, next: impl Into<String>) -> Option<Finding> {
    finding(Level::Warning, code, what, next)
}

fn note(code: &str, what: impl Into<String>, next: impl Into<String>) -> Option<Finding> {
    finding(Level::Note, code, what, next)
}

impl Diagnosis {
    /// Of the client, once its driver runs.
    fn driven(&self) -> Option<&Observation> {
        self.session.as_ref().filter(|session| session.device_status.contains(&"DRIVER_OK"))
    }

    fn enabled(&self) -> impl Iterator<Item = &ObservedQueue> {
        self.driven().into_iter().flat_map(|session| &session.queues).filter(|queue| queue.enabled)
    }

    fn has(&self, feature: &str) -> bool {
        self.session.as_ref().is_some_and(|session| session.features.iter().any(|name| name == feature))
    }

    /// The 99th percentile of a stage in nanoseconds, if it happened often enough to have one.
    fn p99_ns(&self, stage: &str) -> Option<u64> {
        let found = self.stages.iter().find(|times| times.stage == stage && times.count >= ENOUGH)?;
        found.p99_ns
    }

    fn mean_ns(&self, stage: &str) -> u64 {
        self.stages.iter().find(|times| times.stage == stage).and_then(|times| times.mean_ns).unwrap_or(0)
    }

    /// So many of something for each request.
    fn per_request(&self, count: u64) -> Option<f64> {
        let requests = self.statistics.operations();
        (requests >= ENOUGH).then(|| count as f64 / requests as f64)
    }
}

fn silent(of: &Diagnosis) -> Option<Finding> {
    let why = of.silent.as_ref()?;
    error(
        "silent",
        format!("its session does not say what it knows: {why}"),
        "look whether its storage answers: in_flight of vfio-user-blk ctl statistics, and the server's log; then ask again",
    )
}

fn needs_reset(of: &Diagnosis) -> Option<Finding> {
    let session = of.session.as_ref()?;
    if !session.device_status.contains(&"DEVICE_NEEDS_RESET") {
        return None;
    }
    let why = session.fault.as_deref().unwrap_or("it does not say why");
    error(
        "needs_reset",
        format!("the device has stopped and needs a reset: {why}"),
        "reset it by its driver: reboot the guest, or unbind virtio_blk from the device and bind it again; if the guest's driver is in \
         order, this is a defect to be told",
    )
}

fn private_memory(of: &Diagnosis) -> Option<Finding> {
    if !of.session.as_ref()?.memory.found_blank {
        return None;
    }
    error(
        "private_memory",
        "a queue was kicked, but its ring is blank: the guest's memory is private to the client",
        "start QEMU with -object memory-backend-memfd,id=mem,size=SIZE,share=on and -machine memory-backend=mem",
    )
}

fn no_memory(of: &Diagnosis) -> Option<Finding> {
    let memory = &of.driven()?.memory;
    if memory.ranges > memory.unreachable_ranges {
        return None;
    }
    error(
        "no_memory",
        format!("a driver runs, but none of its memory can be reached: {} ranges, none with a file", memory.ranges),
        "give the guest's memory a file that is shared: -object memory-backend-memfd,id=mem,size=SIZE,share=on and \
         -machine memory-backend=mem",
    )
}

fn unreachable_memory(of: &Diagnosis) -> Option<Finding> {
    let memory = &of.driven()?.memory;
    if memory.unreachable_ranges == 0 || memory.unreachable_ranges == memory.ranges {
        return None;
    }
    let (bytes, ranges) = (Size(memory.unreachable_bytes), memory.unreachable_ranges);
    let level = if memory.unreachable_bytes > memory.bytes / 8 { Level::Warning } else { Level::Note };
    finding(
        level,
        "unreachable_memory",
        format!("{bytes} in {ranges} ranges came without a file: a request into them stops the device"),
        "small ones are ROMs and video memory, where drivers have no buffers; for memory that was added later, use a backend with share=on",
    )
}

fn io_errors(of: &Diagnosis) -> Option<Finding> {
    let errors = of.statistics.io_errors;
    if errors == 0 {
        return None;
    }
    warning(
        "io_errors",
        format!("the store failed {errors} requests of {}", of.statistics.operations()),
        "the server's log and the kernel's say more; when the storage is mended, count anew: vfio-user-blk ctl reset-statistics",
    )
}

fn held(of: &Diagnosis) -> Option<Finding> {
    let held = of.held.as_ref().filter(|held| held.requests > 0)?;
    let (requests, error, device) = (held.requests, held.error.as_deref().unwrap_or("on their way again"), &of.device);
    warning(
        "held",
        format!("the storage has failed {requests} requests, which wait: {error}"),
        format!("put the storage in order, then: vfio-user-blk ctl resume {device}"),
    )
}

fn faults(of: &Diagnosis) -> Option<Finding> {
    let faults = of.setup.faults;
    if faults == 0 {
        return None;
    }
    warning(
        "faults",
        format!("there are {faults} faults on purpose: what it does wrong may be meant"),
        "when the experiment is over: vfio-user-blk ctl fault remove --all, and no [[device.fault]] in its configuration",
    )
}

fn paused(of: &Diagnosis) -> Option<Finding> {
    if !of.status.paused {
        return None;
    }
    let device = &of.device;
    warning("paused", "an operator has paused it: it takes no requests", format!("vfio-user-blk ctl resume {device}"))
}

fn no_version(of: &Diagnosis) -> Option<Finding> {
    if of.session.as_ref()?.protocol.is_some() {
        return None;
    }
    warning(
        "no_version",
        "a process is connected and has not said which protocol it speaks; nobody else can connect meanwhile",
        "look what it is (client.pid), and end it if it is no vfio-user client",
    )
}

fn many_ranges(of: &Diagnosis) -> Option<Finding> {
    let (ranges, limit) = (of.session.as_ref()?.memory.ranges, u64::from(of.setup.max_dma_maps));
    if ranges < limit / 10 * 9 {
        return None;
    }
    warning(
        "many_ranges",
        format!("{ranges} ranges of memory are mapped, of {limit} that a client may have; the next are refused"),
        "raise max_dma_maps, or let the guest use its IOMMU less (iommu.strict=0 in Linux)",
    )
}

fn no_interrupts(of: &Diagnosis) -> Option<Finding> {
    let session = of.driven()?;
    let deaf =
        session.interrupts == "msix" && of.enabled().any(|queue| queue.vector.is_some() && !queue.vector_connected);
    if !deaf {
        return None;
    }
    note(
        "masked_vectors",
        "a queue's interrupt has no eventfd: its driver polls, or the client has the vector masked",
        "nothing, if that is firmware or a driver that polls; a guest's disk that hangs so is a defect of the client",
    )
}

fn intx(of: &Diagnosis) -> Option<Finding> {
    if of.driven()?.interrupts != "intx" || of.statistics.interrupts_sent == 0 {
        return None;
    }
    warning(
        "intx",
        "interrupts go by INTx: one line for all queues, and a register that is read by message for each",
        "boot the guest without pci=nomsi, and give it a machine with MSI (q35)",
    )
}

fn one_vector(of: &Diagnosis) -> Option<Finding> {
    let vectors: Vec<_> = of.enabled().filter_map(|queue| queue.vector).collect();
    let first = vectors.first()?;
    if vectors.len() < 2 || vectors.iter().any(|vector| vector != first) {
        return None;
    }
    warning(
        "one_vector",
        format!("{} queues share one interrupt, {first}: one processor of the guest serves all", vectors.len()),
        "the guest could not have a vector each; look for a limit on them in the guest (/proc/interrupts, and its log)",
    )
}

fn small_queues(of: &Diagnosis) -> Option<Finding> {
    let size = of.enabled().map(|queue| queue.size).min().filter(|size| *size < SMALL_QUEUE)?;
    let offered = of.setup.queue_size;
    let next = if offered < SMALL_QUEUE {
        format!("serve it with queue_size = 256; now it offers {offered}")
    } else {
        format!("have the driver use what is offered, {offered}")
    };
    warning(
        "small_queue",
        format!("a queue has {size} entries: no more requests than that can wait for the store"),
        next,
    )
}

fn no_event_idx(of: &Diagnosis) -> Option<Finding> {
    of.driven()?;
    if of.has("EVENT_IDX") {
        return None;
    }
    let interrupts = of.per_request(of.statistics.interrupts_sent).unwrap_or(0.0);
    let level = if interrupts > 0.5 { Level::Warning } else { Level::Note };
    finding(
        level,
        "no_event_idx",
        format!(
            "the driver does not use EVENT_IDX, by which both sides leave out interrupts and kicks; {interrupts:.2} interrupts a request"
        ),
        "nothing for firmware; look why a guest's driver does without, since all that are in use know it",
    )
}

fn no_indirect(of: &Diagnosis) -> Option<Finding> {
    of.driven()?;
    if of.has("INDIRECT_DESC") {
        return None;
    }
    note(
        "no_indirect_desc",
        "the driver does not use INDIRECT_DESC: each buffer of a request takes an entry of the queue",
        "nothing for firmware; for a guest's driver, a larger queue_size has the same effect",
    )
}

fn few_queues(of: &Diagnosis) -> Option<Finding> {
    let (enabled, offered) = (of.enabled().count(), usize::from(of.setup.num_queues));
    if enabled == 0 || enabled >= offered {
        return None;
    }
    note(
        "few_queues",
        format!("the driver uses {enabled} of {offered} queues"),
        "nothing, if the guest has that few processors: Linux takes one queue for each",
    )
}

fn idle_polling(of: &Diagnosis) -> Option<Finding> {
    let (found, vain) = (of.statistics.polls_with_work, of.statistics.polls_in_vain);
    let all = found.saturating_add(vain);
    if of.setup.poll != PollPolicy::Always || all < ENOUGH || found > all / 20 {
        return None;
    }
    warning(
        "idle_polling",
        format!("its worker never sleeps, and found work in {:.1} % of its looks", found as f64 / all as f64 * 100.0),
        "poll = \"adaptive\" spins only while that pays",
    )
}

fn unused_page(of: &Diagnosis) -> Option<Finding> {
    let session = of.driven()?;
    if of.setup.doorbell != Doorbell::Mapped || session.kicks.by_message < ENOUGH {
        return None;
    }
    warning(
        "unused_doorbell_page",
        format!("{} kicks came by message, though the client could map a page for them", session.kicks.by_message),
        "a client that does not map the page pays for it with an answer to each write: doorbell = \"messages\"",
    )
}

fn slow_worker(of: &Diagnosis) -> Option<Finding> {
    let p99 = of.p99_ns("kick_to_submit").filter(|p99| *p99 > SLOW_WORKER_NS)?;
    warning(
        "slow_worker",
        format!("one kick in a hundred waits {} or more for its worker", time(p99)),
        "give the server processors of its own (worker_cpus, and the guests others), or more workers",
    )
}

fn slow_store(of: &Diagnosis) -> Option<Finding> {
    let p99 = of.p99_ns("submit_to_reap").filter(|p99| *p99 > SLOW_STORE_NS)?;
    warning(
        "slow_store",
        format!("one request in a hundred is with the store for {} or more", time(p99)),
        "look at the storage by itself (fio on the same file, iostat -x), and at what else uses it",
    )
}

fn where_the_time_goes(of: &Diagnosis) -> Option<Finding> {
    if of.statistics.operations() < ENOUGH {
        return None;
    }
    let [kick, store, interrupt] =
        ["kick_to_submit", "submit_to_reap", "reap_to_interrupt"].map(|stage| of.mean_ns(stage));
    let share = store as f64 / kick.saturating_add(store).saturating_add(interrupt).max(1) as f64 * 100.0;
    note(
        "stages",
        format!(
            "{share:.0} % of a request's time here is the store's: {} on the mean, after {} from a kick until it is taken, and \
             before {} until its interrupt is sent",
            time(store),
            time(kick),
            time(interrupt)
        ),
        "what a guest waits beyond that is its own and its client's: compare with fio in the guest",
    )
}

fn buffered(of: &Diagnosis) -> Option<Finding> {
    let cache = match of.setup.cache? {
        Cache::None => return None,
        Cache::Writeback => "writeback",
        Cache::Writethrough => "writethrough",
    };
    note(
        "buffered",
        format!("cache is {cache}: data is copied through the host's page cache, and evicts what others have there"),
        "cache = \"none\" moves it between disk and guest with no copy",
    )
}

fn small_pages(of: &Diagnosis) -> Option<Finding> {
    let memory = &of.driven()?.memory;
    let small: u64 = memory.files.iter().filter(|file| file.page_size <= 4096).map(|file| file.bytes).sum();
    if small < MUCH_MEMORY {
        return None;
    }
    note(
        "small_pages",
        format!("{} of guest memory are in files of 4 KiB pages", Size(small)),
        "huge pages make copies into it cheaper: memory-backend-memfd with hugetlb=on, or transparent ones \
         (/sys/kernel/mm/transparent_hugepage/shmem_enabled)",
    )
}

fn unsupported(of: &Diagnosis) -> Option<Finding> {
    let requests = of.statistics.unsupported;
    if requests == 0 {
        return None;
    }
    note(
        "unsupported",
        format!("{requests} requests asked for what the store cannot do, such as discards where there are no holes"),
        "nothing; drivers do without",
    )
}

fn detached(of: &Diagnosis) -> Option<Finding> {
    if of.status.client.is_some() || of.silent.is_some() {
        return None;
    }
    note(
        "detached",
        "no client is connected",
        "attach it: -device '{\"driver\":\"vfio-user-pci\",\"socket\":{\"type\":\"unix\",\"path\":\"...\"}}', with QEMU 10.1 or newer",
    )
}

/// A time for people.
fn time(nanoseconds: u64) -> String {
    match nanoseconds {
        0..1_000 => format!("{nanoseconds} ns"),
        1_000..1_000_000 => format!("{:.1} us", nanoseconds as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", nanoseconds as f64 / 1e6),
        _ => format!("{:.1} s", nanoseconds as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::hold::HeldRequests;
    use crate::config::DeviceConfig;
    use crate::diagnosis::{Setup, StageTimes};
    use crate::metrics::Statistics;
    use crate::session::{ObservedFile, ObservedMemory, Protocol};
    use crate::status::{Peer, Status};

    /// A device with which nothing is wrong.
    fn well() -> Diagnosis {
        let queue = |vector| ObservedQueue {
            enabled: true,
            running: true,
            size: 256,
            vector: Some(vector),
            vector_connected: true,
        };
        let memory = ObservedMemory {
            ranges: 3,
            bytes: 1 << 30,
            files: vec![ObservedFile { bytes: 1 << 30, kind: "memfd", page_size: 4096, writable: true }],
            ..ObservedMemory::default()
        };
        Diagnosis {
            device: "vm1".into(),
            description: String::new(),
            status: Status { size: 1 << 30, paused: false, client: Some(Peer { pid: 1, uid: 2 }), ..Status::default() },
            setup: Setup::of(&DeviceConfig::new("vm1.sock"), 4),
            held: None,
            silent: None,
            session: Some(Observation {
                protocol: Some(Protocol::default()),
                device_status: vec!["DRIVER_OK"],
                features: ["EVENT_IDX", "INDIRECT_DESC"].map(str::to_owned).to_vec(),
                interrupts: "msix",
                queues: (1..=4).map(queue).collect(),
                memory,
                ..Observation::default()
            }),
            statistics: Statistics::default(),
            stages: ["kick_to_submit", "submit_to_reap", "reap_to_interrupt"].map(times).to_vec(),
            findings: Vec::new(),
        }
    }

    fn times(stage: &'static str) -> StageTimes {
        StageTimes { stage, count: ENOUGH, mean_ns: Some(1000), p50_ns: Some(900), p99_ns: Some(5000) }
    }

    fn found(change: impl FnOnce(&mut Diagnosis)) -> Vec<(Level, String)> {
        let mut diagnosis = well();
        change(&mut diagnosis);
        of(&diagnosis).into_iter().map(|finding| (finding.level, finding.code)).collect()
    }

    fn session(change: impl FnOnce(&mut Observation)) -> impl FnOnce(&mut Diagnosis) {
        |diagnosis| change(diagnosis.session.as_mut().unwrap())
    }

    type Change = Box<dyn FnOnce(&mut Diagnosis)>;

    /// Each by the one change that brings it, and none without.
    #[test]
    fn each_thing_that_is_wrong_is_found_and_nothing_else() {
        use Level::{Error, Note, Warning};
        assert_eq!(found(|_| {}), []);
        let all: Vec<(Level, &str, Change)> = vec![
            (Error, "silent", Box::new(|of| of.silent = Some("no answer".into()))),
            (Error, "needs_reset", Box::new(session(|of| of.device_status.push("DEVICE_NEEDS_RESET")))),
            (Error, "private_memory", Box::new(session(|of| of.memory.found_blank = true))),
            (Error, "no_memory", Box::new(session(|of| of.memory.unreachable_ranges = of.memory.ranges))),
            (Note, "unreachable_memory", Box::new(session(|of| of.memory.unreachable_ranges = 1))),
            (
                Warning,
                "unreachable_memory",
                Box::new(session(|of| (of.memory.unreachable_ranges, of.memory.unreachable_bytes) = (1, 1 << 29))),
            ),
            (Warning, "io_errors", Box::new(|of| of.statistics.io_errors = 1)),
            (Warning, "held", Box::new(|of| of.held = Some(HeldRequests { requests: 1, error: None }))),
            (Warning, "faults", Box::new(|of| of.setup.faults = 1)),
            (Warning, "paused", Box::new(|of| of.status.paused = true)),
            (Warning, "no_version", Box::new(session(|of| of.protocol = None))),
            (Warning, "many_ranges", Box::new(session(|of| of.memory.ranges = 65000))),
            (Note, "masked_vectors", Box::new(session(|of| of.queues[1].vector_connected = false))),
            (
                Warning,
                "intx",
                Box::new(|of| {
                    of.statistics.interrupts_sent = 1;
                    session(|of| of.interrupts = "intx")(of);
                }),
            ),
            (
                Warning,
                "one_vector",
                Box::new(session(|of| of.queues.iter_mut().for_each(|queue| queue.vector = Some(1)))),
            ),
            (Warning, "small_queue", Box::new(session(|of| of.queues[3].size = 32))),
            (Note, "no_event_idx", Box::new(session(|of| drop(of.features.remove(0))))),
            (Note, "no_indirect_desc", Box::new(session(|of| drop(of.features.remove(1))))),
            (Note, "few_queues", Box::new(session(|of| of.queues[3].enabled = false))),
            (
                Warning,
                "idle_polling",
                Box::new(|of| {
                    of.setup.poll = PollPolicy::Always;
                    (of.statistics.polls_with_work, of.statistics.polls_in_vain) = (50, 951);
                }),
            ),
            (
                Warning,
                "unused_doorbell_page",
                Box::new(|of| {
                    of.setup.doorbell = Doorbell::Mapped;
                    session(|of| of.kicks.by_message = ENOUGH)(of);
                }),
            ),
            (Warning, "slow_worker", Box::new(|of| of.stages[0].p99_ns = Some(SLOW_WORKER_NS + 1))),
            (Warning, "slow_store", Box::new(|of| of.stages[1].p99_ns = Some(SLOW_STORE_NS + 1))),
            (Note, "stages", Box::new(|of| of.statistics.reads = ENOUGH)),
            (Note, "buffered", Box::new(|of| of.setup.cache = Some(Cache::Writeback))),
            (Note, "small_pages", Box::new(session(|of| of.memory.files[0].bytes = MUCH_MEMORY))),
            (Note, "unsupported", Box::new(|of| of.statistics.unsupported = 1)),
            (
                Note,
                "detached",
                Box::new(|of| {
                    of.status.client = None;
                    of.session = None;
                }),
            ),
        ];
        // Every question has its case.
        assert_eq!(all.len(), QUESTIONS.len() + 1);
        for (level, code, change) in all {
            assert_eq!(found(change), [(level, code.to_owned())]);
        }
    }

    #[test]
    fn interrupts_for_each_request_make_a_warning_of_a_note() {
        let codes = found(|of| {
            (of.statistics.reads, of.statistics.interrupts_sent) = (ENOUGH, ENOUGH);
            session(|of| drop(of.features.remove(0)))(of);
        });
        assert_eq!(codes, [(Level::Warning, "no_event_idx".into()), (Level::Note, "stages".into())]);
    }

    #[test]
    fn few_samples_prove_nothing() {
        assert_eq!(
            found(|of| {
                of.stages.iter_mut().for_each(|times| (times.count, times.p99_ns) = (ENOUGH - 1, Some(u64::MAX)));
                of.setup.poll = PollPolicy::Always;
                of.statistics.polls_in_vain = ENOUGH - 1;
            }),
            []
        );
    }

    #[test]
    fn a_size_that_is_small_by_configuration_is_changed_there() {
        let mut diagnosis = well();
        diagnosis.setup.queue_size = 32;
        diagnosis.session.as_mut().unwrap().queues[0].size = 32;
        assert!(of(&diagnosis)[0].next.contains("queue_size = 256"));
    }

    #[test]
    fn times_have_their_units() {
        assert_eq!([999, 1_500, 2_000_000, 3_000_000_000].map(time), ["999 ns", "1.5 us", "2.0 ms", "3.0 s"]);
    }
}
