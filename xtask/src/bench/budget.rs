//! `cargo xtask bench --check`: instructions a request, and what they may be.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use client::{BlockOptions, RequestType};
use serde::Deserialize;
use testbed::Progress;

use super::callgrind::{self, Counted, Load};

/// The budget, from the root of the repository.
const FILE: &str = "tests/budget.toml";
/// By how much of the budget it may be overdrawn: for compilers that differ a little.
const TOLERANCE: f64 = 0.03;
/// Requests that are counted for one number: so many that what happens once does not show.
const REQUESTS: u32 = 65_536;
/// Functions of a profile that are printed.
const SHOWN: usize = 16;

/// Most of a load's kind.
const LOAD: Load = Load { store: "null", kind: RequestType::Read, depth: 32, mappings: 0, rings: 0 };

/// What is counted, by its name in the budget.
const LOADS: [(&str, Load); 10] = [
    ("null-read-depth-32", LOAD),
    ("null-read-depth-1", Load { depth: 1, ..LOAD }),
    ("null-write-depth-32", Load { kind: RequestType::Write, ..LOAD }),
    ("memory-read-depth-32", Load { store: "memory", ..LOAD }),
    ("memory-read-depth-1", Load { store: "memory", depth: 1, ..LOAD }),
    ("null-read-64-mappings", Load { mappings: 64, ..LOAD }),
    ("null-read-50000-mappings", Load { mappings: 50_000, ..LOAD }),
    ("null-read-in-order", Load { rings: BlockOptions::IN_ORDER, ..LOAD }),
    ("null-read-packed", Load { rings: BlockOptions::PACKED, ..LOAD }),
    ("null-read-packed-in-order", Load { rings: BlockOptions::PACKED | BlockOptions::IN_ORDER, ..LOAD }),
];

/// Of two loads, how many times the first the second may take at most: a request that finds its memory among some mappings, and
/// one that finds it among a thousand times as many.
const MANY_MAPPINGS: (&str, &str, f64) = ("null-read-64-mappings", "null-read-50000-mappings", 2.0);

/// The budget as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Budget {
    /// The compiler whose code was counted.
    rustc: String,
    /// Instructions a request of each load.
    instructions: BTreeMap<String, u64>,
}

/// Counts, and compares with the budget, or writes it if `bless`.
pub(super) fn check(bless: bool, only: &[String], profile: bool) -> Result<ExitCode> {
    let path = path();
    let budget = fs::read_to_string(&path)
        .context("cannot read it; `cargo xtask bench --check --bless` writes it")
        .and_then(|text| Ok(toml::from_str::<Budget>(&text)?))
        .context(FILE);
    let budget = if bless { budget.ok() } else { Some(budget?) };
    let progress = Progress::stderr();
    let mut counted = BTreeMap::new();
    let mut over = Vec::new();
    println!("{:<26}{:>12}{:>12}{:>10}", "instructions a request", "counted", "budget", "");
    for (name, load) in LOADS.into_iter().filter(|(name, _)| super::is_chosen(name, only)) {
        let step = progress.step(format!("counting {name}"));
        let count = callgrind::count(load, REQUESTS.min(u32::from(load.depth) * 8192), &progress)?;
        drop(step);
        let own = instructions(load, &count);
        let allowed = budget.as_ref().and_then(|budget| budget.instructions.get(name)).copied();
        let change = allowed.map_or(String::new(), |allowed| format!("{:+.1} %", (own / allowed as f64 - 1.0) * 100.0));
        let shown = allowed.map_or("none".to_owned(), |allowed| allowed.to_string());
        println!("{name:<26}{own:>12.1}{shown:>12}{change:>10}");
        if profile {
            print_profile(&count);
        }
        if allowed.is_none_or(|allowed| own > allowed as f64 * (1.0 + TOLERANCE)) {
            over.push(name);
        }
        counted.insert(name.to_owned(), own.round() as u64);
    }
    let (one, many, most) = MANY_MAPPINGS;
    if let (Some(one), Some(many)) = (counted.get(one), counted.get(many)) {
        let times = *many as f64 / *one as f64;
        println!("among 50,000 mappings a request takes {times:.2} times what it takes among 64; at most {most}");
        ensure!(times <= most, "to find memory among many mappings takes too long");
    }
    let rustc = testbed::output(std::process::Command::new("rustc").arg("--version"))?.trim().to_owned();
    if bless {
        let mut instructions = budget.map(|budget| budget.instructions).unwrap_or_default();
        instructions.retain(|name, _| LOADS.iter().any(|(load, _)| load == name));
        instructions.extend(counted);
        fs::write(&path, text(&rustc, &instructions)).with_context(|| format!("cannot write {}", path.display()))?;
        println!("written to {FILE}");
        return Ok(ExitCode::SUCCESS);
    }
    if over.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let limit = TOLERANCE * 100.0;
    eprintln!("more than {limit} % above the budget in {FILE}: {}", over.join(", "));
    eprintln!("`cargo xtask bench --check --profile` shows where; if it has to be, `--bless` makes it the budget");
    // Another compiler makes other code of the same source: that says nothing about the source.
    if let Some(budget) = budget.filter(|budget| budget.rustc != rustc) {
        eprintln!("not held against it: the budget is of {}, and this is {rustc}", budget.rustc);
        return Ok(ExitCode::SUCCESS);
    }
    Ok(ExitCode::FAILURE)
}

/// What counts: all, but for the copying of a memory store, which takes other processors other instructions.
fn instructions(load: Load, count: &Counted) -> f64 {
    if load.store == "memory" { count.all - count.copying } else { count.all }
}

/// What a null read at depth 32 takes.
pub(super) fn null_read() -> Result<f64> {
    let (_, load) = LOADS[0];
    Ok(callgrind::count(load, REQUESTS, &Progress::silent())?.all)
}

fn print_profile(count: &Counted) {
    for (function, cost) in count.functions.iter().take(SHOWN) {
        println!("{cost:>16.1}  {function}");
    }
}

fn text(rustc: &str, instructions: &BTreeMap<String, u64>) -> String {
    let mut text = format!(
        "# Instructions that a request of 4 KiB takes the server; for memory, without the copying itself.\n\
         # `cargo xtask bench --check` counts them and fails where they are more than {} % above these;\n\
         # `cargo xtask bench --check --bless` writes what it has counted.\n\n\
         # The compiler whose code was counted.\nrustc = {rustc:?}\n\n[instructions]\n",
        TOLERANCE * 100.0
    );
    for (name, count) in instructions {
        text.push_str(&format!("{name} = {count}\n"));
    }
    text
}

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").join(FILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_what_is_counted() {
        let budget: Budget = toml::from_str(&fs::read_to_string(path()).unwrap()).unwrap();
        let mut loads: Vec<_> = LOADS.iter().map(|(name, _)| (*name).to_owned()).collect();
        loads.sort();
        assert_eq!(budget.instructions.keys().cloned().collect::<Vec<_>>(), loads);
        let again: Budget = toml::from_str(&text(&budget.rustc, &budget.instructions)).unwrap();
        assert_eq!((again.rustc, again.instructions), (budget.rustc, budget.instructions));
    }
}
