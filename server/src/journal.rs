//! The log: lines for people, or for systemd's journal, which takes a priority before each (sd-daemon(3)).

use std::env;
use std::io::Write;

use log::Level;
use nix::sys::stat::fstat;

/// Where the log goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Log {
    /// To a terminal, a file, a pipe.
    People,
    /// To the journal, which knows the time and the program by itself.
    Journal,
}

impl Log {
    /// Starts it, as `RUST_LOG` says.
    pub(crate) fn start() -> Self {
        let log = if is_journal(env::var("JOURNAL_STREAM").ok().as_deref()) { Self::Journal } else { Self::People };
        let mut logger = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"));
        if log == Self::Journal {
            logger.format(|out, record| {
                out.write_all(lines(record.level(), &format!("{}: {}", record.target(), record.args())).as_bytes())
            });
        }
        logger.init();
        log
    }

    /// Says why the program ends.
    pub(crate) fn end(self, why: &str) {
        match self {
            Self::People => eprintln!("vfio-user-blk: {why}"),
            Self::Journal => eprint!("{}", lines(Level::Error, why)),
        }
    }
}

/// Whether standard error is the stream that systemd has made: it may have been sent elsewhere since.
fn is_journal(stream: Option<&str>) -> bool {
    let Some((device, inode)) = stream.and_then(|stream| stream.split_once(':')) else { return false };
    fstat(std::io::stderr()).is_ok_and(|about| {
        device.parse().is_ok_and(|device: u64| device == about.st_dev)
            && inode.parse().is_ok_and(|inode: u64| inode == about.st_ino)
    })
}

/// Each line with its priority, those of syslog(3).
fn lines(level: Level, text: &str) -> String {
    let priority = match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    text.lines().map(|line| format!("<{priority}>{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_has_its_priority() {
        assert_eq!(lines(Level::Error, "one\ntwo"), "<3>one\n<3>two\n");
        assert_eq!(
            [Level::Warn, Level::Info, Level::Trace].map(|level| lines(level, "a")),
            ["<4>a\n", "<6>a\n", "<7>a\n"]
        );
    }

    #[test]
    fn another_stream_is_no_journal() {
        assert!([None, Some(""), Some("1"), Some("a:b"), Some("0:0")].iter().all(|stream| !is_journal(*stream)));
        let here = fstat(std::io::stderr()).unwrap();
        assert!(is_journal(Some(&format!("{}:{}", here.st_dev, here.st_ino))));
    }
}
