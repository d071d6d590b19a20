//! What a terminal shows while a server is at work.

use std::io::{self, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vfio_user_blk::config::Size;
use vfio_user_blk::control::{CallError, ControlClient};

use super::percent;

/// How often what is shown is made anew.
const INTERVAL: Duration = Duration::from_millis(250);
/// What takes no longer is not spoken of.
const SHORT: Duration = Duration::from_secs(1);
/// To the first column, and nothing on the line any more.
const CLEAR: &str = "\r\x1b[K";

/// Calls a method, and shows on `terminal` how far the server is until it answers. What it shows is gone then.
///
/// # Errors
/// Those of the call.
pub(super) fn call(
    server: &mut ControlClient,
    socket: &Path,
    (method, params): (&str, &Value),
    terminal: &mut (dyn Write + Send),
) -> Result<Value, CallError> {
    let (over, is_over) = channel();
    let device = params.get("device").filter(|_| method == "device.commit");
    // An operator of its own: the first one waits.
    let asking = device.and_then(|device| Some((ControlClient::connect(socket).ok()?, device)));
    thread::scope(|scope| {
        scope.spawn(move || {
            // A terminal that has gone does not matter to what is done.
            let _gone = show(asking, &is_over, terminal);
        });
        let result = server.call(method, params);
        drop(over);
        result
    })
}

fn show(
    mut asking: Option<(ControlClient, &Value)>,
    is_over: &Receiver<()>,
    terminal: &mut (dyn Write + Send),
) -> io::Result<()> {
    let (begun, mut shown) = (Instant::now(), false);
    while is_over.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
        let progress = asking.as_mut().map(|(server, device)| {
            server.call("device.progress", &json!({ "device": device })).map(|result| result["commit"].clone())
        });
        let progress = match progress {
            Some(Ok(progress)) => progress,
            // A server that knows of no progress, or has other things to do.
            Some(Err(_)) => {
                asking = None;
                Value::Null
            }
            None => Value::Null,
        };
        if !progress.is_null() || begun.elapsed() >= SHORT {
            write!(terminal, "{CLEAR}{}", line(&progress, begun.elapsed()))?;
            terminal.flush()?;
            shown = true;
        }
    }
    if shown {
        write!(terminal, "{CLEAR}")?;
        terminal.flush()?;
    }
    Ok(())
}

/// How far it is, in less than a line.
fn line(progress: &Value, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs();
    match (progress["size"].as_u64(), progress["written"].as_u64()) {
        (Some(size), Some(written)) => {
            format!("{:3} % of {}, {} MiB written, {seconds} s", percent(progress), Size(size), written >> 20)
        }
        _ => format!("the server is at it, {seconds} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_it_is() {
        let progress = json!({ "looked_at": 3u64 << 29, "size": 2u64 << 30, "written": 700u64 << 20 });
        assert_eq!(line(&progress, Duration::from_secs(9)), " 75 % of 2 GiB, 700 MiB written, 9 s");
        assert_eq!(line(&Value::Null, Duration::from_millis(1900)), "the server is at it, 1 s");
        assert!(line(&json!({ "looked_at": u64::MAX, "size": 0, "written": 0 }), Duration::ZERO).contains('%'));
    }
}
