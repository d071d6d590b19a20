//! Two builds of the server, in turns of some milliseconds: what their difference is shows where that of two measurements of a
//! second is lost.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use testbed::{Progress, binary};

use super::load::{Completion, Load, on_cpu};
use super::servers::{Place, Store, ours};
use super::turns::{self, Contender};
use super::{DRIVER_CPU, test_file};

/// How often both are started: where their memory happens to lie makes a difference too.
const STARTS: usize = 12;
/// Pairs of turns of each start.
const PAIRS: usize = 40;

/// Bytes of the file that each of them serves.
const FILE_SIZE: u64 = 512 << 20;

/// Prints the rates of this build as parts of those of another. Files are made in `folder`.
pub(super) fn compare(other: &Path, folder: &Path, progress: &Progress) -> Result<ExitCode> {
    use Store::{File, Memory, Null};
    let sockets = tempfile::tempdir().context("cannot make a temporary folder")?;
    let files = [test_file(folder, FILE_SIZE, progress)?, test_file(folder, FILE_SIZE, progress)?];
    let places = files.each_ref().map(|file| Place { folder: sockets.path().to_owned(), file: file.path().to_owned() });
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
        let load = Load { write, depth, completion: Completion::Poll, rings: 0, size: FILE_SIZE };
        let mut ratios = Vec::with_capacity(STARTS * PAIRS);
        for start in 0..STARTS {
            // Who is started first changes.
            let [one, other] = programs;
            ratios.extend(if start % 2 == 0 {
                pairs(&places, [one, other], store, load)?
            } else {
                pairs(&places, [other, one], store, load)?.into_iter().map(f64::recip).collect()
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
fn pairs(places: &[Place; 2], programs: [&Path; 2], store: Store, load: Load) -> Result<Vec<f64>> {
    on_cpu(DRIVER_CPU, || {
        let mut contenders = Vec::<Box<dyn Contender>>::new();
        for ((program, place), name) in programs.iter().zip(places).zip(["one.sock", "other.sock"]) {
            contenders.push(Box::new(ours(program, name, place, store, "adaptive", load)?));
        }
        let rates = turns::take(&mut contenders, PAIRS)?;
        contenders.into_iter().try_for_each(Contender::leave)?;
        let [one, other] = rates.as_slice() else { return Ok(Vec::new()) };
        Ok(one.iter().zip(other).map(|(one, other)| one / other).collect())
    })
}
