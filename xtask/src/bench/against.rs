//! Two builds of the server, in turns of some milliseconds: what else the machine does then falls on both alike, and what
//! their difference is shows where that of two measurements of a second is lost.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use testbed::{Progress, binary};

use super::load::{Completion, Driver, Load, on_cpu};
use super::servers::{Place, Store, data_size, options, serve};
use super::{DRIVER_CPU, disk, test_file};

/// How often both are started: where their memory happens to lie makes a difference too.
const STARTS: usize = 12;
/// Pairs of turns of each start.
const PAIRS: usize = 40;
/// One turn, and what comes before it: the other server falls asleep, and this one wakes up.
const TURN: Duration = Duration::from_millis(8);
const WARM_UP: Duration = Duration::from_millis(2);

/// Bytes of the file that each of them serves.
const FILE_SIZE: u64 = 512 << 20;

/// Prints the rates of this build as parts of those of another. Files are made in `folder`.
pub(super) fn compare(other: &Path, folder: &Path, progress: &Progress) -> Result<ExitCode> {
    use Store::{File, Memory, Null};
    let sockets = tempfile::tempdir().context("cannot make a temporary folder")?;
    let files = [test_file(folder, FILE_SIZE, progress)?, test_file(folder, FILE_SIZE, progress)?];
    let places = files.each_ref().map(|file| Place {
        folder: sockets.path().to_owned(),
        file: file.path().to_owned(),
        file_size: FILE_SIZE,
    });
    let programs = [&binary()?, other];
    let rows = [
        (Null, false, 1),
        (Null, false, 32),
        (Memory, false, 1),
        (Memory, false, 32),
        (File, false, 32),
        (File, true, 32),
    ];
    println!("| | depth | rate, of the other's: median of {} | middle half |\n|---|---|---|---|", STARTS * PAIRS);
    for (store, write, depth) in rows {
        let step = progress.step("measuring");
        let load = Load { write, depth, completion: Completion::Poll, size: FILE_SIZE };
        let mut ratios = Vec::with_capacity(STARTS * PAIRS);
        for start in 0..STARTS {
            // Who is started first, and has its turn first, takes turns.
            let [one, other] = programs;
            ratios.extend(if start % 2 == 0 {
                turns(&places, [one, other], store, load)?
            } else {
                turns(&places, [other, one], store, load)?.into_iter().map(f64::recip).collect()
            });
            step.advance(start as u64, STARTS as u64);
        }
        step.done("done");
        ratios.sort_by(f64::total_cmp);
        let at = |quarter: usize| ratios.get(ratios.len() * quarter / 4).copied().unwrap_or_default();
        let what = if write { "write" } else { "read" };
        println!("| {store:?}, {what} | {depth} | {:.3} | {:.3} to {:.3} |", at(2), at(1), at(3));
    }
    Ok(ExitCode::SUCCESS)
}

/// The first program's rate over the second's, in each pair of turns.
fn turns(places: &[Place; 2], programs: [&Path; 2], store: Store, load: Load) -> Result<Vec<f64>> {
    let [one, other] = places;
    let sockets = [one.folder.join("one.sock"), other.folder.join("other.sock")];
    // Awake only while there are requests: both have the same core.
    let _one = serve(programs[0], one, store, "adaptive", &sockets[0])?;
    let _other = serve(programs[1], other, store, "adaptive", &sockets[1])?;
    on_cpu(DRIVER_CPU, || {
        let attach = |socket| disk::Disk::attach(socket, &options(load), data_size(load));
        let (mut one, mut other) = (attach(&sockets[0])?, attach(&sockets[1])?);
        let queues = one.queues.first_mut().zip(other.queues.first_mut()).context("a server has no queue")?;
        let mut drivers = (Driver::new(queues.0, &one.data, load)?, Driver::new(queues.1, &other.data, load)?);
        let ratios = (0..PAIRS).map(|_| Ok(drivers.0.run(WARM_UP, TURN)? / drivers.1.run(WARM_UP, TURN)?)).collect();
        one.detach()?;
        other.detach()?;
        ratios
    })
}
