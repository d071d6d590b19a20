//! `vfio-user-blk ctl`: an operator's words to a running server, and its answers as people read them.

mod faults;
mod waiting;

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use vfio_user_blk::config::{
    CtlArgs, CtlCommand, DeviceArgs, DeviceConfig, DiscardArgs, FabricChoice, PowerCutArgs, RateLimits, RemoveArgs,
    ResizeArgs, SetFabricArgs, SetLimitsArgs, Size,
};
use vfio_user_blk::control::ControlClient;

/// Does it, and prints what came of it.
pub(crate) fn run(arguments: &CtlArgs) -> Result<()> {
    let mut server = connect(&arguments.socket)?;
    let (method, params) = call(&arguments.command)?;
    let result = if arguments.json || !io::stderr().is_terminal() {
        server.call(method, &params)?
    } else {
        waiting::call(&mut server, &arguments.socket, (method, &params), &mut io::stderr())?
    };
    let text = if arguments.json { format!("{result:#}\n") } else { tell(&arguments.command, &result) };
    io::stdout().lock().write_all(text.as_bytes()).context("cannot write to standard output")
}

/// Connects to a server's control socket.
pub(crate) fn connect(socket: &Path) -> Result<ControlClient> {
    ControlClient::connect(socket).with_context(|| {
        let socket = socket.display();
        format!("{socket}: no server answers there; start one with --control-socket, or name its socket with --socket")
    })
}

/// The method, and its parameters.
fn call(command: &CtlCommand) -> Result<(&'static str, Value)> {
    let of = |DeviceArgs { device }: &DeviceArgs| json!({ "device": device });
    Ok(match command {
        CtlCommand::List => ("device.list", json!({})),
        CtlCommand::Add(device) => ("device.add", serde_json::to_value(from_root(device)?)?),
        CtlCommand::Remove(RemoveArgs { device, force }) => {
            ("device.remove", json!({ "device": device, "force": force }))
        }
        CtlCommand::Resize(ResizeArgs { device, size, shrink }) => {
            ("device.resize", json!({ "device": device, "size": size, "shrink": shrink }))
        }
        CtlCommand::Pause(device) => ("device.pause", of(device)),
        CtlCommand::Resume(device) => ("device.resume", of(device)),
        CtlCommand::Drain(device) => ("device.drain", of(device)),
        CtlCommand::Commit(device) => ("device.commit", of(device)),
        CtlCommand::Discard(DiscardArgs { device, force }) => {
            ("device.discard", json!({ "device": device, "force": force }))
        }
        CtlCommand::Statistics(device) => ("device.statistics", of(device)),
        CtlCommand::ResetStatistics(device) => ("device.reset_statistics", of(device)),
        CtlCommand::SetLimits(SetLimitsArgs { device, limits }) => {
            ("device.set_limits", json!({ "device": device, "limits": limits }))
        }
        CtlCommand::SetFabric(SetFabricArgs { device, fabric }) => {
            ("device.set_fabric", json!({ "device": device, "fabric": fabric }))
        }
        CtlCommand::PowerCut(PowerCutArgs { device, mode, seed }) => {
            ("device.power_cut", json!({ "device": device, "mode": mode, "seed": seed }))
        }
        CtlCommand::Fault(fault) => faults::call(&fault.command),
        CtlCommand::Stop => ("server.stop", json!({})),
        CtlCommand::Version => ("version", json!({})),
    })
}

/// The device with its paths from the root: the server may be in another folder.
fn from_root(device: &DeviceConfig) -> Result<DeviceConfig> {
    let absolute = |path: &Path| -> Result<PathBuf> {
        std::path::absolute(path).with_context(|| format!("{}: it has no way from the root", path.display()))
    };
    let mut device = device.clone();
    device.socket_path = absolute(&device.socket_path)?;
    for path in [
        &mut device.blk_file,
        &mut device.overlay_of,
        &mut device.overlay_file,
        &mut device.nbd_tls_dir,
        &mut device.nbd_tls_psk_file,
    ] {
        *path = path.as_deref().map(absolute).transpose()?;
    }
    Ok(device)
}

/// What a result says to people.
fn tell(command: &CtlCommand, result: &Value) -> String {
    let name = text(&result["device"]);
    let size = || Size(result["size"].as_u64().unwrap_or(0));
    match command {
        CtlCommand::List => table(&result["devices"]),
        CtlCommand::Add(_) => {
            let device = &result["device"];
            let (name, path) = (text(&device["name"]), text(&device["socket_path"]));
            format!("{name}: {}; it listens on {path}\n", text(&device["description"]))
        }
        CtlCommand::Remove(_) if result["flushed"] == true => format!("{name}: removed\n"),
        CtlCommand::Remove(_) => format!("{name}: removed, but its storage is still at work; see the server's log\n"),
        CtlCommand::Resize(_) => format!("{name}: {}\n", size()),
        CtlCommand::Pause(_) => format!("{name}: paused; vfio-user-blk ctl resume {name} has it go on\n"),
        CtlCommand::Resume(_) => match result["sent_again"].as_u64() {
            None | Some(0) => format!("{name}: takes requests\n"),
            Some(again) => format!(
                "{name}: takes requests; {again} that had failed are sent again: vfio-user-blk ctl list shows what fails once more\n"
            ),
        },
        CtlCommand::PowerCut(_) => survivors(name, result),
        CtlCommand::Drain(_) => {
            format!("{name}: paused, and all that it has completed is on stable storage; resume it when you are done\n")
        }
        CtlCommand::Commit(_) => {
            let of = |key: &str| Size(result[key].as_u64().unwrap_or(0));
            let seconds = result["seconds"].as_f64().unwrap_or(0.0);
            format!(
                "{name}: {} written into its base, {} made zero there, in {seconds:.1} s\n",
                of("written"),
                of("zeroed")
            )
        }
        CtlCommand::Discard(_) => {
            format!("{name}: is its base again; {} freed\n", Size(result["freed"].as_u64().unwrap_or(0)))
        }
        CtlCommand::Statistics(_) => statistics(&result["queues"]),
        CtlCommand::ResetStatistics(_) => format!("{name}: counts anew\n"),
        CtlCommand::SetLimits(_) | CtlCommand::SetFabric(_) => format!("{name}: {}\n", layers(result)),
        CtlCommand::Fault(fault) => faults::tell(&fault.command, result),
        CtlCommand::Stop => "the server stops\n".to_owned(),
        CtlCommand::Version => {
            format!("vfio-user-blk {}, control socket {}\n", text(&result["server"]), result["control"])
        }
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// What lies before a device's store, if anything does.
fn layers(device: &Value) -> String {
    let limits = serde_json::from_value::<Option<RateLimits>>(device["limits"].clone()).ok().flatten();
    let fabric = serde_json::from_value::<Option<FabricChoice>>(device["fabric"].clone()).ok().flatten();
    let limits = limits.map(|limits| format!("limits {limits}"));
    let all: Vec<_> = limits.into_iter().chain(fabric.map(|fabric| format!("fabric {fabric}"))).collect();
    if all.is_empty() { "no limits, no fabric".to_owned() } else { all.join("; ") }
}

/// A row for each counter, a column for each queue.
fn statistics(queues: &Value) -> String {
    let queues: Vec<_> = queues.as_array().into_iter().flatten().collect();
    let mut rows =
        vec![["".to_owned()].into_iter().chain((0..queues.len()).map(|queue| format!("QUEUE {queue}"))).collect()];
    for key in queues.first().and_then(|queue| queue.as_object()).into_iter().flat_map(|queue| queue.keys()) {
        let values = queues.iter().filter_map(|queue| queue.get(key)).map(Value::to_string);
        rows.push([key.replace('_', " ")].into_iter().chain(values).collect());
    }
    aligned(&rows)
}

/// What a power cut has left.
fn survivors(name: &str, result: &Value) -> String {
    let (unflushed, whole) = (&result["unflushed"], &result["whole"]);
    let torn = match &result["torn_sectors"] {
        Value::Null => String::new(),
        sectors => format!(", and {sectors} sectors of the next"),
    };
    format!(
        "{name}: its power was cut: of {unflushed} writes that were not flushed {whole} survive{torn}; \
         start its machine anew\n"
    )
}

fn table(devices: &Value) -> String {
    let mut rows = vec![["DEVICE", "SIZE", "QUEUES", "STATE", "CLIENT", "WHAT"].map(str::to_owned).to_vec()];
    for device in devices.as_array().into_iter().flatten() {
        let held = &device["held"];
        let commit = &device["commit"];
        let state = match (device["paused"] == true, device["client"].is_null()) {
            _ if commit.is_object() => format!("committed to {} %", percent(commit)),
            _ if held["error"].is_string() => format!("holds {}: {}", held["requests"], text(&held["error"])),
            (true, _) => "paused".to_owned(),
            (false, true) => "waits".to_owned(),
            (false, false) => "in use".to_owned(),
        };
        let client = match &device["client"] {
            Value::Null => "-".to_owned(),
            peer => format!("process {}, user {}", peer["pid"], peer["uid"]),
        };
        let read_only = if device["read_only"] == true { " (read-only)" } else { "" };
        rows.push(vec![
            text(&device["name"]).to_owned(),
            Size(device["size"].as_u64().unwrap_or(0)).to_string(),
            device["num_queues"].to_string(),
            format!("{state}{read_only}"),
            client,
            match device["limits"].is_null() && device["fabric"].is_null() {
                true => text(&device["description"]).to_owned(),
                false => format!("{}; {}", text(&device["description"]), layers(device)),
            },
        ]);
    }
    aligned(&rows)
}

/// How much of a commit is done.
fn percent(commit: &Value) -> u128 {
    let number = |key: &str| u128::from(commit[key].as_u64().unwrap_or(0));
    number("looked_at") * 100 / number("size").max(1)
}

/// Rows of cells, in columns as wide as they have to be.
pub(crate) fn aligned(rows: &[Vec<String>]) -> String {
    let mut widths = Vec::new();
    for row in rows {
        widths.resize(widths.len().max(row.len()), 0);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_row_for_each_device() {
        let devices = json!([
            { "name": "root", "size": 1 << 30, "num_queues": 4, "paused": false, "read_only": false,
              "client": { "pid": 12, "uid": 107 }, "description": "root.img" },
            { "name": "/run/vfio-user-blk/data.sock", "size": 512, "num_queues": 1, "paused": true, "read_only": true,
              "client": null, "description": "memory", "limits": { "iops": 100 },
              "fabric": { "round_trip": "1ms" } },
            { "name": "c", "size": 512, "num_queues": 1, "paused": true, "read_only": false, "client": null,
              "description": "overlay", "commit": { "looked_at": 256, "size": 512, "written": 0 } },
        ]);
        let table = table(&devices);
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[3].contains("committed to 50 %"), "{table}");
        assert!(lines[1].starts_with("root                          1 GiB      4       in use"), "{table}");
        assert!(lines[1].ends_with("process 12, user 107  root.img"), "{table}");
        assert!(lines[2].ends_with("memory; limits iops=100; fabric round_trip=1ms"), "{table}");
        assert!(lines[2].contains("512 bytes  1       paused (read-only)  -"), "{table}");
    }

    #[test]
    fn a_description_arrives_as_it_was_given() {
        let mut device = DeviceConfig::new("/run/a.sock");
        device.size = Some(Size(1 << 20));
        device.queue_workers = Some("1,0".parse().unwrap());
        device.socket_mode = Some("0660".parse().unwrap());
        device.poll = Some(vfio_user_blk::config::PollPolicy::Never);
        let (_, params) = call(&CtlCommand::Add(device.clone())).unwrap();
        assert_eq!(serde_json::from_value::<DeviceConfig>(params).unwrap(), device);
        let relative = from_root(&DeviceConfig::new("a.sock")).unwrap();
        assert!(relative.socket_path.is_absolute() && relative.socket_path.ends_with("a.sock"));
    }
}
