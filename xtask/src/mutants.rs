//! `cargo xtask mutants`: weakens and removes each ordering of the shipped source, one at a time, in a copy of the
//! tree, and shows that a test notices.

mod list;
mod tree;

use std::collections::HashSet;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::models::{Suite, seconds};
pub(crate) use tree::Tree;

/// One change of the source that loses a wakeup, or something else that the other side waits for.
struct Mutant {
    name: String,
    file: &'static str,
    /// Where in the file: how the only function that is meant begins.
    function: &'static str,
    /// Texts, each of which is there exactly once, and what takes their place.
    edits: Vec<(&'static str, String)>,
    /// What must notice, tried in this order until one does.
    killers: &'static [Suite],
}

/// `cargo xtask mutants`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only those whose name contains this.
    name: Option<String>,
    /// Instead: let either full barrier of the ring be a write barrier, as kvmtool had it, and count the rounds until
    /// the stress loses a wakeup on this hardware.
    #[arg(long)]
    hardware: bool,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let tree = Tree::copy()?;
    if options.hardware {
        return hardware(&tree);
    }
    let mut mutants = list::mutants();
    // All of them: so that none is left behind when the source moves on.
    mutants.iter().try_for_each(|mutant| tree.check(mutant))?;
    if let Some(name) = &options.name {
        mutants.retain(|mutant| mutant.name.contains(name.as_str()));
    }
    ensure!(!mutants.is_empty(), "there is no such mutant");
    let start = Instant::now();
    unchanged(&tree, &mutants)?;
    println!("\n{:<52} {:<24} {:>7}  by", "mutant", "killed by", "after");
    let mut survivors = 0;
    for mutant in &mutants {
        match kill(&tree, mutant).with_context(|| mutant.name.clone())? {
            Some((suite, took, test)) => {
                let suite = suite.to_string();
                println!("{:<52} {suite:<24} {:>5.1} s  {test}", mutant.name, took.as_secs_f64());
            }
            None => {
                survivors += 1;
                println!("{:<52} SURVIVES", mutant.name);
            }
        }
    }
    println!("\n{} mutants, {survivors} survive, {:.0} s", mutants.len(), start.elapsed().as_secs_f64());
    Ok(if survivors == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The source as it stands passes all that is to kill its mutants: otherwise a kill says nothing.
fn unchanged(tree: &Tree, mutants: &[Mutant]) -> Result<()> {
    let mut seen = HashSet::new();
    for suite in mutants.iter().flat_map(|mutant| mutant.killers) {
        if seen.insert(suite.to_string()) {
            let executable = suite.build(&tree.models())?;
            let outcome = suite.run(&executable, &[])?;
            ensure!(outcome.failed.is_empty(), "{suite} fails on the source as it stands:\n{}", outcome.output);
            println!("unchanged source: {suite} pass in {:.1} s", seconds(&outcome));
        }
    }
    Ok(())
}

/// Which suite notices, after how long a run, and the first test that does.
fn kill(tree: &Tree, mutant: &Mutant) -> Result<Option<(Suite, Duration, String)>> {
    let _changed = tree.change(mutant)?;
    for suite in mutant.killers {
        let executable = suite.build(&tree.models())?;
        let outcome = suite.run(&executable, &[])?;
        if let Some(first) = outcome.failed.first() {
            let others = outcome.failed.len() - 1;
            let test = if others > 0 { format!("{first} and {others} more") } else { first.clone() };
            return Ok(Some((*suite, outcome.took, test)));
        }
    }
    Ok(None)
}

/// Runs of the stress, each with lots of its own.
const RUNS: u64 = 5;
/// Rounds of the longest run, at depth 1 with the event index: the first quarter of all.
const ROUNDS: u64 = 50_000_000;

fn hardware(tree: &Tree) -> Result<ExitCode> {
    let mut mutants = list::mutants();
    mutants.retain(|mutant| list::WRITE_BARRIERS.contains(&mutant.name.as_str()));
    for mutant in mutants {
        let _changed = tree.change(&mutant)?;
        let executable = Suite::Stress.build(&tree.release())?;
        let format = if mutant.name.starts_with("packed") { "packed" } else { "split" };
        let mut all = (1..=RUNS).map(|seed| rounds_to_loss(&executable, format, seed)).collect::<Result<Vec<_>>>()?;
        println!("{}: a wakeup was lost after {all:?} rounds", mutant.name);
        all.sort_unstable();
        println!("  median: {}", all.get(all.len() / 2).copied().unwrap_or_default());
    }
    Ok(ExitCode::SUCCESS)
}

/// How many rounds the stress takes to lose a wakeup.
fn rounds_to_loss(executable: &Path, format: &str, seed: u64) -> Result<u64> {
    let environment = [
        ("STRESS_FORMAT", format.to_owned()),
        ("STRESS_ROUNDS", (4 * ROUNDS).to_string()),
        ("STRESS_SEED", seed.to_string()),
        ("STRESS_PATIENCE", "3".to_owned()),
    ];
    let outcome = Suite::Stress.run(executable, &environment)?;
    lost_after(&outcome.output).with_context(|| format!("no wakeup was lost:\n{}", outcome.output))
}

/// "... LostWakeup, rounds: 12345 ..."
fn lost_after(output: &str) -> Option<u64> {
    let (_, rest) = output.split_once("LostWakeup, rounds: ")?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rounds_are_found() {
        let failure = "the driver: Some(Stuck { why: LostWakeup, rounds: 4711 })";
        assert_eq!(lost_after(failure), Some(4711));
        assert_eq!(lost_after("why: Stalled, rounds: 1"), None);
    }
}
