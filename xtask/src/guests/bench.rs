//! `cargo xtask guests --bench`: our disk and QEMU's own virtio-blk on the same image, in the same guest.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use testbed::{Machine, Progress, Server, Testbed};

const BEGIN: &str = "<!-- written by cargo xtask guests --bench: begin -->\n";
const END: &str = "<!-- written by cargo xtask guests --bench: end -->";

const MIB: usize = 1 << 20;
const IMAGE_MIB: usize = 512;
const CPUS: u32 = 2;

/// The serials of the two disks: which of them Linux finds first, and calls vda, is a matter of luck.
const OURS: &str = "ours";
const QEMU_OWN: &str = "own";

/// The disks take turns, so that a neighbour's load hits both.
const SCRIPT: &str = "
    set +x
    named() { for block in /sys/block/vd*; do [ \"$(cat $block/serial)\" != $1 ] || echo /dev/${block##*/}; done; }
    for round in $(seq $rounds); do
        for load in 'randread 4k' 'randwrite 4k' 'read 128k' 'write 128k'; do
            for depth in 1 32; do
                for jobs in 1 4; do
                    for disk in $disks; do
                        set -- $load
                        report=$(fio --minimal --name=bench --filename=$(named $disk) --rw=$1 --bs=$2 --iodepth=$depth \\
                            --numjobs=$jobs --group_reporting --ioengine=libaio --direct=1 --time_based \\
                            --runtime=$seconds --norandommap --randrepeat=0 --offset_increment=25%)
                        # Of fio's terse output, version 3: one of both is 0.
                        reads=$(echo \"$report\" | cut -d ';' -f 8)
                        writes=$(echo \"$report\" | cut -d ';' -f 49)
                        fact result $1 $2 $depth $jobs $disk $reads $writes
                    done
                done
            done
        done
    done";

/// A load: fio's pattern, its block size, its depth and its jobs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Load {
    pattern: String,
    block: String,
    depth: u32,
    jobs: u32,
}

/// Requests a second, one value a round: of our disk, and of QEMU's.
type Rates = (Vec<f64>, Vec<f64>);

pub(super) fn run(seconds: u32, rounds: u32) -> Result<()> {
    let progress = Progress::stderr();
    let testbed = Testbed::open(&progress)?;
    let step = progress.step("building the server");
    Server::build()?;
    step.done("done");

    let dir = tempfile::tempdir().context("cannot make a temporary folder")?;
    let (socket, image) = (dir.path().join("blk0.sock"), dir.path().join("disk.img"));
    let step = progress.step("writing an image without holes");
    let mut file = File::create(&image).context("cannot make an image")?;
    for _ in 0..IMAGE_MIB {
        file.write_all(&[0x5a; MIB]).context("cannot write the image")?;
    }
    file.sync_all().context("cannot write the image")?;
    step.done("done");
    let (path, disk) = (socket.to_string_lossy(), image.to_string_lossy());
    let server = ["--socket-path", &*path, "--blk-file", &*disk, "--serial", OURS, "--num-queues", &CPUS.to_string()]
        .map(str::to_owned);
    let _server = Server::start(&server)?;

    let machine = Machine::new().cpus(CPUS).memory_mib(1024).vfio_user(&socket).qemu_disk(&image, QEMU_OWN);
    let step = progress.step("measuring in a guest");
    let mut guest =
        testbed.boot(&machine, &format!("seconds={seconds} rounds={rounds} disks='{OURS} {QEMU_OWN}'\n{SCRIPT}"))?;
    let values = u64::from(rounds) * 32;
    for done in 0..values {
        step.advance(done, values);
        guest.fact("result")?;
    }
    guest.finish()?;
    step.done("done");

    let mut results: BTreeMap<Load, Rates> = BTreeMap::new();
    for fact in guest.facts("result") {
        let (load, ours, rate) = parse(&fact).with_context(|| format!("not a result: {fact}"))?;
        let rates = results.entry(load).or_default();
        if ours { rates.0.push(rate) } else { rates.1.push(rate) }
    }
    let block = format!(
        "QEMU {}; Linux {}, {CPUS} processors of a host with {}; each value is measured {rounds} times, for {seconds} s.\n\n{}",
        testbed.qemu_version(),
        guest.facts("kernel").concat(),
        std::thread::available_parallelism().map_or_else(|_| "?".to_owned(), |cpus| cpus.to_string()),
        table(&results),
    );
    println!("{block}");
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/compatibility.md");
    let text = fs::read_to_string(&page).with_context(|| format!("cannot read {}", page.display()))?;
    let text = replaced(&text, &block).with_context(|| format!("{} lacks the marks of its table", page.display()))?;
    fs::write(&page, text).with_context(|| format!("cannot write {}", page.display()))
}

/// "randread 4k 32 1 ours 12000 0": the load, whether the disk is ours, and the rate.
fn parse(fact: &str) -> Option<(Load, bool, f64)> {
    let [pattern, block, depth, jobs, disk, reads, writes] = fact.split(' ').collect::<Vec<_>>().try_into().ok()?;
    let rate = reads.parse::<f64>().ok()? + writes.parse::<f64>().ok()?;
    let (depth, jobs) = (depth.parse().ok()?, jobs.parse().ok()?);
    let load = Load { pattern: pattern.to_owned(), block: block.to_owned(), depth, jobs };
    let ours = [(OURS, true), (QEMU_OWN, false)].into_iter().find_map(|(name, ours)| (name == disk).then_some(ours))?;
    (rate > 0.0).then_some((load, ours, rate))
}

fn table(results: &BTreeMap<Load, Rates>) -> String {
    let mut text = "| load | depth | jobs | ours | QEMU's | ratio |\n|---|---:|---:|---:|---:|---:|\n".to_owned();
    for (Load { pattern, block, depth, jobs }, (ours, own)) in results {
        let ratios: Vec<f64> = ours.iter().zip(own).map(|(ours, own)| ours / own).collect();
        let (ratio, low, high) = spread(&ratios);
        let (ours, own) = (spread(ours).0, spread(own).0);
        // A String takes all.
        let _ = writeln!(
            text,
            "| {pattern} {block} | {depth} | {jobs} | {ours:.0}/s | {own:.0}/s | {ratio:.2} ({low:.2} to {high:.2}) |"
        );
    }
    text
}

/// The median, the lowest and the highest.
fn spread(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
    (at(sorted.len() / 2), at(0), at(sorted.len().saturating_sub(1)))
}

/// `text` with `block` between the marks.
fn replaced(text: &str, block: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}{block}{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_its_loads_and_its_disks() {
        let load = Load { pattern: "randread".to_owned(), block: "4k".to_owned(), depth: 32, jobs: 4 };
        assert_eq!(parse("randread 4k 32 4 ours 1200 0"), Some((load.clone(), true, 1200.0)));
        assert_eq!(parse("randread 4k 32 4 own 0 800"), Some((load.clone(), false, 800.0)));
        assert_eq!(parse("randread 4k 32 4 own 0 0"), None);
        let table = table(&BTreeMap::from([(load, (vec![100.0, 300.0, 200.0], vec![100.0, 100.0, 100.0]))]));
        assert!(table.ends_with("| randread 4k | 32 | 4 | 200/s | 100/s | 2.00 (1.00 to 3.00) |\n"), "{table}");
    }

    #[test]
    fn the_page_has_the_marks() {
        let page = include_str!("../../../docs/compatibility.md");
        let text = replaced(page, "a table\n").unwrap();
        assert!(text.contains(&format!("{BEGIN}a table\n{END}")));
        assert_eq!(replaced("no marks", "a table"), None);
    }
}
