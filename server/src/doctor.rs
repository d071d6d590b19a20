//! `vfio-user-blk doctor`: how the devices of a running server are, as people read it.

use std::fmt::Write as _;
use std::io::{self, Write};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use vfio_user_blk::config::{DoctorArgs, Size};
use vfio_user_blk::control::{ControlClient, Finding, Level};

use crate::{ctl, exit};

/// Looks at one device or all, and prints what is found.
///
/// # Errors
/// If a device is found unwell, besides all that can happen on the way to it.
pub(crate) fn run(arguments: &DoctorArgs) -> Result<()> {
    let mut server = ctl::connect(&arguments.socket)?;
    let names = match &arguments.device {
        Some(device) => vec![device.clone()],
        None => names(&server.call("device.list", &json!({}))?),
    };
    let mut patients = Vec::new();
    for name in names {
        patients.push(diagnose(&mut server, &name)?);
    }
    let text = if arguments.json {
        format!("{:#}\n", Value::Array(patients.clone()))
    } else if patients.is_empty() {
        "the server has no devices; vfio-user-blk ctl add serves one\n".to_owned()
    } else {
        patients.iter().map(tell).collect::<Vec<_>>().join("\n")
    };
    io::stdout().lock().write_all(text.as_bytes()).context("cannot write to standard output")?;
    let levels: Vec<_> = patients.iter().flat_map(findings).map(|finding| finding.level).collect();
    let count = |level| levels.iter().filter(|found| **found == level).count();
    match (count(Level::Error), count(Level::Warning)) {
        (0, 0) => Ok(()),
        (errors, warnings) => Err(exit::Unwell { errors, warnings }.into()),
    }
}

fn names(list: &Value) -> Vec<String> {
    let devices = list["devices"].as_array().into_iter().flatten();
    devices.filter_map(|device| device["name"].as_str()).map(str::to_owned).collect()
}

fn diagnose(server: &mut ControlClient, device: &str) -> Result<Value> {
    Ok(server.call("device.diagnose", &json!({ "device": device }))?)
}

/// Those that are understood: a newer server may have more kinds.
fn findings(patient: &Value) -> Vec<Finding> {
    let all = patient["findings"].as_array().into_iter().flatten();
    all.filter_map(|finding| serde_json::from_value(finding.clone()).ok()).collect()
}

/// What is known of a device, line by line, and then what is wrong.
fn tell(patient: &Value) -> String {
    let mut text = format!("{}: {}\n", word(&patient["device"]), word(&patient["description"]));
    for (what, value) in lines(patient) {
        // As wide as the longest.
        let _infallible = writeln!(text, "  {what:<11}{value}");
    }
    let findings = findings(patient);
    if findings.is_empty() {
        text.push_str("  all is well\n");
    }
    for Finding { level, what, next, .. } in findings {
        let level = match level {
            Level::Error => "ERROR",
            Level::Warning => "WARNING",
            Level::Note => "note",
        };
        let _infallible = writeln!(text, "  {level}: {what}\n    -> {next}");
    }
    text
}

fn lines(patient: &Value) -> Vec<(&'static str, String)> {
    let mut lines = vec![("client", client(patient))];
    let session = &patient["session"];
    if !session.is_null() {
        lines.extend(protocol(&session["protocol"]));
        lines.push(("driver", format!("{}; {}", list(&session["device_status"]), list(&session["features"]))));
        lines.push(("queues", queues(session, patient)));
        lines.push(("memory", memory(&session["memory"])));
        lines.push(("kicks", kicks(session, patient)));
    }
    lines.push(("requests", requests(&patient["statistics"])));
    for stage in patient["stages"].as_array().into_iter().flatten().filter(|stage| stage["count"] != 0) {
        let time = |key: &str| stage[key].as_u64().map_or("-".to_owned(), crate::top::time);
        let times = format!("mean {}, p50 {}, p99 {}", time("mean_ns"), time("p50_ns"), time("p99_ns"));
        lines.push(("", format!("{}: {times}", word(&stage["stage"]).replace('_', " "))));
    }
    lines
}

fn client(patient: &Value) -> String {
    match &patient["client"] {
        Value::Null => "none".to_owned(),
        peer => format!("process {}, user {}", peer["pid"], peer["uid"]),
    }
}

fn protocol(protocol: &Value) -> Vec<(&'static str, String)> {
    let Value::Object(_) = protocol else { return vec![("protocol", "not agreed on".to_owned())] };
    let bounds = |side: &Value| {
        let size = Size(side["max_data_xfer_size"].as_u64().unwrap_or(0));
        format!("messages of {size}, {} descriptors each, {} DMA ranges", side["max_msg_fds"], side["max_dma_maps"])
    };
    let version = format!("vfio-user {}; it takes {}", word(&protocol["version"]), bounds(&protocol["client"]));
    let quirks = protocol["quirks"].as_array().into_iter().flatten().map(|quirk| ("", word(quirk)));
    [("protocol", version), ("", format!("we take {}", bounds(&protocol["server"])))]
        .into_iter()
        .chain(quirks)
        .collect()
}

fn queues(session: &Value, patient: &Value) -> String {
    let all: Vec<_> = session["queues"].as_array().into_iter().flatten().collect();
    let enabled: Vec<_> = all.iter().filter(|queue| queue["enabled"] == true).collect();
    let running = all.iter().filter(|queue| queue["running"] == true).count();
    let mut sizes: Vec<_> = enabled.iter().filter_map(|queue| queue["size"].as_u64()).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let sizes = sizes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
    let packed = session["features"].as_array().is_some_and(|features| features.contains(&"RING_PACKED".into()));
    let format = if packed { "packed" } else { "split" };
    let vectors: Vec<_> =
        enabled.iter().filter_map(|queue| queue["vector"].as_u64()).map(|vector| vector.to_string()).collect();
    let interrupts = match vectors.is_empty() {
        true => word(&session["interrupts"]),
        false => format!("{} vectors {}", word(&session["interrupts"]), vectors.join(", ")),
    };
    match enabled.len() {
        0 => format!("none of {} enabled", patient["setup"]["num_queues"]),
        number => {
            format!("{number} of {} enabled, {running} served; {sizes} entries, {format}; {interrupts}", all.len())
        }
    }
}

fn memory(memory: &Value) -> String {
    let size = |value: &Value| Size(value.as_u64().unwrap_or(0)).to_string();
    let files = memory["files"].as_array().into_iter().flatten().map(|file| {
        let writable = if file["writable"] == true { "" } else { ", read-only" };
        format!("{} {} with pages of {}{writable}", size(&file["bytes"]), word(&file["kind"]), size(&file["page_size"]))
    });
    let files = files.collect::<Vec<_>>().join("; ");
    let shared = match (files.is_empty(), memory["found_blank"] == true) {
        (true, _) => "none shared".to_owned(),
        (false, true) => format!("{files}; NOT SHARED"),
        (false, false) => format!("shared: {files}"),
    };
    format!("{} ranges, {}; {shared}", memory["ranges"], size(&memory["bytes"]))
}

fn kicks(session: &Value, patient: &Value) -> String {
    let (kicks, setup) = (&session["kicks"], &patient["setup"]);
    let mapped = if kicks["mapped_page"] == true { ", or to a mapped page" } else { "" };
    format!(
        "{} by message ({} of them posted), {} by {} eventfds{mapped}; poll is {}",
        kicks["by_message"],
        kicks["posted"],
        kicks["by_eventfd"],
        kicks["eventfds"],
        word(&setup["poll"])
    )
}

fn requests(statistics: &Value) -> String {
    let number = |key: &str| statistics[key].as_u64().unwrap_or(0);
    let all: u64 = ["reads", "writes", "flushes", "discards", "write_zeroes", "other"].map(number).iter().sum();
    let each = |count: u64| if all == 0 { "-".to_owned() } else { format!("{:.2}", count as f64 / all as f64) };
    let (found, vain) = (number("polls_with_work"), number("polls_in_vain"));
    let hits = match found + vain {
        0 => "-".to_owned(),
        polls => format!("{:.1} %", found as f64 / polls as f64 * 100.0),
    };
    format!(
        "{all} ({} in flight, {} failed); each with {} kicks, {} interrupts sent and {} suppressed; polls that found work: {hits}",
        number("in_flight"),
        number("io_errors"),
        each(number("kicks")),
        each(number("interrupts_sent")),
        each(number("interrupts_suppressed")),
    )
}

fn list(words: &Value) -> String {
    let words: Vec<_> = words.as_array().into_iter().flatten().map(word).collect();
    if words.is_empty() { "-".to_owned() } else { words.join(" ") }
}

/// A word of the server's, with nothing in it that a terminal would obey.
fn word(value: &Value) -> String {
    value
        .as_str()
        .unwrap_or_default()
        .chars()
        .flat_map(|char| match char.is_control() {
            true => char.escape_default().collect::<Vec<_>>(),
            false => vec![char],
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patient_without_a_client_has_little_to_tell() {
        let patient = json!({
            "device": "vm1\u{1b}[2J", "description": "memory", "client": null, "session": null,
            "setup": { "poll": "adaptive", "num_queues": 4 }, "statistics": {}, "stages": [], "findings": [],
        });
        let text = tell(&patient);
        assert!(text.starts_with("vm1\\u{1b}[2J: memory\n  client     none\n"), "{text}");
        assert!(text.ends_with("  all is well\n"), "{text}");
    }

    #[test]
    fn findings_come_with_what_to_do() {
        let patient = json!({
            "findings": [
                { "level": "warning", "code": "paused", "what": "it is paused", "next": "resume it" },
                { "level": "catastrophe", "code": "x", "what": "from a newer server", "next": "" },
            ],
        });
        let text = tell(&patient);
        assert!(text.contains("  WARNING: it is paused\n    -> resume it\n"), "{text}");
        assert_eq!(findings(&patient).len(), 1);
    }
}
