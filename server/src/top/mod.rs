//! `vfio-user-blk top`: what the devices of a running server are doing, from its control socket.
//!
//! The server tells counters and the time by its own clock; two such [`Snapshot`]s make the rates of [`rates`], which [`table`]
//! puts into columns, for a file or for the terminal that [`screen`] draws on.

mod rates;
mod screen;
mod table;

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vfio_user_blk::config::TopArgs;
use vfio_user_blk::control::{ControlClient, Snapshot};

pub(crate) use table::time;

use crate::{ctl, exit};

/// How long the server may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a signal may wait until it is seen.
const NAP: Duration = Duration::from_millis(100);

/// Shows it, as the arguments say, until it is told to end.
pub(crate) fn run(arguments: &TopArgs) -> Result<()> {
    let in_terminal = !(arguments.once || arguments.batch);
    if in_terminal && !(io::stdout().is_terminal() && io::stdin().is_terminal()) {
        return Err(exit::UsageError("there is no terminal; use --once or --batch").into());
    }
    // Before anything is changed that a signal would leave so.
    let ended = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&ended)).context("cannot handle signals")?;
    }
    let mut server = ctl::connect(&arguments.socket)?;
    server.set_timeout(PATIENCE)?;
    if in_terminal {
        return screen::run(&mut server, arguments, &ended);
    }
    let mut before = look(&mut server)?;
    loop {
        let until = Instant::now() + arguments.interval;
        while Instant::now() < until {
            if ended.load(Ordering::Relaxed) {
                return Ok(());
            }
            std::thread::sleep(NAP.min(until.saturating_duration_since(Instant::now())));
        }
        let now = look(&mut server)?;
        let text = table::text(&rates::rows(&before, &now, arguments.sort, arguments.queues));
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("cannot write to standard output")?;
        if arguments.once {
            return Ok(());
        }
        before = now;
    }
}

fn look(server: &mut ControlClient) -> Result<Snapshot> {
    let told = server.call("server.statistics", &json!({}))?;
    serde_json::from_value(told)
        .context("the server tells its statistics in another way; use the vfio-user-blk that it is of")
}
