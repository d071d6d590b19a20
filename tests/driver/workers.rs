//! Where workers run, which queues they serve, and who submits for them.

use std::path::Path;

use client::BlockOptions;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use crate::binary::{Served, disk, run};
use crate::rig::{Machine, exercise, until};

/// Serves a disk in an image file, with these options besides; there are two workers.
fn serve(options: &[&str]) -> Served {
    Served::start(|folder| {
        let image = folder.join("disk.img");
        let options = [&["--blk-file", image.to_str().unwrap()], options].concat();
        let mut arguments = disk(&folder.join("blk.sock"));
        arguments.extend(options.into_iter().map(str::to_owned));
        arguments
    })
}

/// Two processors that this process may use, the higher first; twice the same if there is one.
fn two_processors() -> [usize; 2] {
    let usable = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let mut usable = (0..CpuSet::count()).filter(|cpu| usable.is_set(*cpu).unwrap());
    let first = usable.next().unwrap();
    [usable.next().unwrap_or(first), first]
}

fn names(server: &Served) -> Vec<String> {
    server.threads("worker-").into_iter().map(|thread| thread.name).collect()
}

#[test]
fn workers_are_bound_to_processors_in_their_order() {
    let [first, second] = two_processors();
    let server = serve(&["--worker-cpus", &format!("{first},{second}")]);
    assert_eq!(names(&server), ["worker-0", "worker-1"]);
    let cpus: Vec<_> = server.threads("worker-").into_iter().map(|thread| thread.cpus).collect();
    assert_eq!(cpus, [first.to_string(), second.to_string()]);
    exercise(&mut Machine::new(server.client(), &BlockOptions::default()).queues);
    server.stop();
}

/// Each request puts the worker that serves it to sleep and wakes it; one that has nothing to serve is never woken.
#[test]
fn queues_go_to_the_workers_that_are_named() {
    const REQUESTS: u64 = 200;
    // The list, a queue, and the worker that serves it.
    for (list, queue, worker) in [("1", 0, 1), ("1,0", 0, 1), ("1,0", 1, 0), ("0,0,1", 3, 0), ("0,0,1", 2, 1)] {
        let server = serve(&["--poll", "never", "--queue-workers", list]);
        let mut machine = Machine::new(server.client(), &BlockOptions::default());
        let switches = || -> Vec<_> { server.threads("worker-").into_iter().map(|thread| thread.switches).collect() };
        let before = switches();
        for sector in 0..REQUESTS {
            machine.queues[queue].read(sector, &mut [0; 512]).unwrap();
        }
        let switched: Vec<_> = switches().iter().zip(before).map(|(after, before)| after - before).collect();
        // The idle one may have been seen before it came to its sleep.
        let right = switched[worker] > REQUESTS / 4 && switched[1 - worker] < REQUESTS / 20;
        assert!(right, "{list}, queue {queue}: {switched:?}");
        server.stop();
    }
}

#[test]
fn threads_of_the_kernel_submit_and_sleep_when_there_is_nothing() {
    let [first, second] = two_processors();
    let cpus = format!("{first},{second}");
    let server = serve(&["--sqpoll", "--sqpoll-idle", "1", "--sqpoll-cpus", &cpus]);
    let mut machine = Machine::new(server.client(), &BlockOptions::default());
    for _ in 0..3 {
        exercise(&mut machine.queues);
        // Such a thread sleeps nowhere but at its end of the queue.
        until("they sleep", || server.threads("iou-sqp-").iter().all(|thread| thread.asleep));
        until("the workers sleep", || server.threads("worker-").iter().all(|thread| thread.asleep));
    }
    let mut bound: Vec<_> = server.threads("iou-sqp-").into_iter().map(|thread| thread.cpus).collect();
    let mut asked = [first.to_string(), second.to_string()];
    bound.sort();
    asked.sort();
    assert_eq!(bound, asked);
    drop(machine);
    server.stop();
    let without = serve(&[]);
    exercise(&mut Machine::new(without.client(), &BlockOptions::default()).queues);
    assert!(without.threads("iou-sqp-").is_empty());
    without.stop();
}

#[test]
fn what_cannot_be_had_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("blk.sock");
    let refused = |options: &[&str]| {
        let arguments = [&["serve", "--socket-path", socket.to_str().unwrap(), "--size", "1M"], options].concat();
        let arguments: Vec<_> = arguments.into_iter().map(str::to_owned).collect();
        let (status, said) = run(&arguments);
        assert!(!status.success() && !said.contains("panicked"), "{options:?}: {status}: {said}");
        assert!(!Path::new(&socket).exists(), "{options:?}");
        said
    };
    for (options, words) in [
        // Nowhere are there that many, in any case not for us.
        (&["--worker-cpus", "1023"][..], "worker_cpus names processor 1023,"),
        (&["--workers", "1", "--sqpoll", "--sqpoll-cpus", "1023"], "sqpoll_cpus names processor 1023,"),
        (&["--workers", "2", "--worker-cpus", "0"], "names 1 processors for 2 workers"),
        (&["--workers", "2", "--queue-workers", "0,2"], "queue_workers names worker 2"),
        (&["--workers", "0"], "workers is 0"),
        (&["--sqpoll-idle", "5"], "sqpoll_idle is for sqpoll"),
        (&["--worker-cpus", "0-"], "such as 0,2,4-7"),
        (&["--iopoll"], "iopoll is for store"),
    ] {
        let said = refused(options);
        assert!(said.contains(words), "{options:?}: {said}");
    }
}
