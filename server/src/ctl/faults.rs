//! `vfio-user-blk ctl fault`.

use serde_json::{Value, json};
use vfio_user_blk::config::{
    AddFaultArgs, DeviceArgs, FaultCommand, ReleaseFaultArgs, RemoveFaultArgs, TriggerFaultArgs,
};

use super::{aligned, text};

/// The method, and its parameters.
pub(super) fn call(command: &FaultCommand) -> (&'static str, Value) {
    match command {
        FaultCommand::Add(AddFaultArgs { device, rule }) => {
            ("device.fault.add", json!({ "device": device, "rule": rule }))
        }
        FaultCommand::List(DeviceArgs { device }) => ("device.fault.list", json!({ "device": device })),
        FaultCommand::Remove(RemoveFaultArgs { device, id, all }) => {
            ("device.fault.remove", json!({ "device": device, "id": id, "all": all }))
        }
        FaultCommand::Release(ReleaseFaultArgs { device, id }) => {
            ("device.fault.release", json!({ "device": device, "id": id }))
        }
        FaultCommand::Trigger(TriggerFaultArgs { device, what, queue }) => {
            ("device.fault.trigger", json!({ "device": device, "what": what, "queue": queue }))
        }
    }
}

/// What a result says to people.
pub(super) fn tell(command: &FaultCommand, result: &Value) -> String {
    let name = text(&result["device"]);
    match command {
        FaultCommand::Add(_) => {
            let id = &result["id"];
            format!("{name}: fault {id}; vfio-user-blk ctl fault remove {name} {id} ends it\n")
        }
        FaultCommand::List(_) => table(&result["faults"]),
        FaultCommand::Remove(_) => format!("{name}: removed {}\n", numbers(&result["removed"])),
        FaultCommand::Trigger(_) => format!("{name}: {}\n", text(&result["what"])),
        FaultCommand::Release(_) => format!("{name}: released {}\n", numbers(&result["released"])),
    }
}

fn numbers(numbers: &Value) -> String {
    let numbers: Vec<_> = numbers.as_array().into_iter().flatten().map(Value::to_string).collect();
    if numbers.is_empty() { "nothing".to_owned() } else { format!("fault {}", numbers.join(", ")) }
}

fn table(faults: &Value) -> String {
    let mut rows = vec![["ID", "FAULT", "CONCERNED", "STRUCK", "WHAT"].map(str::to_owned).to_vec()];
    for fault in faults.as_array().into_iter().flatten() {
        let words = fault["rule"].as_object().into_iter().flatten().filter(|(key, _)| *key != "fault");
        let words = words.map(|(key, value)| format!("{key} {}", word(value)));
        rows.push(vec![
            fault["id"].to_string(),
            text(&fault["rule"]["fault"]).to_owned(),
            fault["concerned"].to_string(),
            fault["struck"].to_string(),
            words.collect::<Vec<_>>().join(", "),
        ]);
    }
    aligned(&rows)
}

/// A value as the command line takes it.
fn word(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(words) => words.iter().map(text).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use vfio_user_blk::config::{Cli, Command, CtlCommand, FaultConfig};

    use super::*;

    #[test]
    fn a_fault_arrives_as_it_was_given_and_is_shown_so() {
        let line = "vfio-user-blk ctl fault add root latency --latency 1ms-5ms --on read,flush --sectors 8-15 --every 1000 \
                    --burst 10 --queue 2";
        let Command::Ctl(ctl) = Cli::parse_from(line.split_whitespace()).command else { panic!() };
        let CtlCommand::Fault(fault) = ctl.command else { panic!() };
        let (method, params) = call(&fault.command);
        assert_eq!((method, &params["device"]), ("device.fault.add", &json!("root")));
        let rule: FaultConfig = serde_json::from_value(params["rule"].clone()).unwrap();
        assert_eq!(rule.check(3), Ok(()));
        let told = table(&json!([{ "id": 7, "rule": rule, "concerned": 2000, "struck": 20 }]));
        let row = told.lines().nth(1).unwrap();
        assert!(row.starts_with("7   latency  2000       20      "), "{told}");
        for word in ["latency 1000us-5000us", "on read,flush", "sectors 8-15", "every 1000", "burst 10", "queue 2"] {
            assert!(row.contains(word), "{told}");
        }
    }

    #[test]
    fn all_are_removed_only_if_that_is_said() {
        for (words, whether) in [("root", false), ("root 3", true), ("root --all", true), ("root 3 --all", false)] {
            let line = format!("vfio-user-blk ctl fault remove {words}");
            assert_eq!(Cli::try_parse_from(line.split_whitespace()).is_ok(), whether, "{words}");
        }
    }
}
